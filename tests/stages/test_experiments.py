"""Experiments that want a GPU, but ImageNet 256: each runs its chain at a reduced size, and is planned at its full."""

import json
import math
import re
from pathlib import Path

import pytest
from support.reduced import REDUCED

from vqscale import cli
from vqscale.data.shards import Manifest
from vqscale.sources import load_model

CONFIGS = Path(__file__).parents[2] / "configs"
DRAWN = ["source=drawn", "num_drawn=120", "holdout=0.2"]
SCORES = ["weights=none", "extractor=lite0", "metrics=[reconstruction_mse,nll,perplexity,bits_per_dim]"]
# experiment -> pixels of the reduced images, levels, grids at that size and at the full one
EXPERIMENTS = {
    "cifar10": (32, {"top": (8, 8), "bottom": (16, 16)}, {"top": (8, 8), "bottom": (16, 16)}),
    "cifar10_vqvae": (32, {"top": (8, 8)}, {"top": (8, 8)}),
    "imagenet128_vqvae": (32, {"top": (8, 8)}, {"top": (32, 32)}),
    "clothing256": (64, {"top": (8, 8), "bottom": (16, 16)}, {"top": (32, 32), "bottom": (64, 64)}),
    "ffhq1024": (
        64,
        {"top": (2, 2), "middle": (4, 4), "bottom": (8, 8)},
        {"top": (32, 32), "middle": (64, 64), "bottom": (128, 128)},
    ),
}


def files_of(experiment: str) -> list[str]:
    """The configs of an experiment in the order of the pipeline."""
    return [name for name in REDUCED if (CONFIGS / experiment / f"{name}.yaml").is_file()]


@pytest.mark.slow
@pytest.mark.parametrize("experiment", list(EXPERIMENTS))
def test_every_stage_has_a_pulse(experiment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    side, grids, _ = EXPERIMENTS[experiment]
    for name in files_of(experiment):
        stage = re.sub("_(top|middle|bottom)$", "", name)
        more = {"pack": [*DRAWN, f"resolution={side}"], "evaluate": SCORES}.get(name, [])
        assert cli.main([stage, str(CONFIGS / experiment / f"{name}.yaml"), *REDUCED[name], *more]) == 0, name
    runs = tmp_path / "runs" / experiment
    codes, samples = Manifest.load(runs / "extract_codes" / "train"), Manifest.load(runs / "sample")
    assert {level: tuple(grid) for level, grid in codes.extra["levels"].items()} == grids
    assert samples.num_samples == len(codes.classes) and samples.transform["resolution"] == side
    kind = load_model(runs / "train_vqvae", "vqvae").model.config.quantizer.codebook
    assert kind == ("gradient" if experiment.endswith("_vqvae") else "ema")
    scores = json.loads((runs / "evaluate" / "scores.json").read_text())
    nats = sum(scores[f"nll/{level}"]["value"] * h * w for level, (h, w) in grids.items())
    assert scores["bits_per_dim"]["value"] == pytest.approx(nats / math.log(2) / (3 * side**2))
    assert not scores["bits_per_dim"]["comparable_with_papers"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("experiment", "name"), [(e, n) for e in EXPERIMENTS for n in files_of(e) if n.startswith("train_")]
)
def test_it_is_planned_at_its_full_size(experiment: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--world", "16", "--strategy", "fsdp"]
    assert cli.main(["plan", str(CONFIGS / experiment / f"{name}.yaml"), *words]) == 0
    printed = capsys.readouterr().out
    assert float(re.search(r"days, overlapped +([\d.]+)", printed)[1]) > 0  # type: ignore[index]
    if name != "train_vqvae":
        grids = list(EXPERIMENTS[experiment][2].items())
        level = name.removeprefix("train_prior_")
        (height, width) = dict(grids)[level]
        assert f"{height}x{width}" in printed and "K = 512" in printed
