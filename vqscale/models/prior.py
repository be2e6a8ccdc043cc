"""What the priors of one level share: their config, the stack over the levels above, the head, the likelihood.

In: codes [b, h, w], labels [b], the codes of all levels above.  Out: logits [b, K, h, w]; those at a place depend on
the codes before it in raster order only. `pixelcnn.py` and `transformer.py` are the two ways from one to the other.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vqscale.models.causal import Block, ConditioningBlock, normalise

Grid = tuple[int, int]


def _pixelcnn_only(default: Any) -> Any:
    """A field that the transformer has no use for."""
    return field(default=default, metadata={"kind": "pixelcnn"})


@dataclass(frozen=True)
class PriorConfig:
    """Size and shape of one prior. The grid, K and the classes come from the data, not from here."""

    kind: str = "pixelcnn"  # pixelcnn | transformer; keys of the pixelcnn alone are refused by the other
    hidden: int = 128  # channels: of both streams of the pixelcnn, of the transformer's tokens
    residual: int = 128  # channels inside a block: the width of the gate, pixelcnn's or SwiGLU's
    layers: int = 6  # gated blocks, or transformer blocks
    attention_every: int = _pixelcnn_only(0)  # a causal self-attention block after every so many gated blocks; 0 = none
    heads: int = 8  # heads of attention; divides hidden
    filter: int = _pixelcnn_only(5)  # kernel size k, odd: (k // 2 + 1) x k taps above, k // 2 + 1 taps to the left
    dropout: float = 0.0  # after each residual branch, attention's among them
    output_layers: int = _pixelcnn_only(2)  # residual 1x1 blocks between the last gated block and the logits
    output_residual: int = _pixelcnn_only(0)  # channels inside those; 0 = hidden
    conditioning_layers: int = 4  # residual blocks over the codes of the levels above; not built for the top level
    conditioning_hidden: int = 0  # channels of that stack; 0 = hidden
    conditioning_filter: int = 3  # its kernel size, odd
    class_dim: int = _pixelcnn_only(128)  # width of the class embedding; the transformer's is a token of width hidden
    class_dropout: float = 0.0  # share of training samples that lose their class, for classifier-free guidance
    activation_checkpointing: bool = False  # recompute each block in backward: less memory, a third more time


def _check(config: PriorConfig, kind: str) -> None:
    """Raises ValueError for sizes that cannot be, and for keys that this kind would not read."""
    for f in fields(PriorConfig):
        value = getattr(config, f.name)
        if f.metadata.get("kind", kind) != kind and value != f.default:
            raise ValueError(f"model.{f.name}={value} is a key of model.kind={f.metadata['kind']}: leave it out")
    for name in ("filter", "conditioning_filter"):
        if getattr(config, name) % 2 == 0:
            raise ValueError(f"model.{name} must be odd, got {getattr(config, name)}")
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


def resize_nearest(x: Tensor, grid: Grid) -> Tensor:
    """[b, h', w', ...] -> [b, h, w, ...], each place taking what covers its centre."""
    height, width = x.shape[1:3]
    rows = (2 * torch.arange(grid[0], device=x.device) + 1) * height // (2 * grid[0])
    columns = (2 * torch.arange(grid[1], device=x.device) + 1) * width // (2 * grid[1])
    return x[:, rows[:, None], columns[None]]


class LevelPrior(nn.Module):
    """What both kinds are: their data's shape, their units, their size.

    num_codes: K. grid: (h, w) of this level. num_classes: labels are 0 ... num_classes - 1, and num_classes itself
    means "no class". upper_grids: the grids of all levels above, top first; empty for the top level.
    """

    kind: ClassVar[str]  # the word for it in `model.kind`

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
        _check(config, self.kind)
        self.config, self.num_codes, self.num_classes = config, num_codes, num_classes
        self.grid: Grid = (grid[0], grid[1])
        self.upper_grids: list[Grid] = [(h, w) for h, w in upper_grids]

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
