"""The parts of a transformer prior: rotary positions in two dimensions, attention, SwiGLU.

In: tokens [b, t, c], features of the level above [b, s, e], angles, dropout keys.  Out: tokens.

Pre-norm residual branches, queries and keys normalised per head (Henry et al. 2020, Dehghani et al. 2023), SwiGLU
(Shazeer 2020), rotary positions (Su et al. 2021) along two axes (Heo et al. 2024): half of a head's channels turn with
the row, half with the column, so that the product of a query and a key depends on their offset.

Legend: b batch, t tokens, s places of the nearest level above, c hidden, e conditioning, d channels of a head.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vqscale.models.causal import Block, BranchEnd, normalise
from vqscale.models.dropout import Dropout

_BASE = 100.0  # of the frequencies; the slowest turns by less than a circle over 128 places


def rotation(places: Tensor, dim: int) -> Tensor:
    """Places (row, column) [t, 2] -> cosines and sines [2, t, dim / 2]. dim: channels of a head, a multiple of 4."""
    frequencies = _BASE ** -(torch.arange(dim // 4, device=places.device, dtype=torch.float32) / (dim // 4))
    angles = (places[:, :, None] * frequencies).flatten(1)
    return torch.stack((angles.cos(), angles.sin()))


def turn(x: Tensor, gain: Tensor, by: Tensor) -> Tensor:
    """Normalised, then turned: x, gain [..., d], by [2, ..., d / 2]; within, in the gain's precision or better."""
    normalised = F.rms_norm(x.to(gain.dtype), x.shape[-1:], eps=1e-6)
    first, second = (normalised * gain).chunk(2, dim=-1)
    cosine, sine = by[0], by[1]
    turned = torch.cat((first * cosine - second * sine, first * sine + second * cosine), dim=-1)
    return turned.to(x.dtype)


def _head_norm(dim: int) -> nn.RMSNorm:
    """Holds the gain of `turn`."""
    return nn.RMSNorm(dim)


class SelfAttention(nn.Module):
    """Causal over tokens. As in the PixelCNN its output is dropped, not its logits, so that SDPA stays fused."""

    def __init__(self, hidden: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.query_norm, self.key_norm = _head_norm(hidden // heads), _head_norm(hidden // heads)
        self.out = BranchEnd(hidden, hidden)

    def forward(self, x: Tensor, query_turn: Tensor, key_turn: Tensor) -> Tensor:
        """x [b, t, c], turns [2, t, d / 2] -> [b, t, c]."""
        query, key, value = rearrange(
            self.qkv(normalise(x)), "b t (three heads d) -> three b heads t d", three=3, heads=self.heads
        )
        query, key = turn(query, self.query_norm.weight, query_turn), turn(key, self.key_norm.weight, key_turn)
        y = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out(rearrange(y, "b heads t d -> b t (heads d)"))


class CrossAttention(nn.Module):
    """From every token to all places of the nearest level above."""

    def __init__(self, hidden: int, heads: int, conditioning: int):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(hidden, hidden)
        self.key_value = nn.Linear(conditioning, 2 * hidden)
        self.query_norm, self.key_norm = _head_norm(hidden // heads), _head_norm(hidden // heads)
        self.out = BranchEnd(hidden, hidden)

    def keys_and_values(self, features: Tensor, upper_turn: Tensor) -> tuple[Tensor, Tensor]:
        """features [b, s, e], turn [2, s, d / 2] -> twice [b, heads, s, d]."""
        key, value = rearrange(
            self.key_value(features), "b s (two heads d) -> two b heads s d", two=2, heads=self.heads
        )
        return turn(key, self.key_norm.weight, upper_turn), value

    def forward(self, x: Tensor, features: Tensor, query_turn: Tensor, upper_turn: Tensor) -> Tensor:
        """x [b, t, c], features [b, s, e] -> [b, t, c]."""
        query = rearrange(self.query(normalise(x)), "b t (heads d) -> b heads t d", heads=self.heads)
        key, value = self.keys_and_values(features, upper_turn)
        y = F.scaled_dot_product_attention(turn(query, self.query_norm.weight, query_turn), key, value)
        return self.out(rearrange(y, "b heads t d -> b t (heads d)"))


class SwiGLU(nn.Module):
    """out(silu(first half of up(x)) * second half)."""

    def __init__(self, hidden: int, residual: int):
        super().__init__()
        self.up = nn.Linear(hidden, 2 * residual)
        self.out = BranchEnd(residual, hidden)

    def forward(self, x: Tensor) -> Tensor:
        signal, factor = self.up(normalise(x)).chunk(2, dim=-1)
        return self.out(F.silu(signal) * factor)


class TransformerBlock(Block):
    """Self-attention, cross-attention where there is something above, SwiGLU; each a residual branch with dropout."""

    def __init__(self, hidden: int, residual: int, heads: int, conditioning: int, dropout: float, layer: int):
        """conditioning: channels of the features of the levels above, or 0. Takes dropout sites layer ... layer + 2."""
        super().__init__()
        self.attention = SelfAttention(hidden, heads)
        self.cross = CrossAttention(hidden, heads, conditioning) if conditioning else None
        self.mlp = SwiGLU(hidden, residual)
        self.attention_dropout = Dropout(dropout, layer)
        self.cross_dropout = Dropout(dropout, layer + 1)
        self.mlp_dropout = Dropout(dropout, layer + 2)

    def forward(self, x: Tensor, features: Tensor | None, turns: Sequence[Tensor], key: Tensor | None) -> Tensor:
        """x [b, t, c]; features [b, s, e] or None; turns: of queries, keys and, with features, of the places above."""
        return self.run(self._forward, x, features, key, *turns)

    def _forward(self, x: Tensor, features: Tensor | None, key: Tensor | None, *turns: Tensor) -> Tensor:
        x = x + self.attention_dropout(self.attention(x, turns[0], turns[1]), key)
        if self.cross is not None:
            assert features is not None
            x = x + self.cross_dropout(self.cross(x, features, turns[0], turns[2]), key)
        return x + self.mlp_dropout(self.mlp(x), key)
