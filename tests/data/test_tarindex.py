import importlib
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
        ([("README", b"x")], "there are no samples"),
    ],
)
def test_hostile_or_broken_tars_are_refused_by_name(tmp_path: Path, entries: list[Entry], message: str) -> None:
    path = make_tar(tmp_path / "x.tar", [*sample("good"), *entries] if "no samples" not in message else entries)
    with pytest.raises(ValueError, match=message) as error:
        index_tar(path, num_classes=10)
    assert str(path) in str(error.value)


def gnu(kind: bytes, size: int = 0, name: str = "a.jpg") -> bytes:
    """A header of a kind that tarfile does not write."""
    info = member(name, kind)
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT)


def pax(records: dict[str, str], entry: Entry) -> bytes:
    """A member after a PAX header with these records."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo(entry[0])
        info.size, info.pax_headers = len(entry[1]), records
        tar.addfile(info, io.BytesIO(entry[1]))
    return out.getvalue().rstrip(b"\0").ljust(-(-len(out.getvalue().rstrip(b"\0")) // 512) * 512, b"\0")


def blocks(entries: list[Entry]) -> bytes:
    """A tar without its end mark."""
    return b"".join(gnu(b"0", len(data), name) + data + bytes(-len(data) % 512) for name, data in entries)


END = bytes(1024)
GOOD = blocks(sample("good"))
STRANGE_TARS = {
    "empty": (b"", "empty, 0 bytes"),
    "one zero block": (bytes(512), "cut short at byte 512, inside the end mark"),
    "no end mark": (GOOD, "cut short at byte 2048, inside a header; its end mark is missing"),
    "half an end mark": (GOOD + bytes(512), "cut short at byte 2560, inside the end mark"),
    "trailing garbage": (GOOD + END + b"x" * 512, "data after the end mark at byte 2048"),
    "a zip called tar": (b"PK\x03\x04" + bytes(600), "compressed into a zip archive"),
    "a web page": (b"<!DOCTYPE html><title>404</title>", "a web page, not a tar"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(600), "compressed with zstd.*unzstd"),
    "noise": (b"\x01" * 600, "not a tar header at byte 0"),
    "a GNU sparse file": (gnu(b"S", 512) + bytes(512) + END, "'a.jpg' is a sparse file"),
    "a PAX sparse file": (pax({"GNU.sparse.major": "1"}, ("a.jpg", b"x")) + END, "'a.jpg' is a sparse file"),
    "an unknown type": (gnu(b"Z") + END, "unknown type b'Z'"),
    "a PAX size beyond the end": (pax({"size": "9" * 15}, ("a.jpg", b"x")) + END, "cut short at byte"),
    "a PAX size that is none": (pax({"size": "-1"}, ("a.jpg", b"x")) + END, "has the size '-1'"),
    "a PAX path that leads out": (pax({"path": "../a.jpg"}, ("a.jpg", b"x")) + END, "leads out"),
    "parts apart": (blocks([("a.jpg", b"x"), ("b.jpg", b"x"), ("a.cls", b"1")]) + END, "no label"),
    "parts apart, the label first": (
        blocks([("a.cls", b"1"), ("b.cls", b"1"), ("a.jpg", b"x")]) + END,
        r"key 'a' comes a second time; keys must be unique, and a sample's parts adjacent \(tar --sort=name\)",
    ),
    "pairs without a label": (
        blocks([("a.jpg", b"x"), ("a.txt", b"x"), ("a.json", b"{}")]) + END,
        "key 'a' has no label: its parts are 'jpg', 'txt', 'json'.*labels=none",
    ),
    "two names for one part": (blocks([("a.jpg", b"x"), ("a.JPG", b"x"), ("a.cls", b"1")]) + END, "two parts 'jpg'"),
    "every picture under another name": (
        blocks([("1.image.jpg", b"x"), ("1.cls", b"1"), ("2.image.jpg", b"x"), ("2.cls", b"1")]) + END,
        "none of its 2 samples has a picture .*'image.jpg', 'cls', and a part's name begins at the first dot",
    ),
    "dots in the keys": (
        blocks([("shot 2.0.jpg", b"x"), ("shot 2.0.cls", b"1"), ("shot 2.1.jpg", b"x"), ("shot 2.1.cls", b"1")]) + END,
        "key 'shot 2' has no label: its parts are '0.jpg', '0.cls', '1.jpg', '1.cls'.*begins at the first dot",
    ),
    "a label that is too long": (
        blocks([("a.jpg", b"x"), ("a.cls", b"0" * 64 + b"7")]) + END,
        "key 'a': the label is longer than 64 bytes",
    ),
    "a label of 41 digits": (blocks([("a.jpg", b"x"), ("a.cls", b"1" * 41)]) + END, "label 1{41} is too large"),
}


@pytest.mark.parametrize("name", STRANGE_TARS)
def test_strange_tars_are_refused_in_one_clear_line(tmp_path: Path, name: str) -> None:
    data, message = STRANGE_TARS[name]
    (tmp_path / "x.tar").write_bytes(data)
    with pytest.raises(ValueError, match=message) as error:
        index_tar(tmp_path / "x.tar")
    assert str(error.value).startswith(str(tmp_path / "x.tar")) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("module", "message"), [("gzip", "gzip.*gunzip"), ("bz2", "bzip2.*bunzip2"), ("lzma", "xz.*unxz")]
)
def test_a_compressed_tar_is_named_as_such(tmp_path: Path, module: str, message: str) -> None:
    (tmp_path / "x.tar").write_bytes(importlib.import_module(module).compress(GOOD + END))
    with pytest.raises(ValueError, match=f"compressed with {message}"):
        index_tar(tmp_path / "x.tar")


CLUTTER = ("train/._1.jpg", "train/.DS_Store", ".DS_Store", "._x.tar", "__MACOSX/train/._1.jpg", "a/__MACOSX/1.jpg")
CLUTTER += ("Thumbs.db", "train/desktop.ini", "__meta__", "README", "train/..jpg")


@pytest.mark.parametrize("entry", [(name, b"clutter") for name in CLUTTER], ids=CLUTTER)
def test_files_that_are_no_samples_are_skipped(tmp_path: Path, entry: Entry) -> None:
    (tmp_path / "x.tar").write_bytes(blocks([entry, *sample("train/1"), entry, *sample("train/2")]) + END)
    assert index_tar(tmp_path / "x.tar")[1].keys == ["train/1", "train/2"]


STRANGE_BUT_RIGHT = {
    "a volume label": gnu(b"V", 0, "backup of 1.jpg") + GOOD,
    "a contiguous file": gnu(b"7", 1, "a.jpg") + b"x".ljust(512, b"\0") + blocks([("a.cls", b"1")]) + GOOD,
    "Solaris headers": gnu(b"X", 13, "x") + b"13 comment=x\n".ljust(512, b"\0") + GOOD,
    "a name that begins like a zip": blocks(sample("PK")) + GOOD,
    "a PAX name": pax({"path": "ä.jpg"}, ("a.jpg", b"x")) + blocks([("ä.cls", b"1")]) + GOOD,
    "a padded label": blocks([("a.jpg", b"x"), ("a.cls", b" " * 40 + b"1\n")]) + GOOD,
    "a long end mark": GOOD + bytes(10240),
}


@pytest.mark.parametrize("name", STRANGE_BUT_RIGHT)
def test_strange_tars_that_are_right_are_read(tmp_path: Path, name: str) -> None:
    (tmp_path / "x.tar").write_bytes(STRANGE_BUT_RIGHT[name] + END)
    rows = index_tar(tmp_path / "x.tar")[1]
    assert rows.keys[-1] == "good" and set(rows.labels) == {1}
    assert all(set(parts) == {"jpg", "cls"} for parts in rows.parts)


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
