"""A part of `gpu.py`: sampling of both levels in bf16, as graphs and eagerly.

In: a `Case`.  Out: seconds to draw the codes of a batch with both priors. Four rows of each level are drawn, two
eagerly, spread over the grid, and scaled to all rows; capturing the graphs is not counted, as it is done once a batch
size.
"""

from typing import Any

import torch
from gpu_rows import Case
from gpu_steps import CLASSES, K, prior_of, release
from measure import timed
from sampling import evenly

from vqscale.models.sampling import Options, RowSampler

BATCHES = (64, 8, 1, 256)
AS_IT_IS = Options(1.0, 0, 1.0, False)  # temperature 1, nothing left out, no guidance


@torch.inference_mode()
def sampling(case: Case) -> None:
    priors = {level: prior_of(case, level).eval() for level in ("top", "bottom")}
    weights = {level: prior.sampling_weights(torch.bfloat16) for level, prior in priors.items()}

    def seconds(batch: int, graphs: bool) -> dict[str, float]:
        release()
        return {level: level_seconds(case, prior, weights[level], batch, graphs) for level, prior in priors.items()}

    for batch in BATCHES:
        with case.rows.attempt(f"sampling/batch {batch} seconds"):
            taken = seconds(batch if case.full else min(batch, 4), True)
            total = sum(taken.values())
            case.rows.put(f"sampling/batch {batch} seconds", total, images_per_second=batch / total, **taken)
        if batch == 8:
            with case.rows.attempt("sampling/graph over eager at 8"):
                eager = sum(seconds(batch if case.full else 4, False).values())
                case.rows.put("sampling/graph over eager at 8", eager / total, eager_seconds=eager)


def level_seconds(case: Case, prior: Any, weights: Any, batch: int, graphs: bool) -> float:
    """Seconds to draw one level's codes of a batch."""
    (height, width), device = prior.grid, case.device
    label = torch.randint(CLASSES, (batch,), device=device)
    upper = [torch.randint(K, (batch, *grid), device=device) for grid in prior.upper_grids]
    temperatures = torch.ones(width, dtype=torch.float64, device=device)
    uniforms = torch.rand(width, batch, dtype=torch.float64, device=device)
    state = weights.state(batch)
    sampler = RowSampler(state, AS_IT_IS._replace(graphs=graphs))
    state.codes.random_(K)
    start = timed(lambda: state.reset(label, upper))
    rows = evenly(height, 4 if graphs else 2)

    def draw(row: int) -> None:
        sampler.draw(row, uniforms, temperatures)

    for row in rows:
        draw(row)  # captures
    return start + height * sum(timed(lambda: draw(row)) for row in rows) / len(rows)  # noqa: B023
