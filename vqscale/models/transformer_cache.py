"""A transformer prior one code at a time: keys and values of all tokens so far are kept, in memory taken once.

In: a Transformer, the tensor of codes that the sampler fills, label embeddings, features of the level above.  Out: a
callable, place -> logits [b, K], equal to the full forward's.

A code costs one reading of all weights whatever the batch, so that products are cut into parts as in cache.py. Legend:
b batch, t places, s places above, c hidden, d channels of a head, n = three times the heads, p parts, r residual.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vqscale.models.cache import parts_of
from vqscale.models.causal import normalise
from vqscale.models.transformer_block import CrossAttention, SelfAttention, SwiGLU, TransformerBlock, turn

if TYPE_CHECKING:
    from vqscale.models.transformer import Transformer


def _matrices(layer: nn.Linear, parts: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A linear layer cut along its outputs: weight [p, c, r], bias [p, 1, r]."""
    weight = rearrange(layer.weight.to(dtype), "(p r) c -> p r c", p=parts).transpose(1, 2)
    return weight, rearrange(layer.bias.to(dtype), "(p r) -> p 1 r", p=parts)


class _SelfState:
    """Keys and values of all places so far, [heads, b, t, d]."""

    def __init__(self, layer: SelfAttention, batch: int, places: int, dtype: torch.dtype):
        self.heads = layer.heads
        self.weight, self.bias = _matrices(layer.qkv, 3 * layer.heads, dtype)
        self.out = layer.out.weight.to(dtype).t()
        gains = torch.stack((layer.query_norm.weight, layer.key_norm.weight))
        self.gains = gains.repeat_interleave(layer.heads, 0)[:, None]  # of queries, then of keys: turned in one go
        self.keys = self.bias.new_zeros(layer.heads, batch, places, self.bias.shape[2])
        self.values = torch.zeros_like(self.keys)

    def code(self, x: Tensor, place: int, by: Tensor) -> None:
        """x [b, c] of one token, updated in place; by [2, two heads, 1, d / 2], of queries, then of keys."""
        rows, heads = normalise(x).expand(3 * self.heads, -1, -1), self.heads
        projected = torch.baddbmm(self.bias, rows, self.weight)
        turned, so_far = turn(projected[: 2 * heads], self.gains, by), slice(0, place + 1)
        self.keys[:, :, place] = turned[heads:]
        self.values[:, :, place] = projected[2 * heads :]
        query = turned[:heads, :, None]
        y = F.scaled_dot_product_attention(query, self.keys[:, :, so_far], self.values[:, :, so_far])
        x.addmm_(y.transpose(0, 1).reshape(x.shape), self.out)


class _CrossState:
    """Keys and values of the level above, computed once, [heads, b, s, d]."""

    def __init__(self, layer: CrossAttention, features: Tensor, upper_turn: Tensor, dtype: torch.dtype):
        self.heads = layer.heads
        self.weight, self.bias = _matrices(layer.query, layer.heads, dtype)
        self.out = layer.out.weight.to(dtype).t()
        self.gain = layer.query_norm.weight
        kept = layer.keys_and_values(features, upper_turn)
        self.keys, self.values = (x.to(dtype).transpose(0, 1).contiguous() for x in kept)

    def code(self, x: Tensor, query_turn: Tensor) -> None:
        query = torch.baddbmm(self.bias, normalise(x).expand(self.heads, -1, -1), self.weight)
        query = turn(query, self.gain, query_turn)[:, :, None]
        y = F.scaled_dot_product_attention(query, self.keys, self.values)
        x.addmm_(y.transpose(0, 1).reshape(x.shape), self.out)


class _MLPState:
    def __init__(self, layer: SwiGLU, dtype: torch.dtype):
        self.parts = parts_of(layer.up.out_features)
        self.weight, self.bias = _matrices(layer.up, self.parts, dtype)
        self.out = layer.out.weight.to(dtype).t()

    def code(self, x: Tensor) -> None:
        both = torch.baddbmm(self.bias, normalise(x).expand(self.parts, -1, -1), self.weight)
        signal, factor = both.chunk(2)
        x.addmm_(F.silu(signal, inplace=True).mul_(factor).transpose(0, 1).reshape(len(x), -1), self.out)


class TransformerCache:
    """The incremental transformer. Call it with places 0, 1, ... h w - 1 in order."""

    def __init__(self, prior: Transformer, codes: Tensor, label: Tensor, features: Tensor | None, dtype: torch.dtype):
        """codes: int64 [b, h, w], read as it is filled; label: [b, c]; features: [b, h', w', e] or None."""
        self.codes, (batch, height, width) = codes, codes.shape
        self.embedding, self.label = prior.embedding.weight.to(dtype), label.to(dtype)
        self.places = prior.places().to(dtype)
        self.aligned = None if features is None else prior.aligned(features).to(dtype).flatten(1, 2)
        turns = prior.turns(height, codes.device)
        self.query_turns = turns[0].unbind(1)
        both = torch.stack(turns[:2], dim=2).repeat_interleave(prior.config.heads, dim=2)  # [2, t, two heads, d / 2]
        self.turns = both[:, :, :, None].unbind(1)
        self.blocks: list[tuple[_SelfState, _CrossState | None, _MLPState]] = []
        for block in prior.blocks:
            assert isinstance(block, TransformerBlock)
            cross = None
            if block.cross is not None:
                assert features is not None
                cross = _CrossState(block.cross, features.flatten(1, 2), turns[2], dtype)
            attention = _SelfState(block.attention, batch, height * width, dtype)
            self.blocks.append((attention, cross, _MLPState(block.mlp, dtype)))
        self.head, self.head_bias = prior.logits.weight.to(dtype).t(), prior.logits.bias.to(dtype)

    def __call__(self, place: int) -> Tensor:
        held = self.label if place == 0 else self.embedding[self.codes.flatten(1)[:, place - 1]]
        x = held + self.places[place]
        if self.aligned is not None:
            x += self.aligned[:, place]
        for attention, cross, mlp in self.blocks:
            attention.code(x, place, self.turns[place])
            if cross is not None:
                cross.code(x, self.query_turns[place])
            mlp.code(x)
        return torch.addmm(self.head_bias, normalise(x), self.head)

    def bytes_per_sample(self) -> int:
        """Memory that one more sample in the batch takes, weights apart."""
        states = [state for attention, cross, _ in self.blocks for state in (attention, cross) if state is not None]
        held = [tensor for state in states for tensor in (state.keys, state.values)]
        held += [] if self.aligned is None else [self.aligned]
        return sum(t.numel() * t.element_size() for t in held) // len(self.codes)
