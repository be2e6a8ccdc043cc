"""The prior of one level of codes: a two-stack, class-conditional PixelCNN with causal self-attention, and its cache.

In: codes [b, h, w], labels [b], the codes of all levels above.  Out: logits [b, k, h, w]; those at a position depend on
the codes before it in raster order only.

Sources: van den Oord et al. 2016b (gated two-stack PixelCNN), Chen et al. 2018 (self-attention between the
convolutions), Razavi et al. 2019, section 3.2 and appendix (attention every n layers, 1x1 output stack, conditioning
stack over the upper levels, dropout).

Legend: b batch, h w grid, k codes, c hidden, d class, e conditioning.
"""

from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from vqscale.models.causal import (
    AttentionBlock,
    CachedAttentionBlock,
    CachedGatedBlock,
    CachedPointwiseBlock,
    GatedBlock,
    Key,
    PointwiseBlock,
    normalise,
    shift_down,
    shift_right,
)
from vqscale.models.prior import Codes, Conditioning, Labels, LevelPrior, PriorCache, PriorConfig


class PixelCNN(LevelPrior):
    """p(codes | class, levels above), one factor per code in raster order."""

    kind = "pixelcnn"

    def __init__(self, config: PriorConfig, **shape: Any):
        """`shape`: num_codes, grid, num_classes, upper_grids; see `LevelPrior`."""
        super().__init__(config, class_dim=config.class_dim, **shape)
        if config.attention_every and config.hidden % config.heads:
            raise ValueError(f"model.hidden={config.hidden} is not divisible by model.heads={config.heads}")
        hidden, p = config.hidden, config.dropout
        if self.upper_grids:
            self.conditioning = Conditioning(config, self.num_codes, self.grid, self.upper_grids)
        features = self.conditioning.width if self.conditioning else 0
        site = config.conditioning_layers  # numbers the dropout sites
        self.blocks = nn.ModuleList()
        for n in range(1, config.layers + 1):
            self.blocks.append(GatedBlock(hidden, config.residual, config.filter, config.class_dim, features, p, site))
            site += 2
            if config.attention_every and n % config.attention_every == 0:
                self.blocks.append(AttentionBlock(hidden, config.heads, p, site))
                site += 1
        self.output = nn.ModuleList(
            PointwiseBlock(hidden, config.output_residual or hidden, p, site + n) for n in range(config.output_layers)
        )
        self.finish()

    def forward(
        self, codes: Codes, label: Labels, upper: Sequence[Tensor] = (), *, dropout_key: Key | None = None
    ) -> Float[Tensor, "b k h w"]:
        """Logits of codes (0 ... K - 1). `codes` may be the first rows only: then so are the logits.

        upper: codes of each level above, top first; dropout_key: from `dropout_key(seed, position)`, None = no dropout.
        """
        label, features = self.condition(label, upper, dropout_key)
        rows = codes.shape[1]
        features = None if features is None else features[:, :rows]
        embedded, positions = self.embedding(codes), self.positions()[:rows]
        vertical, horizontal = shift_down(embedded) + positions, shift_right(embedded) + positions
        for block in self.blocks:
            if isinstance(block, GatedBlock):
                vertical, horizontal = block(vertical, horizontal, label, features, dropout_key)
            else:
                horizontal = block(horizontal, dropout_key)
        for block in self.output:
            horizontal = block(horizontal, dropout_key)
        return rearrange(self.logits(normalise(horizontal)), "b i j k -> b k i j")

    def incremental(self, codes: Codes, label: Labels, upper: Sequence[Tensor], dtype: torch.dtype) -> "PixelCNNCache":
        """What cached sampling calls: position -> logits [b, k], given the codes before it, filled meanwhile.

        upper: as in `forward`. Positions must come in raster order, each once.
        """
        return PixelCNNCache(self, codes, *self.condition(label, upper), dtype)


class PixelCNNCache(PriorCache):
    """A PixelCNN one code at a time; the vertical stack, whole rows at a time."""

    def __init__(
        self,
        prior: PixelCNN,
        codes: Codes,
        label: Float[Tensor, "b d"],
        features: Float[Tensor, "b h w e"] | None,
        dtype: torch.dtype,
    ):
        """codes: read as they are filled. label, features: what `LevelPrior.condition` gives."""
        super().__init__(prior, codes, dtype)
        batch, height, self.width = codes.shape
        self.positions = prior.positions().to(dtype)
        self.features = None if features is None else rearrange(features.to(dtype), "b i j e -> i (j b) e").contiguous()
        self.buffers = [] if self.features is None else [self.features]
        self.gated: list[CachedGatedBlock] = []
        for block in prior.blocks:
            if isinstance(block, GatedBlock):
                self.gated.append(CachedGatedBlock(block, label, self.width, dtype))
                self.blocks.append(self.gated[-1])
            else:
                assert isinstance(block, AttentionBlock)
                self.blocks.append(CachedAttentionBlock(block, batch, height * self.width, dtype))
        for block in prior.output:
            assert isinstance(block, PointwiseBlock)
            self.blocks.append(CachedPointwiseBlock(block, dtype))

    def start(self, position: int) -> Float[Tensor, "b c"]:
        row, column = divmod(position, self.width)
        if column == 0:
            self._run_row(row)
        x = self.positions[row, column].expand(len(self.codes), -1).contiguous()
        if column:
            x += self.embedding[self.codes[:, row, column - 1]]
        return x

    def _run_row(self, row: int) -> None:
        """The vertical stack of one row, for all its columns."""
        x = self.positions[row][:, None].repeat(1, len(self.codes), 1)
        if row:
            x += self.embedding[self.codes[:, row - 1].t()]
        x = x.flatten(0, 1)
        features = None if self.features is None else self.features[row]
        for block in self.gated:
            block.row(x, features)
