"""JPEG files edited byte by byte, and other containers that turn or animate their pixels."""

import io
import struct
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, features
from support.image_files import exif, turned

from vqscale.data.images import decode_image
from vqscale.data.parts import DecodeError


def pixels(data: bytes) -> np.ndarray:
    return decode_image(data).numpy().transpose(1, 2, 0)


def blocks() -> np.ndarray:
    """Smooth colours, 40 wide and 24 high, which JPEG keeps well."""
    y, x = np.mgrid[0:24, 0:40]
    return np.dstack([x * 5, y * 8, 200 - x * 3]).astype(np.uint8)


def jpeg(image: np.ndarray | Image.Image | None = None, **options: object) -> bytes:
    out = io.BytesIO()
    picture = image if isinstance(image, Image.Image) else Image.fromarray(blocks() if image is None else image)
    picture.save(out, "JPEG", **({"quality": 95, "subsampling": 0} | options))
    return out.getvalue()


def segments(data: bytes) -> list[bytes]:
    """SOI, the segments before the scan, and the scan with all that follows."""
    cut = [data[:2]]
    at = 2
    while data[at + 1] != 0xDA:
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        cut.append(data[at:end])
        at = end
    return [*cut, data[at:]]


def between(filler: bytes) -> Callable[[list[bytes]], bytes]:
    return lambda cut: filler.join(cut)


def app(number: int, body: bytes) -> bytes:
    return bytes([0xFF, 0xE0 + number]) + struct.pack(">H", len(body) + 2) + body


def behind_the_frame(segment: bytes) -> Callable[[list[bytes]], bytes]:
    return lambda cut: b"".join([*cut[:-1], segment, cut[-1]])


def at_start(segment: bytes) -> Callable[[list[bytes]], bytes]:
    return lambda cut: b"".join([cut[0], segment, *cut[1:]])


HARMLESS_EDITS = {
    "zero bytes": between(bytes(3)),
    "one zero byte": between(b"\0"),
    "fill bytes": between(b"\xff\xff\xff"),
    "junk": between(b"junk"),
    "junk and fill": between(b"\0\xff\xff"),
    "stuffed bytes": between(b"\xff\0\xff\0"),
    "garbage behind the end": lambda cut: b"".join(cut) + b"\0garbage\xff\xd8\xff",
    "a second picture": lambda cut: b"".join(cut) + jpeg(255 - blocks()),
    "a thumbnail with its own SOI": at_start(app(2, jpeg(255 - blocks()))),
    "a comment": at_start(b"\xff\xfe\0\6abcd"),
    "EXIF that is none": at_start(app(1, b"Exif\0\0garbage")),
    "EXIF cut short": at_start(app(1, b"Exif\0\0" + exif(6)[:15])),
    "EXIF without entries": at_start(app(1, b"Exif\0\0II*\0\x08\0\0\0\0\0")),
    "an empty APP1": at_start(app(1, b"")),
    "XMP orientation": at_start(app(1, b'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="6"/>')),
    "a profile": at_start(app(2, b"ICC_PROFILE\0\1\1" + bytes(200))),
    "upright": at_start(app(1, b"Exif\0\0" + exif(1))),
    "orientation 0": at_start(app(1, b"Exif\0\0" + exif(0))),
}


@pytest.mark.parametrize("kind", ["colour", "grey", "progressive", "4:2:0", "restarts", "cmyk"])
@pytest.mark.parametrize("edit", HARMLESS_EDITS)
def test_jpegs_with_harmless_oddities(edit: str, kind: str) -> None:
    whole = {
        "colour": lambda: jpeg(),
        "grey": lambda: jpeg(blocks()[..., 0]),
        "progressive": lambda: jpeg(progressive=True),
        "4:2:0": lambda: jpeg(subsampling=2),
        "restarts": lambda: jpeg(restart_marker_blocks=1),
        "cmyk": lambda: jpeg(Image.fromarray(blocks()).convert("CMYK")),
    }[kind]()
    with Image.open(io.BytesIO(whole)) as image:
        expected = np.asarray(image.convert("RGB"))
    assert np.abs(expected[..., 0].astype(int) - blocks()[..., 0]).max() < 16  # the picture that was meant
    assert np.array_equal(pixels(HARMLESS_EDITS[edit](segments(whole))), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    "kind", ["little-endian", "a long", "a byte", "behind the frame", "cmyk", "zero bytes", "grey"]
)
def test_orientation_of_jpegs(kind: str, orientation: int) -> None:
    stored = Image.fromarray(np.ascontiguousarray(turned(blocks(), orientation)))
    data = jpeg(stored.convert({"cmyk": "CMYK", "grey": "L"}.get(kind, "RGB")), quality=100)
    tag = exif(orientation, "<" if kind == "little-endian" else ">", {"long": 4, "byte": 1}.get(kind, 3))
    segment = app(1, b"Exif\0\0" + tag)
    edit = behind_the_frame(segment) if kind == "behind the frame" else at_start(segment)
    data = edit(segments(data))
    if kind == "zero bytes":
        data = b"\0\0".join(segments(data))
    expected = np.asarray(Image.fromarray(blocks()).convert("L").convert("RGB")) if kind == "grey" else blocks()
    assert np.abs(pixels(data).astype(int) - expected).max() < 10


def test_colours_of_adobe_jpegs() -> None:
    rgb = jpeg(keep_rgb=True)  # Adobe's transform 0: no YCbCr
    assert b"Adobe" in rgb
    assert np.abs(pixels(rgb).astype(int) - blocks()).max() < 10
    flat = Image.new("CMYK", (16, 16), (155, 127, 127, 0))
    cmyk = jpeg(flat)
    assert np.abs(pixels(cmyk)[8, 8].astype(int) - (100, 128, 128)).max() < 4
    at = cmyk.index(b"Adobe") + 11
    ycck = cmyk[:at] + b"\2" + cmyk[at + 1 :]  # the stored inks are then Y 100, Cb 128, Cr 128, K 255, inverted
    assert np.abs(pixels(ycck)[8, 8].astype(int) - (155, 155, 155)).max() < 4


def test_the_first_picture_of_several() -> None:
    kinds = {"MPO": {"quality": 95}, "GIF": {}, "PNG": {}, "WEBP": {"lossless": True}, "TIFF": {}}
    for kind, options in kinds.items():
        out = io.BytesIO()
        second = Image.fromarray(255 - blocks())
        Image.fromarray(blocks()).save(out, kind, save_all=True, append_images=[second], **options)
        assert np.abs(pixels(out.getvalue()).astype(int) - blocks()).max() < (40 if kind == "GIF" else 16), kind


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["WEBP", "AVIF"])
def test_orientation_of_other_containers(kind: str, orientation: int) -> None:
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    out = io.BytesIO()
    stored = Image.fromarray(np.ascontiguousarray(turned(blocks(), orientation)))
    options = {"lossless": True} if kind == "WEBP" else {"quality": 100, "subsampling": "4:4:4"}
    stored.save(out, kind, exif=b"Exif\0\0" + exif(orientation), **options)
    assert np.abs(pixels(out.getvalue()).astype(int) - blocks()).max() < 8


@pytest.mark.parametrize("data", [jpeg(), jpeg(progressive=True), jpeg(Image.new("CMYK", (32, 32)))])
def test_jpegs_cut_short(data: bytes) -> None:
    start = data.index(b"\xff\xda")
    for end in range(3, len(data) - 2, max(1, len(data) // 40)):
        with pytest.raises(DecodeError) as error:
            decode_image(data[:end])
        assert end > start or "without a frame header" in str(error.value) or "not decode" in str(error.value)
