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
from vqscale.models.prior import Codes, Conditioning, Grid, Labels, LevelPrior, PriorCache, PriorConfig, resize_nearest
from vqscale.models.transformer_block import (
    CachedCrossAttention,
    CachedSelfAttention,
    CachedSwiGLU,
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

    def incremental(
        self, codes: Codes, label: Labels, upper: Sequence[Tensor], dtype: torch.dtype
    ) -> "TransformerCache":
        """As `PixelCNN.incremental`."""
        return TransformerCache(self, codes, *self.condition(label, upper), dtype)


class TransformerCache(PriorCache):
    """A transformer one code at a time: keys and values of all tokens so far are kept, in memory taken once.

    A code costs one reading of all weights whatever the batch.
    """

    def __init__(
        self,
        prior: Transformer,
        codes: Codes,
        label: Float[Tensor, "b c"],
        features: Float[Tensor, "b u v e"] | None,
        dtype: torch.dtype,
    ):
        """codes: read as they are filled. label, features: what `LevelPrior.condition` gives."""
        super().__init__(prior, codes, dtype)
        self.label, self.positions = label.to(dtype), prior.positions().to(dtype).flatten(0, 1)
        self.aligned = None if features is None else prior.aligned(features).to(dtype).flatten(1, 2)
        self.buffers = [] if self.aligned is None else [self.aligned]
        query_table, key_table, *upper_table = prior.rotary_tables(codes.shape[1], codes.device)
        for block in prior.blocks:
            assert isinstance(block, TransformerBlock)
            self.blocks.append(CachedSelfAttention(block.attention, len(codes), (query_table, key_table), dtype))
            if block.cross is not None:
                assert features is not None
                flat = features.flatten(1, 2)
                self.blocks.append(CachedCrossAttention(block.cross, flat, query_table, upper_table[0], dtype))
            self.blocks.append(CachedSwiGLU(block.mlp, dtype))

    def start(self, position: int) -> Float[Tensor, "b c"]:
        known = self.label if position == 0 else self.embedding[self.codes.flatten(1)[:, position - 1]]
        x = known + self.positions[position]
        if self.aligned is not None:
            x += self.aligned[:, position]
        return x


def _centres(grid: Grid, of: Grid, device: torch.device) -> Float[Tensor, "s 2"]:
    """Centres of the positions of `grid`, laid over a grid `of` finer positions and measured in those."""
    rows, columns = ((torch.arange(n, device=device) + 0.5) * m / n - 0.5 for n, m in zip(grid, of, strict=True))
    return torch.cartesian_prod(rows, columns)
