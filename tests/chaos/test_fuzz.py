"""Every file format that is read, under a few random damages; `make chaos` has thousands."""

import pytest
from chaos import fuzz


@pytest.mark.parametrize("name", fuzz.FORMATS)
def test_damage_is_never_silent_and_never_a_traceback(name: str) -> None:
    counts = fuzz.fuzz(name, trials=40, seed=1)
    assert counts["refused"] > 0 and counts.total() == 40
    assert counts["silent"] == counts["crashed"] == 0
