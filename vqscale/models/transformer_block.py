"""The parts of a transformer prior, each followed by its cached twin, which sampling runs one code at a time.

In: tokens [b, t, c], features of the level above [b, s, e], rotary tables, dropout keys.  Out: tokens.

Pre-norm residual branches, queries and keys normalised per head (Henry et al. 2020, Dehghani et al. 2023), SwiGLU
(Shazeer 2020), rotary positions (Su et al. 2021) along two axes (Heo et al. 2024): half of a head's channels turn with
the row, half with the column, so that the product of a query and a key depends on their offset.

Legend: b batch, t tokens, s positions of the nearest level above, c hidden, e conditioning, n heads, d channels of a
head, h = d / 2. A rotary table [2, t, h] holds cosines, then sines.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from vqscale.models.causal import (
    CachedBlock,
    CheckpointableBlock,
    HeadsWeights,
    Key,
    PastAttention,
    SlicedLinear,
    branch_end,
    normalise,
    num_slices,
)
from vqscale.models.dropout import Dropout

_BASE = 100.0  # of the frequencies; the slowest turns by less than a circle over 128 positions

Tokens = Float[Tensor, "b t c"]
Table = Float[Tensor, "2 t h"]
UpperTable = Float[Tensor, "2 s h"]


def rotary_table(positions: Int[Tensor, "t 2"] | Float[Tensor, "t 2"], dim: int) -> Table:
    """Of (row, column) positions. dim: channels of a head, a multiple of 4."""
    frequencies = _BASE ** -(torch.arange(dim // 4, device=positions.device, dtype=torch.float32) / (dim // 4))
    angles = (positions[:, :, None] * frequencies).flatten(1)
    return torch.stack((angles.cos(), angles.sin()))


def apply_rotary(
    x: Float[Tensor, "*shape d"], gain: Float[Tensor, "... d"], cos_sin: Float[Tensor, "2 ... d//2"]
) -> Float[Tensor, "*shape d"]:
    """Normalised, then turned, in the gain's precision or better."""
    normalised = F.rms_norm(x.to(gain.dtype), x.shape[-1:], eps=1e-6)
    first, second = (normalised * gain).chunk(2, dim=-1)
    cosine, sine = cos_sin[0], cos_sin[1]
    turned = torch.cat((first * cosine - second * sine, first * sine + second * cosine), dim=-1)
    return turned.to(x.dtype)


# --- self-attention ---------------------------------------------------------------------------------------------------


class SelfAttention(nn.Module):
    """Causal over tokens. As in the PixelCNN its output is dropped, not its logits, so that SDPA stays fused."""

    def __init__(self, hidden: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(hidden, 3 * hidden)
        # They hold the gains of `apply_rotary`
        self.query_norm, self.key_norm = nn.RMSNorm(hidden // heads), nn.RMSNorm(hidden // heads)
        self.out = branch_end(hidden, hidden)

    def forward(self, x: Tokens, query_table: Table, key_table: Table) -> Tokens:
        query, key, value = rearrange(
            self.qkv(normalise(x)), "b t (three heads d) -> three b heads t d", three=3, heads=self.heads
        )
        query = apply_rotary(query, self.query_norm.weight, query_table)
        key = apply_rotary(key, self.key_norm.weight, key_table)
        y = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out(rearrange(y, "b heads t d -> b t (heads d)"))


class SelfAttentionWeights(HeadsWeights):
    """A `SelfAttention`'s weights and rotary tables as its cached twin reads them."""

    def __init__(self, layer: SelfAttention, tables: tuple[Table, Table], dtype: torch.dtype):
        """tables: of queries and of keys, at all positions."""
        super().__init__(layer.qkv, layer.out, layer.heads, dtype)
        # of queries, then of keys: turned in one go
        gains = torch.stack((layer.query_norm.weight, layer.key_norm.weight))
        self.gains = gains.repeat_interleave(layer.heads, 0)[:, None]
        both = torch.stack(tables, dim=2).repeat_interleave(layer.heads, dim=2)  # [2, t, two n, h]
        self.tables = both.transpose(0, 1)[:, :, :, None].contiguous()  # [t, 2, two n, 1, h]


class CachedSelfAttention(PastAttention):
    """`SelfAttention`, one code at a time."""

    weights: SelfAttentionWeights

    def __init__(self, weights: SelfAttentionWeights, batch: int, grid: tuple[int, int]):
        super().__init__(weights, batch, grid)
        self.tables = torch.zeros_like(weights.tables[: self.width])  # of this row

    def begin_row(self, row: int) -> None:
        super().begin_row(row)
        self.tables.copy_(self.weights.tables[row * self.width : (row + 1) * self.width])

    def step(self, x: Float[Tensor, "b c"], column: int) -> None:
        projected, rotated = self.weights.project(normalise(x)), 2 * self.weights.heads
        query, key = apply_rotary(projected[:rotated], self.weights.gains, self.tables[column]).chunk(2)
        self.attend(x, column, query, key, projected[rotated:])


# --- cross-attention --------------------------------------------------------------------------------------------------


class CrossAttention(nn.Module):
    """From every token to all positions of the nearest level above."""

    def __init__(self, hidden: int, heads: int, conditioning: int):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(hidden, hidden)
        self.key_value = nn.Linear(conditioning, 2 * hidden)
        self.query_norm, self.key_norm = nn.RMSNorm(hidden // heads), nn.RMSNorm(hidden // heads)
        self.out = branch_end(hidden, hidden)

    def keys_and_values(
        self, features: Float[Tensor, "b s e"], upper_table: UpperTable
    ) -> tuple[Float[Tensor, "b n s d"], Float[Tensor, "b n s d"]]:
        """Of the level above."""
        key, value = rearrange(
            self.key_value(features), "b s (two heads d) -> two b heads s d", two=2, heads=self.heads
        )
        return apply_rotary(key, self.key_norm.weight, upper_table), value

    def forward(
        self, x: Tokens, features: Float[Tensor, "b s e"], query_table: Table, upper_table: UpperTable
    ) -> Tokens:
        query = rearrange(self.query(normalise(x)), "b t (heads d) -> b heads t d", heads=self.heads)
        key, value = self.keys_and_values(features, upper_table)
        y = F.scaled_dot_product_attention(apply_rotary(query, self.query_norm.weight, query_table), key, value)
        return self.out(rearrange(y, "b heads t d -> b t (heads d)"))


class CrossAttentionWeights(HeadsWeights):
    """A `CrossAttention`'s weights and rotary tables as its cached twin reads them."""

    def __init__(self, layer: CrossAttention, query_table: Table, upper_table: UpperTable, dtype: torch.dtype):
        super().__init__(layer.query, layer.out, layer.heads, dtype)
        self.layer, self.gain, self.upper_table = layer, layer.query_norm.weight, upper_table
        self.tables = query_table.transpose(0, 1).contiguous()  # [t, 2, h]


class CachedCrossAttention(CachedBlock):
    """`CrossAttention`, one code at a time; keys and values are computed once for a batch."""

    def __init__(self, weights: CrossAttentionWeights, batch: int, width: int):
        self.weights, self.width = weights, width
        self.tables = torch.zeros_like(weights.tables[:width])  # of this row
        heads, positions, dim = weights.heads, weights.upper_table.shape[1], 2 * weights.tables.shape[2]
        self.buffers = [weights.out.new_zeros(heads, batch, positions, dim) for _ in range(2)]

    def reset(self, features: Float[Tensor, "b s e"]) -> None:
        """Begin a batch with these features of the level above."""
        kept = self.weights.layer.keys_and_values(features, self.weights.upper_table)
        for buffer, value in zip(self.buffers, kept, strict=True):
            buffer.copy_(value.transpose(0, 1))

    def begin_row(self, row: int) -> None:
        self.tables.copy_(self.weights.tables[row * self.width : (row + 1) * self.width])

    def step(self, x: Float[Tensor, "b c"], column: int) -> None:
        query = apply_rotary(self.weights.project(normalise(x)), self.weights.gain, self.tables[column])
        self.weights.attend(x, query, *self.buffers)


# --- SwiGLU -----------------------------------------------------------------------------------------------------------


class SwiGLU(nn.Module):
    """out(silu(first half of up(x)) * second half)."""

    def __init__(self, hidden: int, residual: int):
        super().__init__()
        self.up = nn.Linear(hidden, 2 * residual)
        self.out = branch_end(residual, hidden)

    def forward(self, x: Tokens) -> Tokens:
        signal, factor = self.up(normalise(x)).chunk(2, dim=-1)
        return self.out(F.silu(signal) * factor)


class CachedSwiGLU(CachedBlock):
    """`SwiGLU`, one code at a time; it keeps nothing."""

    def __init__(self, layer: SwiGLU, dtype: torch.dtype):
        self.up = SlicedLinear(layer.up, num_slices(layer.up, layer.up.out_features), dtype)
        self.out = layer.out.weight.to(dtype).t()

    def step(self, x: Float[Tensor, "b c"], column: int) -> None:
        signal, factor = self.up(normalise(x)).chunk(2)
        x.addmm_(F.silu(signal, inplace=True).mul_(factor).transpose(0, 1).reshape(len(x), -1), self.out)


# --- the block --------------------------------------------------------------------------------------------------------


class TransformerBlock(CheckpointableBlock):
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

    def compute(
        self, x: Tokens, features: Float[Tensor, "b s e"] | None, key: Key | None, *tables: Float[Tensor, "2 _ h"]
    ) -> Tokens:
        """tables: of queries, of keys and, with features, of the positions above."""
        x = x + self.attention_dropout(self.attention(x, tables[0], tables[1]), key)
        if self.cross is not None:
            assert features is not None
            x = x + self.cross_dropout(self.cross(x, features, tables[0], tables[2]), key)
        return x + self.mlp_dropout(self.mlp(x), key)
