"""Tars and pictures made to harm: nothing in them runs, nothing is written outside, no bomb goes off."""

import ctypes
import io
import os
import pickle
import struct
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vqscale.data.codes import CodeReader
from vqscale.data.images import ImageReader, decode_image
from vqscale.data.loader import build_loader
from vqscale.data.parts import DecodeError, read_samples
from vqscale.data.sequential import sequential_batches
from vqscale.data.shards import Manifest
from vqscale.data.tarindex import index_tar
from vqscale.evaluation.inputs import DataSet
from vqscale.evaluation.results import first_of_each_class
from vqscale.stages import index
from vqscale.stages.index import IndexConfig

CODE_PARTS = ("pyd", "pkl", "pickle", "pth", "pt", "cbor", "json", "npy", "npz", "py", "sh", "ten", "mp4", "gz")


class _Evil:
    def __init__(self, sentinel: Path):
        self.sentinel = sentinel

    def __reduce__(self) -> Any:
        return Path.touch, (self.sentinel,)


def pickled_npy(payload: _Evil) -> bytes:
    """An .npy of Python objects, which numpy would unpickle if it were allowed to."""
    out = io.BytesIO()
    np.save(out, np.array([payload], object), allow_pickle=True)
    return out.getvalue()


def png(value: int = 0, size: int = 8) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (size, size), (value, 0, 0)).save(out, "PNG")
    return out.getvalue()


def tar_of(path: Path, entries: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in entries:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def everything(root: Path) -> set[Path]:
    return {path for path in root.rglob("*") if "run" not in path.relative_to(root).parts[:1]}


def test_payloads_in_every_part_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Indexed, verified, trained on, evaluated, shown: pickles stay bytes; files appear in the run's folder only."""
    monkeypatch.chdir(tmp_path)
    payload = pickle.dumps(_Evil(tmp_path / "ran"))
    pickle.loads(payload)
    (tmp_path / "ran").unlink()  # it is there: the payload is live
    entries = []
    for n in range(4):
        entries += [(f"{n}.png", png(n)), (f"{n}.cls", b"0")]
        entries += [
            (f"{n}.{part}", pickled_npy(_Evil(tmp_path / "ran")) if "np" in part else payload) for part in CODE_PARTS
        ]
    entries += [("__import__.py/x", b"x"), ("$(touch ran).png", png()), ("$(touch ran).cls", b"0")]
    tar_of(tmp_path / "x.tar", [*entries, ("`touch ran`;touch ran|.png", png()), ("`touch ran`;touch ran|.cls", b"0")])
    before = everything(tmp_path)
    config = IndexConfig(run_dir="run", source=str(tmp_path / "x.tar"), resolution=8, verify=True, workers=1)
    index.main(config)
    folder = tmp_path / "run" / "train"
    loader = build_loader(folder, read=ImageReader(8), global_batch=6)
    assert next(iter(loader))["bad"].tolist() == [0] * 6
    assert sum(batch["weight"].sum() for batch in sequential_batches(folder, read=ImageReader(8), batch=2)) == 6
    manifest = Manifest.load(folder)
    first_of_each_class(DataSet("x", folder, manifest), 8, per_class=9, most_classes=2)
    assert len(list(read_samples(folder, manifest.index(folder, 0).part_names))) == 6
    assert everything(tmp_path) == before and not (tmp_path / "ran").exists()


def test_codes_of_python_objects_do_not_decode(tmp_path: Path) -> None:
    with pytest.raises(DecodeError, match=r"top.npy contains \|O"):
        CodeReader({"top": (1, 1)})({"top.npy": pickled_npy(_Evil(tmp_path / "ran"))}, 0, 0)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "name",
    [
        "../outside",
        "../../outside",
        "a/../../outside",
        "/outside",
        "{tmp}/outside",
        "./../outside",
        "a/b/../../../outside",
    ],
)
def test_keys_that_lead_out_write_nothing(tmp_path: Path, name: str) -> None:
    name = name.format(tmp=tmp_path)
    (tmp_path / "deep" / "er").mkdir(parents=True)
    tar = tar_of(tmp_path / "deep" / "er" / "x.tar", [(f"{name}.png", png()), (f"{name}.cls", b"0")])
    before = everything(tmp_path)
    config = IndexConfig(run_dir=str(tmp_path / "run"), source=str(tar), workers=1)
    with pytest.raises(ValueError, match=r"x.tar at byte 512: member '.*outside.png' leads out of the data set"):
        index.main(config)
    assert everything(tmp_path) == before
    assert not list((tmp_path / "run").rglob("*.safetensors")) and not list((tmp_path / "run").rglob("dataset.json"))


# --- decompression bombs ----------------------------------------------------------------------------------------------


def grown(work: Callable[[], Any]) -> int:
    """Megabytes by which this process's resident memory rose above where it stood, at the worst moment."""

    def memory(name: str) -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
        return int(line.split()[1]) // 1024

    ctypes.CDLL(None).malloc_trim(0)  # freed memory that the process kept counts when it is taken again
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = memory("VmRSS")
    work()
    return memory("VmHWM") - before


def zeros_png(width: int, height: int) -> bytes:
    """A whole, valid gray PNG of zeros: 156 megapixels take 150 kB."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    press = zlib.compressobj(6)
    body = b"".join(press.compress(bytes(width + 1)) for _ in range(height)) + press.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def resized(kind: str, side: int, at: int, form: str) -> bytes:
    """A small file of another format whose header claims side × side pixels."""
    out = io.BytesIO()
    Image.new("L", (8, 8)).save(out, kind)
    data = bytearray(out.getvalue())
    if kind == "JPEG":
        at = data.index(b"\xff\xc0") + 5
    data[at : at + struct.calcsize(form)] = struct.pack(form, side, side)
    return bytes(data)


def tiff(side: int) -> bytes:
    out = io.BytesIO()
    Image.new("L", (8, 8)).save(out, "TIFF")
    data = bytearray(out.getvalue())
    (at,) = struct.unpack_from("<I", data, 4)
    for entry in range(at + 2, at + 2 + 12 * struct.unpack_from("<H", data, at)[0], 12):
        if struct.unpack_from("<H", data, entry)[0] in (256, 257):
            struct.pack_into("<HII", data, entry + 2, 4, 1, side)
    return bytes(data)


BOMBS = {
    "a PNG of 156 megapixels": lambda: zeros_png(12_500, 12_500),
    "a JPEG": lambda: resized("JPEG", 65_000, 0, ">HH"),
    "a GIF": lambda: resized("GIF", 65_000, 6, "<HH"),
    "a BMP": lambda: resized("BMP", 2_000_000, 18, "<ii"),
    "a TIFF": lambda: tiff(100_000),
    "a PPM": lambda: b"P6 100000 100000 255\n" + bytes(100),
}


def test_the_measure_of_memory_works() -> None:
    assert grown(lambda: b"x" * (250 << 20)) >= 240


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_at_its_header(name: str) -> None:
    data = BOMBS[name]()
    assert len(data) < 1 << 20

    def refuse() -> None:
        with pytest.raises(DecodeError, match="limit"):
            decode_image(data)

    assert grown(refuse) < 50


def test_a_bomb_in_a_data_set_is_one_counted_sample(tmp_path: Path) -> None:
    bomb = zeros_png(12_500, 12_500)
    entries = [(f"{n}.{part}", data) for n in range(5) for part, data in (("png", png(n)), ("cls", b"0"))]
    tar_of(tmp_path / "x.tar", [*entries, ("bomb.png", bomb), ("bomb.cls", b"0")])
    index.main(IndexConfig(run_dir=str(tmp_path / "run"), source=str(tmp_path / "x.tar"), workers=1))
    loader = build_loader(tmp_path / "run" / "train", read=ImageReader(8), global_batch=6, max_bad_fraction=0.2)
    flags: list[int] = []
    assert grown(lambda: flags.extend(next(iter(loader))["bad"].tolist())) < 200
    assert sorted(flags) == [0] * 5 + [1]


def test_a_sample_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    """A picture of 4 GB of zeros, which a sparse file stores in a few blocks."""
    good = [entry for n in range(5) for entry in ((f"{n}.png", png(n)), (f"{n}.cls", b"0"))]
    path = tar_of(tmp_path / "x.tar", [("huge.cls", b"0"), *good])
    head = tarfile.TarInfo("huge.png")
    head.size = 4 << 30
    index_file = tmp_path / "data" / "000000.index.safetensors"
    index_file.parent.mkdir()
    info, rows = index_tar(path)
    rows.parts[0]["png"] = (info.bytes, head.size, 0)
    os.truncate(path, info.bytes + head.size)
    info = replace(info, bytes=info.bytes + head.size, index=index_file.name)
    info = replace(info, index_sha256=rows.save(index_file, info))
    Manifest.of("images", [info], ["all"]).save(index_file.parent)
    loader = build_loader(index_file.parent, read=ImageReader(8), global_batch=6, max_bad_fraction=0.2)
    flags: list[int] = []
    assert grown(lambda: flags.extend(next(iter(loader))["bad"].tolist())) < 200
    assert sorted(flags) == [0] * 5 + [2]
