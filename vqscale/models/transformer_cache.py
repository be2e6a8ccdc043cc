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
        self.query_norm, self.key_norm = layer.query_norm, layer.key_norm
        self.keys = self.bias.new_zeros(layer.heads, batch, places, self.bias.shape[2])
        self.values = torch.zeros_like(self.keys)

    def code(self, x: Tensor, place: int, query_turn: Tensor, key_turn: Tensor) -> None:
        """x [b, c] of one token, updated in place."""
        rows = normalise(x).expand(3 * self.heads, -1, -1)
        query, key, value = torch.baddbmm(self.bias, rows, self.weight).split(self.heads)
        self.keys[:, :, place] = turn(self.key_norm, key, key_turn)
        self.values[:, :, place] = value
        query, so_far = turn(self.query_norm, query, query_turn)[:, :, None], slice(0, place + 1)
        y = F.scaled_dot_product_attention(query, self.keys[:, :, so_far], self.values[:, :, so_far])
        x.addmm_(y.transpose(0, 1).reshape(x.shape), self.out)


class _CrossState:
    """Keys and values of the level above, computed once, [heads, b, s, d]."""

    def __init__(self, layer: CrossAttention, features: Tensor, upper_turn: Tensor, dtype: torch.dtype):
        self.heads = layer.heads
        self.weight, self.bias = _matrices(layer.query, layer.heads, dtype)
        self.out = layer.out.weight.to(dtype).t()
        self.norm = layer.query_norm
        kept = layer.keys_and_values(features, upper_turn)
        self.keys, self.values = (x.to(dtype).transpose(0, 1).contiguous() for x in kept)

    def code(self, x: Tensor, query_turn: Tensor) -> None:
        query = torch.baddbmm(self.bias, normalise(x).expand(self.heads, -1, -1), self.weight)
        query = turn(self.norm, query, query_turn)[:, :, None]
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
        self.query_turns, self.key_turns = turns[0].unbind(1), turns[1].unbind(1)
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
        query_turn, key_turn = self.query_turns[place], self.key_turns[place]
        for attention, cross, mlp in self.blocks:
            attention.code(x, place, query_turn, key_turn)
            if cross is not None:
                cross.code(x, query_turn)
            mlp.code(x)
        return torch.addmm(self.head_bias, normalise(x), self.head)

    def bytes_per_sample(self) -> int:
        """Memory that one more sample in the batch takes, weights apart."""
        states = [state for attention, cross, _ in self.blocks for state in (attention, cross) if state is not None]
        held = [tensor for state in states for tensor in (state.keys, state.values)]
        held += [] if self.aligned is None else [self.aligned]
        return sum(t.numel() * t.element_size() for t in held) // len(self.codes)
