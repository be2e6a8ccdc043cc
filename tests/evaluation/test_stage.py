"""`vqscale evaluate` as a user runs it, on a small finished pipeline."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vqscale import cli
from vqscale.data.shards import Manifest
from vqscale.evaluation import passes, samples
from vqscale.evaluation.features import Extractor

WITH_INTERVALS = {
    *("fid", "kid", "inception_score", "precision", "recall", "density", "coverage"),
    *("reconstruction_mse", "psnr", "ssim", "reconstruction_fid"),
}


@pytest.fixture(autouse=True)
def cheap_network(monkeypatch: pytest.MonkeyPatch, quick: Extractor) -> None:
    """These tests are about the stage; the networks have tests of their own."""
    monkeypatch.setattr(passes, "load_extractor", lambda *_args, **_more: quick)


def run(world: Any, tmp_path: Path, *words: str, **changes: object) -> int:
    config = tmp_path / "experiment" / "evaluate.yaml"
    config.parent.mkdir(exist_ok=True)
    config.write_text("extractor: inception\nweights: given\n")
    overrides = world.overrides(run_dir=tmp_path / "run", **changes)
    return cli.main(["evaluate", str(config), *overrides, *words])


def scores_of(tmp_path: Path) -> dict[str, Any]:
    return json.loads((tmp_path / "run" / "scores.json").read_text())


def test_everything_that_can_be_had(world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = (f"picture={tmp_path}/picture.png", "nll_train_images=20", "kid_subset_size=20")
    assert run(world, tmp_path, *words) == 0
    scores = scores_of(tmp_path)
    assert list(scores) == [
        *("fid", "sfid", "kid", "inception_score", "precision", "recall", "density", "coverage"),
        *("reconstruction_mse", "psnr", "ssim", "reconstruction_fid"),
        *(
            "nll/top",
            "nll/bottom",
            "bits_per_code/top",
            "bits_per_code/bottom",
            "nll_shuffled_class/top",
            "nll_shuffled_class/bottom",
            "nll_shuffled_upper/bottom",
        ),
        *("nll_train/top", "nll_train/bottom", "order0_entropy/top", "order0_entropy/bottom"),
        *("perplexity/top", "perplexity/bottom", "used_codes/top", "used_codes/bottom", "bits_per_dim"),
    ]
    assert all(score["value"] is not None and np.isfinite(score["value"]) for score in scores.values())
    assert scores["fid"]["n"] == 21 and scores["psnr"]["n"] == 26 and scores["nll_train/top"]["n"] == 20
    assert not any(score["comparable_with_papers"] for score in scores.values())
    assert "holdout" in scores["fid"]["reference"] and "26 images" in scores["fid"]["reference"]
    assert (scores["fid"]["protocol"], scores["psnr"]["protocol"]) == ("adm_gfid", "rfid_imagenet_val")
    assert scores["fid"]["preparation"] == "preparation unknown" and scores["inception_score"]["preparation"] is None
    assert scores["nll/top"]["protocol"] is None
    assert {key for key, score in scores.items() if score["interval"]} == WITH_INTERVALS
    for key in WITH_INTERVALS:
        low, high = scores[key]["interval"]
        assert low <= scores[key]["value"] <= high and low < high
    assert scores["bits_per_dim"]["value"] == pytest.approx(
        (16 * scores["nll/top"]["value"] + 64 * scores["nll/bottom"]["value"]) / (np.log(2) * 3 * 16**2)
    )
    assert scores["bits_per_code/top"]["value"] == pytest.approx(scores["nll/top"]["value"] / np.log(2))
    by_class = json.loads((tmp_path / "run" / "nll_by_class.json").read_text())
    assert list(by_class) == ["top", "bottom"] and list(by_class["top"]) == ["disc", "stripes", "plain"]
    shares = np.bincount([n % 3 for n in range(26)]) / 26  # of the classes among the held-out samples
    for level, nats in by_class.items():
        assert np.dot(shares, list(nats.values())) == pytest.approx(scores[f"nll/{level}"]["value"], rel=1e-6)
    report = (tmp_path / "run" / "report.html").read_text()
    assert all(name in report for name in ("disc", "stripes", "plain", world.tokenizer))
    assert (tmp_path / "picture.png").read_bytes() == (tmp_path / "run" / "samples.png").read_bytes()
    printed = capsys.readouterr().out
    assert "reconstruction_mse" in printed and "left out: cas_top1, cas_top5" in printed
    assert "fd_lite0" in printed


def test_again_does_nothing_until_an_input_changes(
    world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(world, tmp_path, metrics="[psnr]") == 0
    page = tmp_path / "run" / "report.html"
    before = page.stat().st_mtime_ns
    assert run(world, tmp_path, metrics="[psnr]") == 0
    assert page.stat().st_mtime_ns == before and "nothing left to do" in capsys.readouterr().err
    assert run(world, tmp_path, metrics="[psnr]", reference=world.root / "pack" / "train") == 0
    assert page.stat().st_mtime_ns > before and scores_of(tmp_path)["psnr"]["n"] == 40


def test_a_reference_is_at_distance_0_from_itself(world: Any, tmp_path: Path) -> None:
    asked = "[fid,precision,recall,coverage]"
    assert run(world, tmp_path, metrics=asked, samples=world.root / "pack" / "holdout") == 0
    scores = scores_of(tmp_path)
    assert scores["fid"]["value"] < 1e-8
    assert [scores[name]["value"] for name in ("precision", "recall", "coverage")] == [1, 1, 1]


def test_statistics_are_kept_and_used_again(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: Extractor
) -> None:
    assert run(world, tmp_path, metrics="[fid]", vqvae="none", codes="none", prior_top="none", prior_bottom="none") == 0
    first = scores_of(tmp_path)
    assert len(list((tmp_path / "run" / "statistics").iterdir())) == 2
    (tmp_path / "run" / "inputs.json").unlink()  # as after a kill

    def fails(_images: torch.Tensor) -> Any:
        raise AssertionError("computed again")

    broken = Extractor(quick.name, quick.weights_sha256, True, quick.resize, quick.preprocessing, fails)
    monkeypatch.setattr(passes, "load_extractor", lambda *_args, **_more: broken)
    monkeypatch.setattr(samples, "check_extractor", lambda *_args: [])
    assert run(world, tmp_path, metrics="[fid]", vqvae="none", codes="none", prior_top="none", prior_bottom="none") == 0
    assert scores_of(tmp_path) == first


def test_statistics_of_images_prepared_in_another_way_are_not_used_again(
    world: Any, tmp_path: Path, write_images: Callable[..., Manifest]
) -> None:
    """The same pictures under the same name, a little off, as JPEG or another resize leave them."""
    rest: dict[str, object] = {"vqvae": "none", "codes": "none", "prior_top": "none", "prior_bottom": "none"}
    distances = []
    for off in (0, 1):
        shutil.rmtree(tmp_path / "pack", ignore_errors=True)
        write_images(tmp_path / "pack" / "holdout", world.holdout ^ off, [n % 3 for n in range(26)])
        assert run(world, tmp_path, metrics="[fid]", reference=tmp_path / "pack", **rest) == 0
        distances.append(scores_of(tmp_path)["fid"]["value"])
    assert len(list((tmp_path / "run" / "statistics").iterdir())) == 3  # samples, and two references
    assert distances[0] != distances[1]


def test_absent_inputs_are_named(world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(world, tmp_path, samples=tmp_path / "nowhere", prior_bottom="none", codes=world.root / "codes") == 0
    scores, printed = scores_of(tmp_path), capsys.readouterr().out
    assert "fid" not in scores and "nll/top" in scores and "nll/bottom" not in scores and "bits_per_dim" not in scores
    assert "nowhere does not exist; `vqscale sample` makes it" in printed
    assert "left out: nll/bottom: prior_bottom=none" in printed


def test_without_codes_usage_comes_from_the_reconstructions(world: Any, tmp_path: Path) -> None:
    for name, codes in (("a", world.root / "codes"), ("b", "none")):
        (tmp_path / name).mkdir()
        assert run(world, tmp_path / name, metrics="[perplexity,used_codes]", codes=codes) == 0
    with_codes, without = scores_of(tmp_path / "a"), scores_of(tmp_path / "b")
    assert {k: (v["value"], v["n"]) for k, v in without.items()} == {
        k: (v["value"], v["n"]) for k, v in with_codes.items()
    }


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"metrics": "[fid]", "samples": "none"}, "metrics=fid cannot be computed: samples=none"),
        ({"metrics": "[fd_lite0]"}, "metrics=fd_lite0 cannot be computed"),
        ({"metrics": "[nll]", "codes": "none"}, "metrics=nll cannot be computed: codes=none"),
        ({"metrics": "[cas_top1]"}, "metrics=cas_top1 cannot be computed"),
        ({"metrics": "[psnr]", "vqvae": "none", "prior_top": "none"}, "metrics=psnr cannot be computed: vqvae=none"),
        ({"metrics": "[pnsr]"}, "unknown metric pnsr; did you mean psnr?"),
        ({"metrics": "[nll_train]"}, "metrics=nll_train cannot be computed: nll_train_images=0"),
    ],
)
def test_what_is_asked_for_by_name_must_be_possible(
    world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, str], said: str
) -> None:
    assert run(world, tmp_path, **changes) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert said in error
    assert not (tmp_path / "run" / "scores.json").exists()


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"samples": "{root}/codes"}, "samples={root}/codes: images are needed, this is a data set of codes"),
        ({"codes": "{root}/pack"}, "codes={root}/pack: code shards are needed"),
        ({"prior_top": "{root}/prior_bottom"}, "prior_top={root}/prior_bottom: this is a prior of the bottom level"),
        ({"vqvae": "{root}/prior_top"}, "expected a vqvae"),
        ({"reference": "{root}/none.npz"}, "none.npz: there is no such file"),
        (
            {"reference": "{root}/samples"},
            "reference={root}/samples: these are samples; are samples= and reference= the",
        ),
        ({"samples": "{root}/larger"}, "samples={root}/larger: images of 24 px, but reference={root}/pack has 16 px"),
    ],
)
def test_inputs_of_another_kind_are_one_line(
    world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, str], said: str
) -> None:
    filled = {key: value.format(root=world.root) for key, value in changes.items()}
    assert run(world, tmp_path, **filled) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(lines) == 1 and said.format(root=world.root) in lines[0]


@pytest.mark.parametrize(
    ("key", "part", "metrics", "n"), [("samples", ".", "[fid]", 21), ("reference", "holdout", "[psnr]", 26)]
)
def test_a_damaged_image_is_an_error_and_named(
    world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str, part: str, metrics: str, n: int
) -> None:
    shutil.copytree(world.root / {"samples": "samples", "reference": "pack"}[key], tmp_path / key)
    tar = tmp_path / key / part / "000000.tar"
    data = bytearray(tar.read_bytes())
    at = data.index(b"IDAT") + 8
    data[at : at + 8] = b"\xff" * 8
    tar.write_bytes(bytes(data))
    assert run(world, tmp_path, metrics=metrics, **{key: tmp_path / key}) == 1
    assert f" 1 of {n} images could not be read: bad.jsonl names them" in capsys.readouterr().err
    assert "000000" in (tmp_path / "run" / "bad.jsonl").read_text()


def test_a_truncated_shard_is_an_error_and_named(
    world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "samples"
    shutil.copytree(world.root / "samples", folder)
    data = (folder / "000001.tar").read_bytes()
    (folder / "000001.tar").write_bytes(data[: len(data) // 2])
    assert run(world, tmp_path, metrics="[fid]", samples=folder) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert "of 21 images could not be read: bad.jsonl names them" in line
    assert "000001.tar" in (tmp_path / "run" / "bad.jsonl").read_text()


def test_too_few_samples_for_kid_are_null_with_the_reason(world: Any, tmp_path: Path) -> None:
    assert run(world, tmp_path, metrics="[kid]") == 0
    score = scores_of(tmp_path)["kid"]
    assert score["value"] is None and score["reason"] == "KID needs at least 1000 images, there are 21 samples"


def test_statistics_of_another_data_set_are_refused(
    world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file moved in place of the one for these images."""
    rest: dict[str, object] = {"vqvae": "none", "codes": "none", "prior_top": "none", "prior_bottom": "none"}
    assert run(world, tmp_path, metrics="[fid]", **rest) == 0
    one, other = (tmp_path / "run" / "statistics").iterdir()
    other.write_bytes(one.read_bytes())
    (tmp_path / "run" / "inputs.json").unlink()
    assert run(world, tmp_path, metrics="[fid]", **rest) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert f"{other}: statistics of other images: data is sha256:" in line and "expected sha256:" in line


def test_edited_statistics_are_computed_again_with_a_warning(
    world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rest: dict[str, object] = {"vqvae": "none", "codes": "none", "prior_top": "none", "prior_bottom": "none"}
    assert run(world, tmp_path, metrics="[fid]", **rest) == 0
    first = (tmp_path / "run" / "scores.json").read_bytes()
    path = next((tmp_path / "run" / "statistics").iterdir())
    data = path.read_bytes()
    path.write_bytes(data[:-8] + bytes(8))  # a number of the last tensor
    (tmp_path / "run" / "inputs.json").unlink()
    capsys.readouterr()
    assert run(world, tmp_path, metrics="[fid]", **rest) == 0
    assert (tmp_path / "run" / "scores.json").read_bytes() == first and path.read_bytes() == data
    assert f"{path}: was damaged or edited" in capsys.readouterr().err


def test_adms_reference_takes_the_place_of_images(world: Any, tmp_path: Path, quick: Extractor) -> None:
    features = quick(world.holdout).pooled.double().numpy()
    path = tmp_path / "reference.npz"
    np.savez(path, mu=features.mean(0), sigma=np.cov(features, rowvar=False), arr_0=world.holdout.permute(0, 2, 3, 1))
    assert run(world, tmp_path, metrics="[fid,recall]", reference=path) == 0
    own = scores_of(tmp_path)
    (tmp_path / "b").mkdir()
    assert run(world, tmp_path / "b", metrics="[fid,recall]") == 0
    other = scores_of(tmp_path / "b")
    assert own["fid"]["value"] == pytest.approx(other["fid"]["value"], rel=1e-6)
    assert own["recall"]["value"] == other["recall"]["value"]
    assert own["fid"]["reference"] == str(path)
    (tmp_path / "c").mkdir()
    assert run(world, tmp_path / "c", metrics="[psnr]", reference=path) == 1


def test_dry_run_lists_the_inputs(world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(world, tmp_path, "--dry-run") == 0
    printed = capsys.readouterr().out
    assert world.tokenizer in printed and "absent: prior_middle=none" in printed
    assert not (tmp_path / "run").exists()
