"""Image files written by hand, with struct and zlib alone: encoders that share nothing with the reader under test."""

import struct
import zlib
from collections.abc import Sequence

import numpy as np

CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # of PNG's colour types
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


def chunk(kind: bytes, body: bytes, crc: int | None = None) -> bytes:
    return (
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body) if crc is None else crc)
    )


def packed_rows(samples: np.ndarray, depth: int) -> list[bytes]:
    """[h, w, c] -> each row's bytes, big-endian, depths below 8 packed from the left."""
    rows = samples.reshape(len(samples), -1)
    if depth == 16:
        return [row.astype(">u2").tobytes() for row in rows]
    if depth == 8:
        return [row.astype(np.uint8).tobytes() for row in rows]
    bits = (rows[..., None] >> np.arange(depth)[::-1]) & 1
    return [np.packbits(row.reshape(-1).astype(np.uint8)).tobytes() for row in bits]


def filtered(rows: Sequence[bytes], pixel_bytes: int) -> bytes:
    """PNG's filters 0 to 4, one after the other."""
    out, above = b"", bytes(len(rows[0]))
    for number, row in enumerate(rows):
        left, corner = bytes(pixel_bytes) + row, bytes(pixel_bytes) + above
        guesses = []
        for x, up in enumerate(above):
            a, c = left[x], corner[x]
            paeth = min((a, up, c), key=lambda value: (abs(a + up - c - value), (a, up, c).index(value)))
            guesses.append((0, a, up, (a + up) // 2, paeth)[number % 5])
        out += bytes([number % 5]) + bytes((value - guess) % 256 for value, guess in zip(row, guesses, strict=True))
        above = row
    return out


def png(
    samples: np.ndarray,
    colour: int,
    depth: int,
    *,
    before: bytes = b"",
    after: bytes = b"",
    interlaced: bool = False,
    pieces: int = 1,
    lacking: int = 0,
) -> bytes:
    """A PNG of samples [h, w, c]. before, after: chunks on either side of the pixels; lacking: bytes of pixels that
    the (well-formed) stream does not hold."""
    pixel_bytes = max(1, depth * CHANNELS[colour] // 8)
    passes = ADAM7 if interlaced else ((0, 0, 1, 1),)
    parts = [samples[y::dy, x::dx] for x, y, dx, dy in passes]
    raw = b"".join(filtered(packed_rows(part, depth), pixel_bytes) for part in parts if part.size)
    data = zlib.compress(raw[: len(raw) - lacking])
    cuts = np.linspace(0, len(data), pieces + 1).astype(int)
    idat = b"".join(chunk(b"IDAT", data[a:b]) for a, b in zip(cuts, cuts[1:], strict=False))
    height, width = samples.shape[:2]
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced))
    return b"\x89PNG\r\n\x1a\n" + header + before + idat + after + chunk(b"IEND", b"")


def exif(orientation: int, order: str = ">", kind: int = 3) -> bytes:
    """A TIFF structure with one tag. kind: 1 byte, 3 short, 4 long."""
    mark = b"II*\0" if order == "<" else b"MM\0*"
    value = struct.pack(order + {1: "B", 3: "H", 4: "I"}[kind], orientation).ljust(4, b"\0")
    return mark + struct.pack(order + "IHHHI", 8, 1, 0x0112, kind, 1) + value + bytes(4)


def tiff(
    samples: np.ndarray,
    photometric: int,
    bits: int,
    *,
    order: str = "<",
    tile: int = 0,
    planar: bool = False,
    deflate: bool = False,
    pages: int = 1,
    raw: bytes = b"",
    tags: dict[int, tuple[int, ...]] | None = None,
) -> bytes:
    """A TIFF of samples [h, w, c] in one strip, or in square tiles; further pages are black. raw: the strip itself."""
    out = b"II*\0" if order == "<" else b"MM\0*"
    out += struct.pack(order + "I", 0)
    link = 4
    for page in range(pages):
        shown = samples if page == 0 else np.zeros_like(samples)
        blocks = [raw or _bytes(block, bits, order) for block in _blocks(shown, tile, planar)]
        blocks = [zlib.compress(block) if deflate else block for block in blocks]
        offsets = []
        for block in blocks:
            offsets.append(len(out))
            out += block + b"\0" * (len(block) % 2)
        table = _tags(samples, photometric, bits, tile, planar, deflate, offsets, blocks, tags)
        out, link = _with_directory(out, link, table, order)
    return out


def _blocks(samples: np.ndarray, tile: int, planar: bool) -> list[np.ndarray]:
    if planar:
        return [samples[..., n : n + 1] for n in range(samples.shape[2])]
    if not tile:
        return [samples]
    high, wide = (-(-size // tile) * tile for size in samples.shape[:2])
    whole = np.zeros((high, wide, samples.shape[2]), samples.dtype)
    whole[: len(samples), : samples.shape[1]] = samples
    return [whole[y : y + tile, x : x + tile] for y in range(0, high, tile) for x in range(0, wide, tile)]


def _bytes(samples: np.ndarray, bits: int, order: str) -> bytes:
    if samples.dtype.kind == "f" or bits > 8:
        return samples.astype(f"{order}{samples.dtype.kind}{bits // 8}").tobytes()
    return b"".join(packed_rows(samples, bits))


def _tags(samples, photometric, bits, tile, planar, deflate, offsets, blocks, more) -> dict[int, tuple[int, ...]]:
    height, width, channels = samples.shape
    tags = {256: (width,), 257: (height,), 258: (bits,) * channels, 259: (8 if deflate else 1,), 262: (photometric,)}
    tags |= {277: (channels,), 284: (2 if planar else 1,)}
    sizes = tuple(map(len, blocks))
    tags |= {322: (tile,), 323: (tile,), 324: tuple(offsets), 325: sizes} if tile else {}
    tags |= {} if tile else {273: tuple(offsets), 278: (height,), 279: sizes}
    return tags | (more or {})


def _with_directory(out: bytes, link: int, tags: dict[int, tuple[int, ...]], order: str) -> tuple[bytes, int]:
    """The file with a directory, whose offset is written at `link`; and where the next one's offset goes."""
    out = out[:link] + struct.pack(order + "I", len(out)) + out[link + 4 :]
    entries, extra = b"", b""
    after = len(out) + 2 + 12 * len(tags) + 4
    for tag, values in sorted(tags.items()):
        data = struct.pack(f"{order}{len(values)}I", *values)
        kind = 4
        if tag in (258, 320, 338, 339, 262, 259, 274, 277, 284, 266):  # shorts by the specification
            data, kind = struct.pack(f"{order}{len(values)}H", *values), 3
        if len(data) > 4:
            data, extra = struct.pack(order + "I", after + len(extra)), extra + data + b"\0" * (len(data) % 2)
        entries += struct.pack(order + "HHI", tag, kind, len(values)) + data.ljust(4, b"\0")
    out += struct.pack(order + "H", len(tags)) + entries
    return out + bytes(4) + extra, len(out)


def bmp(samples: np.ndarray, bits: int, *, palette: bytes = b"", top_down: bool = False, alpha: bool = False) -> bytes:
    """A BMP of samples [h, w, c] in file order (blue first). alpha: a version 4 header with an alpha mask."""
    rows = packed_rows(samples, bits if len(palette) else 8)
    rows = [row + bytes(-len(row) % 4) for row in (rows if top_down else rows[::-1])]
    height, width = samples.shape[:2]
    size = 108 if alpha else 40
    start = 14 + size + len(palette)
    signed = -height if top_down else height
    info = struct.pack("<IiiHHIIiiII", size, width, signed, 1, bits, 3 if alpha else 0, 0, 0, 0, 0, 0)
    masks = struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000) + b"BGRs" + bytes(48) if alpha else b""
    data = b"".join(rows)
    return b"BM" + struct.pack("<IHHI", start + len(data), 0, 0, start) + info + masks + palette + data


def turned(upright: np.ndarray, orientation: int) -> np.ndarray:
    """As it is stored so that the orientation makes it upright (EXIF 2.32, 4.6.4: where row 0 and column 0 are)."""
    if orientation in (2, 3, 6, 7):  # row 0 or column 0 on the right, seen in the upright image
        upright = upright[:, ::-1]
    if orientation in (3, 4, 7, 8):
        upright = upright[::-1]
    return upright.transpose(1, 0, 2) if orientation >= 5 else upright
