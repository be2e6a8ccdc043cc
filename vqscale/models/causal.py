"""The blocks of a two-stack PixelCNN, each followed by its cached twin, which sampling runs one code at a time.

In: the vertical stream (row i knows the codes of all rows above i), the horizontal stream (position (i, j) knows the
codes before (i, j) in raster order), a class embedding, conditioning features, dropout keys.  Out: the two streams.

Activations are [b, i, j, c] with channels last, so a 1x1 convolution is a Linear. The shift that makes the model causal
is done once, on the input (`shift_down`, `shift_right`). After it every kernel may look at its own position, so no tap
is masked and none is stored for nothing: k // 2 + 1 rows of k taps above, and k // 2 + 1 taps to the left.

A cached twin keeps whatever later codes need, and its `step` updates the stream x [b, c] of one position in place. Its
products are split otherwise than the block's, so the two agree to rounding. Weights are rearranged once for a model
(`…Weights`), memory is taken once for a batch size, and what depends on the row is copied to fixed places: the same
code runs on a CPU and, replayed, on a GPU.

Legend: b batch, i rows, j columns, c hidden, r residual, d class, e conditioning, k filter, q = k // 2, w columns of a
row, t positions in raster order, s slices of a product's outputs, n heads.
"""

import functools
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vqscale.models.dropout import Dropout
from vqscale.models.init import with_init_scale

Stream = Float[Tensor, "b i j c"]
Key = Int[Tensor, " b"]

log = logging.getLogger("vqscale")
_ALIGNMENT = 8  # numbers that attention kernels read at once


def branch_end(inputs: int, outputs: int) -> nn.Linear:
    """The last layer of a residual branch: starts at zero, so that every block starts as the identity."""
    return with_init_scale(nn.Linear(inputs, outputs, bias=False), 0.0)


def shift_down(x: Stream) -> Stream:
    """Row i of the result is row i - 1 of x; the first row is zero."""
    return F.pad(x, (0, 0, 0, 0, 1, 0))[:, :-1]


def shift_right(x: Stream) -> Stream:
    """Column j of the result is column j - 1 of x; the first column is zero."""
    return F.pad(x, (0, 0, 1, 0))[:, :, :-1]


def normalise(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Layer norm over channels without gain or bias: the product that follows has both."""
    return F.layer_norm(x, x.shape[-1:])


def gate(x: Float[Tensor, "*shape two_r"]) -> Float[Tensor, "*shape two_r//2"]:
    """tanh(first half) * sigmoid(second half). van den Oord et al. 2016b, equation 2."""
    signal, opening = x.chunk(2, dim=-1)
    return torch.tanh(signal) * torch.sigmoid(opening)


def convolve(conv: nn.Conv2d, x: Stream, padding: tuple[int, int, int, int]) -> Float[Tensor, "b u v r"]:
    """`conv` over x, zero-padded by (left, right, top, bottom)."""
    x = F.pad(x, (0, 0, *padding))
    return rearrange(conv(rearrange(x, "b i j c -> b c i j")), "b c i j -> b i j c").contiguous()


class CheckpointableBlock(nn.Module):
    """A block that can recompute its activations in backward instead of keeping them; subclasses have `compute`.

    The composable form of checkpointing: parameter names do not change, and there is no generator state to restore
    because dropout is a function of its key.
    """

    activation_checkpointing = False
    compute: Callable[..., Any]

    def forward(self, *inputs: Any) -> Any:
        """`compute(*inputs)`."""
        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(self.compute, *inputs, use_reentrant=False, preserve_rng_state=False)
        return self.compute(*inputs)


class CachedBlock:
    """A block for the samples of one batch, one code at a time. Its memory is taken once, and each new batch of the
    same size reuses it."""

    buffers: Sequence[Tensor] = ()  # what it keeps

    def begin_row(self, row: int) -> None:
        """Before the first code of a row: copy what depends on the row to where `step` reads it."""

    def step(self, x: Float[Tensor, "b c"], column: int) -> None:
        """Update the stream of one position of the row in place. Columns come in order. Nothing here depends on the
        row but through memory, so that a GPU can replay it."""
        raise NotImplementedError

    def end_row(self, row: int) -> None:
        """After its last code: keep what later rows need."""


def on_cpu(tensor: Tensor) -> bool:
    """Whether per-code products are laid out for a CPU."""
    return tensor.device.type == "cpu"


def fused(function: Callable[..., None]) -> Callable[..., None]:
    """`function` of tensors, compiled into one kernel on a GPU, where its operations are too small to be worth several.
    If that fails, it runs operation by operation, and the log says so once."""
    compiled: Callable[[], Callable[..., None]] = functools.cache(lambda: torch.compile(function))
    failed = False

    @functools.wraps(function)
    def run(*tensors: Tensor) -> None:
        nonlocal failed
        if failed or on_cpu(tensors[0]):
            return function(*tensors)
        try:
            return compiled()(*tensors)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            log.warning("sampling goes on with plain kernels, which is slower: %s", str(error).splitlines()[0])
            failed = True
        return function(*tensors)

    return run


@fused
def normalise_into(out: Float[Tensor, "b c"], x: Float[Tensor, "b c"]) -> None:
    """out = `normalise(x)`."""
    out.copy_(normalise(x))


@fused
def gate_into(out: Tensor, signal: Tensor, opening: Tensor) -> None:
    """out = `gate` of the two halves. On a CPU they are used up."""
    if on_cpu(out):
        torch.mul(signal.tanh_(), opening.sigmoid_(), out=out)
    else:
        out.copy_(torch.tanh(signal) * torch.sigmoid(opening))


def num_slices(layer: nn.Linear | nn.Conv2d, outputs: int) -> int:
    """Into how many slices the outputs of a per-code product are cut: an even number that divides `outputs`.

    On a CPU a product of 8 or 32 rows is bound by reading its weights; as a batch of narrow products over the same rows
    it ran up to twice as fast as one `addmm` (MKL hands whole products to threads). Elsewhere two, for a gate's halves.
    """
    if not on_cpu(layer.weight):
        return 2
    return next(n for n in (16, 8, 4, 2) if n == 2 or outputs % n == 0 and outputs >= 64 * n)


class SlicedLinear:
    """A linear layer whose outputs are cut into slices, each a matrix of its own."""

    def __init__(self, layer: nn.Linear, slices: int, dtype: torch.dtype):
        self.slices, self.narrow = slices, on_cpu(layer.weight)
        weight, bias = layer.weight.to(dtype), layer.bias.to(dtype)
        self.weight = rearrange(weight, "(s r) c -> s r c", s=slices).transpose(1, 2) if self.narrow else weight.t()
        self.bias = rearrange(bias, "(s r) -> s 1 r", s=slices) if self.narrow else bias

    def __call__(self, x: Float[Tensor, "b c"]) -> Float[Tensor, "s b r"]:
        if self.narrow:
            return torch.baddbmm(self.bias, x.expand(self.slices, -1, -1), self.weight)
        return torch.addmm(self.bias, x, self.weight).unflatten(1, (self.slices, -1)).transpose(0, 1)


class CachedLinear:
    """A linear layer in the arithmetic of the cached twins."""

    def __init__(self, layer: nn.Linear, dtype: torch.dtype):
        self.weight, self.bias = layer.weight.to(dtype).t(), layer.bias.to(dtype)

    def __call__(self, x: Float[Tensor, "b c"]) -> Float[Tensor, "b r"]:
        return torch.addmm(self.bias, x, self.weight)


# --- gated convolutions -----------------------------------------------------------------------------------------------


class GatedBlock(CheckpointableBlock):
    """One layer of the two stacks: conditional gated convolutions with residual connections.

    van den Oord et al. 2016b ("Conditional image generation with PixelCNN decoders"), figure 2 and equations 3 and 4:
    class and conditioning features enter as biases of every gate.
    """

    def __init__(
        self, hidden: int, residual: int, filter: int, class_dim: int, conditioning: int, dropout: float, layer: int
    ):
        """residual: width of either gate; conditioning: channels of the features, or 0."""
        super().__init__()
        self.reach = filter // 2
        self.vertical = nn.Conv2d(hidden, 2 * residual, (self.reach + 1, filter))
        self.horizontal = nn.Conv2d(hidden, 2 * residual, (1, self.reach + 1))
        self.across = nn.Linear(hidden, 2 * residual, bias=False)  # vertical stream -> horizontal gate
        self.class_bias = nn.Linear(class_dim, 4 * residual, bias=False)  # vertical gate, then horizontal gate
        self.condition = nn.Linear(conditioning, 4 * residual, bias=False) if conditioning else None
        self.vertical_out = branch_end(residual, hidden)
        self.horizontal_out = branch_end(residual, hidden)
        self.vertical_dropout = Dropout(dropout, layer)
        self.horizontal_dropout = Dropout(dropout, layer + 1)

    def compute(
        self,
        vertical: Stream,
        horizontal: Stream,
        label: Float[Tensor, "b d"],
        features: Float[Tensor, "b i j e"] | None,
        key: Key | None,
    ) -> tuple[Stream, Stream]:
        """Both streams, with the class embedding and the features of the levels above."""
        reach = self.reach
        bias = rearrange(self.class_bias(label), "b r -> b 1 1 r")
        if self.condition is not None:
            bias = bias + self.condition(features)
        vertical_bias, horizontal_bias = bias.chunk(2, dim=-1)
        above = convolve(self.vertical, normalise(vertical), (reach, reach, reach, 0)) + vertical_bias
        vertical = vertical + self.vertical_dropout(self.vertical_out(gate(above)), key)
        left = convolve(self.horizontal, normalise(horizontal), (reach, 0, 0, 0)) + horizontal_bias
        left = left + self.across(normalise(vertical))
        horizontal = horizontal + self.horizontal_dropout(self.horizontal_out(gate(left)), key)
        return vertical, horizontal


class GatedWeights:
    """A `GatedBlock`'s weights as its cached twin reads them."""

    def __init__(self, block: GatedBlock, dtype: torch.dtype):
        self.block, self.dtype, taps = block, dtype, block.vertical.weight.to(dtype)  # [2r, c, q + 1, k]
        self.taps = [tap.contiguous().t() for tap in rearrange(taps, "r c i k -> k r (i c)")]
        self.across = block.across.weight.to(dtype).t()
        self.vertical_out = block.vertical_out.weight.to(dtype).t()
        self.horizontal_out = block.horizontal_out.weight.to(dtype).t()
        self.condition = None if block.condition is None else block.condition.weight.to(dtype).t()
        self.slices = num_slices(block.vertical, len(taps))
        window = rearrange(block.horizontal.weight.to(dtype), "(s r) c 1 k -> s r (k c)", s=self.slices)
        self.window = window.contiguous().transpose(1, 2)

    def biases(self, label: Float[Tensor, "b d"]) -> list[Float[Tensor, "b two_r"]]:
        """Of the vertical and the horizontal gates, with the class in them."""
        layers = (self.block.vertical, self.block.horizontal)
        parts = self.block.class_bias(label).chunk(2, dim=-1)
        return [(part + layer.bias).to(self.dtype) for part, layer in zip(parts, layers, strict=True)]


class CachedGatedBlock(CachedBlock):
    """`GatedBlock`: the vertical stack row by row, the horizontal one code by code.

    Per row: the vertical stack (15 of 18 taps at k = 5) as full-size products over all columns and samples, and with it
    all that a horizontal gate adds to its own window: bias, class, conditioning, vertical stream. Per code there remain
    one window product, the gate and one 1x1.
    """

    def __init__(self, weights: GatedWeights, batch: int, width: int):
        gates, hidden, rows, filter = weights.block.vertical.weight.shape
        self.weights, self.reach, self.width, self.hidden = weights, weights.block.reach, width, hidden
        zeros = weights.window.new_zeros
        # rows above and this one, side by side in channels, so that one product takes a column of taps
        self.rows = zeros(width + 2 * self.reach, batch, rows * hidden)
        self.biases = [zeros(batch, gates), zeros(batch, gates)]
        self.vertical_gates = zeros(width * batch, gates)
        self.horizontal_gates = zeros(width, weights.slices, batch, gates // weights.slices)
        self.line = zeros(batch, width + self.reach, hidden)  # this row of the horizontal stream
        self.gated = zeros(batch, gates // 2)
        self.buffers = [self.rows, self.vertical_gates, self.horizontal_gates, self.line, *self.biases]
        self._make_views(filter)

    def reset(self, label: Float[Tensor, "b d"]) -> None:
        """Begin a batch of these classes."""
        self.rows.zero_()
        for bias, value in zip(self.biases, self.weights.biases(label), strict=True):
            bias.copy_(value)

    def _make_views(self, filter: int) -> None:
        """Views made once: slicing costs as much as a small product."""
        half = self.weights.slices // 2
        self.slots = [self.line[:, self.reach + j] for j in range(self.width)]
        self.windows = [self._window(j) for j in range(self.width)]
        self.gates = [(gates, gates[:half], gates[half:]) for gates in self.horizontal_gates]
        self.gated_slices = rearrange(self.gated, "b (s r) -> s b r", s=half)
        self.columns = [self.rows[t : t + self.width].flatten(0, 1) for t in range(filter)]
        self.newest = self.rows[self.reach : self.reach + self.width, :, -self.hidden :]

    def _window(self, j: int) -> Tensor:
        """[s, b, (q + 1) c]: columns j - q ... j of this row, without a copy."""
        batch, length, hidden = self.line.shape
        shape, strides = (self.weights.slices, batch, (self.reach + 1) * hidden), (0, length * hidden, 1)
        return self.line.as_strided(shape, strides, j * hidden)

    def begin_row(self, row: int) -> None:
        """The rows above move up by one; here, so that all that follows may be done twice."""
        self.rows[:, :, : -self.hidden] = self.rows[:, :, self.hidden :].clone()

    def run_row(self, x: Float[Tensor, "wb c"], features: Float[Tensor, "wb e"] | None) -> None:
        """Update the vertical stream of one row in place; keep what this row's horizontal gates add."""
        hidden, width, above, weights = self.hidden, self.width, self.vertical_gates, self.weights
        self.newest.copy_(normalise(x).view(width, -1, hidden))
        above.copy_(self.biases[0].repeat(width, 1))
        left = self.biases[1].repeat(width, 1)
        if weights.condition is not None:
            assert features is not None
            above.addmm_(features, weights.condition[:, : above.shape[1]])
            left.addmm_(features, weights.condition[:, above.shape[1] :])
        for column, tap in zip(self.columns, weights.taps, strict=True):
            above.addmm_(column, tap)
        x.addmm_(gate(above), weights.vertical_out)
        left.addmm_(normalise(x), weights.across)
        self.horizontal_gates.copy_(rearrange(left, "(w b) (s r) -> w s b r", w=width, s=weights.slices))

    def step(self, x: Float[Tensor, "b c"], column: int) -> None:
        normalise_into(self.slots[column], x)
        gates, signal, opening = self.gates[column]
        gates.baddbmm_(self.windows[column], self.weights.window)
        gate_into(self.gated_slices, signal, opening)
        x.addmm_(self.gated, self.weights.horizontal_out)


# --- self-attention ---------------------------------------------------------------------------------------------------


class AttentionBlock(CheckpointableBlock):
    """Causal multi-head self-attention over raster order, with a residual connection (Chen et al. 2018, PixelSNAIL).

    Position (i, j) attends to itself and to all before it; its input already excludes its own code. Positions come with
    the stream. The paper drops attention logits; here the attention's output is dropped, so that SDPA stays fused.
    """

    def __init__(self, hidden: int, heads: int, dropout: float, layer: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.out = branch_end(hidden, hidden)
        self.dropout = Dropout(dropout, layer)

    def compute(self, x: Stream, key: Key | None) -> Stream:
        rows = x.shape[1]
        query, keys, values = rearrange(
            self.qkv(normalise(x)), "b i j (three heads d) -> three b heads (i j) d", three=3, heads=self.heads
        )
        y = F.scaled_dot_product_attention(query, keys, values, is_causal=True)
        return x + self.dropout(self.out(rearrange(y, "b heads (i j) d -> b i j (heads d)", i=rows)), key)


class HeadsWeights:
    """The layers around an attention, as its cached twin reads them."""

    def __init__(self, projection: nn.Linear, out: nn.Linear, heads: int, dtype: torch.dtype):
        """projection: hidden -> one or more of query, key and value, each of all heads."""
        self.heads, self.out = heads, out.weight.to(dtype).t()
        self.project = SlicedLinear(projection, heads * projection.out_features // projection.in_features, dtype)

    def attend(
        self,
        x: Float[Tensor, "b c"],
        query: Float[Tensor, "n b d"],
        keys: Float[Tensor, "n b t d"],
        values: Float[Tensor, "n b t d"],
        mask: Float[Tensor, "1 t"] | None = None,
    ) -> None:
        """Add the attention's output to x."""
        y = F.scaled_dot_product_attention(query[:, :, None], keys, values, mask)
        x.addmm_(y.transpose(0, 1).reshape(x.shape), self.out)  # einops costs more than the product here


class PastAttention(CachedBlock):
    """Keys and values of all positions so far, in memory taken once, and attention to them.

    They stand as [this row, last column first | rows above]: what a column attends to is one slice without a copy. On a
    CPU the slice is just that. Elsewhere it begins at the row's first slot, as kernels want aligned memory, and it
    ends at a quarter of the grid or more, so that few graphs serve all rows; a mask takes away the rest.
    """

    def __init__(self, weights: HeadsWeights, batch: int, grid: tuple[int, int]):
        self.weights, (self.height, self.width) = weights, grid
        example = weights.out
        positions, dim = self.height * self.width, len(example) // weights.heads
        self.keys = example.new_zeros(weights.heads, batch, positions, dim)
        self.values = torch.zeros_like(self.keys)
        self.buffers = [self.keys, self.values]
        self.past = 0  # positions above this row that are attended to
        self.mask: Tensor | None = None  # [w, t], by column
        if not on_cpu(example):
            self.mask = example.new_zeros(self.width, -(-positions // _ALIGNMENT) * _ALIGNMENT)
            slot = torch.arange(self.width, device=example.device)
            self.mask[:, : self.width].masked_fill_(slot < slot.flip(0)[:, None], -math.inf)

    def begin_row(self, row: int) -> None:
        self.past = row * self.width
        if self.mask is not None:
            known = self.width + self.past
            self.mask[:, self.width : known] = 0
            self.mask[:, known:] = -math.inf
            self.past = attended_rows(row, self.height) * self.width

    def attend(self, x: Tensor, column: int, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Keep this column's key and value [n, b, d], then attend to all positions up to it."""
        slot, end = self.width - 1 - column, self.width + self.past
        self.keys[:, :, slot] = key
        self.values[:, :, slot] = value
        mask = None if self.mask is None else self.mask[column : column + 1, :end]
        start = slot if mask is None else 0
        self.weights.attend(x, query, self.keys[:, :, start:end], self.values[:, :, start:end], mask)

    def end_row(self, row: int) -> None:
        if row + 1 < self.height:
            above = slice((row + 1) * self.width, (row + 2) * self.width)
            for kept in self.buffers:
                kept[:, :, above] = kept[:, :, : self.width]


def attended_rows(row: int, height: int) -> int:
    """How many rows above a row are read where the number must not be another for each: in quarters of the grid."""
    quarter = -(-height // 4)
    return min(-(-row // quarter) * quarter, height - 1)


class CachedAttentionBlock(PastAttention):
    """`AttentionBlock`, one code at a time."""

    def step(self, x: Float[Tensor, "b c"], column: int) -> None:
        self.attend(x, column, *self.weights.project(normalise(x)).chunk(3))


# --- 1x1 convolutions -------------------------------------------------------------------------------------------------


class PointwiseBlock(CheckpointableBlock):
    """Residual block of 1x1 convolutions: the output stack."""

    def __init__(self, hidden: int, residual: int, dropout: float, layer: int):
        super().__init__()
        self.up = nn.Linear(hidden, residual)
        self.out = branch_end(residual, hidden)
        self.dropout = Dropout(dropout, layer)

    def compute(self, x: Stream, key: Key | None) -> Stream:
        return x + self.dropout(self.out(F.silu(self.up(normalise(x)))), key)


class CachedPointwiseBlock(CachedBlock):
    """`PointwiseBlock`, one code at a time; it keeps nothing."""

    def __init__(self, block: PointwiseBlock, dtype: torch.dtype):
        self.up, self.out = CachedLinear(block.up, dtype), block.out.weight.to(dtype).t()

    def step(self, x: Float[Tensor, "b c"], column: int) -> None:
        x.addmm_(F.silu(self.up(normalise(x)), inplace=True), self.out)


# --- the levels above -------------------------------------------------------------------------------------------------


class ConditioningBlock(CheckpointableBlock):
    """Residual block of an ordinary (not causal) convolution and a 1x1: the stack over the levels above."""

    def __init__(self, hidden: int, residual: int, filter: int, dropout: float, layer: int):
        super().__init__()
        self.reach = filter // 2
        self.conv = nn.Conv2d(hidden, residual, filter)
        self.out = branch_end(residual, hidden)
        self.dropout = Dropout(dropout, layer)

    def compute(self, x: Stream, key: Key | None) -> Stream:
        y = F.silu(convolve(self.conv, normalise(x), (self.reach,) * 4))
        return x + self.dropout(self.out(y), key)
