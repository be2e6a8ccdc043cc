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
    GatedWeights,
    HeadsWeights,
    Key,
    PointwiseBlock,
    normalise,
    shift_down,
    shift_right,
)
from vqscale.models.prior import Codes, Conditioning, Labels, LevelPrior, PriorConfig, PriorState, PriorWeights


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

    def sampling_weights(self, dtype: torch.dtype) -> "PixelCNNWeights":
        """What cached sampling reads."""
        return PixelCNNWeights(self, dtype)


class PixelCNNWeights(PriorWeights):
    """See `PriorWeights`."""

    prior: PixelCNN

    def __init__(self, prior: PixelCNN, dtype: torch.dtype):
        super().__init__(prior, dtype)
        self.blocks: list[GatedWeights | HeadsWeights] = []
        for block in prior.blocks:
            if isinstance(block, GatedBlock):
                self.blocks.append(GatedWeights(block, dtype))
            else:
                assert isinstance(block, AttentionBlock)
                self.blocks.append(HeadsWeights(block.qkv, block.out, block.heads, dtype))
        self.output = [CachedPointwiseBlock(block, dtype) for block in prior.output]  # type: ignore[arg-type]

    def make_state(self, batch: int) -> "PixelCNNState":
        return PixelCNNState(self, batch)


class PixelCNNState(PriorState):
    """A PixelCNN one code at a time; the vertical stack, whole rows at a time."""

    weights: PixelCNNWeights

    def __init__(self, weights: PixelCNNWeights, batch: int):
        super().__init__(weights, batch)
        self.gated: list[CachedGatedBlock] = []
        for part in weights.blocks:
            if isinstance(part, GatedWeights):
                self.gated.append(CachedGatedBlock(part, batch, self.width))
                self.blocks.append(self.gated[-1])
            else:
                self.blocks.append(CachedAttentionBlock(part, batch, weights.prior.grid))
        self.blocks += weights.output
        self.features: Tensor | None = None  # [h, w b, e], and of this row
        if (conditioning := weights.prior.conditioning) is not None:
            height = weights.prior.grid[0]
            self.features = weights.embedding.new_zeros(height, self.width * batch, conditioning.width)
            self.row_features = torch.zeros_like(self.features[0])
            self.buffers = [self.features, self.row_features]

    def condition(self, embedded: Tensor, features: Tensor | None) -> None:
        for block in self.gated:
            block.reset(embedded)
        if self.features is not None:
            assert features is not None
            self.features.copy_(rearrange(features, "b i j e -> i (j b) e"))

    def begin_row(self, row: int) -> None:
        super().begin_row(row)
        if self.features is not None:
            self.row_features.copy_(self.features[row])

    def start(self, column: int) -> Float[Tensor, "b c"]:
        if column == 0:
            self._run_row()
        x = self.positions[column].expand(len(self.row), -1).contiguous()
        if column:
            x += self.weights.embedding[self.row[:, column - 1]]
        return x

    def _run_row(self) -> None:
        """The vertical stack of this row, for all its columns."""
        x = (self.positions[:, None] + self.weights.embedding[self.above.t()]).flatten(0, 1)
        for block in self.gated:
            block.run_row(x, None if self.features is None else self.row_features)
