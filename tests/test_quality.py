"""benchmarks/quality.py: baselines see the same images, trainings are kept, ratios are right; and its patches."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.stages import CONFIGS

from vqscale.cli import main as vqscale
from vqscale.data.images import decode_image

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # scripts, not a package
patches, quality = importlib.import_module("patches"), importlib.import_module("quality")

# The interface of the port, with one convolution for a network; it writes down which images it sees.
STAND_IN = """
from pathlib import Path
import torch
from torch import nn

class Quantize(nn.Module):
    def __init__(self, dim, n_embed):
        super().__init__()
        self.dim, self.n_embed = dim, n_embed
        self.table = nn.Parameter(torch.randn(n_embed, dim))

    def forward(self, z):
        codes = torch.cdist(z.float().flatten(0, 2), self.table).argmin(1).view(z.shape[:-1])
        return z + (self.table[codes] - z).detach(), (z - self.table[codes]).square().mean(), codes

class VQVAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 8, 4, 4), nn.ConvTranspose2d(8, 3, 4, 4)
        self.quantize_t, self.quantize_b = Quantize(8, 16), Quantize(8, 16)

    def encode(self, image):
        if self.training:
            with Path(__file__).with_name("seen").open("a") as file:
                file.writelines(f"{value:.4f}\\n" for value in image.mean((1, 2, 3)).tolist())
        z = self.down(image).permute(0, 2, 3, 1)
        top, loss, codes = self.quantize_t(z)
        bottom, more, others = self.quantize_b(z - top)
        return top.permute(0, 3, 1, 2), bottom.permute(0, 3, 1, 2), (loss + more).unsqueeze(0), codes, others

    def decode(self, top, bottom):
        return self.up(top + bottom)

    def forward(self, image):
        top, bottom, loss, *_ = self.encode(image)
        return self.decode(top, bottom), loss
"""


def test_a_side_without_its_files_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        quality.main(["drawn32", "--sides", "ours", "library"])
    assert stop.value.code == 2 and "--sides library: needs --port" in capsys.readouterr().err


@pytest.mark.slow
def test_all_sides_are_trained_once_and_the_baselines_on_the_same_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    pack = ["source=drawn", "num_drawn=400", "resolution=32", "run_dir=drawn32", "holdout=every:5"]
    assert vqscale(["pack", str(CONFIGS / "pack.yaml"), *pack]) == 0
    (port := tmp_path / "port").mkdir()
    (port / "vqvae.py").write_text(STAND_IN)
    command = ["drawn32", "--quick", "--port", str(port), "--json", "rows.json", "--ours", "model.hidden=16"]
    rows = quality.main(command)
    assert set(rows["drawn32"]) == {"128", "256"}
    assert all(set(row) == {"rate 0.0003", "best rates"} for row in rows["drawn32"].values())
    curves = json.loads(Path("rows.json").read_text())["curves"]
    assert {name.split("/")[1] for name in curves} == set(quality.SIDES)
    for curve in curves.values():
        assert [point["images"] for point in curve] == [128, 256]
        assert all(0 < point["mse"] < 2 and min(point["used_codes"]) > 0 for point in curve)

    means = (port / "seen").read_text().splitlines()
    assert len(means) == 3 * 256 and means[:256] == means[256:512] == means[512:]  # all baselines: the same images
    assert "train_vqvae" in capfd.readouterr().err
    assert quality.main(command) == rows
    assert len((port / "seen").read_text().splitlines()) == len(means)
    quality.main([command[0], "--sides", "ours", "port", *command[1:]])
    assert {name.split("/")[1] for name in json.loads(Path("rows.json").read_text())["curves"]} == {"ours", "port"}
    assert len((port / "seen").read_text().splitlines()) == len(means)
    assert "train_vqvae" not in capfd.readouterr().err
    quality.main([*command, "max_norm=0"])  # other settings of ours are another training
    assert "train_vqvae" in capfd.readouterr().err and len((port / "seen").read_text().splitlines()) == len(means)


def test_ratios_are_to_the_better_baseline_and_of_the_worst_seed() -> None:
    curves = {
        ("ours", 1e-3, 0): [4.0, 2.0],
        ("port", 1e-3, 0): [8.0, 6.0],
        ("library", 1e-3, 0): [5.0, 8.0],
        ("ours", 2e-3, 0): [3.0, 3.0],
        ("port", 2e-3, 0): [6.0, 4.0],
        ("library", 2e-3, 0): [9.0, 9.0],
    }
    one = {point: {name: row["value"] for name, row in rows.items()} for point, rows in _compare(curves).items()}
    assert one == {
        "16": {"rate 0.001": 4 / 5, "rate 0.002": 3 / 6, "best rates": 4 / 5},
        "32": {"rate 0.001": 2 / 6, "rate 0.002": 3 / 4, "best rates": 2 / 4},
    }
    worse = {}
    for (side, rate, _), (early, late) in curves.items():
        worse[side, rate, 1] = [2 * early, 2 * late] if side == "ours" else [early, late]
    both = _compare(curves | worse)
    assert all(both[point][name]["value"] == 2 * value for point, row in one.items() for name, value in row.items())
    assert _compare({key: curve for key, curve in curves.items() if key[0] == "ours"}) == {}
    assert _compare({key: curve for key, curve in curves.items() if key[0] != "ours"}) == {}


def _compare(curves: dict[tuple[str, float, int], list[float]]) -> dict[str, Any]:
    return quality.compare(curves, [16, 32])


def test_patches_are_cut_of_photographs_and_held_out_by_photograph(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(12):  # each of one brightness, which tells whose patch it is
        size = (30, 200) if number == 11 else (200, 150)  # the last is too small when its sides are halved
        Image.new("L", size, 20 * number).save(folder / f"{number:02d}.png")
    (folder / "broken.png").write_bytes(b"no image")
    written = patches.main([str(folder), str(tmp_path / "out"), "--count", "39", "--side", "32"])
    assert written == {"train": 27, "holdout": 6}
    found: dict[str, set[int]] = {part: set() for part in written}
    for path in (tmp_path / "out").rglob("*.png"):
        patch = decode_image(path.read_bytes())
        assert patch.shape == (3, 32, 32) and patch.min() == patch.max()
        found[path.relative_to(tmp_path / "out").parts[0]].add(int(patch[0, 0, 0]))
    assert found == {"train": {20 * n for n in range(1, 10)}, "holdout": {0, 200}}
