"""The first bytes of an image file -> its format, size and orientation, without decoding.

In: encoded bytes.  Out: `Header`. Other kinds of file and images of too many pixels are refused here, before memory is
taken.
"""

import struct
from dataclasses import dataclass

from vqscale.data.kinds import format_of
from vqscale.data.parts import DecodeError
from vqscale.data.png import Png

MAX_PIXELS = 150_000_000
_EXIF_MARK = b"Exif\0\0"
_EXIF_TYPES = {1: "B", 3: "H", 4: "I"}
_ORIENTATION_TAG = 0x0112
_JPEG_APP1, _JPEG_END, _JPEG_SCAN = 0xE1, 0xD9, 0xDA
_JPEG_FRAMES = {marker for marker in range(0xC0, 0xD0) if marker not in (0xC4, 0xC8, 0xCC)}
_JPEG_WITHOUT_LENGTH = {0x00, 0x01, *range(0xD0, 0xD9)}


@dataclass(frozen=True)
class Header:
    """What the header says; size and EXIF orientation (1 to 8) of JPEG and PNG alone.

    `plain`: 8-bit grey or RGB without transparency or rotation, in a file that every reader accepts.
    """

    format: str  # jpg | png | gif | bmp | webp | tiff | ppm | avif
    width: int = 0
    height: int = 0
    orientation: int = 1
    plain: bool = False
    png: Png | None = None


def read_header(data: bytes, max_pixels: int = MAX_PIXELS) -> Header:
    """Raises DecodeError for what is no image (naming its kind), a damaged JPEG or PNG, or too many pixels."""
    name = format_of(data)
    if name == "jpg":
        header = _jpeg_header(data)
    elif name == "png":
        header = _png_header(data)
    else:
        return Header(name)
    check_size(header.width, header.height, max_pixels)
    return header


def check_size(width: int, height: int, max_pixels: int = MAX_PIXELS) -> None:
    """Raises DecodeError for an image without pixels, or with so many that decoding would exhaust memory."""
    if width < 1 or height < 1:
        raise DecodeError(f"an image of {width}×{height} pixels")
    if width * height > max_pixels:
        raise DecodeError(f"an image of {width}×{height} pixels is over the limit of {max_pixels} (max_pixels=)")


def _png_header(data: bytes) -> Header:
    png = Png.parse(data)
    orientation = exif_orientation(png.exif)
    return Header("png", png.width, png.height, orientation, png.simple and orientation == 1, png)


def _jpeg_header(data: bytes) -> Header:
    """Walk the markers (ITU T.81, annex B) to the first scan. As in libjpeg, a marker begins at the next 0xFF and what
    lies before it is skipped."""
    frame = exif = b""
    offset = 2
    while (offset := data.find(b"\xff", offset)) >= 0:
        while data[offset : offset + 1] == b"\xff":  # fill bytes
            offset += 1
        marker = data[offset] if offset < len(data) else _JPEG_END
        offset += 1
        if marker in (_JPEG_SCAN, _JPEG_END):
            break
        if marker in _JPEG_WITHOUT_LENGTH:
            continue
        end = offset + int.from_bytes(data[offset : offset + 2], "big")
        body = data[offset + 2 : end]
        if marker in _JPEG_FRAMES:
            frame = frame or body
        elif marker == _JPEG_APP1 and body.startswith(_EXIF_MARK):
            exif = exif or body
        offset = max(end, offset + 2)
    if len(frame) < 6:
        raise DecodeError("a JPEG without a frame header")
    depth, height, width, components = struct.unpack_from(">BHHB", frame)
    orientation = exif_orientation(exif)
    plain = depth == 8 and components in (1, 3) and orientation == 1 and data[2:3] == b"\xff"
    return Header("jpg", width, height, orientation, plain)


def exif_orientation(exif: bytes) -> int:
    """The orientation, 1 to 8, in EXIF bytes; 1 (upright) where they hold none that can be read."""
    tiff = exif.removeprefix(_EXIF_MARK)
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(order + "I", tiff, 4)
        (count,) = struct.unpack_from(order + "H", tiff, start)
        for entry in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(order + "HH", tiff, entry)
            if tag == _ORIENTATION_TAG and kind in _EXIF_TYPES:
                (value,) = struct.unpack_from(order + _EXIF_TYPES[kind], tiff, entry + 8)
                return value if 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1
