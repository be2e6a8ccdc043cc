import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.stages import CONFIGS

from vqscale import rundir, runtime, stopping
from vqscale.config import load
from vqscale.data import processes
from vqscale.data.images import adm_center_crop, decode_image, preparation
from vqscale.data.parts import read_samples
from vqscale.data.shards import Manifest
from vqscale.stages import pack
from vqscale.stages.pack import PackConfig


def save(path: Path, seed: int, size: tuple[int, int] = (20, 16), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1] // 4 + 1, size[0] // 4 + 1, 3), np.uint8)
    Image.fromarray(pixels).resize(size).convert(mode).save(path)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """30 images of three classes, nested, of several kinds."""
    folder = tmp_path / "source"
    for n in range(30):
        name = ("ant", "bee", "cow")[n % 3]
        save(folder / name / f"part{n % 2}" / f"{n:02d}.{('png', 'jpg', 'bmp')[n % 3]}", n, (20 + n, 16 + n // 2))
    (folder / "ant" / "notes.txt").write_text("not an image")
    return folder


def config(tmp_path: Path, folder: Path, **changes: Any) -> PackConfig:
    base = PackConfig(
        run_dir=str(tmp_path / "run"), source=str(folder), resolution=8, samples_per_shard=6, workers=1, device="cpu"
    )
    return replace(base, **changes)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def packed(run_dir: Path) -> dict[str, bytes]:
    return {f"{part}/{name}": data for part in ("train", "holdout") for name, data in files(run_dir / part).items()}


def test_a_folder_becomes_two_data_sets(tmp_path: Path, source: Path) -> None:
    pack.main(config(tmp_path, source, holdout="every:10"))
    train, holdout = (Manifest.load(tmp_path / "run" / part) for part in ("train", "holdout"))
    assert (train.num_samples, holdout.num_samples) == (27, 3)
    assert train.classes == holdout.classes == ("ant", "bee", "cow") and train.kind == "images"
    assert [shard.num_samples for shard in train.shards] == [5, 5, 6, 5, 6]
    assert train.transform["resolution"] == 8 and train.transform["format"] == "png"
    samples = [*read_samples(tmp_path / "run" / "train", ["png"]), *read_samples(tmp_path / "run" / "holdout", ["png"])]
    assert {(key.split("/")[0], label) for key, label, _ in samples} == {("ant", 0), ("bee", 1), ("cow", 2)}
    assert len({key for key, _, _ in samples}) == 30
    assert all(decode_image(parts["png"]).shape == (3, 8, 8) for _, _, parts in samples)
    labels = [label for _, label, _ in samples[:27]]
    assert labels != sorted(labels)  # stored mixed, not class by class


def test_bytes_are_the_same_at_any_number_of_processes(tmp_path: Path, source: Path) -> None:
    pack.main(config(tmp_path, source))
    pack.main(config(tmp_path, source, workers=2, run_dir=str(tmp_path / "other")))
    assert packed(tmp_path / "run") == packed(tmp_path / "other")


def test_a_finished_shard_is_never_redone(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack.main(config(tmp_path, source, run_dir=str(tmp_path / "whole")))
    run_jobs, begun = pack.run_jobs, []

    def stop_after_two(function: Any, jobs: Any, *rest: Any) -> Iterator[Any]:
        for job, result in run_jobs(function, jobs, *rest):
            begun.append(job.tar)
            yield job, result
            if len(begun) == 2:
                (tmp_path / "run" / "train" / ".000009.tar.1.tmp").write_text("what a killed run leaves")
                raise KeyboardInterrupt

    monkeypatch.setattr(pack, "run_jobs", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        pack.main(config(tmp_path, source))
    pack.main(config(tmp_path, source))
    assert len(begun) == len(set(begun)) == 6
    assert packed(tmp_path / "run") == packed(tmp_path / "whole")


def test_a_stop_request_ends_after_a_shard_and_the_rerun_goes_on(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack.main(config(tmp_path, source, run_dir=str(tmp_path / "whole")))
    pack_shard = pack.pack_shard

    def stop(job: Any) -> Any:
        (tmp_path / "run" / "STOP").touch()
        return pack_shard(job)

    monkeypatch.setattr(pack, "pack_shard", stop)
    monkeypatch.setattr(stopping, "STOP_FILE_SECONDS", 0.0)
    with pytest.raises(runtime.Stopped):
        pack.main(config(tmp_path, source))
    assert not (tmp_path / "run" / "train" / "dataset.json").exists()
    monkeypatch.undo()
    pack.main(config(tmp_path, source))
    assert packed(tmp_path / "run") == packed(tmp_path / "whole")


def test_run_again_says_so_and_changes_nothing(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pack.main(config(tmp_path, source))
    before = packed(tmp_path / "run")
    pack.main(config(tmp_path, source))
    assert "already packed" in capsys.readouterr().err
    shutil.rmtree(source)
    pack.main(config(tmp_path, source))
    assert packed(tmp_path / "run") == before


@pytest.mark.parametrize("change", ["another image", "another size", "another name"])
def test_a_changed_source_is_refused(tmp_path: Path, source: Path, change: str) -> None:
    pack.main(config(tmp_path, source, holdout="0"))
    path = source / "ant" / "part0" / "00.png"
    if change == "another image":
        save(source / "ant" / "new.png", 99)
    elif change == "another size":
        save(path, 1, (90, 90))
    else:
        path.rename(path.with_name("zz.png"))
    counts = "30 train images then, 31 now" if change == "another image" else r"30 now \(same number, but other"
    with pytest.raises(ValueError, match=f"source has changed .*{counts}"):
        pack.main(config(tmp_path, source, holdout="0"))


def test_a_changed_config_is_refused(tmp_path: Path, source: Path) -> None:
    pack.main(config(tmp_path, source))
    with pytest.raises(ValueError, match="resolution: was 8, now 16"):
        pack.main(config(tmp_path, source, resolution=16))


def test_one_corrupt_image_among_good_ones(tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = source / "bee" / "part0" / "04.jpg"
    bad.write_bytes(bad.read_bytes()[:200])
    pack.main(config(tmp_path, source, holdout="0"))
    assert Manifest.load(tmp_path / "run" / "train").num_samples == 29
    (line,) = (tmp_path / "run" / "bad.jsonl").read_text().splitlines()
    assert json.loads(line)["file"] == str(bad)
    assert f"1 images do not decode and were left out, e.g. {bad}" in capsys.readouterr().err
    pack.main(config(tmp_path, source, holdout="0"))  # and again: already packed


def test_too_many_corrupt_images(tmp_path: Path, source: Path) -> None:
    for n in (0, 2):
        (source / ("ant", "bee", "cow")[n % 3] / "part0" / f"{n:02d}.{('png', 'jpg', 'bmp')[n % 3]}").write_bytes(b"")
    with pytest.raises(ValueError, match=r"2 of 30 images do not decode, more than the 1 that max_bad_fraction=0.01"):
        pack.main(config(tmp_path, source))
    assert not list((tmp_path / "run").glob("*/dataset.json"))
    pack.main(config(tmp_path, source, run_dir=str(tmp_path / "lenient"), max_bad_fraction=0.1))
    (source / "cow" / "part0" / "02.bmp").unlink()
    with pytest.raises(ValueError, match="1 of 29 images do not decode, more than the 0"):
        pack.main(config(tmp_path, source, run_dir=str(tmp_path / "strict"), max_bad_fraction=0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "/no/such/folder"}, "source folder /no/such/folder does not exist"),
        ({"holdout": "1.5"}, "holdout=1.5: a fraction"),
        ({"holdout": "/no/such/folder"}, "neither a fraction, every:n nor a folder"),
        ({"labels": "/no/such/file"}, "labels file /no/such/file does not exist"),
        ({"classes_from": "/no/such/data"}, "`vqscale pack` makes it"),
        ({"source": "drawn", "labels": "x"}, "source=drawn has classes of its own"),
        ({"source": "drawn", "class_names": ["x"]}, "source=drawn has classes of its own"),
        ({"class_names": ["x"], "classes_from": "x"}, "class_names= and classes_from= both name the classes"),
        ({"class_names": ["x", "y"]}, r"has 3 classes \(ant to cow\), but class_names has 2 names"),
        ({"class_names": ["x", "y", "x"]}, "class_names: two classes have the name 'x'"),
    ],
)
def test_mistakes_are_found_before_anything_is_written(
    tmp_path: Path, source: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        pack.main(config(tmp_path, source, **changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("word", ["format=gif", "resolution=0", "quality=101", "max_pixels=0", "samples_per_shard=0"])
def test_values_out_of_range_are_refused_at_load(tmp_path: Path, word: str) -> None:
    (tmp_path / "pack.yaml").write_text("source: drawn\n")
    with pytest.raises(ValueError, match=word.replace("=", ".*")):
        load(PackConfig, tmp_path / "pack.yaml", [word])


def test_images_that_fit_are_stored_as_they_are(tmp_path: Path) -> None:
    kept = {"rgb": ("png", "RGB"), "gray": ("png", "L")}
    for name, (suffix, mode) in {**kept, "alpha": ("png", "RGBA"), "lossless": ("bmp", "RGB")}.items():
        save(tmp_path / "source" / "a" / f"{name}.{suffix}", 1, (8, 8), mode)
    pack.main(config(tmp_path, tmp_path / "source", holdout="0"))
    for key, _, parts in read_samples(tmp_path / "run" / "train", ["png"]):
        (path,) = (tmp_path / "source").glob(f"{key}.*")
        assert (parts["png"] == path.read_bytes()) == (path.stem in kept)
        assert decode_image(parts["png"]).equal(decode_image(path.read_bytes()))


def test_jpg(tmp_path: Path, source: Path) -> None:
    pack.main(config(tmp_path, source, resolution=130, quality=80))
    manifest = Manifest.load(tmp_path / "run" / "train")
    assert (manifest.transform["format"], manifest.transform["quality"]) == ("jpg", 80)
    _, _, parts = next(read_samples(tmp_path / "run" / "train", ["jpg"]))
    assert decode_image(parts["jpg"]).shape == (3, 130, 130)


def test_held_out_images_have_a_format_of_their_own(tmp_path: Path, source: Path) -> None:
    made = config(tmp_path, source, format="jpg", resize="adm", holdout="every:10", holdout_format="png")
    by_adm = "resized by ADM's rule to 8 px, centre crop"
    said = pack.plan(made).splitlines()
    assert said[1:] == [f"train: {by_adm}, JPEG of quality 95", f"holdout: {by_adm}, PNG"]
    assert len(pack.plan(replace(made, holdout="0")).splitlines()) == 2
    pack.main(made)
    train, holdout = (Manifest.load(tmp_path / "run" / part).transform for part in ("train", "holdout"))
    assert set(train.pop("versions")) == set(holdout.pop("versions")) == {"vqscale", "torch", "torchvision", "pillow"}
    assert holdout == {"resolution": 8, "format": "png", "resize": "adm", "crop": "center"}
    assert train == {**holdout, "format": "jpg", "quality": 95}
    for key, _, parts in read_samples(tmp_path / "run" / "holdout", ["png"]):
        (path,) = source.glob(f"{key}.*")
        assert decode_image(parts["png"]).equal(adm_center_crop(decode_image(path.read_bytes()), 8))
    for change in ({"resize": "bilinear"}, {"holdout_format": "jpg"}):
        with pytest.raises(ValueError, match=f"{next(iter(change))}: was"):
            pack.main(replace(made, **change))


def test_imagenet_is_prepared_as_papers_prepare_it(source: Path) -> None:
    words = [f"source={source}", "holdout=every:10"]
    said = pack.plan(load(PackConfig, CONFIGS.parent / "imagenet256" / "pack.yaml", words))
    assert "holdout: resized by ADM's rule to 256 px, centre crop, PNG" in said.splitlines()


def test_what_is_packed_again_with_other_versions_is_the_same(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack.main(config(tmp_path, source))
    before = packed(tmp_path / "run")
    monkeypatch.setattr(pack, "versions", lambda: {"vqscale": "9.9"})
    (tmp_path / "run" / "train" / "000001.tar").unlink()
    pack.main(config(tmp_path, source))
    assert packed(tmp_path / "run") == before
    pack.main(config(tmp_path, source, run_dir=str(tmp_path / "other")))
    again, recorded = (Manifest.load(tmp_path / run / "train") for run in ("other", "run"))
    assert again.fingerprint == recorded.fingerprint and again.transform["versions"] == {"vqscale": "9.9"}


def test_a_holdout_folder_with_a_labels_file(tmp_path: Path, source: Path) -> None:
    for n in range(3):
        save(tmp_path / "val" / f"{n}.png", n)
    (tmp_path / "labels.txt").write_text("0.png cow\n1.png ant\n2.png 1\n")
    made = config(tmp_path, source, holdout=str(tmp_path / "val"), labels=str(tmp_path / "labels.txt"))
    pack.main(made)
    holdout = {key: label for key, label, _ in read_samples(tmp_path / "run" / "holdout", [])}
    assert holdout == {"0": 2, "1": 0, "2": 1} and Manifest.load(tmp_path / "run" / "train").num_samples == 30


@pytest.mark.parametrize("held_out", ["a folder", "a rule"])
def test_class_folders_get_the_names_that_the_config_gives(tmp_path: Path, source: Path, held_out: str) -> None:
    for n in range(3):
        save(tmp_path / "val" / f"{n}.png", n)
    (tmp_path / "labels.txt").write_text("0.png 2\n1.png 0\n2.png 1\n")
    folder = (
        {"holdout": str(tmp_path / "val"), "labels": str(tmp_path / "labels.txt")} if held_out == "a folder" else {}
    )
    pack.main(config(tmp_path, source, class_names=["stop", "yield", "road works"], **folder))
    for part in ("train", "holdout"):
        assert Manifest.load(tmp_path / "run" / part).classes == ("stop", "yield", "road works")
    for key, label, _ in read_samples(tmp_path / "run" / "train", []):
        assert label == ["ant", "bee", "cow"].index(key.split("/")[0])
    holdout = {key: label for key, label, _ in read_samples(tmp_path / "run" / "holdout", [])}
    assert len(holdout) == 1 if held_out == "a rule" else holdout == {"0": 2, "1": 0, "2": 1}


def test_class_numbers_of_another_data_set(tmp_path: Path, source: Path) -> None:
    pack.main(config(tmp_path, source))
    shutil.rmtree(source / "ant")
    pack.main(config(tmp_path, source, run_dir=str(tmp_path / "two"), classes_from=str(tmp_path / "run")))
    assert {label for _, label, _ in read_samples(tmp_path / "two" / "train", [])} == {1, 2}
    save(source / "zebra" / "x.png", 1)
    with pytest.raises(ValueError, match="'zebra' is not one of the 3 known classes"):
        pack.main(config(tmp_path, source, run_dir=str(tmp_path / "three"), classes_from=str(tmp_path / "run")))


def test_the_embedded_data_set(tmp_path: Path) -> None:
    drawn = config(tmp_path, Path("drawn"), num_drawn=40, resolution=16)
    assert "39 training and 1 held-out images of 10 classes" in pack.plan(drawn)
    pack.main(drawn)
    manifest = Manifest.load(tmp_path / "run" / "train")
    assert manifest.num_samples == 39 and manifest.classes[0] == "circle"
    assert preparation(manifest.transform) == "drawn at 16 px, PNG"
    for key, label, parts in read_samples(tmp_path / "run" / "train", ["png"]):
        assert key.split("/")[0] == manifest.classes[label] and decode_image(parts["png"]).shape == (3, 16, 16)


@pytest.mark.parametrize("case", ["inside", "around", "same", "link to it", "shared files", "hard links"])
def test_a_holdout_that_shares_pictures_with_the_source_is_refused(tmp_path: Path, source: Path, case: str) -> None:
    other = tmp_path / "other" / "ant"
    other.mkdir(parents=True)
    link = tmp_path / "link"
    link.symlink_to(source)
    picture = source / "ant" / "part0" / "00.png"
    if case == "shared files":
        (other / "x.png").symlink_to(picture)
    if case == "hard links":
        (other / "x.png").hardlink_to(picture)
    folders = {
        "inside": (source, source / "ant"),
        "around": (source / "ant", source),
        "same": (source, source),
        "link to it": (source, link),
    }
    folder, holdout = folders.get(case, (source, other.parent))
    message = "share 1 files: ant/x.png is ant/part0/00.png" if case not in folders else "lie one in the other"
    with pytest.raises(ValueError, match=message):
        pack.main(config(tmp_path, folder, holdout=str(holdout)))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "gone", ["train/000001.tar", "train/dataset.json", "train/000000.index.safetensors", "holdout"]
)
def test_outputs_that_are_gone_are_packed_again(
    tmp_path: Path, source: Path, gone: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pack.main(config(tmp_path, source, holdout="every:10"))
    before = packed(tmp_path / "run")
    path = tmp_path / "run" / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    pack.main(config(tmp_path, source, holdout="every:10"))
    assert packed(tmp_path / "run") == before
    said = capsys.readouterr().err
    assert ("already packed" if gone.endswith(".json") else "is gone, or not whole: packing again") in said
    if gone != "holdout":
        path.unlink()
        source.rename(tmp_path / "away")
        with pytest.raises(ValueError, match="is gone, or not whole; without source=.* it cannot be packed again"):
            pack.main(config(tmp_path, source, holdout="every:10"))
        assert rundir.read_status(tmp_path / "run")["state"] == "done"


def test_fresh_packs_a_changed_source(tmp_path: Path, source: Path) -> None:
    pack.main(config(tmp_path, source, holdout="0"))
    save(source / "ant" / "new.png", 99)
    with pytest.raises(ValueError, match="30 train images then, 31 now; use another run_dir, or fresh=true"):
        pack.main(config(tmp_path, source, holdout="0"))
    pack.main(config(tmp_path, source, holdout="0", fresh=True))
    assert Manifest.load(tmp_path / "run" / "train").num_samples == 31


def test_what_is_left_out_is_said(tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (source / "dog").mkdir()
    (source / "dog" / "a.heic").write_bytes(b"x")
    (source / "ant" / "gone.png").symlink_to(tmp_path / "nowhere")
    made = config(tmp_path, source, max_pixels=500)
    lost = "train: 1 folders hold no image and became no class: dog (1 .heic)"
    assert lost in pack.plan(made)
    with pytest.raises(ValueError, match=r"pixels is over the limit of 500 \(max_pixels=\)"):
        pack.main(made)
    said = capsys.readouterr().err
    assert lost in said and "2 other files ignored (1 .txt, 1 .heic)" in said
    assert "train: 1 links lead nowhere, e.g. ant/gone.png" in said


def test_progress_is_reported_by_images(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "BEAT_SECONDS", 0.0)
    asked: list[int] = []
    ask = stopping.Stoppable.stop_requested
    monkeypatch.setattr(stopping.Stoppable, "stop_requested", lambda run: asked.append(1) or ask(run))
    pack.main(config(tmp_path, source))
    assert len(asked) > 30
