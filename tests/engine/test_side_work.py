"""The cost of an optional part of the evaluations, by a clock that the test turns."""

import logging

import pytest
import torch

from vqscale.engine import side_work
from vqscale.engine.side_work import SideWork


def test_the_share_is_of_the_time_since_the_last_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = 0.0
    monkeypatch.setattr(side_work.time, "monotonic", lambda: now)
    work = SideWork("FD", torch.device("cpu"))
    now = 10.0
    work.start()
    with caplog.at_level(logging.INFO, "vqscale"):
        for length, seconds in ((100, 4), (50, 1)):
            now += length - seconds
            for _ in range(2):
                with work.timed():
                    now += seconds / 2
            figures = work.figures()
            assert figures == {"fd_seconds": seconds, "fd_fraction": seconds / length}
        work.log_total()
    assert caplog.messages == [
        "FD: 4.0 s, 4.0 % of the training time since the last one",
        "FD: 1.0 s, 2.0 % of the training time since the last one",
        "FD total: 5.0 s, 3.3 % of the training time",
    ]


def test_without_an_evaluation_nothing_is_told(caplog: pytest.LogCaptureFixture) -> None:
    work = SideWork("FD", torch.device("cpu"))
    work.start()
    work.log_total()
    assert not caplog.messages
