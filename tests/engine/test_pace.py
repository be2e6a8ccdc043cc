"""The rank that the others wait for is found by its own work, under every strategy, and named."""

import logging
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from support import training
from support.distributed import run_ranks
from support.training import TinyConfig, TinyModel, config, metrics, train

from vqscale.engine.pace import OwnWork, SlowestRank
from vqscale.topology import Topology


def topology_of(world: int, strategy: str = "single") -> Any:
    class Here(Topology):
        def gather(self, value: Any) -> list[Any]:
            return [f"node-{rank}" for rank in range(self.world_size)]

    return Here(0, world, 0, world, 1, strategy, torch.device("cpu"))


def test_the_slowest_rank_and_its_lag_behind_the_median() -> None:
    slowest = SlowestRank(topology_of(4))
    assert slowest.compare([1.0, 1.5, 1.0, 0.5]) == {"slowest_rank": 1, "slowest_rank_lag": 0.5}
    assert slowest.compare([0.0, 0.0, 0.0, 0.0]) == {}
    assert SlowestRank(topology_of(1)).compare([1.0]) == {}


def test_one_warning_of_a_rank_that_stays_slow(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "vqscale")
    slowest = SlowestRank(topology_of(4))
    slow, even, other = [1.0, 1.3, 1.0, 1.0], [1.0, 1.1, 1.0, 1.0], [1.3, 1.0, 1.0, 1.0]
    for seconds in (slow, slow, even, slow, other, slow, slow):
        slowest.compare(seconds)
    assert not caplog.records  # never three in a row of one rank
    for _ in range(4):
        slowest.compare(slow)
    (record,) = caplog.records
    assert "rank 1 on node-1 is slow: in 3 log lines in a row" in record.message and "now 30 %" in record.message


def test_work_is_the_wait_for_data_and_every_forward_of_a_step() -> None:
    work = OwnWork(TinyModel(), topology_of(1), micro_batches=3, compiled=False)
    for _ in range(6):  # two steps
        with work.forward():
            time.sleep(0.01)
    assert 0.53 <= work.seconds_per_step(0.5) < 1.0
    assert work.seconds_per_step(0.25) == 0.25  # nothing since then


def _train_where_rank_one_is_slow(settings: TinyConfig) -> None:
    """Its forwards take longer; under FSDP the others, too, wait for its part of the weights."""
    forward = torch.nn.Linear.forward

    def slowly(module: Any, x: torch.Tensor) -> torch.Tensor:
        if module.training and module.in_features == module.out_features:  # one of the two blocks
            time.sleep(0.02)
        return forward(module, x)

    import os

    if os.environ["RANK"] == "1":
        torch.nn.Linear.forward = slowly  # type: ignore[method-assign, assignment]
    train(settings)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", pytest.param("zero2", marks=pytest.mark.slow)])
def test_a_slow_rank_is_named_in_the_metrics_and_in_the_log(tmp_path: Path, strategy: str) -> None:
    settings = config(tmp_path, strategy=strategy, total_images=64, save_every=64)
    run_ranks(_train_where_rank_one_is_slow, 2, settings)
    lines = [line for line in metrics(tmp_path) if "slowest_rank" in line]
    assert len(lines) == 8
    assert [line["slowest_rank"] for line in lines[1:]] == [1] * 7  # the first has what is done once
    assert all(line["slowest_rank_lag"] > 0.2 for line in lines[1:])
    assert (tmp_path / "log" / "0.log").read_text().count("rank 1 on ") == 1


def test_a_single_process_has_no_slowest_rank(tmp_path: Path) -> None:
    run_ranks(train, 1, config(tmp_path, total_images=16))
    assert training.metrics(tmp_path) and not any("slowest_rank" in line for line in training.metrics(tmp_path))
