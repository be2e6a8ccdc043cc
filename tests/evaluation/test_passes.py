"""Features chunk by chunk: the same at any number of ranks, and after a kill."""

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from support.distributed import run_ranks, started
from support.extractors import projection

from vqscale import cli
from vqscale.evaluation import passes
from vqscale.evaluation.statistics import write_tensors

METRICS = "[fd_lite0, kid, inception_score, precision, recall, density, coverage, reconstruction_fd_lite0, psnr, ssim]"

ENDS = ((0, "low"), (1, "high"))


def evaluated(run_dir: str, config: str, words: list[str], pause: float = 0.0) -> int:
    passes.CHUNK = 8
    extractor = projection(calls=Path(f"{run_dir}.calls"), pause=pause)
    passes.load_extractor = lambda *_args, **_more: extractor  # type: ignore[assignment]
    return cli.main(["evaluate", config, *words])


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "evaluate.yaml"
    path.write_text(f"kid_subset_size: 12\nmetrics: {METRICS}\n")
    return str(path)


def values(run_dir: Path) -> dict[str, float]:
    """The scores, and as <key>/low and <key>/high their intervals."""
    scores = json.loads((run_dir / "scores.json").read_text())
    bounds = {f"{key}/{end}": score["interval"][which] for key, score in scores.items() for which, end in ENDS}
    return {key: score["value"] for key, score in scores.items()} | bounds


@pytest.mark.slow
def test_one_two_and_four_ranks_agree_to_ten_digits(world: Any, tmp_path: Path, config: str) -> None:
    for ranks in (1, 2, 4):
        run_dir = tmp_path / str(ranks)
        words = world.overrides(run_dir=run_dir, batch=5)
        assert run_ranks(evaluated, ranks, str(run_dir), config, words) == [0] * ranks
        assert sorted(path.suffix for path in (run_dir / "statistics").iterdir()) == [".safetensors"] * 2
    one = values(tmp_path / "1")
    assert len(one) == 30 and all(value is not None for value in one.values())
    for ranks in (2, 4):
        assert values(tmp_path / str(ranks)) == pytest.approx(one, rel=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize(
    "metrics", [METRICS, "[reconstruction_fd_lite0, psnr, ssim]"], ids=["samples", "reconstructions"]
)
def test_killed_and_run_again_on_other_ranks_gives_the_same(
    world: Any, tmp_path: Path, config: str, metrics: str
) -> None:
    """The second kill falls into the pass over reconstructions, which comes first there."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    words = [*world.overrides(run_dir=whole, batch=4), f"metrics={metrics}"]
    assert run_ranks(evaluated, 1, str(whole), config, words) == [0]
    words = [*world.overrides(run_dir=killed, batch=4), f"metrics={metrics}"]
    with started(evaluated, 2, str(killed), config, words, 0.2) as ranks:
        until = time.monotonic() + 60
        while len(list(killed.glob("statistics/*/*.safetensors"))) < 2 and time.monotonic() < until:
            time.sleep(0.02)
        ranks.signal(signal.SIGKILL)
        ranks.wait(10)
    kept = len(list(killed.glob("statistics/*/*.safetensors")))
    assert kept >= 2 and not (killed / "scores.json").exists()
    before = len(Path(f"{killed}.calls").read_text().splitlines())
    assert run_ranks(evaluated, 1, str(killed), config, words) == [0]
    assert values(killed) == pytest.approx(values(whole), rel=1e-10)
    again = len(Path(f"{killed}.calls").read_text().splitlines()) - before
    assert again <= len(Path(f"{whole}.calls").read_text().splitlines()) - 2 * kept + 2  # two batches of a chunk spared


@pytest.mark.parametrize("damage", ["cut", "edited", "of other images"])
def test_a_damaged_chunk_is_computed_again(tmp_path: Path, damage: str) -> None:
    chunk = range(0, 8)
    path = passes.chunk_path(tmp_path, chunk)
    write_tensors(path, {"mse": torch.arange(8.0)})
    assert passes.unfinished(tmp_path, [chunk]) == []
    data = path.read_bytes()
    if damage == "cut":
        path.write_bytes(data[:-4])
    elif damage == "edited":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    else:
        write_tensors(path, {"mse": torch.arange(7.0)})
    assert passes.unfinished(tmp_path, [chunk]) == [chunk]
