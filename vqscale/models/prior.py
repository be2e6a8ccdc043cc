"""What the priors of one level share: config, embeddings, the stack over the levels above, cache, likelihood.

In: codes [b, h, w], labels [b], the codes of all levels above.  Out: logits [b, k, h, w]; those at a position depend on
the codes before it in raster order only. `pixelcnn.py` and `transformer.py` are the two ways from one to the other.

Legend: b batch, h w grid, k codes, c hidden, e conditioning.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from vqscale.fields import Choice, NonNegativeInt, PositiveInt, Range, check_values
from vqscale.models.causal import (
    CachedBlock,
    CachedLinear,
    CheckpointableBlock,
    ConditioningBlock,
    Key,
    PastAttention,
    normalise,
)
from vqscale.models.dropout import drop_labels
from vqscale.models.init import with_init_scale

Grid = tuple[int, int]
Codes = Int[Tensor, "b h w"]
Labels = Int[Tensor, " b"]


def _pixelcnn_only(default: Any) -> Any:
    """A field that the transformer has no use for."""
    return field(default=default, metadata={"kind": "pixelcnn"})


@dataclass(frozen=True)
class PriorConfig:
    """Size and shape of one prior. The grid, K and the classes come from the data, not from here."""

    kind: Annotated[str, Choice("pixelcnn", "transformer")] = "pixelcnn"  # each refuses the other's keys
    hidden: PositiveInt = 128  # channels: of both streams of the pixelcnn, of the transformer's tokens
    residual: PositiveInt = 128  # channels inside a block: the width of the gate, pixelcnn's or SwiGLU's
    layers: PositiveInt = 6  # gated blocks, or transformer blocks
    attention_every: NonNegativeInt = _pixelcnn_only(0)  # gated blocks per causal self-attention block; 0 = none
    heads: PositiveInt = 8  # heads of attention; divides hidden
    filter: PositiveInt = _pixelcnn_only(5)  # kernel size k, odd: (k // 2 + 1) x k taps above, k // 2 + 1 left
    dropout: Annotated[float, Range(ge=0, lt=1)] = 0.0  # after each residual branch, attention's among them
    output_layers: NonNegativeInt = _pixelcnn_only(2)  # residual 1x1 blocks between the last gated block and the logits
    output_residual: NonNegativeInt = _pixelcnn_only(0)  # channels inside those; 0 = hidden
    conditioning_layers: NonNegativeInt = 4  # residual blocks over the codes of the levels above, if there are any
    conditioning_hidden: NonNegativeInt = 0  # channels of that stack; 0 = hidden
    conditioning_filter: PositiveInt = 3  # its kernel size, odd
    class_dim: PositiveInt = _pixelcnn_only(128)  # width of the class embedding; the transformer's is hidden
    class_dropout: Annotated[float, Range(ge=0, lt=1)] = 0.0  # share of samples trained without class, for guidance
    activation_checkpointing: bool = False  # recompute each block in backward: less memory, a third more time

    def __post_init__(self) -> None:
        check_values(self)
        for name in ("filter", "conditioning_filter"):
            if getattr(self, name) % 2 == 0:
                raise ValueError(f"model.{name} must be odd, got {getattr(self, name)}")


def _check_kind(config: PriorConfig, kind: str) -> None:
    """Raises ValueError for keys that this kind would not read."""
    for f in fields(PriorConfig):
        value = getattr(config, f.name)
        if f.metadata.get("kind", kind) != kind and value != f.default:
            raise ValueError(f"model.{f.name}={value} is a key of model.kind={f.metadata['kind']}: leave it out")


class Conditioning(nn.Module):
    """Codes of the levels above -> features on a grid."""

    def __init__(self, config: PriorConfig, num_codes: int, grid: Grid, upper_grids: Sequence[Grid]):
        super().__init__()
        self.grid, self.width = grid, config.conditioning_hidden or config.hidden
        self.embeddings = nn.ModuleList(nn.Embedding(num_codes, self.width) for _ in upper_grids)
        self.row = nn.Embedding(grid[0], self.width)
        self.column = nn.Embedding(grid[1], self.width)
        self.blocks = nn.ModuleList(
            ConditioningBlock(self.width, config.residual, config.conditioning_filter, config.dropout, layer)
            for layer in range(config.conditioning_layers)
        )

    def forward(self, upper: Sequence[Int[Tensor, "b _ _"]], key: Key | None) -> Float[Tensor, "b h w e"]:
        """upper: codes of each level above, top first, resized to this grid by the nearest code."""
        x = self.row.weight[:, None] + self.column.weight
        for embedding, codes in zip(self.embeddings, upper, strict=True):
            x = x + embedding(resize_nearest(codes, self.grid))
        for block in self.blocks:
            x = block(x, key)
        return normalise(x)


def resize_nearest(x: Shaped[Tensor, "b u v *c"], grid: Grid) -> Shaped[Tensor, "b h w *c"]:
    """Resized to the grid, each position taking what covers its centre."""
    height, width = x.shape[1:3]
    rows = (2 * torch.arange(grid[0], device=x.device) + 1) * height // (2 * grid[0])
    columns = (2 * torch.arange(grid[1], device=x.device) + 1) * width // (2 * grid[1])
    return x[:, rows[:, None], columns[None]]


class LevelPrior(nn.Module):
    """What both kinds are: their data's shape, their embeddings, their units, their size.

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
        class_dim: int = 0,
    ):
        """class_dim: width of the class embedding; 0 = hidden."""
        super().__init__()
        _check_kind(config, self.kind)
        self.config, self.num_codes, self.num_classes = config, num_codes, num_classes
        self.grid: Grid = (grid[0], grid[1])
        self.upper_grids: list[Grid] = [(h, w) for h, w in upper_grids]
        self.embedding = nn.Embedding(num_codes, config.hidden)
        self.row = nn.Embedding(self.grid[0], config.hidden)
        self.column = nn.Embedding(self.grid[1], config.hidden)
        self.label = nn.Embedding(num_classes + 1, class_dim or config.hidden)
        self.conditioning: Conditioning | None = None

    def finish(self) -> None:
        """The last step of building one: the head, and the config's word on recomputing blocks."""
        self.logits = with_init_scale(nn.Linear(self.config.hidden, self.num_codes), 0.1)  # the first loss: near ln K
        for block in self.wrap_units():
            block.activation_checkpointing = self.config.activation_checkpointing

    def positions(self) -> Float[Tensor, "h w c"]:
        """The embedding of every position."""
        return self.row.weight[:, None] + self.column.weight

    def condition(
        self, label: Labels, upper: Sequence[Tensor], key: Key | None = None
    ) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b u v e"] | None]:
        """(class embeddings, features of the levels above or None), with dropout where there is a key."""
        if self.training:
            label = drop_labels(label, key, self.config.class_dropout, self.num_classes)
        return self.label(label), None if self.conditioning is None else self.conditioning(upper, key)

    def wrap_units(self) -> list[CheckpointableBlock]:
        """The blocks, in order: the units of checkpointing, compilation and sharding."""
        return [module for module in self.modules() if isinstance(module, CheckpointableBlock)]

    def num_parameters(self) -> dict[str, int]:
        """{"layers": parameters of convolutions and linear layers, "embeddings": those of the embedding tables}."""
        embeddings = sum(module.weight.numel() for module in self.modules() if isinstance(module, nn.Embedding))
        return {"layers": sum(p.numel() for p in self.parameters()) - embeddings, "embeddings": embeddings}


class PriorWeights:
    """A prior's weights as cached sampling reads them: rearranged once, on the prior's device, in the given precision.

    Subclasses have `make_state`.
    """

    make_state: Callable[[int], "PriorState"]  # batch -> memory for it

    def __init__(self, prior: LevelPrior, dtype: torch.dtype):
        self.prior, self.dtype = prior, dtype
        self.embedding = F.pad(prior.embedding.weight.to(dtype), (0, 0, 0, 1))  # the last row: no code above
        self.positions = prior.positions().to(dtype)
        self.head = CachedLinear(prior.logits, dtype)
        self._state: PriorState | None = None

    def state(self, batch: int) -> "PriorState":
        """Memory for a batch: that of the batch before where it had the same size."""
        if self._state is None or len(self._state.codes) != batch:
            self._state = None  # its memory first
            self._state = self.make_state(batch)
        return self._state


class PriorState:
    """A prior one code at a time, for a batch: all that later codes need is kept, in memory taken once.

    `reset`, then for every row `begin_row`, `next_logits` of its columns, and `end_row`. `row` has the codes that were
    chosen in this row; the caller fills it. Subclasses fill `blocks` and have `condition` and `start`.
    """

    condition: Callable[
        [Tensor, Tensor | None], None
    ]  # class embeddings and features: what `LevelPrior.condition` gives
    start: Callable[[int], Tensor]  # column -> the stream [b, c] before the first block

    def __init__(self, weights: PriorWeights, batch: int):
        self.weights, (height, self.width) = weights, weights.prior.grid
        self.codes = weights.embedding.new_zeros(batch, height, self.width, dtype=torch.int64)
        self.row, self.above = torch.zeros_like(self.codes[:, 0]), torch.zeros_like(self.codes[:, 0])
        self.positions = torch.zeros_like(weights.positions[0])  # of this row
        self.blocks: list[CachedBlock] = []
        self.buffers: list[Tensor] = []  # besides those of the blocks
        self.samplers: dict[Any, Any] = {}  # with the graphs that a GPU replays; see `sampling.RowSampler`

    def reset(self, label: Labels, upper: Sequence[Tensor]) -> None:
        """Begin a batch of these classes, with the codes above. In the precision of sampling: the stack over the codes
        above is half of a lower level's arithmetic."""
        dtype = self.weights.dtype
        with torch.autocast(label.device.type, dtype, enabled=dtype in (torch.bfloat16, torch.float16)):
            self.condition(*self.weights.prior.condition(label, upper))

    @property
    def attended(self) -> tuple[int, ...]:
        """What of this row is not in memory: how many positions above it its attentions read."""
        return tuple(block.past for block in self.blocks if isinstance(block, PastAttention))

    def begin_row(self, row: int) -> None:
        self.positions.copy_(self.weights.positions[row])
        if row:
            self.above.copy_(self.codes[:, row - 1])
        else:
            self.above.fill_(self.weights.prior.num_codes)
        for block in self.blocks:
            block.begin_row(row)

    def next_logits(self, column: int) -> Float[Tensor, "b k"]:
        """Of one position of the row, given the codes before it."""
        x = self.start(column)
        for block in self.blocks:
            block.step(x, column)
        return self.weights.head(normalise(x))

    def end_row(self, row: int) -> None:
        self.codes[:, row] = self.row
        for block in self.blocks:
            block.end_row(row)

    def bytes_per_sample(self) -> int:
        """Memory that one more sample in the batch takes, weights apart."""
        buffers = [*self.buffers, *(buffer for block in self.blocks for buffer in block.buffers)]
        return sum(buffer.nbytes for buffer in buffers) // len(self.codes)


def code_nll(logits: Float[Tensor, "b k h w"], codes: Codes) -> Float[Tensor, "b h w"]:
    """Negative log-likelihood of each code in nats.

    Computed in float32 (float64 for float64 logits) whatever the precision of the model.
    """
    flat = rearrange(logits, "b k i j -> (b i j) k").to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(flat, codes.reshape(-1), reduction="none").view(codes.shape)


def nll(logits: Float[Tensor, "b k h w"], codes: Codes) -> Float[Tensor, ""]:
    """Mean of `code_nll`: nats per code."""
    return code_nll(logits, codes).mean()
