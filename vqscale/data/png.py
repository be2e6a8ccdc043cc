"""PNG files, read for their pixels alone (W3C, Portable Network Graphics, third edition).

In: the bytes of a PNG.  Out: RGB at 8 bits, transparency on white, and the EXIF bytes. Pillow inflates and filters the
samples; it sees no other chunks, so that no text, profile or damaged remark stands in the way.
"""

import io
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from vqscale.data.kinds import PNG_SIGNATURE
from vqscale.data.parts import DecodeError

_GREY, _RGB, _PALETTE, _GREY_ALPHA, _RGB_ALPHA = 0, 2, 3, 4, 6
_CHANNELS = {_GREY: 1, _RGB: 3, _PALETTE: 1, _GREY_ALPHA: 2, _RGB_ALPHA: 4}
_DEPTHS = {_GREY: (1, 2, 4, 8, 16), _RGB: (8, 16), _PALETTE: (1, 2, 4, 8), _GREY_ALPHA: (8, 16), _RGB_ALPHA: (8, 16)}
_CRITICAL = (b"IHDR", b"PLTE", b"IDAT", b"IEND")
# Chunks that every reader accepts and that change no pixel.
_HARMLESS = (*_CRITICAL, b"gAMA", b"cHRM", b"sRGB", b"pHYs", b"tIME", b"bKGD", b"sBIT", b"hIST", b"tEXt", b"eXIf")
_LONG_TEXT = 1 << 16
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))  # x y dx dy
_SCALED_16 = ((np.arange(65536) * 255 + 32767) // 65535).astype(np.uint8)
_BLOCK_SAMPLES = 1 << 20


@dataclass(frozen=True)
class Png:
    """A PNG taken apart. `transparency`: alphas of the palette's colours, or the samples of the one colour that is
    transparent; `simple`: 8-bit grey or RGB without transparency, in chunks that every reader accepts."""

    width: int
    height: int
    depth: int
    colour: int
    interlaced: bool
    palette: bytes
    transparency: bytes
    exif: bytes
    pixels: tuple[bytes, ...]  # IDAT chunks, whole
    simple: bool

    @classmethod
    def parse(cls, data: bytes) -> "Png":
        """Raises DecodeError for a PNG that is cut short or damaged in a chunk that matters."""
        bodies: dict[bytes, bytes] = {}
        pixels = []
        simple = True
        for kind, chunk, intact in _chunks(data):
            matters = kind[:1].isupper() or kind in (b"tRNS", b"eXIf")
            if matters and not intact:
                raise DecodeError(f"a PNG whose {kind.decode('latin-1')} chunk is damaged (its CRC differs)")
            if kind[:1].isupper() and kind not in _CRITICAL:
                raise DecodeError(f"a PNG with an unknown critical chunk {kind.decode('latin-1')!r}")
            if kind == b"IDAT":
                pixels.append(chunk)
            elif matters:
                bodies.setdefault(kind, chunk[8:-4])
            simple &= intact and kind in _HARMLESS and (kind != b"tEXt" or len(chunk) < _LONG_TEXT)
        return cls._of(bodies, tuple(pixels), simple)

    @classmethod
    def _of(cls, bodies: dict[bytes, bytes], pixels: tuple[bytes, ...], simple: bool) -> "Png":
        if len(bodies.get(b"IHDR", b"")) != 13 or not pixels:
            raise DecodeError("a PNG without a header or without pixels")
        width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", bodies[b"IHDR"])
        if depth not in _DEPTHS.get(colour, ()):
            raise DecodeError(f"a PNG of colour type {colour} and bit depth {depth}, which do not go together")
        palette, transparency, exif = (bodies.get(kind, b"") for kind in (b"PLTE", b"tRNS", b"eXIf"))
        if transparency and colour in (_GREY, _RGB) and len(transparency) != 2 * _CHANNELS[colour]:
            raise DecodeError(f"a PNG whose tRNS chunk has {len(transparency)} bytes")
        simple = simple and depth == 8 and colour in (_GREY, _RGB)
        return cls(width, height, depth, colour, bool(interlaced), palette, transparency, exif, pixels, simple)

    def decode(self) -> UInt8[np.ndarray, "h w 3"]:
        """RGB, transparent pixels on white. Raises DecodeError for missing pixels, and whatever Pillow raises."""
        samples = self._samples()
        if self.interlaced or not samples[-1].any():
            self._check_complete()
        if self.colour == _PALETTE:
            return self._palette_on_white()[samples[..., 0]]
        maximum = 2**self.depth - 1
        if self.colour in (_GREY_ALPHA, _RGB_ALPHA):
            pixels = _on_white(samples[..., :-1], samples[..., -1:], maximum)
        else:
            pixels = _SCALED_16[samples] if self.depth == 16 else samples * np.uint8(255 // maximum)
            if self.transparency:
                colour = np.frombuffer(self.transparency, ">u2") & maximum
                pixels = np.where((samples == colour).all(-1, keepdims=True), np.uint8(255), pixels)
        return np.repeat(pixels, 3, -1) if pixels.shape[-1] == 1 else pixels

    def _samples(self) -> np.ndarray:
        """uint8 or uint16 [h, w, channels] as they are stored, indices of a palette too."""
        if self.colour == _GREY_ALPHA and self.depth == 16:  # four bytes per pixel, as in 8-bit RGBA
            return np.ascontiguousarray(self._read(8, _RGB_ALPHA)).view(">u2")
        values = self._read(self.depth, _GREY if self.colour == _PALETTE else self.colour)
        if self.depth == 16 and self.colour in (_RGB, _RGB_ALPHA):  # Pillow gives one byte of each two
            mode = "RGB;16L" if self.colour == _RGB else "RGBA;16L"
            values = values.astype(np.uint16) << 8 | self._read(16, self.colour, mode)
        if self.depth in (2, 4):
            values = values // (255 // (2**self.depth - 1))
        return values.astype(np.uint16 if self.depth == 16 else np.uint8, copy=False)

    def _read(self, depth: int, colour: int, raw_mode: str = "") -> np.ndarray:
        """[h, w, channels] as Pillow gives them."""
        size = struct.pack(">IIBBBBB", self.width, self.height, depth, colour, 0, 0, self.interlaced)
        data = b"".join((PNG_SIGNATURE, _chunk(b"IHDR", size), *self.pixels, _chunk(b"IEND", b"")))
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            if raw_mode:
                image.tile = [tile._replace(args=raw_mode) for tile in image.tile]  # type: ignore[attr-defined]
            image.load()
            return np.asarray(image).reshape(self.height, self.width, -1)

    def _check_complete(self) -> None:
        """Pillow leaves rows black that a well-formed stream does not hold."""
        bits = self.depth * _CHANNELS[self.colour]
        passes = _ADAM7 if self.interlaced else ((0, 0, 1, 1),)
        sizes = [(-(-(self.width - x) // dx), -(-(self.height - y) // dy)) for x, y, dx, dy in passes]
        missing = sum(rows * (1 + -(-columns * bits // 8)) for columns, rows in sizes if columns > 0 and rows > 0)
        inflate = zlib.decompressobj()
        for chunk in (*self.pixels, b""):
            rest = chunk[8:-4]
            while missing > 0 and (data := inflate.decompress(rest, _BLOCK_SAMPLES)):
                missing -= len(data)
                rest = inflate.unconsumed_tail
        if missing > 0:
            raise DecodeError(f"a PNG that lacks its last {missing} bytes of pixels")

    def _palette_on_white(self) -> UInt8[np.ndarray, "256 3"]:
        if not self.palette:
            raise DecodeError("a PNG of indexed colours without a palette")
        whole = self.palette[: len(self.palette) // 3 * 3][:768]
        colours = np.frombuffer(whole.ljust(768, b"\0"), np.uint8).reshape(256, 3)
        alphas = np.frombuffer(self.transparency[:256].ljust(256, b"\xff"), np.uint8).reshape(256, 1)
        return _on_white(colours, alphas, 255)


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes, bool]]:
    """(kind, whole chunk, whether its CRC is right) up to the end mark."""
    offset, kind = len(PNG_SIGNATURE), b""
    while kind != b"IEND":
        if offset + 12 > len(data):
            raise DecodeError("a PNG that is cut short: it has no end mark")
        length, kind = struct.unpack_from(">I4s", data, offset)
        if not kind.isalpha():
            raise DecodeError(f"a PNG with a damaged chunk at byte {offset}")
        chunk = data[offset : offset + 12 + length]
        if len(chunk) < 12 + length:
            raise DecodeError(f"a PNG that is cut short in its {kind.decode('latin-1')!r} chunk")
        yield kind, chunk, zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")
        offset += len(chunk)


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _on_white(colours: np.ndarray, alphas: np.ndarray, maximum: int) -> np.ndarray:
    """uint8 of [..., c] samples with their opacity [..., 1], both up to `maximum`, on a white ground; rounded."""
    wide: Any = np.uint16 if maximum == 255 else np.uint64  # both hold maximum², with half of it for rounding
    full = wide(maximum)
    pixels = np.empty(colours.shape, np.uint8)
    rows = max(1, _BLOCK_SAMPLES // max(1, colours[0].size))
    for top in range(0, len(colours), rows):  # in blocks, for memory's sake
        alpha = alphas[top : top + rows].astype(wide)
        mixed = colours[top : top + rows] * alpha + full * (full - alpha)
        if maximum != 255:
            mixed = mixed * wide(255) // full
        pixels[top : top + rows] = (mixed + full // wide(2)) // full
    return pixels
