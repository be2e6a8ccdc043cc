"""Ancestral sampling from a prior, one code at a time; the cached way and the slow reference that it must equal.

In: a prior (anything with the members of `Prior`), labels [b], the codes of the levels above, sample ids [b].
Out: codes int64 [b, h, w].

Randomness is addressed: the uniform of a code depends on (seed, level, sample id, place) and on nothing else, so
sample i is the same in any batch, on any rank.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from vqscale.seeding import key_of, mix, uniform_array


class Prior(Protocol):
    """What sampling needs of a prior. Calling it with the first rows of codes gives the logits of those rows."""

    num_codes: int
    num_classes: int
    grid: tuple[int, int]
    upper_grids: list[tuple[int, int]]

    def __call__(self, codes: Tensor, label: Tensor, upper: Sequence[Tensor] = ()) -> Tensor: ...
    def incremental(
        self, codes: Tensor, label: Tensor, upper: Sequence[Tensor], dtype: torch.dtype
    ) -> Callable[[int], Tensor]: ...
    def parameters(self) -> Any: ...


class SamplingStopped(Exception):
    """`stop` said so; nothing of the batch is kept."""


@torch.inference_mode()
def sample_codes(
    prior: Prior,
    label: Tensor,
    upper: Sequence[Tensor] = (),
    *,
    seed: int,
    sample_ids: Tensor,
    temperature: float = 1.0,
    temperature_end: float | None = None,
    top_k: int = 0,
    top_p: float = 1.0,
    guidance: float = 0.0,
    cached: bool = True,
    dtype: torch.dtype | None = None,
    progress: Callable[[int, int], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> Tensor:
    """Codes int64 [b, h, w] drawn from the prior, on its device.

    label: int64 [b] in 0 ... num_classes (that last one = no class). upper: int64 [b, h', w'] per level above, top
    first. sample_ids: int64 [b], which sample each row is. temperature >= 0 (0 = the likeliest code): the first code's;
    temperature_end: the last code's, in between linear in raster order, None = the same. top_k: keep the k likeliest
    codes (0 = all); top_p in (0, 1]: keep the likeliest codes up to that mass (nucleus, Holtzman et al. 2020). guidance
    w: logits (1 + w) conditional - w unconditional (Ho and Salimans 2022, equation 6, on logits), at twice the cost;
    needs a prior trained with class_dropout. cached=False runs a full forward per code. dtype: arithmetic of the cached
    way; default that of the weights. progress(rows done, rows); stop() is asked before each row and ends sampling by
    SamplingStopped.

    Raises ValueError for labels, ids, codes above or options that do not fit.
    """
    end = temperature if temperature_end is None else temperature_end
    _check(prior, label, upper, sample_ids, min(temperature, end), top_k, top_p)
    weight = next(prior.parameters())
    label, upper = label.to(weight.device), [codes.to(weight.device) for codes in upper]
    (height, width), batch, copies = prior.grid, len(label), 2 if guidance else 1
    warmth = torch.linspace(temperature, end, height * width, dtype=torch.float64).tolist()
    if guidance:
        label = torch.cat((label, torch.full_like(label, prior.num_classes)))
        upper = [codes.repeat(2, 1, 1) for codes in upper]
    codes = torch.zeros(batch * copies, height, width, dtype=torch.int64, device=weight.device)
    way = (
        prior.incremental(codes, label, upper, dtype or weight.dtype)
        if cached
        else _forwards(prior, codes, label, upper)
    )
    uniforms = draw_uniforms(seed, len(prior.upper_grids), sample_ids, height * width).to(weight.device)
    for row in range(height):
        if stop is not None and stop():
            raise SamplingStopped(f"sampling stopped at row {row} of {height}")
        for column in range(width):
            place = row * width + column
            logits = way(place)
            if guidance:
                logits = torch.lerp(logits[batch:], logits[:batch], 1 + guidance)
            chosen = choose(logits, uniforms[place], temperature=warmth[place], top_k=top_k, top_p=top_p)
            codes[:, row, column] = chosen.repeat(copies) if guidance else chosen
        if progress is not None:
            progress(row + 1, height)
    return codes[:batch].clone() if guidance else codes


def _check(
    prior: Prior, label: Tensor, upper: Sequence[Tensor], ids: Tensor, temperature: float, top_k: int, top_p: float
) -> None:
    if label.ndim != 1 or label.shape != ids.shape:
        raise ValueError(f"label has shape {tuple(label.shape)}, sample_ids {tuple(ids.shape)}: both must be [b]")
    if len(label) and not 0 <= int(label.min()) <= int(label.max()) <= prior.num_classes:
        raise ValueError(
            f"labels {int(label.min())} ... {int(label.max())} do not fit a prior of {prior.num_classes} classes"
        )
    wanted = [(len(label), *grid) for grid in prior.upper_grids]
    if [tuple(codes.shape) for codes in upper] != wanted:
        raise ValueError(f"codes above have shapes {[tuple(codes.shape) for codes in upper]}, the prior needs {wanted}")
    if temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(f"temperature={temperature} must be >= 0, top_k={top_k} >= 0, top_p={top_p} in (0, 1]")


def draw_uniforms(seed: int, level: int, sample_ids: Tensor, places: int) -> Tensor:
    """float64 [places, b] in [0, 1): one number per (seed, level, sample id, place); level 0 is the top."""
    index = np.arange(places, dtype=np.uint64)
    stream = key_of("sample")
    draws = [uniform_array(mix(seed, stream, level, sample), index) for sample in sample_ids.tolist()]
    return torch.from_numpy(np.stack(draws, axis=1)) if draws else torch.zeros(places, 0, dtype=torch.float64)


def choose(logits: Tensor, uniform: Tensor, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Inverse-CDF draw: logits [b, K] and uniforms float64 [b] in [0, 1) -> codes int64 [b].

    In float64 whatever the model's precision: the same code unless logits differ by more than rounding.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    scaled = logits.double()
    probability = torch.softmax(scaled if temperature == 1 else scaled / temperature, dim=-1)
    if 0 < top_k < logits.shape[-1] or top_p < 1:
        probability = _truncate(probability, top_k or logits.shape[-1], top_p)
    mass = probability.cumsum(dim=-1)
    # strictly below the total, whatever the rounding; codes of zero probability are never the first above the target
    target = (uniform * (1 - 2.0**-50))[:, None] * mass[:, -1:]
    return torch.searchsorted(mass, target, right=True)[:, 0]


def _truncate(probability: Tensor, top_k: int, top_p: float) -> Tensor:
    """Zero all but the top_k likeliest codes and all beyond the first that reach mass top_p; ties to the lower code."""
    ranked, order = probability.sort(dim=-1, descending=True, stable=True)
    keep = ranked.cumsum(dim=-1) - ranked < top_p
    keep[:, top_k:] = False
    return torch.zeros_like(probability).scatter_(-1, order, ranked * keep)


def _forwards(prior: Prior, codes: Tensor, label: Tensor, upper: Sequence[Tensor]) -> Callable[[int], Tensor]:
    """The reference: a full forward over the rows so far, again for every code."""

    def logits(place: int) -> Tensor:
        row, column = divmod(place, codes.shape[2])
        return prior(codes[:, : row + 1], label, upper)[:, :, row, column]

    return logits
