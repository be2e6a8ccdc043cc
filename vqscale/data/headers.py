"""The first bytes of an image file -> format, size, and whether anything is special about its pixels.

In: encoded bytes.  Out: `Header`, without decoding; too many pixels are refused here, before memory is taken.
"""

import struct
from dataclasses import dataclass

from vqscale.data.parts import DecodeError

MAX_PIXELS = 150_000_000
_JPEG, _PNG = b"\xff\xd8", b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Header:
    """What the header says. `plain`: 8-bit grey or RGB without transparency or rotation."""

    format: str  # jpg | png | "" for others
    width: int
    height: int
    plain: bool


def read_header(data: bytes) -> Header:
    """Format and size without decoding. Raises DecodeError for a damaged JPEG or PNG header, or too many pixels."""
    if data[:2] == _JPEG:
        header = _jpeg_header(data)
    elif data[:8] == _PNG:
        header = _png_header(data)
    else:
        return Header("", 0, 0, False)
    check_size(header.width, header.height)
    return header


def check_size(width: int, height: int) -> None:
    """Raises DecodeError for an image without pixels, or with so many that decoding would exhaust memory."""
    if width < 1 or height < 1:
        raise DecodeError(f"an image of {width}×{height} pixels")
    if width * height > MAX_PIXELS:
        raise DecodeError(f"an image of {width}×{height} pixels is over the limit of {MAX_PIXELS}")


def _png_header(data: bytes) -> Header:
    if len(data) < 33 or data[12:16] != b"IHDR":
        raise DecodeError("a PNG without a header")
    if b"IEND" not in data[-64:] and data.rfind(b"IEND") < 0:
        raise DecodeError("a PNG that is cut short: it has no end mark")
    width, height, depth, colour = struct.unpack(">IIBB", data[16:26])
    plain = depth == 8 and colour in (0, 2) and not _png_has_transparency(data)
    return Header("png", width, height, plain)


def _png_has_transparency(data: bytes) -> bool:
    """A tRNS chunk, which stands before the first IDAT."""
    offset = 8
    while offset + 8 <= len(data):
        length, kind = struct.unpack(">I4s", data[offset : offset + 8])
        if kind in (b"tRNS", b"IDAT"):
            return kind == b"tRNS"
        offset += 12 + length
    return False


def _jpeg_header(data: bytes) -> Header:
    """Walk the markers (ITU T.81, annex B) to the frame header."""
    offset, rotated = 2, False
    while offset + 4 <= len(data):
        if data[offset] != 0xFF:
            break
        marker = data[offset + 1]
        if marker == 0xFF:  # a fill byte
            offset += 1
            continue
        length = int.from_bytes(data[offset + 2 : offset + 4], "big")
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            if offset + 10 > len(data):
                break
            depth, height, width, components = struct.unpack(">BHHB", data[offset + 4 : offset + 10])
            return Header("jpg", width, height, depth == 8 and components in (1, 3) and not rotated)
        if marker == 0xE1 and data[offset + 4 : offset + 10] == b"Exif\0\0":
            rotated = rotated or _exif_orientation(data[offset + 10 : offset + 2 + length]) != 1
        offset += 2 + length
    raise DecodeError("a JPEG without a frame header")


def _exif_orientation(tiff: bytes) -> int:
    """The orientation tag of the first image directory; 1 (upright) where there is none, 0 where it is unreadable."""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    try:
        if order is None:
            return 0
        (start,) = struct.unpack_from(order + "I", tiff, 4)
        (count,) = struct.unpack_from(order + "H", tiff, start)
        for entry in range(start + 2, start + 2 + 12 * count, 12):
            tag, _, _, value = struct.unpack_from(order + "HHIH", tiff, entry)
            if tag == 0x0112:
                return value
    except struct.error:
        return 0
    return 1
