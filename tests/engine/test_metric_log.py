import json
from pathlib import Path

import pytest
import torch
from support.distributed import run_ranks

from vqscale.config import StageConfig
from vqscale.engine.metric_log import MetricLog, drop_lines_beyond
from vqscale.topology import Topology, bring_up, take_down


def collect(path: Path, topology: Topology) -> tuple[MetricLog, list[tuple[dict[str, float], int]]]:
    tracked: list[tuple[dict[str, float], int]] = []
    return MetricLog(path, topology, lambda values, seen: tracked.append((values, seen))), tracked


def lines(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_means_over_steps_and_micro_batches(tmp_path: Path, topology: Topology) -> None:
    metrics, tracked = collect(tmp_path / "m.jsonl", topology)
    for values in ([1.0, 3.0], [5.0, 11.0]):
        for value in values:
            metrics.add({"loss": torch.tensor(value, requires_grad=True)}, micro_batches=2)
        metrics.add({"norm": torch.tensor(values[0], dtype=torch.float64)})
    flushed = metrics.flush(16, 2, {"rate": 0.5})
    assert flushed == {"loss": 5.0, "norm": 3.0, "rate": 0.5}
    metrics.add({"loss": torch.tensor([7.0])})
    metrics.flush(24, 1, {})
    assert lines(tmp_path / "m.jsonl") == [{"images_seen": 16, **flushed}, {"images_seen": 24, "loss": 7.0}]
    assert tracked == [(flushed, 16), ({"loss": 7.0}, 24)]


def test_nothing_is_read_from_the_device_before_a_flush(tmp_path: Path, topology: Topology) -> None:
    metrics, _ = collect(tmp_path / "m.jsonl", topology)
    metrics.add({"loss": torch.tensor(1.0)})
    assert not (tmp_path / "m.jsonl").exists()


def test_what_is_not_finite_is_null(tmp_path: Path, topology: Topology) -> None:
    metrics, tracked = collect(tmp_path / "m.jsonl", topology)
    metrics.write(8, {"loss": float("nan"), "norm": float("inf"), "rate": 1.0})
    assert lines(tmp_path / "m.jsonl") == [{"images_seen": 8, "loss": None, "norm": None, "rate": 1.0}]
    assert len(tracked) == 1


def test_a_log_that_cannot_be_written_does_not_stop_the_run(
    tmp_path: Path, topology: Topology, caplog: pytest.LogCaptureFixture
) -> None:
    metrics, tracked = collect(tmp_path / "nowhere" / "m.jsonl", topology)
    metrics.write(8, {"loss": 1.0})
    assert tracked == [({"loss": 1.0}, 8)]
    assert "a line is lost" in caplog.text


def _flush_on_a_rank(path: str) -> dict[str, float]:
    topology = bring_up(StageConfig(device="cpu", threads=1))
    metrics, tracked = collect(Path(path), topology)
    metrics.add({"loss": torch.tensor(float(topology.rank)), "same": torch.tensor(2.0)})
    flushed = metrics.flush(8, 1, {})
    take_down(orderly=True)
    return flushed | {"tracked": len(tracked)}


def test_means_over_ranks_written_once(tmp_path: Path) -> None:
    flushed = run_ranks(_flush_on_a_rank, 2, str(tmp_path / "m.jsonl"))
    assert flushed == [{"loss": 0.5, "same": 2.0, "tracked": 1}, {"loss": 0.5, "same": 2.0, "tracked": 0}]
    assert len(lines(tmp_path / "m.jsonl")) == 1


def test_lines_beyond_the_checkpoint_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text("".join(json.dumps({"images_seen": n, "loss": n / 10}) + "\n" for n in (8, 16, 24, 32)))
    drop_lines_beyond(path, 20)
    assert [line["images_seen"] for line in lines(path)] == [8, 16]
    assert path.read_text().endswith("\n")


def test_a_torn_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"images_seen": 8}\n{"images_se')
    drop_lines_beyond(path, 100)
    assert path.read_text() == '{"images_seen": 8}\n'
    drop_lines_beyond(tmp_path / "absent.jsonl", 100)
    assert not (tmp_path / "absent.jsonl").exists()
