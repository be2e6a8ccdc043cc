import hashlib
import json
import os
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vqscale.data.parts import read_samples
from vqscale.data.shards import IndexRows, Manifest, ShardIndex, ShardInfo, ShardWriter, resolve, shard_info
from vqscale.data.verify import verify_shard
from vqscale.files import SEAL, sealed, write_json

SAMPLES = {
    "a/0001": {"jpg": b"x" * 700, "cls": b"3", "json": b"{}"},
    "b/" + "long" * 60: {"jpg": b"", "cls": b"0"},
    "ü/ключ 1": {"png": bytes(range(256)) * 2, "cls": b"12"},
}


def write(path: Path) -> ShardInfo:
    with ShardWriter(path) as writer:
        for key, parts in SAMPLES.items():
            writer.write(key, parts)
    assert writer.info is not None
    return writer.info


def test_webdataset_reads_what_we_write(tmp_path: Path, read_as_webdataset: Callable) -> None:
    write(tmp_path / "000000.tar")
    read = read_as_webdataset(tmp_path / "000000.tar")
    assert [sample["__key__"] for sample in read] == list(SAMPLES)
    for sample, parts in zip(read, SAMPLES.values(), strict=True):
        assert {name: sample[name] for name in parts} == parts


def test_the_index_points_at_every_part(tmp_path: Path) -> None:
    info = write(tmp_path / "000000.tar")
    data = (tmp_path / "000000.tar").read_bytes()
    index = ShardIndex.load(tmp_path / info.index_name)
    assert index.keys == list(SAMPLES) and index.labels.tolist() == [3, 0, 12]
    for row, parts in enumerate(SAMPLES.values()):
        for name in index.part_names:
            offset, size = int(index.offset[name][row]), int(index.size[name][row])
            assert (data[offset : offset + size] if offset >= 0 else None) == parts.get(name)
    assert (info.bytes, info.sha256) == (len(data), hashlib.sha256(data).hexdigest())


def test_bytes_are_reproducible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "again").mkdir()
    write(tmp_path / "000000.tar")
    monkeypatch.setattr("time.time", lambda: 2e9)
    write(tmp_path / "again" / "000000.tar")
    for name in ("000000.tar", "000000.index.safetensors"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError), ShardWriter(tmp_path / "000000.tar") as writer:
        writer.write("a", {"cls": b"0"})
        raise KeyError
    assert os.listdir(tmp_path) == []


def test_a_kill_at_any_moment_leaves_no_tar_without_its_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop at each rename in turn: what can be seen is nothing, or an index alone, or both."""
    renames = os.replace
    for allowed in range(3):
        calls = iter(range(10))

        def replace(source: str, target: str, allowed: int = allowed, calls=calls) -> None:
            if next(calls) >= allowed:
                raise OSError("killed")
            renames(source, target)

        monkeypatch.setattr(os, "replace", replace)
        folder = tmp_path / str(allowed)
        folder.mkdir()
        if allowed < 2:
            with pytest.raises(OSError, match="killed"):
                write(folder / "000000.tar")
        else:
            write(folder / "000000.tar")
        seen = {path.suffix for path in folder.iterdir()}
        assert seen == [set(), {".safetensors"}, {".safetensors", ".tar"}][allowed]
        assert (shard_info(folder / "000000.tar") is not None) == (allowed == 2)


@pytest.mark.parametrize(
    ("key", "parts", "message"),
    [
        ("../x", {"cls": b"0"}, "leads out"),
        ("/x", {"cls": b"0"}, "leads out"),
        ("a/x.y", {"cls": b"0"}, "without dots"),
        ("a", {"jpg": b""}, "no label"),
        ("a", {"cls": b"cat"}, "'cat' is not a number"),
        ("a", {"cls": b"-1"}, "negative"),
        ("a", {"cls": b"1" * 41}, "too large"),
        ("a", {"cls": b"1" * 65}, "longer than 64 bytes"),
        ("twice", {"cls": b"0"}, "written twice"),
    ],
)
def test_unusable_samples_are_refused(tmp_path: Path, key: str, parts: dict[str, bytes], message: str) -> None:
    with pytest.raises(ValueError, match=message), ShardWriter(tmp_path / "000000.tar") as writer:
        writer.write("twice", {"cls": b"0"})
        writer.write(key, parts)


def test_a_damaged_index_is_refused(tmp_path: Path) -> None:
    info = write(tmp_path / "000000.tar")
    path = tmp_path / info.index_name
    whole = path.read_bytes()
    for cut in range(0, len(whole), 37):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="not a whole shard index"):
            ShardIndex.load(path)


def test_manifest_round_trip_and_tampering(images: Path, tmp_path: Path) -> None:
    manifest = Manifest.load(images)
    manifest.save(tmp_path)
    assert Manifest.load(tmp_path) == manifest
    raw = json.loads((tmp_path / "dataset.json").read_text())
    raw["classes"][0] = "another"
    (tmp_path / "dataset.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="was edited"):
        Manifest.load(tmp_path)
    raw["version"] = 3
    (tmp_path / "dataset.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="version 3"):
        Manifest.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shards": [{"name": 5, "num_samples": 1, "bytes": 512, "sha256": ""}]}, "a shard has name=5"),
        ({"shards": [{"name": "x", "num_samples": -1, "bytes": 512, "sha256": ""}]}, "a shard has num_samples=-1"),
        ({"shards": [{"name": "x", "num_samples": 1.5, "bytes": 512, "sha256": ""}]}, "a shard has num_samples=1.5"),
        ({"shards": [{"name": "x", "num_samples": 10**12, "bytes": 512, "sha256": ""}]}, "do not fit in the 512 bytes"),
        ({"shards": [{"name": "x"}]}, "not a data set's description"),
        ({"shards": 3}, "not a data set's description"),
        ({"classes": [1, 2]}, "not a list of names"),
        ({"extra": [1]}, "no objects"),
        ({"transform": "abc"}, "no objects"),
        ({"kind": "videos"}, "not a data set's description"),
    ],
)
def test_an_impossible_description_is_refused(images: Path, tmp_path: Path, change: dict, message: str) -> None:
    raw = json.loads((images / "dataset.json").read_text())
    raw.pop(SEAL)
    write_json(tmp_path / "dataset.json", sealed({**raw, **change}))
    with pytest.raises(ValueError, match=message) as error:
        Manifest.load(tmp_path)
    assert str(error.value).startswith(str(tmp_path / "dataset.json")) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("names", "results"),
    [
        (["/a/x-000.tar", "/b/x-001.tar"], ["x-000.tar", "x-001.tar"]),
        (["https://host/x-000.tar", "s3://b/x-001.tar"], ["x-000.tar", "x-001.tar"]),
        (["/a/x.tar", "/b/x.tar"], ["000000.tar", "000001.tar"]),
        (["https://host/x.tar?sign=a/b", "pipe:cat y | zcat"], ["000000.tar", "000001.tar"]),
        (["..", "a/.tar"], ["000000.tar", "000001.tar"]),
        (["../x.tar", "/a/x.tar"], ["000000.tar", "000001.tar"]),
    ],
)
def test_results_have_names_of_their_own(names: list[str], results: list[str]) -> None:
    shards = [ShardInfo(name, 1, 1, "", f"../{n:06d}.index.safetensors") for n, name in enumerate(names)]
    assert Manifest.of("images", shards, ["all"]).names_of_results() == results


def test_an_index_of_another_tar_is_refused(own_images: Path) -> None:
    (own_images / "000000.index.safetensors").write_bytes((own_images / "000003.index.safetensors").read_bytes())
    with pytest.raises(ValueError, match="another tar"):
        Manifest.load(own_images).index(own_images, 0)


def test_no_flipped_bit_of_an_index_is_silent(own_images: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, rng = own_images / "000002.index.safetensors", random.Random(3)
    whole = path.read_bytes()
    for at in rng.sample(range(len(whole)), 200):
        flip(path, at)
        with pytest.raises(ValueError, match="000002.index.safetensors"):
            Manifest.load(own_images).index(own_images, 2)
        path.write_bytes(whole)
    flip(path, len(whole) - 1)
    assert "000002.index.safetensors" in verify_shard((own_images, 2, False))[0]
    with pytest.raises(ValueError, match=r"000002.index.safetensors: was damaged or changed: its sha256 is"):
        list(read_samples(own_images, ["png"]))


def test_edited_labels_are_seen_and_data_sets_without_a_checksum_still_read(own_images: Path) -> None:
    manifest = Manifest.load(own_images)
    path = own_images / "000002.index.safetensors"
    index = ShardIndex.load(path)
    rows = IndexRows(index.keys, [0] * len(index), [{} for _ in index.keys])
    rows.save(path, manifest.shards[2])
    with pytest.raises(ValueError, match="was damaged or changed"):
        manifest.index(own_images, 2)
    earlier = [replace(shard, index_sha256="") for shard in manifest.shards]
    Manifest.of("images", earlier, manifest.classes).save(own_images)
    assert "index_sha256" not in (own_images / "dataset.json").read_text()
    assert Manifest.load(own_images).fingerprint == manifest.fingerprint
    assert Manifest.load(own_images).index(own_images, 2).labels.tolist() == [0] * 13


def test_labels_outside_the_classes_are_refused(own_images: Path) -> None:
    manifest = Manifest.load(own_images)
    Manifest.of("images", manifest.shards, manifest.classes[:2]).save(own_images)
    with pytest.raises(ValueError, match=r"000002.index.*: label \d of key '.*' is outside the 2 classes"):
        Manifest.load(own_images).index(own_images, 2)


def test_resolve(images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "train").symlink_to(images)
    assert resolve(images) == resolve(images, "holdout") == images
    assert resolve(tmp_path / "run") == tmp_path / "run" / "train"
    assert resolve(tmp_path / "run", "holdout") == tmp_path / "run" / "train"
    assert "no holdout" in caplog.text
    with pytest.raises(FileNotFoundError, match="does not exist; `vqscale extract_codes` makes it"):
        resolve(tmp_path / "nowhere", made_by="extract_codes")


def test_read_samples_sees_every_sample_and_a_flipped_byte(own_images: Path) -> None:
    assert len(list(read_samples(own_images, ["png"]))) == 37
    index = Manifest.load(own_images).index(own_images, 2)
    flip(own_images / "000002.tar", int(index.offset["png"][4]) + 20)
    with pytest.raises(ValueError, match=rf"000002.tar: key '{index.key(4)}': part 'png' is damaged"):
        list(read_samples(own_images, ["png"]))


def test_samples_are_read_at_positions_in_the_order_asked(images: Path) -> None:
    everything = list(read_samples(images, ["png", "cls"]))
    asked = [36, 0, 7, 6, 36]
    assert list(read_samples(images, ["png", "cls"], asked)) == [everything[position] for position in asked]
    assert {int(sample.parts["cls"]) == sample.label for sample in everything} == {True}
    assert [sample.parts for sample in read_samples(images, ["txt"], [3])] == [{}]
    for position in (-1, 37):
        with pytest.raises(IndexError, match=f"no position {position} among 37 samples"):
            next(read_samples(images, [], [position]))


def flip(path: Path, at: int) -> None:
    data = np.fromfile(path, np.uint8)
    data[at] ^= 1
    data.tofile(path)
