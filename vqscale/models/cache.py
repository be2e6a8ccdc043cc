"""A PixelCNN one code at a time: everything already computed is kept, everything that can be done per row is.

In: a PixelCNN, the tensor of codes that the sampler fills, label embeddings, conditioning features.  Out: a callable,
place -> logits [b, K], equal to the full forward's.

Per row: the vertical stack (15 of 18 taps at k = 5) as full-size products over all columns and samples, and with it
all that a horizontal gate adds to its own window: bias, class, conditioning, vertical stream. Per code there remain,
for each block, one window product, the gate and one 1x1; attention against the kept keys and values; the output
stack. Legend: b batch, w columns, c hidden, r residual, k filter, q = k // 2, t places,
s parts of a product's outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from vqscale.models.causal import AttentionBlock, GatedBlock, PointwiseBlock, gate, normalise

if TYPE_CHECKING:
    from vqscale.models.pixelcnn import PixelCNN


def parts_of(gates: int) -> int:
    """Into how many parts the outputs of a per-code product are cut: an even number that divides `gates`.

    A product of 8 or 32 rows is bound by reading its weights; as a batch of narrow products over the same rows it ran
    up to twice as fast as one `addmm` (MKL hands whole products to threads).
    """
    return next(n for n in (16, 8, 4, 2) if n == 2 or gates % n == 0 and gates >= 64 * n)


class _GatedState:
    """One gated block: its weights as matrices, the last rows of the vertical stream, this row of the horizontal."""

    def __init__(self, block: GatedBlock, label: Tensor, batch: int, width: int, dtype: torch.dtype):
        taps = block.vertical.weight.to(dtype)  # [2r, c, q + 1, k]
        hidden, rows, self.filter = taps.shape[1:]
        self.reach, self.width, self.hidden = block.reach, width, hidden
        self.taps = [tap.contiguous().t() for tap in rearrange(taps, "r c i k -> k r (i c)")]
        self.across = block.across.weight.to(dtype).t()
        self.vertical_out = block.vertical_out.weight.to(dtype).t()
        self.horizontal_out = block.horizontal_out.weight.to(dtype).t()
        self.condition = None if block.condition is None else block.condition.weight.to(dtype).t()
        down, right = block.class_bias(label).split(
            (block.vertical.out_channels, block.horizontal.out_channels), dim=-1
        )
        assert block.vertical.bias is not None and block.horizontal.bias is not None
        self.down_bias = (down + block.vertical.bias).to(dtype)  # [b, 2r]
        self.right_bias = (right + block.horizontal.bias).to(dtype)
        gates = self.right_bias.shape[1]
        self.parts = parts_of(gates)
        window = rearrange(block.horizontal.weight.to(dtype), "(s r) c 1 k -> s r (k c)", s=self.parts)
        self.window = window.contiguous().transpose(1, 2)
        # rows above and this one, side by side in channels, so that one product takes a column of taps
        self.slab = taps.new_zeros(width + 2 * self.reach, batch, rows * hidden)
        self.down = taps.new_empty(width * batch, self.down_bias.shape[1])
        self.right = taps.new_empty(width, self.parts, batch, gates // self.parts)
        self.line = taps.new_zeros(batch, width + self.reach, hidden)
        self.gated = taps.new_empty(batch, gates // 2)
        self._make_views()

    def _make_views(self) -> None:
        """Views made once: slicing costs as much as a small product."""
        half = self.parts // 2
        self.slots = [self.line[:, self.reach + j] for j in range(self.width)]
        self.windows = [self._window(j) for j in range(self.width)]
        self.gates = [(right, right[:half], right[half:]) for right in self.right]
        self.gated_parts = rearrange(self.gated, "b (s r) -> s b r", s=half)
        self.columns = [self.slab[t : t + self.width].flatten(0, 1) for t in range(self.filter)]
        self.newest = self.slab[self.reach : self.reach + self.width, :, -self.hidden :]

    def _window(self, j: int) -> Tensor:
        """[s, b, (q + 1) c]: the places j - q ... j of this row, without a copy."""
        batch, length, hidden = self.line.shape
        shape, strides = (self.parts, batch, (self.reach + 1) * hidden), (0, length * hidden, 1)
        return self.line.as_strided(shape, strides, j * hidden)

    def row(self, x: Tensor, features: Tensor | None) -> None:
        """Vertical stream x [w b, c] of this row, updated in place; leaves in `right` what the horizontal gates add."""
        hidden, width, down = self.hidden, self.width, self.down
        self.slab[:, :, :-hidden] = self.slab[:, :, hidden:].clone()
        self.newest.copy_(normalise(x).view(width, -1, hidden))
        down.copy_(self.down_bias.repeat(width, 1))
        right = self.right_bias.repeat(width, 1)
        if self.condition is not None:
            assert features is not None
            down.addmm_(features, self.condition[:, : down.shape[1]])
            right.addmm_(features, self.condition[:, down.shape[1] :])
        for column, tap in zip(self.columns, self.taps, strict=True):
            down.addmm_(column, tap)
        x.addmm_(gate(down), self.vertical_out)
        right.addmm_(normalise(x), self.across)
        self.right.copy_(rearrange(right, "(w b) (s r) -> w s b r", w=width, s=self.parts))

    def code(self, x: Tensor, place: int, column: int) -> None:
        """Horizontal stream x [b, c] of one place, updated in place."""
        self.slots[column].copy_(normalise(x))
        gates, signal, opening = self.gates[column]
        gates.baddbmm_(self.windows[column], self.window)
        torch.mul(signal.tanh_(), opening.sigmoid_(), out=self.gated_parts)
        x.addmm_(self.gated, self.horizontal_out)


class _AttentionState:
    """One attention block: keys and values of all places so far, [heads, b, t, d]."""

    def __init__(self, block: AttentionBlock, batch: int, places: int, dtype: torch.dtype):
        self.heads, parts = block.heads, 3 * block.heads
        self.weight = rearrange(block.qkv.weight.to(dtype), "(n d) c -> n d c", n=parts).transpose(1, 2)
        self.bias = rearrange(block.qkv.bias.to(dtype), "(n d) -> n 1 d", n=parts)
        self.out = block.out.weight.to(dtype).t()
        self.keys = self.bias.new_zeros(block.heads, batch, places, self.bias.shape[2])
        self.values = torch.zeros_like(self.keys)

    def code(self, x: Tensor, place: int, column: int) -> None:
        rows = normalise(x).expand(3 * self.heads, -1, -1)
        query, key, value = torch.baddbmm(self.bias, rows, self.weight).split(self.heads)
        self.keys[:, :, place] = key
        self.values[:, :, place] = value
        so_far = slice(0, place + 1)
        y = F.scaled_dot_product_attention(query[:, :, None], self.keys[:, :, so_far], self.values[:, :, so_far])
        x.addmm_(y.transpose(0, 1).reshape(x.shape), self.out)  # einops costs more than the product here


class _PointwiseState:
    """One block of the output stack."""

    def __init__(self, block: PointwiseBlock, dtype: torch.dtype):
        self.weight, self.bias = block.up.weight.to(dtype).t(), block.up.bias.to(dtype)
        self.out = block.out.weight.to(dtype).t()

    def code(self, x: Tensor, place: int, column: int) -> None:
        x.addmm_(F.silu(torch.addmm(self.bias, normalise(x), self.weight), inplace=True), self.out)


_State = _GatedState | _AttentionState | _PointwiseState


class PixelCNNCache:
    """The incremental PixelCNN. Call it with places 0, 1, ... h w - 1 in order."""

    def __init__(self, prior: PixelCNN, codes: Tensor, label: Tensor, features: Tensor | None, dtype: torch.dtype):
        """codes: int64 [b, h, w], read as it is filled; label: [b, d]; features: [b, h, w, e] or None."""
        self.codes, (batch, self.height, self.width) = codes, codes.shape
        self.embedding = prior.embedding.weight.to(dtype)
        self.place = (prior.row.weight[:, None] + prior.column.weight).to(dtype)  # [h, w, c]
        self.features = None if features is None else rearrange(features.to(dtype), "b i j e -> i (j b) e").contiguous()
        self.gated: list[_GatedState] = []
        self.states: list[_State] = []
        for block in prior.blocks:
            if isinstance(block, GatedBlock):
                self.gated.append(_GatedState(block, label, batch, self.width, dtype))
                self.states.append(self.gated[-1])
            else:
                assert isinstance(block, AttentionBlock)
                self.states.append(_AttentionState(block, batch, self.height * self.width, dtype))
        for block in prior.output:
            assert isinstance(block, PointwiseBlock)
            self.states.append(_PointwiseState(block, dtype))
        self.head, self.head_bias = prior.logits.weight.to(dtype).t(), prior.logits.bias.to(dtype)

    def __call__(self, place: int) -> Tensor:
        row, column = divmod(place, self.width)
        if column == 0:
            self._row(row)
        x = self.place[row, column].expand(len(self.codes), -1).contiguous()
        if column:
            x += self.embedding[self.codes[:, row, column - 1]]
        for state in self.states:
            state.code(x, place, column)
        return torch.addmm(self.head_bias, normalise(x), self.head)

    def _row(self, row: int) -> None:
        """The vertical stack of one row, for all its columns."""
        x = self.place[row][:, None].repeat(1, len(self.codes), 1)
        if row:
            x += self.embedding[self.codes[:, row - 1].t()]
        x = x.flatten(0, 1)
        features = None if self.features is None else self.features[row]
        for state in self.gated:
            state.row(x, features)

    def bytes_per_sample(self) -> int:
        """Memory that one more sample in the batch takes, weights apart."""
        held: Sequence[Tensor] = [t for s in self.states for t in _buffers(s)]
        held = [*held, *([] if self.features is None else [self.features])]
        return sum(t.numel() * t.element_size() for t in held) // len(self.codes)


def _buffers(state: _State) -> list[Tensor]:
    if isinstance(state, _GatedState):
        return [state.slab, state.down, state.right, state.line, state.down_bias, state.right_bias]
    return [state.keys, state.values] if isinstance(state, _AttentionState) else []
