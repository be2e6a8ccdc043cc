"""The prior of one level of codes: a two-stack, class-conditional PixelCNN with causal self-attention.

In: codes [b, h, w], labels [b], the codes of all levels above.  Out: logits [b, K, h, w]; those at a place depend on
the codes before it in raster order only.

Sources: van den Oord et al. 2016b (gated two-stack PixelCNN), Chen et al. 2018 (self-attention between the
convolutions), Razavi et al. 2019, section 3.2 and appendix (attention every n layers, 1x1 output stack, conditioning
stack over the upper levels, dropout).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vqscale.models.cache import PixelCNNCache
from vqscale.models.causal import (
    AttentionBlock,
    Block,
    ConditioningBlock,
    GatedBlock,
    PointwiseBlock,
    normalise,
    shift_down,
    shift_right,
)
from vqscale.models.dropout import drop_labels

Grid = tuple[int, int]


@dataclass(frozen=True)
class PriorConfig:
    """Size and shape of one prior. The grid, K and the classes come from the data, not from here."""

    kind: str = "pixelcnn"  # which prior
    hidden: int = 128  # channels of both streams
    residual: int = 128  # channels inside a residual block: the width of the gate
    layers: int = 6  # gated blocks
    attention_every: int = 0  # a causal self-attention block after every so many gated blocks; 0 = none
    heads: int = 8  # heads of self-attention; divides hidden
    filter: int = 5  # kernel size k, odd: (k // 2 + 1) x k taps above, k // 2 + 1 taps to the left
    dropout: float = 0.0  # after each residual block and on the attention's output
    output_layers: int = 2  # residual 1x1 blocks between the last gated block and the logits
    output_residual: int = 0  # channels inside those; 0 = hidden
    conditioning_layers: int = 4  # residual blocks over the codes of the levels above; not built for the top level
    conditioning_hidden: int = 0  # channels of that stack; 0 = hidden
    conditioning_filter: int = 3  # its kernel size, odd
    class_dim: int = 128  # width of the class embedding
    class_dropout: float = 0.0  # share of training samples that lose their class, for classifier-free guidance
    activation_checkpointing: bool = False  # recompute each block in backward: less memory, a third more time


def _check(config: PriorConfig) -> None:
    for name in ("filter", "conditioning_filter"):
        if getattr(config, name) % 2 == 0:
            raise ValueError(f"model.{name} must be odd, got {getattr(config, name)}")
    if config.attention_every and config.hidden % config.heads:
        raise ValueError(f"model.hidden={config.hidden} is not divisible by model.heads={config.heads}")
    if not 0 <= config.class_dropout < 1:
        raise ValueError(f"model.class_dropout must be in [0, 1), got {config.class_dropout}")


class Conditioning(nn.Module):
    """Codes of the levels above -> features on this level's grid [b, h, w, e]."""

    def __init__(self, config: PriorConfig, *, num_codes: int, grid: Grid, upper_grids: Sequence[Grid], layer: int):
        super().__init__()
        self.grid, self.width = grid, config.conditioning_hidden or config.hidden
        self.embeddings = nn.ModuleList(nn.Embedding(num_codes, self.width) for _ in upper_grids)
        self.row = nn.Embedding(grid[0], self.width)
        self.column = nn.Embedding(grid[1], self.width)
        self.blocks = nn.ModuleList(
            ConditioningBlock(self.width, config.residual, config.conditioning_filter, config.dropout, layer + n)
            for n in range(config.conditioning_layers)
        )

    def forward(self, upper: Sequence[Tensor], key: Tensor | None) -> Tensor:
        """upper: int64 [b, h', w'] per level above, top first, resized to this grid by the nearest code."""
        x = self.row.weight[:, None] + self.column.weight
        for embedding, codes in zip(self.embeddings, upper, strict=True):
            x = x + embedding(resize_nearest(codes, self.grid))
        for block in self.blocks:
            x = block(x, key)
        return normalise(x)


class Head(nn.Linear):
    """Channels -> logits. Starts small: the first loss is near ln K."""

    init_scale = 0.1


def resize_nearest(codes: Tensor, grid: Grid) -> Tensor:
    """Integer codes [b, h', w'] -> [b, h, w], each place taking the code that covers its centre."""
    height, width = codes.shape[1:]
    rows = (2 * torch.arange(grid[0], device=codes.device) + 1) * height // (2 * grid[0])
    columns = (2 * torch.arange(grid[1], device=codes.device) + 1) * width // (2 * grid[1])
    return codes[:, rows[:, None], columns[None]]


class PixelCNN(nn.Module):
    """p(codes | class, levels above), one factor per code in raster order.

    num_codes: K. grid: (h, w) of this level. num_classes: labels are 0 ... num_classes - 1, and num_classes itself
    means "no class". upper_grids: the grids of all levels above, top first; empty for the top level.
    """

    def __init__(
        self,
        config: PriorConfig,
        *,
        num_codes: int,
        grid: Grid,
        num_classes: int,
        upper_grids: Sequence[Grid] = (),
    ):
        super().__init__()
        _check(config)
        self.config, self.num_codes, self.num_classes = config, num_codes, num_classes
        self.grid: Grid = (grid[0], grid[1])
        self.upper_grids: list[Grid] = [(h, w) for h, w in upper_grids]
        hidden, p = config.hidden, config.dropout
        self.embedding = nn.Embedding(num_codes, hidden)
        self.row = nn.Embedding(grid[0], hidden)
        self.column = nn.Embedding(grid[1], hidden)
        self.label = nn.Embedding(num_classes + 1, config.class_dim)
        self.conditioning: Conditioning | None = None
        if self.upper_grids:
            self.conditioning = Conditioning(
                config, num_codes=num_codes, grid=self.grid, upper_grids=self.upper_grids, layer=0
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
        self.logits = Head(hidden, num_codes)
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

    def incremental(
        self, codes: Tensor, label: Tensor, upper: Sequence[Tensor], dtype: torch.dtype
    ) -> Callable[[int], Tensor]:
        """What cached sampling calls: place -> logits [b, K], given the places before it in `codes`, filled meanwhile.

        codes: int64 [b, h, w]; label: int64 [b]; upper as in `forward`. Places must come in raster order, each once.
        """
        features = self.conditioning(upper, None) if self.conditioning is not None else None
        return PixelCNNCache(self, codes, self.label(label), features, dtype)

    def wrap_units(self) -> list[Block]:
        """The blocks, in order: the units of checkpointing, compilation and sharding."""
        return [module for module in self.modules() if isinstance(module, Block)]

    def num_parameters(self) -> dict[str, int]:
        """{"layers": parameters of convolutions and linear layers, "embeddings": those of the embedding tables}."""
        embeddings = sum(p.numel() for p in _embedding_weights(self))
        return {"layers": sum(p.numel() for p in self.parameters()) - embeddings, "embeddings": embeddings}


def _embedding_weights(model: nn.Module) -> Iterator[Tensor]:
    return (module.weight for module in model.modules() if isinstance(module, nn.Embedding))


def code_nll(logits: Tensor, codes: Tensor) -> Tensor:
    """Negative log-likelihood of each code in nats: logits [b, K, h, w], codes int64 [b, h, w] -> float32 [b, h, w].

    Computed in float32 (float64 for float64 logits) whatever the precision of the model.
    """
    flat = rearrange(logits, "b k i j -> (b i j) k")
    flat = flat if flat.dtype == torch.float64 else flat.float()
    return F.cross_entropy(flat, codes.reshape(-1), reduction="none").view(codes.shape)


def nll(logits: Tensor, codes: Tensor) -> Tensor:
    """Mean of `code_nll`: nats per code, a scalar."""
    return code_nll(logits, codes).mean()
