"""Ancestral sampling from a prior, one code at a time: cached, and the slow reference that it must equal.

In: a prior (anything with the members of `Prior`), labels [b], the codes of the levels above, sample ids [b].
Out: codes [b, h, w].

Randomness is addressed: the uniform of a code depends on (seed, level, sample id, position) and on nothing else, so
sample i is the same in any batch, on any rank.

Legend: b batch, h w grid, k codes, t = h w positions in raster order.
"""

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from vqscale.batch import float64_device
from vqscale.seeding import key_of, mix, uniform_array

log = logging.getLogger("vqscale")
_WARM_UPS = 3  # rows that run eagerly before a graph is captured, as libraries choose their kernels then


def _linear(s: Tensor) -> Tensor:
    return s


def _cosine(s: Tensor) -> Tensor:
    return (1 - torch.cos(math.pi * s)) / 2


# The share of the guidance weight that a code has, by its place s in raster order: 0 at the first, 1 at the last.
SCHEDULES: dict[str, Callable[[Tensor], Tensor]] = {"constant": torch.ones_like, "linear": _linear, "cosine": _cosine}
WHOLE = (0.0, 1.0)  # the interval of all codes
# Options of `sample_codes` that have a value for each level.
PER_LEVEL = (
    *("temperature", "temperature_end", "top_k", "top_p", "guidance", "guidance_schedule", "guidance_interval"),
)


class Options(NamedTuple):
    """How codes are chosen from logits. heat: the temperature of all codes if it is 0 or 1, else None. guided: whether
    the batch has its samples a second time, without class. graphs: a GPU replays rows."""

    heat: float | None
    top_k: int
    top_p: float
    guided: bool
    graphs: bool = True


class State(Protocol):
    """A prior one code at a time, for a batch, in fixed memory; see `prior.PriorState`."""

    codes: Tensor  # [b, h, w]
    row: Tensor  # [b, w]
    samplers: "dict[Options, RowSampler]"

    @property
    def attended(self) -> tuple[int, ...]: ...
    def reset(self, label: Tensor, upper: Sequence[Tensor]) -> None: ...
    def begin_row(self, row: int) -> None: ...
    def next_logits(self, column: int) -> Tensor: ...
    def end_row(self, row: int) -> None: ...


class Weights(Protocol):
    """A prior's weights, rearranged for sampling."""

    def state(self, batch: int) -> State: ...


class Prior(Protocol):
    """What sampling needs of a prior. Calling it with the first rows of codes gives the logits of those rows."""

    num_codes: int
    num_classes: int
    grid: tuple[int, int]
    upper_grids: list[tuple[int, int]]

    def __call__(self, codes: Tensor, label: Tensor, upper: Sequence[Tensor] = ()) -> Tensor: ...
    def sampling_weights(self, dtype: torch.dtype) -> Weights: ...
    def parameters(self) -> Any: ...


class Reference:
    """The slow `State`: a full forward over the rows so far, again for every code."""

    attended: tuple[int, ...] = ()

    def __init__(self, prior: Prior, batch: int, device: torch.device):
        self._prior, self._current, self.samplers = prior, 0, dict[Options, RowSampler]()
        self.codes = torch.zeros(batch, *prior.grid, dtype=torch.int64, device=device)

    def reset(self, label: Tensor, upper: Sequence[Tensor]) -> None:
        self._given = label, upper

    def begin_row(self, row: int) -> None:
        self._current, self.row = row, self.codes[:, row]

    def next_logits(self, column: int) -> Tensor:
        return self._prior(self.codes[:, : self._current + 1], *self._given)[:, :, self._current, column]

    def end_row(self, row: int) -> None:
        """`row` is a view of `codes`."""


class RowSampler:
    """Draws the codes of a batch row by row. On a GPU a row is captured once as a graph, and replayed.

    What depends on the row, the samples, the temperature or the guidance weight is copied to fixed memory first. What
    remains is the same work for every row from which its attentions read equally far.
    """

    def __init__(self, state: State, options: Options):
        self._state, self._options = state, options
        (rows, self._width), device = state.codes[:, 0].shape, state.codes.device
        self._batch = rows // 2 if options.guided else rows
        self._chooses_on = float64_device(device)
        self._uniforms = torch.zeros(self._width, self._batch, dtype=torch.float64, device=self._chooses_on)
        self._temperatures = torch.zeros(self._width, dtype=torch.float64, device=self._chooses_on)
        self._guidance = torch.zeros(self._width, dtype=torch.float64, device=self._chooses_on)
        self._graphs: dict[tuple[int, ...], tuple[Any, Tensor]] = {}  # with the last logits, which each leaves behind
        self._captures = options.graphs and device.type == "cuda" and not isinstance(state, Reference)

    def draw(
        self,
        row: int,
        uniforms: Float[Tensor, "w b"],
        temperatures: Float[Tensor, " w"],
        guidance: Float[Tensor, " w"] | None = None,
    ) -> None:
        """Choose the codes of a row, given those of the rows above. guidance: weights, which guided batches need.

        Raises ValueError for logits that are not finite.
        """
        self._state.begin_row(row)
        self._uniforms.copy_(uniforms)
        self._temperatures.copy_(temperatures)
        if guidance is not None:
            self._guidance.copy_(guidance)
        logits = self._replay() if self._captures else self._choose()
        self._state.end_row(row)
        if not logits.isfinite().all():  # once a row: each look waits for the device
            raise ValueError(f"the prior's logits are not finite in row {row}: weights too large for {logits.dtype}")

    def _choose(self) -> Float[Tensor, "b k"]:
        """Fill `state.row`. Returns the last column's logits. To do it twice changes nothing."""
        heat, top_k, top_p, guided, _ = self._options
        for column in range(self._width):
            logits = self._state.next_logits(column).to(self._chooses_on)
            if guided:
                scale = (1 + self._guidance[column]).to(logits.dtype)
                logits = torch.lerp(logits[self._batch :], logits[: self._batch], scale)
            temperature = self._temperatures[column] if heat is None else heat
            chosen = choose(logits, self._uniforms[column], temperature=temperature, top_k=top_k, top_p=top_p)
            self._state.row[:, column] = chosen.repeat(2) if guided else chosen
        return logits

    def _replay(self) -> Float[Tensor, "b k"]:
        key = self._state.attended
        if key not in self._graphs:
            try:
                self._graphs[key] = self._capture()
            except RuntimeError as error:
                log.warning("sampling goes on without CUDA graphs, which is slower: %s", str(error).splitlines()[0])
                self._captures = False
                return self._choose()
        graph, logits = self._graphs[key]
        graph.replay()
        return logits

    def _capture(self) -> tuple[Any, Float[Tensor, "b k"]]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                self._choose()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self._graphs.values()))[0].pool() if self._graphs else None
        with torch.cuda.graph(graph, pool=pool):
            logits = self._choose()
        return graph, logits


@torch.inference_mode()
def sample_codes(
    prior: Prior,
    label: Int[Tensor, " b"],
    upper: Sequence[Int[Tensor, "_ _ _"]] = (),
    *,
    seed: int,
    sample_ids: Int[Tensor, " _"],
    temperature: float = 1.0,
    temperature_end: float | None = None,
    top_k: int = 0,
    top_p: float = 1.0,
    guidance: float = 0.0,
    guidance_schedule: str = "constant",
    guidance_interval: Sequence[float] = WHOLE,
    cached: bool = True,
    dtype: torch.dtype | None = None,
    weights: Weights | None = None,
    graphs: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Int[Tensor, "b h w"]:
    """Codes drawn from the prior, on its device.

    label: 0 ... num_classes (that last one = no class). upper: codes of each level above, top first. sample_ids: which
    sample each row is. temperature >= 0 (0 = the likeliest code): the first code's; temperature_end: the last code's,
    in between linear in raster order, None = the same. top_k: keep the k likeliest codes (0 = all); top_p in (0, 1]:
    keep the likeliest codes up to that mass (nucleus, Holtzman et al. 2020). guidance w: logits (1 + w) conditional - w
    unconditional (Ho and Salimans 2022, equation 6, on logits), at twice the cost; needs a prior trained with
    class_dropout. guidance_schedule, guidance_interval: how w changes along the codes, see `guidance_weights`.
    cached=False runs a full forward per code. dtype: of cached arithmetic; default that of the weights.
    weights: of this prior, from `sampling_weights`; saves their rearranging, and memory and graphs are used again.
    graphs=False: a GPU runs every row kernel by kernel, which is slower and draws the same.
    progress(rows done, rows) is called after each row.

    Raises ValueError for labels, ids, codes above or options that do not fit.
    """
    end = temperature if temperature_end is None else temperature_end
    _check(prior, label, upper, sample_ids)
    _check_options(temperature, end, top_k, top_p, guidance)
    check_guidance(guidance_schedule, guidance_interval)
    weight = next(prior.parameters())
    label, upper = label.to(weight.device), [codes.to(weight.device) for codes in upper]
    (height, width), batch = prior.grid, len(label)
    along = guidance_weights(guidance, guidance_schedule, guidance_interval, height * width).view(height, width)
    if guided := bool(along.any()):
        label = torch.cat((label, torch.full_like(label, prior.num_classes)))
        upper = [codes.repeat(2, 1, 1) for codes in upper]
    if cached:
        state = (weights or prior.sampling_weights(dtype or weight.dtype)).state(len(label))
    else:
        state = Reference(prior, len(label), weight.device)
    heat = temperature if temperature == end and temperature in (0, 1) else None
    options = Options(heat, top_k, top_p, guided, graphs)
    if options not in state.samplers:
        state.samplers[options] = RowSampler(state, options)
    temperatures = torch.linspace(temperature, end, height * width, dtype=torch.float64).view(height, width)
    uniforms = draw_uniforms(seed, len(prior.upper_grids), sample_ids, height * width).unflatten(0, (height, width))
    device = float64_device(weight.device)
    temperatures, uniforms, along = (rows.to(device) for rows in (temperatures, uniforms, along))
    state.reset(label, upper)
    for row in range(height):
        state.samplers[options].draw(row, uniforms[row], temperatures[row], along[row])
        if progress is not None:
            progress(row + 1, height)
    return state.codes[:batch].clone()


def _check(prior: Prior, label: Tensor, upper: Sequence[Tensor], ids: Tensor) -> None:
    if label.ndim != 1 or label.shape != ids.shape:
        raise ValueError(f"label has shape {tuple(label.shape)}, sample_ids {tuple(ids.shape)}: both must be [b]")
    if len(label) and not 0 <= int(label.min()) <= int(label.max()) <= prior.num_classes:
        raise ValueError(
            f"labels {int(label.min())} ... {int(label.max())} do not fit a prior of {prior.num_classes} classes"
        )
    shapes = [tuple(codes.shape) for codes in upper]
    expected = [(len(label), *grid) for grid in prior.upper_grids]
    if shapes != expected:
        raise ValueError(f"codes above have shapes {shapes}, the prior needs {expected}")


def _check_options(temperature: float, end: float, top_k: int, top_p: float, guidance: float) -> None:
    for name, value in {"temperature": temperature, "temperature_end": end}.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name}={value} must be >= 0")
    if top_k < 0 or not 0 < top_p <= 1 or not math.isfinite(guidance):
        raise ValueError(f"top_k={top_k} must be >= 0, top_p={top_p} in (0, 1], guidance={guidance} finite")


def check_guidance(schedule: str, interval: Sequence[float]) -> None:
    """Raises ValueError for a schedule that there is not, or an interval that is none."""
    if schedule not in SCHEDULES:
        raise ValueError(f"guidance_schedule={schedule}: choose from {', '.join(SCHEDULES)}")
    if len(interval) != 2 or not 0 <= interval[0] <= interval[1] <= 1:
        raise ValueError(f"guidance_interval={list(interval)}: takes [first, last], 0 <= first <= last <= 1")


def guidance_weights(weight: float, schedule: str, interval: Sequence[float], positions: int) -> Float[Tensor, " t"]:
    """The guidance weight of each code, float64; at 0 a code is drawn as without guidance.

    With s = position / (positions - 1) in raster order: constant: w; linear: s w (Chang et al. 2023, Muse, arXiv
    2301.00704: the scale rises linearly while tokens are drawn); cosine: (1 - cos(pi s)) / 2 w (Gao et al. 2023, MDT,
    arXiv 2303.14389, at power 1). Outside interval[0] <= s <= interval[1] it is 0 (after Kynkäänniemi et al. 2024,
    arXiv 2404.07724, who limit guidance to an interval of a diffusion's noise levels).
    """
    place = torch.linspace(0, 1, positions, dtype=torch.float64)
    inside = (place >= interval[0]) & (place <= interval[1])
    return weight * SCHEDULES[schedule](place) * inside


def draw_uniforms(seed: int, level: int, sample_ids: Int[Tensor, " b"], positions: int) -> Float[Tensor, "t b"]:
    """float64 in [0, 1): one number per (seed, level, sample id, position); level 0 is the top."""
    index = np.arange(positions, dtype=np.uint64)
    stream = key_of("sample")
    draws = [uniform_array(mix(seed, stream, level, sample), index) for sample in sample_ids.tolist()]
    return torch.from_numpy(np.stack(draws, axis=1)) if draws else torch.zeros(positions, 0, dtype=torch.float64)


def choose(
    logits: Float[Tensor, "b k"],
    uniform: Float[Tensor, " b"],
    *,
    temperature: float | Float[Tensor, ""] = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Int[Tensor, " b"]:
    """Inverse-CDF draw of codes, from uniforms in [0, 1).

    In float64 whatever the model's precision: the same code unless logits differ by more than rounding.
    """
    if isinstance(temperature, Tensor):  # nothing here may depend on its value
        warm = torch.where(temperature == 0, 1, temperature)
        drawn = choose(logits.double() / warm, uniform, top_k=top_k, top_p=top_p)
        return torch.where(temperature == 0, logits.argmax(dim=-1), drawn)
    if temperature == 0:
        return logits.argmax(dim=-1)
    scaled = logits.double()
    probability = torch.softmax(scaled if temperature == 1 else scaled / temperature, dim=-1)
    if 0 < top_k < logits.shape[-1] or top_p < 1:
        probability = _truncate(probability, top_k or logits.shape[-1], top_p)
    mass = probability.cumsum(dim=-1)
    # strictly below the total, whatever the rounding; codes of zero probability are never the first above the target
    target = (uniform * (1 - 2.0**-50))[:, None] * mass[:, -1:]
    return torch.searchsorted(mass, target, right=True)[:, 0].clamp_max(logits.shape[-1] - 1)  # beyond it for NaN


def _truncate(probability: Tensor, top_k: int, top_p: float) -> Tensor:
    """Zero all but the top_k likeliest codes and all beyond the first that reach mass top_p; ties to the lower code."""
    ranked, order = probability.sort(dim=-1, descending=True, stable=True)
    keep = ranked.cumsum(dim=-1) - ranked < top_p
    keep[:, top_k:] = False
    return torch.zeros_like(probability).scatter_(-1, order, ranked * keep)
