"""Files that are no images, or too large ones."""

import gzip
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.image_files import png

from vqscale.data.images import decode_image, read_image_file
from vqscale.data.parts import DecodeError

FTYP = b"\0\0\0\x18ftyp"
KINDS = {
    b"": "an empty file",
    bytes(5000): "zero bytes",
    b"<!DOCTYPE html>\n<html>": "a web page",
    b"\xef\xbb\xbf\r\n  <HTML>": "a web page",
    b"<svg xmlns=": "an SVG",
    b"<?xml version": "XML",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:": "Git LFS",
    gzip.compress(b"x" * 99): "gzip",
    b"PK\3\4": "a zip",
    b"%PDF-1.7": "a PDF",
    b"%!PS-Adobe-3.0 EPSF-3.0\n": "PostScript",
    b'{"error": "not found"}': "JSON",
    FTYP + b"heic\0\0\0\0mif1heic": "a HEIC picture",
    FTYP + b"isom\0\0\2\0isomiso2": "a video",
    b"\0\0\0\x0cJXL \r\n\x87\n": "JPEG XL",
    b"\0\0\0\x0cjP  \r\n\x87\n": "JPEG 2000",
    b"8BPS\0\1": "Photoshop",
    b"RIFF\0\0\0\0AVI LIST": "AVI",
    b"\0\0\1\0\1\0": "an icon",
    b"404: Not Found": "text that begins '404: Not Found'",
    b"\0\5\x16\7\0\2\0\0Mac OS X": "AppleDouble",
    b"\x93NUMPY\1\0": "a NumPy array",
    bytes(257) + b"ustar\0": "a tar",
    b"\x01\x02\xfe\xfd\x80": "begins with the bytes 01 02 fe fd 80",
    FTYP + b"avif\0\0\0\0avifmif1": "AVIF image does not decode",
    b"GIF89a": "GIF image does not decode",
    b"BM": "BMP image does not decode",
    b"II*\0": "TIFF image does not decode",
    b"RIFF\x10\0\0\0WEBPVP8 ": "WEBP image does not decode",
    b"P6\n9": "PPM image does not decode",
    b"\xff\xd8\xff\xe0": "a JPEG without a frame header",
    b"\x89PNG\r\n\x1a\n": "a PNG that is cut short",
}


@pytest.mark.parametrize("data", KINDS, ids=list(KINDS.values()))
def test_other_files_are_named_by_their_kind(data: bytes) -> None:
    with pytest.raises(DecodeError) as error:
        decode_image(data)
    assert KINDS[data] in str(error.value) and "0x" not in str(error.value) and "BytesIO" not in str(error.value)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM"])
def test_the_limit_of_pixels_is_a_parameter(kind: str) -> None:
    out = io.BytesIO()
    Image.new("RGB", (40, 30), (9, 9, 9)).save(out, kind)
    assert decode_image(out.getvalue(), max_pixels=1200).shape == (3, 30, 40)
    with pytest.raises(DecodeError, match=r"40×30 pixels is over the limit of 1199 \(max_pixels=\)"):
        decode_image(out.getvalue(), max_pixels=1199)


def test_the_limit_may_be_above_that_of_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert decode_image(png(np.zeros((30, 40, 1), np.uint8), 0, 8)).shape == (3, 30, 40)
    assert Image.MAX_IMAGE_PIXELS == 100


@pytest.mark.parametrize(
    ("start", "message"),
    [(b"", "a file of zero bytes"), (b"\x89PNG\r\n\x1a\n", "4000000000 bytes is over the limit"), (b"<html>", "a web")],
)
def test_a_huge_sparse_file_is_not_read(start: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "huge.png"
    with open(path, "wb") as file:
        file.write(start)
        file.truncate(4_000_000_000)
    with pytest.raises(DecodeError, match=message):
        read_image_file(path)


def test_the_limit_of_bytes_follows_that_of_pixels(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(80_000_000))
    assert len(read_image_file(tmp_path / "a.png")) == 80_000_008
    with pytest.raises(DecodeError, match="80000008 bytes is over the limit of 67116864"):
        read_image_file(tmp_path / "a.png", max_pixels=1_000)
    with pytest.raises(DecodeError, match="a PNG with a damaged chunk at byte 8"):
        decode_image((tmp_path / "a.png").read_bytes())
