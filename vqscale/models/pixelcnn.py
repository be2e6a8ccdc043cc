"""The prior of one level of codes: a two-stack, class-conditional PixelCNN with causal self-attention.

In: codes [b, h, w], labels [b], the codes of all levels above.  Out: logits [b, K, h, w]; those at a place depend on
the codes before it in raster order only.

Sources: van den Oord et al. 2016b (gated two-stack PixelCNN), Chen et al. 2018 (self-attention between the
convolutions), Razavi et al. 2019, section 3.2 and appendix (attention every n layers, 1x1 output stack, conditioning
stack over the upper levels, dropout).
"""

from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from vqscale.models.cache import PixelCNNCache
from vqscale.models.causal import AttentionBlock, GatedBlock, PointwiseBlock, normalise, shift_down, shift_right
from vqscale.models.dropout import drop_labels
from vqscale.models.prior import Conditioning, Head, LevelPrior, PriorConfig


class PixelCNN(LevelPrior):
    """p(codes | class, levels above), one factor per code in raster order."""

    kind = "pixelcnn"

    def __init__(self, config: PriorConfig, **shape: Any):
        """`shape`: num_codes, grid, num_classes, upper_grids; see `LevelPrior`."""
        super().__init__(config, **shape)
        if config.attention_every and config.hidden % config.heads:
            raise ValueError(f"model.hidden={config.hidden} is not divisible by model.heads={config.heads}")
        hidden, p = config.hidden, config.dropout
        self.embedding = nn.Embedding(self.num_codes, hidden)
        self.row = nn.Embedding(self.grid[0], hidden)
        self.column = nn.Embedding(self.grid[1], hidden)
        self.label = nn.Embedding(self.num_classes + 1, config.class_dim)
        self.conditioning: Conditioning | None = None
        if self.upper_grids:
            self.conditioning = Conditioning(
                config, num_codes=self.num_codes, grid=self.grid, upper_grids=self.upper_grids, layer=0
            )
        site = config.conditioning_layers  # numbers the places of dropout
        features = self.conditioning.width if self.conditioning else 0
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
        self.logits = Head(hidden, self.num_codes)
        for block in self.wrap_units():
            block.activation_checkpointing = config.activation_checkpointing

    def forward(
        self, codes: Tensor, label: Tensor, upper: Sequence[Tensor] = (), *, dropout_key: Tensor | None = None
    ) -> Tensor:
        """codes: int64 [b, h, w] in 0 ... K - 1; label: int64 [b]; upper: int64 [b, h', w'] per level above, top
        first; dropout_key: int64 [b] from `dropout_key(seed, position)`, None = no dropout.  Logits [b, K, h, w].
        `codes` may hold the first rows only: so do the logits.
        """
        if self.training:
            label = drop_labels(label, dropout_key, self.config.class_dropout, self.num_classes)
        features = self.conditioning(upper, dropout_key) if self.conditioning is not None else None
        rows = codes.shape[1]
        features = None if features is None else features[:, :rows]
        place = self.row.weight[:rows, None] + self.column.weight
        embedded, label = self.embedding(codes), self.label(label)
        vertical, horizontal = shift_down(embedded) + place, shift_right(embedded) + place
        for block in self.blocks:
            if isinstance(block, GatedBlock):
                vertical, horizontal = block(vertical, horizontal, label, features, dropout_key)
            else:
                horizontal = block(horizontal, dropout_key)
        for block in self.output:
            horizontal = block(horizontal, dropout_key)
        return rearrange(self.logits(normalise(horizontal)), "b i j k -> b k i j")

    def incremental(self, codes: Tensor, label: Tensor, upper: Sequence[Tensor], dtype: torch.dtype) -> PixelCNNCache:
        """What cached sampling calls: place -> logits [b, K], given the places before it in `codes`, filled meanwhile.

        codes: int64 [b, h, w]; label: int64 [b]; upper as in `forward`. Places must come in raster order, each once.
        """
        features = self.conditioning(upper, None) if self.conditioning is not None else None
        return PixelCNNCache(self, codes, self.label(label), features, dtype)
