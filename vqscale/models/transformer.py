"""The other prior of one level of codes: a class-conditional transformer over raster order, and its cache for sampling.

In and out as the PixelCNN: codes [b, h, w], labels [b], the codes of all levels above -> logits [b, k, h, w].

Token t holds the code at position t - 1 and predicts the one at position t; token 0 holds the class. Queries are turned
by the position that they predict and keys by the position of the code that they hold, so that the angle between them is
their true offset, also across the ends of rows. The levels above enter twice: added to the token over whose position
they lie, and as keys and values of cross-attention.

Legend: b batch, h w grid, k codes, c hidden, e conditioning, t = h w positions, s positions of the nearest level above.
"""

from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from vqscale.models.causal import Key, normalise
from vqscale.models.prior import (
    Codes,
    Conditioning,
    Grid,
    Labels,
    LevelPrior,
    PriorConfig,
    PriorState,
    PriorWeights,
    resize_nearest,
)
from vqscale.models.transformer_block import (
    CachedCrossAttention,
    CachedSelfAttention,
    CachedSwiGLU,
    CrossAttentionWeights,
    SelfAttentionWeights,
    TransformerBlock,
    rotary_table,
)


class Transformer(LevelPrior):
    """p(codes | class, levels above), one factor per code in raster order."""

    kind = "transformer"

    def __init__(self, config: PriorConfig, **shape: Any):
        """`shape`: num_codes, grid, num_classes, upper_grids; see `LevelPrior`."""
        hidden, heads = config.hidden, config.heads
        super().__init__(config, **shape)
        if hidden % (4 * heads):
            raise ValueError(
                f"model.hidden={hidden} is not divisible by 4 x model.heads={heads}: rows and columns turn"
            )
        features = 0
        if self.upper_grids:
            # on the nearest grid above: a quarter of the positions that this level's own would have as keys
            self.conditioning = Conditioning(config, self.num_codes, self.upper_grids[-1], self.upper_grids)
            features = self.conditioning.width
            self.project = nn.Linear(features, hidden)
        site = config.conditioning_layers  # numbers the dropout sites
        self.blocks = nn.ModuleList(
            TransformerBlock(hidden, config.residual, heads, features, config.dropout, site + 3 * n)
            for n in range(config.layers)
        )
        self.finish()

    def forward(
        self, codes: Codes, label: Labels, upper: Sequence[Tensor] = (), *, dropout_key: Key | None = None
    ) -> Float[Tensor, "b k h w"]:
        """As `PixelCNN.forward`: codes or their first rows -> logits or theirs."""
        label, above = self.condition(label, upper, dropout_key)
        rows = codes.shape[1]
        tokens = rearrange(self.embedding(codes), "b i j c -> b (i j) c")
        x = torch.cat((label[:, None], tokens[:, :-1]), dim=1) + self.positions()[:rows].flatten(0, 1)
        features = None
        if above is not None:
            x = x + self.aligned(above)[:, :rows].flatten(1, 2)
            features = above.flatten(1, 2)
        tables = self.rotary_tables(rows, codes.device)
        for block in self.blocks:
            x = block(x, features, dropout_key, *tables)
        return rearrange(self.logits(normalise(x)), "b (i j) k -> b k i j", i=rows)

    def aligned(self, features: Float[Tensor, "b u v e"]) -> Float[Tensor, "b h w c"]:
        """Features of the level above -> what is added to the tokens."""
        return resize_nearest(self.project(features), self.grid)

    def rotary_tables(self, rows: int, device: torch.device) -> list[Tensor]:
        """Of the queries and keys of the first rows and, if there are levels above, of the positions of the nearest
        one, in this grid's units."""
        width, dim = self.grid[1], self.config.hidden // self.config.heads
        token = torch.arange(rows * width, device=device)
        predicted = torch.stack((token // width, token % width), dim=1)
        known = torch.stack(((token - 1) // width, (token - 1) % width), dim=1)  # the class lies before the first row
        tables = [rotary_table(predicted, dim), rotary_table(known, dim)]
        if self.upper_grids:
            tables.append(rotary_table(_centres(self.upper_grids[-1], self.grid, device), dim))
        return tables

    def sampling_weights(self, dtype: torch.dtype) -> "TransformerWeights":
        """What cached sampling reads."""
        return TransformerWeights(self, dtype)


class TransformerWeights(PriorWeights):
    """See `PriorWeights`."""

    prior: Transformer

    def __init__(self, prior: Transformer, dtype: torch.dtype):
        super().__init__(prior, dtype)
        query_table, key_table, *upper_table = prior.rotary_tables(prior.grid[0], self.embedding.device)
        self.blocks: list[SelfAttentionWeights | CrossAttentionWeights | CachedSwiGLU] = []
        for block in prior.blocks:
            assert isinstance(block, TransformerBlock)
            self.blocks.append(SelfAttentionWeights(block.attention, (query_table, key_table), dtype))
            if block.cross is not None:
                self.blocks.append(CrossAttentionWeights(block.cross, query_table, upper_table[0], dtype))
            self.blocks.append(CachedSwiGLU(block.mlp, dtype))

    def make_state(self, batch: int) -> "TransformerState":
        return TransformerState(self, batch)


class TransformerState(PriorState):
    """A transformer one code at a time: keys and values of all tokens so far are kept.

    A code costs one reading of all weights whatever the batch.
    """

    weights: TransformerWeights

    def __init__(self, weights: TransformerWeights, batch: int):
        super().__init__(weights, batch)
        prior, zeros = weights.prior, weights.embedding.new_zeros
        self.cross: list[CachedCrossAttention] = []
        for part in weights.blocks:
            if isinstance(part, SelfAttentionWeights):
                self.blocks.append(CachedSelfAttention(part, batch, prior.grid))
            elif isinstance(part, CrossAttentionWeights):
                self.cross.append(CachedCrossAttention(part, batch, self.width))
                self.blocks.append(self.cross[-1])
            else:
                self.blocks.append(part)
        hidden = prior.config.hidden
        self.label, self.known = zeros(batch, hidden), zeros(batch, hidden)  # of the class; before this row
        self.aligned: Tensor | None = None  # features of the level above, [h, b, w, c], and of this row
        if prior.conditioning is not None:
            self.aligned = zeros(prior.grid[0], batch, self.width, hidden)
            self.row_aligned = torch.zeros_like(self.aligned[0])
            self.buffers = [self.aligned, self.row_aligned]

    def condition(self, embedded: Tensor, features: Tensor | None) -> None:
        self.label.copy_(embedded)
        if self.aligned is not None:
            assert features is not None
            self.aligned.copy_(self.weights.prior.aligned(features).transpose(0, 1))
            for block in self.cross:
                block.reset(features.flatten(1, 2))

    def begin_row(self, row: int) -> None:
        super().begin_row(row)
        self.known.copy_(self.weights.embedding[self.codes[:, row - 1, -1]] if row else self.label)
        if self.aligned is not None:
            self.row_aligned.copy_(self.aligned[row])

    def start(self, column: int) -> Float[Tensor, "b c"]:
        known = self.weights.embedding[self.row[:, column - 1]] if column else self.known
        x = known + self.positions[column]
        if self.aligned is not None:
            x += self.row_aligned[:, column]
        return x


def _centres(grid: Grid, of: Grid, device: torch.device) -> Float[Tensor, "s 2"]:
    """Centres of the positions of `grid`, laid over a grid `of` finer positions and measured in those."""
    rows, columns = ((torch.arange(n, device=device) + 0.5) * m / n - 0.5 for n, m in zip(grid, of, strict=True))
    return torch.cartesian_prod(rows, columns)
