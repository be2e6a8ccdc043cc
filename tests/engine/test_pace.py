"""The rank that the others wait for is found by its own work, under every strategy, and named."""

import logging
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from support import training
from support.distributed import run_ranks
from support.training import TinyConfig, TinyModel, config, metrics, train

from vqscale.engine import pace
from vqscale.engine.pace import OwnWork, SlowestRank
from vqscale.engine.parallel import make_engine
from vqscale.topology import Topology

ZERO = ("zero1", "zero2")


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
    work = OwnWork(TinyModel(), topology_of(1), micro_batches=3)
    for _ in range(6):  # two steps
        with work.forward():
            time.sleep(0.01)
    assert 0.53 <= work.seconds_per_step(0.5) < 1.0
    assert work.seconds_per_step(0.25) == 0.25  # nothing since then


def _train_where_rank_one_is_slow(settings: TinyConfig) -> None:
    """Its forwards take longer; under FSDP the others, too, wait for its part of the weights."""
    slow = os.environ["RANK"] == "1"

    def forward(module: Any, x: torch.Tensor) -> torch.Tensor:
        if slow and module.training and module.in_features == module.out_features:  # one of the two blocks
            time.sleep(0.02)
        return torch.nn.functional.linear(x, module.weight, module.bias)

    torch.nn.Linear.forward = forward  # type: ignore[method-assign, assignment]
    train(settings)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero3", *(pytest.param(s, marks=pytest.mark.slow) for s in ZERO)])
def test_a_slow_rank_is_named_in_the_metrics_and_in_the_log(tmp_path: Path, strategy: str) -> None:
    run_ranks(_train_where_rank_one_is_slow, 2, config(tmp_path, strategy=strategy, total_images=64, save_every=64))
    check_that_rank_one_is_named(tmp_path)


def check_that_rank_one_is_named(tmp_path: Path) -> None:
    lines = [line for line in metrics(tmp_path) if "slowest_rank" in line]
    assert len(lines) == 8
    assert [line["slowest_rank"] for line in lines[1:]] == [1] * 7  # the first has what is done once
    assert all(line["slowest_rank_lag"] > 0.2 for line in lines[1:])
    assert (tmp_path / "log" / "0.log").read_text().count("rank 1 on ") == 1


def _train_compiled_where_rank_one_is_slow(settings: TinyConfig, timed: bool) -> int:
    """Returns how many graphs were compiled."""
    if not timed:
        pace._gathered_at_once = lambda *_: []  # type: ignore[assignment]
    graphs: list[Any] = []

    def note(graph: Any, _inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def compiled_engine(module: Any, *arguments: Any) -> Any:
        for unit in module.wrap_units():
            unit.compile(backend=note)  # as `compile_units` does, without the time that machine code takes
        return make_engine(module, *arguments)

    training.make_engine = compiled_engine  # type: ignore[assignment]
    _train_where_rank_one_is_slow(settings)
    return len(graphs)


def test_a_slow_rank_is_named_where_compiled_units_are_sharded(tmp_path: Path) -> None:
    settings = [config(tmp_path / name, strategy="fsdp", total_images=64, save_every=64) for name in ("a", "b")]
    timed = run_ranks(_train_compiled_where_rank_one_is_slow, 2, settings[0], True)
    check_that_rank_one_is_named(tmp_path / "a")
    untimed = run_ranks(_train_compiled_where_rank_one_is_slow, 2, settings[1], False)
    assert timed == untimed and timed[0] > 0, "timing must not split the units' graphs"


def test_a_single_process_has_no_slowest_rank(tmp_path: Path) -> None:
    run_ranks(train, 1, config(tmp_path, total_images=16))
    assert training.metrics(tmp_path) and not any("slowest_rank" in line for line in training.metrics(tmp_path))
