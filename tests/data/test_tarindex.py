import io
import os
import random
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from vqscale.data.loader import build_loader
from vqscale.data.tarindex import index_tar

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
Entry = tuple[str, bytes]


def make_tar(path: Path, entries: Iterable[Entry | tarfile.TarInfo], tar_format: int = tarfile.GNU_FORMAT) -> Path:
    with tarfile.open(path, "w", format=tar_format) as tar:
        for entry in entries:
            if isinstance(entry, tarfile.TarInfo):
                tar.addfile(entry)
                continue
            info = tarfile.TarInfo(entry[0])
            info.size = len(entry[1])
            info.mtime = 1.5 if tar_format == tarfile.PAX_FORMAT else 1
            tar.addfile(info, io.BytesIO(entry[1]))
    return path


def member(name: str, kind: bytes, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def sample(key: str, label: bytes = b"1") -> list[Entry]:
    return [(f"{key}.jpg", key.encode() * 50), (f"{key}.cls", label)]


@pytest.mark.parametrize("tar_format", FORMATS)
def test_others_tars_are_indexed_as_webdataset_reads_them(
    tmp_path: Path, tar_format: str, read_as_webdataset: Callable
) -> None:
    deep = "d" * 60 + "/" + "k" * (60 if tar_format == "ustar" else 180)
    entries: list[Entry | tarfile.TarInfo] = [("README", b"hello"), member("train", tarfile.DIRTYPE)]
    for key in ("train/0001", deep, "./ünï", "last"):
        entries += [*sample(key, b"7\n"), (f"{key}.Seg.PNG", b"s" * 513)]
    path = make_tar(tmp_path / "x.tar", entries, FORMATS[tar_format])
    info, rows = index_tar(path)
    read = read_as_webdataset(path)
    assert rows.keys == [s["__key__"] for s in read] and rows.labels == [7] * 4
    data = path.read_bytes()
    for parts, expected in zip(rows.parts, read, strict=True):
        assert set(parts) == {"jpg", "cls", "seg.png"}
        assert {n: data[o : o + s] for n, (o, s, _) in parts.items()} == {n: expected[n] for n in parts}
    assert info.num_samples == 4 and info.bytes == len(data)


def test_labels_none(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "x.tar", [("a.jpg", b"1"), ("b.jpg", b"2"), ("b.txt", b"words")])
    assert index_tar(path, labels="none")[1].labels == [0, 0]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (sample("../../etc/x"), r"'../../etc/x.jpg' leads out"),
        (sample("/etc/x"), r"'/etc/x.jpg' leads out"),
        (sample("a/../../x"), r"leads out"),
        ([member("a.jpg", tarfile.SYMTYPE, "/etc/passwd")], "'a.jpg' is a symbolic link"),
        ([member("a.jpg", tarfile.LNKTYPE, "b.jpg")], "'a.jpg' is a hard link"),
        ([member("a.jpg", tarfile.CHRTYPE)], "'a.jpg' is a device"),
        ([member("a.jpg", tarfile.BLKTYPE)], "'a.jpg' is a device"),
        ([member("a.jpg", tarfile.FIFOTYPE)], "'a.jpg' is a pipe"),
        (sample("a") + sample("b") + sample("a"), "key 'a' comes a second time"),
        ([*sample("a"), ("a.jpg", b"x")], "key 'a' has two parts 'jpg'"),
        ([("a.jpg", b"x")], "key 'a' has no label"),
        (sample("a", b"cat"), "key 'a': label 'cat' is not a number"),
        (sample("a", b""), "key 'a': label '' is not a number"),
        (sample("a", b"1.5"), "label '1.5' is not a number"),
        (sample("a", b"-3"), "key 'a': label -3 is negative"),
        (sample("a", b"10"), "key 'a': label 10 is too large, outside the 10 classes"),
        ([("README", b"x")], "holds no samples"),
    ],
)
def test_hostile_or_broken_tars_are_refused_by_name(tmp_path: Path, entries: list[Entry], message: str) -> None:
    path = make_tar(tmp_path / "x.tar", [*sample("good"), *entries] if "no samples" not in message else entries)
    with pytest.raises(ValueError, match=message) as error:
        index_tar(path, num_classes=10)
    assert str(path) in str(error.value)


def test_parts_that_could_run_code_are_never_opened(tmp_path: Path) -> None:
    """A pickle in a part is only bytes; nothing decodes by suffix."""
    sentinel = tmp_path / "ran"
    evil = b"cos\nsystem\n(S'touch " + str(sentinel).encode() + b"'\ntR."
    path = make_tar(tmp_path / "x.tar", [*sample("a"), ("a.pyd", evil), ("a.pkl", evil)])
    index_tar(path)
    assert not sentinel.exists()


def test_joined_tars_are_refused(tmp_path: Path) -> None:
    first, second = (make_tar(tmp_path / f"{n}.tar", sample(n)) for n in "ab")
    with open(first, "ab") as file:
        file.write(second.read_bytes())
    with pytest.raises(ValueError, match="are these tars joined"):
        index_tar(first)


def test_no_truncation_is_silent(own_images: Path, tmp_path: Path) -> None:
    """300 random cuts. Found by the index when anything is lost, and by the loader always."""
    whole = (own_images / "000002.tar").read_bytes()
    contents = len(whole.rstrip(b"\0"))
    end_mark = -(-contents // 512) * 512 + 1024
    rng = random.Random(1)
    cuts = [rng.randrange(len(whole)) for _ in range(200)] + [rng.randrange(end_mark) for _ in range(100)]
    path, refused = own_images / "000002.tar", 0
    for cut in cuts:
        path.write_bytes(whole[:cut])
        try:
            index_tar(path)
        except ValueError as error:
            assert str(path) in str(error) and "byte" in str(error)
            refused += 1
        else:
            assert cut >= end_mark  # only zeros after the end mark are gone
        with pytest.raises(ValueError, match="cut short"):
            build_loader(own_images, read=lambda *_: {}, global_batch=4, max_bad_fraction=0)
    assert refused >= 200


def test_no_flipped_header_byte_is_silent(own_images: Path) -> None:
    path = own_images / "000003.tar"
    whole = bytearray(path.read_bytes())
    info, _ = index_tar(path)
    for at in random.Random(2).sample(range(512), 100):
        damaged = bytearray(whole)
        damaged[at] ^= 0x11
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"000003.tar"):
            index_tar(path)
    assert info.num_samples == 5


def test_absurd_sizes_are_refused_without_reading_them(tmp_path: Path) -> None:
    info = member("a.jpg", b"x")
    info.size = 1 << 40
    (tmp_path / "x.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    with pytest.raises(ValueError, match="claims"):
        index_tar(tmp_path / "x.tar")
    info.type = tarfile.REGTYPE
    (tmp_path / "x.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    with pytest.raises(ValueError, match="cut short at byte 1536, inside member 'a.jpg'"):
        index_tar(tmp_path / "x.tar")


def test_a_missing_tar(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such tar"):
        index_tar(tmp_path / "x.tar")
    assert os.listdir(tmp_path) == []
