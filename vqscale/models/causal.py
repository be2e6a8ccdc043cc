"""The parts of a two-stack PixelCNN. Activations are [b, i, j, c] with channels last, so a 1x1 convolution is a Linear.

In: the vertical stream (row i knows the codes of all rows above i), the horizontal stream (place (i, j) knows the
codes before (i, j) in raster order), a class embedding, conditioning features, dropout keys.  Out: the two streams.

The shift that makes the model causal is done once, on the input (`shift_down`, `shift_right`). After it every kernel
may look at its own place, so no tap is masked and none is stored for nothing: k // 2 + 1 rows of k taps above, and
k // 2 + 1 taps to the left. Legend: b batch, i rows, j columns, c hidden, r residual, d class, e conditioning.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vqscale.models.dropout import Dropout


class BranchEnd(nn.Linear):
    """The last layer of a residual branch: starts at zero, so that every block starts as the identity."""

    init_scale = 0.0

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)


def shift_down(x: Tensor) -> Tensor:
    """[b, i, j, c]: row i of the result is row i - 1 of x; the first row is zero."""
    return F.pad(x, (0, 0, 0, 0, 1, 0))[:, :-1]


def shift_right(x: Tensor) -> Tensor:
    """[b, i, j, c]: column j of the result is column j - 1 of x; the first column is zero."""
    return F.pad(x, (0, 0, 1, 0))[:, :, :-1]


def normalise(x: Tensor) -> Tensor:
    """Layer norm over channels without gain or bias: the product that follows has both."""
    return F.layer_norm(x, x.shape[-1:])


def gate(x: Tensor) -> Tensor:
    """[..., 2r] -> [..., r]: tanh(first half) * sigmoid(second half). van den Oord et al. 2016b, equation 2."""
    signal, opening = x.chunk(2, dim=-1)
    return torch.tanh(signal) * torch.sigmoid(opening)


def convolve(conv: nn.Conv2d, x: Tensor, padding: tuple[int, int, int, int]) -> Tensor:
    """`conv` over [b, i, j, c], zero-padded by (left, right, top, bottom)."""
    x = F.pad(x, (0, 0, *padding))
    return rearrange(conv(rearrange(x, "b i j c -> b c i j")), "b c i j -> b i j c").contiguous()


class Block(nn.Module):
    """A block whose forward can recompute its activations in backward instead of keeping them.

    The composable form of checkpointing: parameter names do not change, and there is no generator state to restore
    because dropout is a function of its key.
    """

    activation_checkpointing = False

    def run(self, function: Callable[..., Any], *inputs: Tensor | None) -> Any:
        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
        return function(*inputs)


class GatedBlock(Block):
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
        self.vertical_out = BranchEnd(residual, hidden)
        self.horizontal_out = BranchEnd(residual, hidden)
        self.vertical_dropout = Dropout(dropout, layer)
        self.horizontal_dropout = Dropout(dropout, layer + 1)

    def forward(
        self, vertical: Tensor, horizontal: Tensor, label: Tensor, features: Tensor | None, key: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Streams [b, i, j, c], label embedding [b, d], features [b, i, j, e] or None, key int64 [b] or None."""
        return self.run(self._forward, vertical, horizontal, label, features, key)

    def _forward(
        self, vertical: Tensor, horizontal: Tensor, label: Tensor, features: Tensor | None, key: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        reach = self.reach
        bias = rearrange(self.class_bias(label), "b r -> b 1 1 r")
        if self.condition is not None:
            bias = bias + self.condition(features)
        down, right = bias.chunk(2, dim=-1)
        above = convolve(self.vertical, normalise(vertical), (reach, reach, reach, 0)) + down
        vertical = vertical + self.vertical_dropout(self.vertical_out(gate(above)), key)
        left = convolve(self.horizontal, normalise(horizontal), (reach, 0, 0, 0)) + right
        left = left + self.across(normalise(vertical))
        horizontal = horizontal + self.horizontal_dropout(self.horizontal_out(gate(left)), key)
        return vertical, horizontal


class AttentionBlock(Block):
    """Causal multi-head self-attention over raster order, with a residual connection (Chen et al. 2018, PixelSNAIL).

    Place (i, j) attends to itself and to all before it; its input already excludes its own code. Positions come with
    the stream. The paper drops attention logits; here the attention's output is dropped, so that SDPA stays fused.
    """

    def __init__(self, hidden: int, heads: int, dropout: float, layer: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.out = BranchEnd(hidden, hidden)
        self.dropout = Dropout(dropout, layer)

    def forward(self, x: Tensor, key: Tensor | None) -> Tensor:
        """x: [b, i, j, c]."""
        return self.run(self._forward, x, key)

    def _forward(self, x: Tensor, key: Tensor | None) -> Tensor:
        rows = x.shape[1]
        query, keys, values = rearrange(
            self.qkv(normalise(x)), "b i j (three heads d) -> three b heads (i j) d", three=3, heads=self.heads
        )
        y = F.scaled_dot_product_attention(query, keys, values, is_causal=True)
        return x + self.dropout(self.out(rearrange(y, "b heads (i j) d -> b i j (heads d)", i=rows)), key)


class PointwiseBlock(Block):
    """Residual block of 1x1 convolutions: the output stack."""

    def __init__(self, hidden: int, residual: int, dropout: float, layer: int):
        super().__init__()
        self.up = nn.Linear(hidden, residual)
        self.out = BranchEnd(residual, hidden)
        self.dropout = Dropout(dropout, layer)

    def forward(self, x: Tensor, key: Tensor | None) -> Tensor:
        """x: [b, i, j, c]."""
        return self.run(self._forward, x, key)

    def _forward(self, x: Tensor, key: Tensor | None) -> Tensor:
        return x + self.dropout(self.out(F.silu(self.up(normalise(x)))), key)


class ConditioningBlock(Block):
    """Residual block of an ordinary (not causal) convolution and a 1x1: the stack over the levels above."""

    def __init__(self, hidden: int, residual: int, filter: int, dropout: float, layer: int):
        super().__init__()
        self.reach = filter // 2
        self.conv = nn.Conv2d(hidden, residual, filter)
        self.out = BranchEnd(residual, hidden)
        self.dropout = Dropout(dropout, layer)

    def forward(self, x: Tensor, key: Tensor | None) -> Tensor:
        """x: [b, i, j, e]."""
        return self.run(self._forward, x, key)

    def _forward(self, x: Tensor, key: Tensor | None) -> Tensor:
        y = F.silu(convolve(self.conv, normalise(x), (self.reach,) * 4))
        return x + self.dropout(self.out(y), key)
