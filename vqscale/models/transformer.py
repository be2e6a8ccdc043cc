"""The other prior of one level of codes: a class-conditional transformer over raster order.

In and out as the PixelCNN: codes [b, h, w], labels [b], the codes of all levels above -> logits [b, K, h, w].

Token t holds the code at place t - 1 and predicts the one at place t; token 0 holds the class. Queries are turned by
the place that they predict and keys by the place of the code that they hold, so that the angle between them is their
true offset, also across the ends of rows. The levels above enter twice: added to the token over whose place they lie,
and as keys and values of cross-attention.
"""

from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from vqscale.models.causal import normalise
from vqscale.models.dropout import drop_labels
from vqscale.models.prior import Conditioning, Grid, Head, LevelPrior, PriorConfig, resize_nearest
from vqscale.models.transformer_block import TransformerBlock, rotation
from vqscale.models.transformer_cache import TransformerCache


class Transformer(LevelPrior):
    """p(codes | class, levels above), one factor per code in raster order."""

    kind = "transformer"

    def __init__(self, config: PriorConfig, **shape: Any):
        """`shape`: num_codes, grid, num_classes, upper_grids; see `LevelPrior`."""
        super().__init__(config, **shape)
        hidden, heads = config.hidden, config.heads
        if hidden % (4 * heads):
            raise ValueError(
                f"model.hidden={hidden} is not divisible by 4 x model.heads={heads}: rows and columns turn"
            )
        self.embedding = nn.Embedding(self.num_codes, hidden)
        self.row = nn.Embedding(self.grid[0], hidden)
        self.column = nn.Embedding(self.grid[1], hidden)
        self.label = nn.Embedding(self.num_classes + 1, hidden)
        self.conditioning: Conditioning | None = None
        features = 0
        if self.upper_grids:
            # on the nearest grid above: a quarter of the places that this level's own would have as keys
            self.conditioning = Conditioning(
                config, num_codes=self.num_codes, grid=self.upper_grids[-1], upper_grids=self.upper_grids, layer=0
            )
            features = self.conditioning.width
            self.project = nn.Linear(features, hidden)
        site = config.conditioning_layers  # numbers the places of dropout
        self.blocks = nn.ModuleList(
            TransformerBlock(hidden, config.residual, heads, features, config.dropout, site + 3 * n)
            for n in range(config.layers)
        )
        self.logits = Head(hidden, self.num_codes)
        for block in self.wrap_units():
            block.activation_checkpointing = config.activation_checkpointing

    def forward(
        self, codes: Tensor, label: Tensor, upper: Sequence[Tensor] = (), *, dropout_key: Tensor | None = None
    ) -> Tensor:
        """As `PixelCNN.forward`: codes [b, h, w] or their first rows -> logits [b, K, h, w] or theirs."""
        if self.training:
            label = drop_labels(label, dropout_key, self.config.class_dropout, self.num_classes)
        rows = codes.shape[1]
        tokens = rearrange(self.embedding(codes), "b i j c -> b (i j) c")
        x = torch.cat((self.label(label)[:, None], tokens[:, :-1]), dim=1) + self.places()[: tokens.shape[1]]
        features = None
        if self.conditioning is not None:
            above = self.conditioning(upper, dropout_key)
            x = x + self.aligned(above)[:, :rows].flatten(1, 2)
            features = above.flatten(1, 2)
        turns = self.turns(rows, codes.device)
        for block in self.blocks:
            x = block(x, features, turns, dropout_key)
        return rearrange(self.logits(normalise(x)), "b (i j) k -> b k i j", i=rows)

    def places(self) -> Tensor:
        """[h w, c]: what every token is told of the place that it predicts."""
        return (self.row.weight[:, None] + self.column.weight).flatten(0, 1)

    def aligned(self, features: Tensor) -> Tensor:
        """Features of the level above [b, h', w', e] -> what is added to the tokens [b, h, w, c]."""
        return resize_nearest(self.project(features), self.grid)

    def turns(self, rows: int, device: torch.device) -> list[Tensor]:
        """[2, t, d / 2] each: of the queries and keys of the first rows and, if there are levels above, of the places
        of the nearest one, in this grid's units."""
        width, dim = self.grid[1], self.config.hidden // self.config.heads
        token = torch.arange(rows * width, device=device)
        predicted = torch.stack((token // width, token % width), dim=1)
        held = torch.stack(((token - 1) // width, (token - 1) % width), dim=1)  # the class lies before the first row
        turns = [rotation(predicted, dim), rotation(held, dim)]
        return [*turns, rotation(_centres(self.upper_grids[-1], self.grid, device), dim)] if self.upper_grids else turns

    def incremental(
        self, codes: Tensor, label: Tensor, upper: Sequence[Tensor], dtype: torch.dtype
    ) -> TransformerCache:
        """As `PixelCNN.incremental`: place -> logits [b, K], given the places before it in `codes`."""
        features = self.conditioning(upper, None) if self.conditioning is not None else None
        return TransformerCache(self, codes, self.label(label), features, dtype)


def _centres(grid: Grid, of: Grid, device: torch.device) -> Tensor:
    """[s, 2]: centres of the places of `grid`, laid over a grid `of` finer places and measured in those."""
    rows, columns = ((torch.arange(n, device=device) + 0.5) * m / n - 0.5 for n, m in zip(grid, of, strict=True))
    return torch.cartesian_prod(rows, columns)
