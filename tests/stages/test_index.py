import io
import logging
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from support.ranks import on_ranks

from vqscale.data.images import ImageReader
from vqscale.data.loader import build_loader
from vqscale.data.sequential import sequential_batches
from vqscale.data.shards import Manifest
from vqscale.stages import index
from vqscale.stages.index import IndexConfig


def others_tar(path: Path, first: int, count: int) -> None:
    """As img2dataset or a shell script might write it."""
    with tarfile.open(path, "w") as tar:
        for n in range(first, first + count):
            out = io.BytesIO()
            Image.new("RGB", (8, 8), (n, 0, 0)).save(out, "PNG")
            for name, data in ((f"n/{n:03d}.png", out.getvalue()), (f"n/{n:03d}.cls", str(n % 3).encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    folder = tmp_path / "tars"
    folder.mkdir()
    for shard in range(3):
        others_tar(folder / f"data-{shard:03d}.tar", 7 * shard, 7)
    return folder


def config(tmp_path: Path, source: str, **changes: Any) -> IndexConfig:
    return replace(IndexConfig(run_dir=str(tmp_path / "run"), source=source, workers=1, device="cpu"), **changes)


def test_others_tars_are_read_where_they_are(tmp_path: Path, tars: Path) -> None:
    index.main(config(tmp_path, f"{tars}/data-{{000..001}}.tar", holdout=f"{tars}/data-002.tar"))
    train, holdout = (Manifest.load(tmp_path / "run" / part) for part in ("train", "holdout"))
    assert (train.num_samples, holdout.num_samples) == (14, 7) and train.classes == ("0", "1", "2")
    assert not list((tmp_path / "run").rglob("*.tar"))
    loader = build_loader(tmp_path / "run" / "train", read=ImageReader(8), global_batch=14)
    batch = next(iter(loader))
    numbers = batch["image"][:, 0, 0, 0].long()
    assert sorted(numbers.tolist()) == list(range(14)) and torch.equal(batch["label"], numbers % 3)
    (last,) = sequential_batches(tmp_path / "run" / "holdout", read=ImageReader(8), batch=7)
    assert last["image"][:, 0, 0, 0].tolist() == list(range(14, 21))


def test_rerun_adds_nothing_and_verifies(tmp_path: Path, tars: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = config(tmp_path, str(tars), verify=True)
    index.main(made)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run" / "train").glob("*.safetensors")}
    index.main(made)
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "run" / "train").glob("*.safetensors")} == before
    assert "verified: 3 tars are whole" in capsys.readouterr().err


def test_verify_finds_a_flipped_byte(tmp_path: Path, tars: Path) -> None:
    made = config(tmp_path, str(tars), verify=True)
    index.main(made)
    manifest = Manifest.load(tmp_path / "run" / "train")
    offset = int(manifest.index(tmp_path / "run" / "train", 1).offset["png"][2])
    data = bytearray((tars / "data-001.tar").read_bytes())
    data[offset + 20] ^= 1
    (tars / "data-001.tar").write_bytes(data)
    with pytest.raises(ValueError, match=r"2 differences in 3 tars; the first: .*data-001.tar"):
        index.main(made)


def test_class_names_of_another_data_set(tmp_path: Path, tars: Path) -> None:
    for names in (["ant", "bee", "cow"], ["ant", "bee"]):
        Manifest.of("images", [], names).save(tmp_path)
        made = config(tmp_path, str(tars), classes_from=str(tmp_path), run_dir=str(tmp_path / f"run{len(names)}"))
        if len(names) == 3:
            index.main(made)
            assert Manifest.load(tmp_path / "run3" / "train").classes == ("ant", "bee", "cow")
        else:
            with pytest.raises(ValueError, match=r"data-000.tar: key 'n/002': label 2 is too large, outside the 2"):
                index.main(made)
            assert not list((tmp_path / "run2").rglob("dataset.json"))


def test_changed_tars_are_refused(tmp_path: Path, tars: Path) -> None:
    index.main(config(tmp_path, str(tars)))
    others_tar(tars / "data-003.tar", 21, 7)
    with pytest.raises(ValueError, match=r"tars have changed .* 3 with 21 samples then, 4 with 28 now.*fresh=true"):
        index.main(config(tmp_path, str(tars)))
    index.main(config(tmp_path, str(tars), fresh=True))
    assert Manifest.load(tmp_path / "run" / "train").num_samples == 28


def test_a_tar_in_both_splits_is_refused(tmp_path: Path, tars: Path) -> None:
    (tmp_path / "link.tar").symlink_to(tars / "data-001.tar")
    (tmp_path / "hard.tar").hardlink_to(tars / "data-001.tar")
    shutil.copy(tars / "data-001.tar", tmp_path / "copy.tar")
    for holdout in (str(tars / "data-001.tar"), str(tmp_path / "link.tar"), str(tmp_path / "hard.tar")):
        with pytest.raises(ValueError, match="is a training tar too"):
            index.main(config(tmp_path, str(tars), holdout=holdout))
    assert not (tmp_path / "run").exists()
    both = config(tmp_path, str(tars), holdout=str(tmp_path / "hard.tar"))
    errors = on_ranks(2, lambda rank: index._tars(both, rank))
    assert len(errors) == 2 and all("hard.tar is a training tar too" in str(error) for error in errors)
    with pytest.raises(ValueError, match=r"copy.tar has the same bytes as .*data-001.tar in train"):
        index.main(config(tmp_path, str(tars), holdout=str(tmp_path / "copy.tar")))
    assert not list((tmp_path / "run").rglob("dataset.json"))


def test_samples_without_a_picture_are_counted(
    tmp_path: Path, tars: Path, caplog: pytest.LogCaptureFixture, program_log: logging.Logger
) -> None:
    with tarfile.open(tars / "data-001.tar", "a") as tar:
        for name in ("odd.image.jpg", "odd.cls"):
            info = tarfile.TarInfo(name)
            info.size = 1
            tar.addfile(info, io.BytesIO(b"1"))
    program_log.addHandler(caplog.handler)
    index.main(config(tmp_path, str(tars)))
    program_log.removeHandler(caplog.handler)
    assert "1 of 22 samples have no picture" in caplog.text and "data-001.tar: key 'odd'" in caplog.text


def test_labels_that_do_not_begin_at_0_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, program_log: logging.Logger
) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, data in (("a.png", b"x"), ("a.cls", b"1"), ("b.png", b"x"), ("b.cls", b"3")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    program_log.addHandler(caplog.handler)
    index.main(config(tmp_path, str(tmp_path / "x.tar")))
    program_log.removeHandler(caplog.handler)
    assert "2 of the labels 0 to 3 do not occur, the first is 0" in caplog.text
    assert Manifest.load(tmp_path / "run" / "train").classes == ("0", "1", "2", "3")


def test_a_damaged_index_is_made_again(tmp_path: Path, tars: Path) -> None:
    index.main(config(tmp_path, str(tars)))
    path = tmp_path / "run" / "train" / "000001.index.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match="000001.index.safetensors: was damaged or changed"):
        index.main(config(tmp_path, str(tmp_path / "run"), verify=True, run_dir=str(tmp_path / "verify")))
    index.main(config(tmp_path, str(tars)))
    assert path.read_bytes() == whole


def test_mistakes(tmp_path: Path, tars: Path) -> None:
    for changes, message in (
        ({"source": ""}, "source= names no tars"),
        ({"source": f"{tars}/nothing-*.tar"}, "nothing matches"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            index.main(config(tmp_path, str(tars)) if not changes else replace(config(tmp_path, str(tars)), **changes))
        assert not (tmp_path / "run").exists()
    with open(tars / "data-001.tar", "r+b") as file:
        file.truncate(3000)
    with pytest.raises(ValueError, match=r"data-001.tar: cut short at byte 3000, inside"):
        index.main(config(tmp_path, str(tars)))


def test_labels_none(tmp_path: Path, tars: Path) -> None:
    index.main(config(tmp_path, str(tars), labels="none"))
    assert Manifest.load(tmp_path / "run" / "train").classes == ("all",)
    assert "3 training and 0 held-out tars" in index.plan(config(tmp_path, str(tars)))
