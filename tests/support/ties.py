"""Runs that differ in rounding only.

A VQ-VAE's are equal until an encoder vector lies so near the middle between two codes that a last bit chooses
(docs/determinism.md, "Why not every bit everywhere"). When that happens depends on the processor.
"""

from collections.abc import Mapping, Sequence

import pytest

AFTER = 1e-2  # how far losses may be apart, relatively, once a code was chosen otherwise
_SAME_USE = 1e-6


def agree_until_a_tie(
    found: Sequence[Mapping[str, float]], expected: Sequence[Mapping[str, float]], tolerance: float
) -> bool:
    """Assert that the losses of every step agree; `found`, `expected`: a line of metrics.jsonl per step.

    To `tolerance` in all steps before the first one that used other codes, which must not be the first; to AFTER from
    there on. Returns whether there was none.
    """
    assert len(found) == len(expected) > 1
    use = [key for key in expected[0] if key.startswith(("perplexity/", "used_codes/"))]
    equal = [
        all(mine[key] == pytest.approx(theirs[key], rel=_SAME_USE) for key in use)
        for mine, theirs in zip(found, expected, strict=True)
    ]
    tie = equal.index(False) if False in equal else len(equal)
    losses, others = ([line["loss"] for line in lines] for lines in (found, expected))
    assert tie > 0 and losses[:tie] == pytest.approx(others[:tie], rel=tolerance, abs=0)
    assert losses[tie:] == pytest.approx(others[tie:], rel=AFTER, abs=0)
    return tie == len(equal)
