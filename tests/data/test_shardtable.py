"""A data set whose shards are columns in a file of their own is the same data set."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.file_calls import counted
from support.ranks import on_ranks

from vqscale.data import shards as shards_module
from vqscale.data.images import ImageReader
from vqscale.data.loader import build_loader
from vqscale.data.parts import read_samples
from vqscale.data.shards import MOST_LISTED, Manifest, ShardInfo, missing_file
from vqscale.data.shardtable import ShardTable, survey
from vqscale.data.verify import verify_shard
from vqscale.files import SEAL, sealed, write_json
from vqscale.topology import Topology

SHA = "0123456789abcdef" * 4


def infos(count: int, name: Callable[[int], str] = "{:06d}.tar".format) -> list[ShardInfo]:
    return [ShardInfo(name(n), n % 7, 5120 + n, f"{n:064x}", "", f"{n + 1:064x}") for n in range(1, count + 1)]


def columns_of(folder: Path) -> Path:
    (path,) = folder.glob("shards-*")
    return path


@pytest.fixture
def in_columns(own_images: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The images with their five shards in columns."""
    monkeypatch.setattr(shards_module, "MOST_LISTED", 4)
    manifest = Manifest.load(own_images)
    Manifest.of(manifest.kind, manifest.shards, manifest.classes).save(own_images)
    return own_images


def test_shards_up_to_the_limit_are_listed_and_more_are_columns(tmp_path: Path) -> None:
    for count in (MOST_LISTED, MOST_LISTED + 1):
        manifest = Manifest.of("images", infos(count), ["a"])
        manifest.save(tmp_path)
        raw = json.loads((tmp_path / "dataset.json").read_text())
        assert isinstance(raw["shards"], list) == (count == MOST_LISTED)
        loaded = Manifest.load(tmp_path)
        assert list(loaded.shards) == list(manifest.shards) == infos(count)
        assert replace(loaded, shards=()) == replace(manifest, shards=())
    assert raw["shards"]["count"] == count and columns_of(tmp_path).stat().st_size == raw["shards"]["bytes"]
    Manifest.of("images", infos(3), ["a"]).save(tmp_path)
    assert not list(tmp_path.glob("shards-*")) and len(Manifest.load(tmp_path).shards) == 3


def test_the_fingerprint_and_every_batch_are_those_of_a_list(images: Path, in_columns: Path) -> None:
    listed, table = Manifest.load(images), Manifest.load(in_columns)
    assert isinstance(table.shards, ShardTable)
    assert isinstance(json.loads((images / "dataset.json").read_text())["shards"], list)
    assert table.fingerprint == listed.fingerprint and list(table.shards) == list(listed.shards)
    assert table.runs([0, 3]) == listed.runs([0, 3]) and table.names_of_results() == listed.names_of_results()
    streams = [iter(build_loader(folder, read=ImageReader(12), global_batch=8)) for folder in (images, in_columns)]
    for one, other in (next(pair) for pair in [zip(*streams, strict=True)] * 6):
        assert one["label"].equal(other["label"]) and one["image"].equal(other["image"])
    assert list(read_samples(in_columns, ["png"])) == list(read_samples(images, ["png"]))
    assert missing_file(in_columns, ALONE) is None and verify_shard((in_columns, 2, False)) == []


@pytest.mark.parametrize(
    ("name", "is_pattern"),
    [
        ("{:06d}.tar".format, True),
        ("/data/set-2/part-{:04d}-of-100.tar".format, False),
        ("https://host/x-{:05d}.tar".format, True),
        ("https://host/x-{:05d}.tar?key=7".format, False),
        (lambda n: f"{n * n}.tar", False),
        (lambda n: f"\udcff ü {n:03d}", True),
        (lambda n: f"{'ab'[n % 2]}/{n}.tar", False),
        (lambda n: "same.tar", False),
        (lambda n: "", True),
    ],
)
def test_names_of_every_kind_come_back(name: Callable[[int], str], is_pattern: bool) -> None:
    shards = infos(30, name)
    table = ShardTable.of([replace(shard, index=f"{n:06d}.index.safetensors") for n, shard in enumerate(shards)])
    assert table.column("name") == [shard.name for shard in shards]
    assert [shard.index_name for shard in table] == [f"{n:06d}.index.safetensors" for n in range(30)]
    assert (b'"name_ends"' in table.data) != is_pattern
    assert table[-1] == table[29] and table[3:5] == [table[3], table[4]]
    with pytest.raises(IndexError):
        table[30]


def test_shards_without_an_index_checksum_and_with_a_wrong_one() -> None:
    table = ShardTable.of([replace(shard, index_sha256="") for shard in infos(3)])
    assert [shard.index_sha256 for shard in table] == ["", "", ""]
    for wrong in ("../outside", "ab", SHA + "00"):
        with pytest.raises(ValueError, match=r"non-hexadecimal|is not a sha256"):
            ShardTable.of([replace(infos(1)[0], sha256=wrong)])


def test_a_missing_cut_or_damaged_columns_file_is_named(in_columns: Path) -> None:
    path = columns_of(in_columns)
    whole = path.read_bytes()
    size = len(whole)
    for content, message in (
        (whole[:-9], f"{path}: {size - 9} bytes, not the {size} of dataset.json"),
        (whole + b"x", f"{path}: {size + 1} bytes, not the {size} of dataset.json"),
        (whole[:-1] + bytes([whole[-1] ^ 1]), f"{path}: was damaged: its sha256 is "),
    ):
        path.write_bytes(content)
        for read in (lambda: Manifest.load(in_columns), lambda: verify_shard((in_columns, 0, False))):
            with pytest.raises(ValueError, match=".") as error:
                read()
            assert str(error.value).startswith(message) and "\n" not in str(error.value)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{path} is missing: it lists the 5 shards of dataset.json"):
        Manifest.load(in_columns)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shards": {"count": 6}}, "5 shards, but dataset.json says 6"),
        ({"shards": {"file": "../../x.safetensors"}}, "is no file of shards"),
        ({"shards": {"more": 1}}, "not a data set's description"),
        ({"shards": [1]}, "not a data set's description"),
        ({"num_samples": 38}, "shards of 37 samples, not 38"),
        ({"kind": "videos"}, "not a data set's description"),
        ({SEAL: None}, "it has no checksum"),
    ],
)
def test_a_description_that_does_not_fit_its_columns_is_refused(in_columns: Path, change: dict, message: str) -> None:
    path = in_columns / "dataset.json"
    raw = json.loads(path.read_text())
    del raw[SEAL]
    for key, value in change.items():
        raw[key] = {**raw[key], **value} if isinstance(value, dict) else value
    write_json(path, sealed(raw) if SEAL not in change else {key: raw[key] for key in raw if key != SEAL})
    with pytest.raises(ValueError, match=message):
        Manifest.load(in_columns)


def test_a_kill_at_any_rename_leaves_a_whole_data_set(in_columns: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = Manifest.load(in_columns)
    after = Manifest.of("images", [*before.shards, ShardInfo("more.tar", 1, 5120, SHA)], before.classes)
    rename = os.replace
    for allowed in range(3):
        renames = iter([rename] * allowed)
        monkeypatch.setattr(os, "replace", lambda a, b, renames=renames: next(renames, stop)(a, b))
        if allowed < 2:
            with pytest.raises(OSError, match="killed"):
                after.save(in_columns)
        else:
            after.save(in_columns)
        expected = before if allowed < 2 else after
        assert list(Manifest.load(in_columns).shards) == list(expected.shards)
    assert len(list(in_columns.glob("*shards-*"))) == 1


def stop(*_paths: object) -> None:
    raise OSError("killed")


def test_half_a_million_shards_are_80_bytes_each_and_none_of_it_is_private(tmp_path: Path) -> None:
    count = 500_000
    rows = np.zeros(count, survey(ALONE, 0, lambda n: None).dtype)
    rows["num_samples"], rows["bytes"], rows["sha256"] = 10_000, 1 << 30, np.arange(32)
    table = ShardTable.of_rows(rows, [f"{n:06d}.tar" for n in range(count)])
    Manifest.of("images", table, ["a"]).save(tmp_path)
    assert columns_of(tmp_path).stat().st_size < 80 * count + 2_000
    before = private_bytes()
    manifest = Manifest.load(tmp_path)
    assert manifest.num_samples == 10_000 * count and manifest.shards[-1].name == "499999.tar"
    assert private_bytes() - before < 60e6


ALONE = Topology(0, 1, 0, 1, 1, "single", None)  # type: ignore[arg-type]


def private_bytes() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Private"))


def test_ranks_share_the_look_at_shards_and_all_see_the_same_rows() -> None:
    shards = infos(7)
    looked: list[list[int]] = [[], [], []]

    def look(rank: int, n: int) -> ShardInfo | None:
        looked[rank].append(n)
        return None if n == 4 else shards[n]

    pieces = [survey_of(rank, lambda n, rank=rank: look(rank, n)) for rank in range(3)]
    assert looked == [[0, 3, 6], [1, 4], [2, 5]]
    rows = survey_of(1, lambda n: look(1, n), pieces)
    assert rows["num_samples"].tolist() == [-1 if n == 4 else shards[n].num_samples for n in range(7)]
    rows["num_samples"][4] = shards[4].num_samples
    rows[4] = survey(ALONE, 1, lambda n: shards[4])[0]
    assert list(ShardTable.of_rows(rows, [shard.name for shard in shards])) == shards


def test_ranks_share_the_look_whether_a_data_set_is_whole(own_images: Path) -> None:
    with counted(own_images) as calls:
        assert missing_file(own_images, ALONE) is None
    with counted(own_images) as shared:
        assert on_ranks(3, lambda rank: missing_file(own_images, rank)) == [None] * 3
    assert shared.total - calls.total == 2 * 2  # two more ranks that read dataset.json
    (own_images / "000004.tar").unlink()
    assert on_ranks(3, lambda rank: missing_file(own_images, rank)) == [own_images / "000004.tar"] * 3


def test_columns_of_numbers_are_arrays_however_short_the_list(images: Path, tmp_path: Path) -> None:
    manifest = Manifest.load(images)
    for field in ("num_samples", "bytes"):
        assert manifest.column(field).dtype == np.int64 and len(manifest.column(field)) == 5
    assert Manifest.of("images", [], ["a"]).column("bytes").shape == (0,)
    shards = [replace(shard, bytes=1 << 63) for shard in manifest.shards]
    Manifest.of("images", shards, ["a"]).save(tmp_path)
    with pytest.raises(ValueError, match=r"has bytes=9223372036854775808"):
        Manifest.load(tmp_path)


class Ranks(Topology):
    """One of three ranks: its gather keeps its own piece, or answers with those of all."""

    def gather(self, value):  # type: ignore[no-untyped-def]
        object.__setattr__(self, "piece", value)
        return PIECES or [value[:0]] * 3


PIECES: list[np.ndarray] = []


def survey_of(rank: int, look: Callable[[int], ShardInfo | None], pieces: list[np.ndarray] | None = None) -> np.ndarray:
    topology = Ranks(rank, 3, 0, 1, 1, "ddp", None)  # type: ignore[arg-type]
    PIECES[:] = pieces or [np.zeros(len(range(r, 7, 3)), survey(ALONE, 0, lambda n: None).dtype) for r in range(3)]
    rows = survey(topology, 7, look)
    return rows if pieces else topology.piece  # type: ignore[attr-defined]
