"""Ancestral sampling from a prior, one code at a time: cached, and the slow reference that it must equal.

In: a prior (anything with the members of `Prior`), labels [b], the codes of the levels above, sample ids [b].
Out: codes [b, h, w].

Randomness is addressed: the uniform of a code depends on (seed, level, sample id, position) and on nothing else, so
sample i is the same in any batch, on any rank.

Legend: b batch, h w grid, k codes, t = h w positions in raster order.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from vqscale.seeding import key_of, mix, uniform_array

NextLogits = Callable[[int], Tensor]  # position -> logits [b, k], given the codes before it


class Prior(Protocol):
    """What sampling needs of a prior. Calling it with the first rows of codes gives the logits of those rows."""

    num_codes: int
    num_classes: int
    grid: tuple[int, int]
    upper_grids: list[tuple[int, int]]

    def __call__(self, codes: Tensor, label: Tensor, upper: Sequence[Tensor] = ()) -> Tensor: ...
    def incremental(self, codes: Tensor, label: Tensor, upper: Sequence[Tensor], dtype: torch.dtype) -> NextLogits: ...
    def parameters(self) -> Any: ...


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
    cached: bool = True,
    dtype: torch.dtype | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Int[Tensor, "b h w"]:
    """Codes drawn from the prior, on its device.

    label: 0 ... num_classes (that last one = no class). upper: codes of each level above, top first. sample_ids: which
    sample each row is. temperature >= 0 (0 = the likeliest code): the first code's; temperature_end: the last code's,
    in between linear in raster order, None = the same. top_k: keep the k likeliest codes (0 = all); top_p in (0, 1]:
    keep the likeliest codes up to that mass (nucleus, Holtzman et al. 2020). guidance w: logits (1 + w) conditional - w
    unconditional (Ho and Salimans 2022, equation 6, on logits), at twice the cost; needs a prior trained with
    class_dropout. cached=False runs a full forward per code. dtype: of cached arithmetic; default that of the weights.
    progress(rows done, rows) is called after each row.

    Raises ValueError for labels, ids, codes above or options that do not fit.
    """
    end = temperature if temperature_end is None else temperature_end
    _check(prior, label, upper, sample_ids)
    _check_options(temperature, end, top_k, top_p, guidance)
    weight = next(prior.parameters())
    label, upper = label.to(weight.device), [codes.to(weight.device) for codes in upper]
    (height, width), batch, copies = prior.grid, len(label), 2 if guidance else 1
    temperatures = torch.linspace(temperature, end, height * width, dtype=torch.float64).tolist()
    if guidance:
        label = torch.cat((label, torch.full_like(label, prior.num_classes)))
        upper = [codes.repeat(2, 1, 1) for codes in upper]
    codes = torch.zeros(batch * copies, height, width, dtype=torch.int64, device=weight.device)
    next_logits = (
        prior.incremental(codes, label, upper, dtype or weight.dtype)
        if cached
        else _forwards(prior, codes, label, upper)
    )
    uniforms = draw_uniforms(seed, len(prior.upper_grids), sample_ids, height * width).to(weight.device)
    for row in range(height):
        for column in range(width):
            position = row * width + column
            logits = next_logits(position)
            if guidance:
                logits = torch.lerp(logits[batch:], logits[:batch], 1 + guidance)
            temperature = temperatures[position]
            chosen = choose(logits, uniforms[position], temperature=temperature, top_k=top_k, top_p=top_p)
            codes[:, row, column] = chosen.repeat(copies) if guidance else chosen
        if not logits.isfinite().all():  # once a row: each look waits for the device
            raise ValueError(f"the prior's logits are not finite in row {row}: weights too large for {logits.dtype}")
        if progress is not None:
            progress(row + 1, height)
    return codes[:batch].clone() if guidance else codes


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
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Int[Tensor, " b"]:
    """Inverse-CDF draw of codes, from uniforms in [0, 1).

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
    return torch.searchsorted(mass, target, right=True)[:, 0].clamp_max(logits.shape[-1] - 1)  # beyond it for NaN


def _truncate(probability: Tensor, top_k: int, top_p: float) -> Tensor:
    """Zero all but the top_k likeliest codes and all beyond the first that reach mass top_p; ties to the lower code."""
    ranked, order = probability.sort(dim=-1, descending=True, stable=True)
    keep = ranked.cumsum(dim=-1) - ranked < top_p
    keep[:, top_k:] = False
    return torch.zeros_like(probability).scatter_(-1, order, ranked * keep)


def _forwards(prior: Prior, codes: Tensor, label: Tensor, upper: Sequence[Tensor]) -> NextLogits:
    """The reference: a full forward over the rows so far, again for every code."""

    def logits(position: int) -> Tensor:
        row, column = divmod(position, codes.shape[2])
        return prior(codes[:, : row + 1], label, upper)[:, :, row, column]

    return logits
