"""Odd image files, against pixels computed here: PNG, TIFF, BMP and Netpbm written by hand."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from support.image_files import bmp, chunk, exif, png, tiff, turned

from vqscale.data.headers import read_header
from vqscale.data.images import decode_image
from vqscale.data.packing import Encoding, store_image
from vqscale.data.parts import DecodeError

HEIGHT, WIDTH = 7, 9
COMBINATIONS = [(0, 1), (0, 2), (0, 4), (0, 8), (0, 16), (2, 8), (2, 16), (3, 1), (3, 2), (3, 4), (3, 8)]
COMBINATIONS += [(4, 8), (4, 16), (6, 8), (6, 16)]
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}


def pixels(data: bytes, **options: int) -> np.ndarray:
    return decode_image(data, **options).numpy().transpose(1, 2, 0)


def noise(channels: int, bits: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**bits, (HEIGHT, WIDTH, channels), np.uint16)


def on_white(samples: np.ndarray, alpha: np.ndarray, most: int) -> np.ndarray:
    """Rounded to 8 bits, in exact integers; grey repeated."""
    value, alpha = samples.astype(object), alpha.astype(object)
    mixed = value * alpha + most * (most - alpha)
    rounded = ((2 * 255 * mixed + most * most) // (2 * most * most)).astype(np.uint8)
    return np.broadcast_to(rounded, (*rounded.shape[:2], 3))


PALETTE = np.random.default_rng(5).integers(0, 256, (256, 3), np.uint8)
ALPHAS = np.random.default_rng(6).integers(0, 256, 256, np.uint8)


def case_of_png(colour: int, depth: int, transparent: bool) -> tuple[np.ndarray, bytes, np.ndarray]:
    """(samples, chunks before the pixels, what they shall become)"""
    samples = noise(CHANNELS[colour], depth)
    most = 2**depth - 1
    opaque = np.full((HEIGHT, WIDTH, 1), most)
    if colour == 3:
        count = min(2**depth, 200)  # fewer alphas than colours: the rest is opaque
        alphas = np.full(256, 255, np.uint8)
        alphas[: count // 2] = ALPHAS[: count // 2] if transparent else 255
        before = chunk(b"PLTE", PALETTE[: 2**depth].tobytes())
        before += chunk(b"tRNS", alphas[: count // 2].tobytes()) if transparent else b""
        return samples, before, on_white(PALETTE[samples[..., 0]], alphas[samples[..., 0], None], 255)
    if colour in (4, 6):
        return samples, b"", on_white(samples[..., :-1], samples[..., -1:], most)
    if not transparent:
        return samples, b"", on_white(samples, opaque, most)
    key = samples[2, 3].copy()
    samples[4, 5] = key
    samples[0, 0] = key
    samples[0, 0, -1] ^= 1  # almost the key: opaque
    before = chunk(b"tRNS", key.astype(">u2").tobytes())
    alpha = np.where((samples == key).all(-1, keepdims=True), 0, most)
    return samples, before, on_white(samples, alpha, most)


@pytest.mark.parametrize("interlaced", [False, True], ids=["rows", "adam7"])
@pytest.mark.parametrize("transparent", [False, True], ids=["opaque", "tRNS"])
@pytest.mark.parametrize(("colour", "depth"), COMBINATIONS)
def test_every_kind_of_png(colour: int, depth: int, transparent: bool, interlaced: bool) -> None:
    samples, before, expected = case_of_png(colour, depth, transparent)
    data = png(samples, colour, depth, before=before, interlaced=interlaced, pieces=3)
    assert np.array_equal(pixels(data), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("colour", "depth", "after"), [(2, 8, False), (3, 4, True), (0, 16, False), (6, 8, True)])
def test_orientation_of_png(colour: int, depth: int, after: bool, orientation: int) -> None:
    upright, before, expected = case_of_png(colour, depth, False)
    mark = chunk(b"eXIf", exif(orientation, "<>"[orientation % 2]))
    where = {"before": before, "after": mark} if after else {"before": before + mark}
    data = png(turned(upright, orientation), colour, depth, **where)
    assert np.array_equal(pixels(data), expected)
    assert read_header(data).plain == (orientation == 1 and (colour, depth) == (2, 8))


TEXT = bytes(2_100_000)
ITXT = b"XML:com.adobe.xmp\0"
ODD_CHUNKS = {
    "2 MB of XMP": chunk(b"iTXt", ITXT + b"\0\0\0\0" + b"x" * 2_100_000),
    "2 MB of compressed XMP": chunk(b"iTXt", ITXT + b"\1\0\0\0" + zlib.compress(TEXT)),
    "2 MB of zTXt": chunk(b"zTXt", b"Comment\0\0" + zlib.compress(TEXT)),
    "70 MB of text": chunk(b"tEXt", b"Comment\0" + b"x" * 70_000_000),
    "wrong CRC in tEXt": chunk(b"tEXt", b"Comment\0hello", crc=1),
    "wrong CRC in tIME": chunk(b"tIME", bytes(7), crc=1),
    "a damaged profile": chunk(b"iCCP", b"sRGB\0\0" + b"not deflated"),
    "a Display-P3 profile": chunk(b"iCCP", b"Display P3\0\0" + zlib.compress(b"\0" * 128)),
    "gAMA and cHRM": chunk(b"gAMA", struct.pack(">I", 100_000)) + chunk(b"cHRM", bytes(32)),
    "private chunk": chunk(b"vpAg", bytes(9)),
    "suggested palette": chunk(b"PLTE", PALETTE.tobytes()),
    "XMP orientation": chunk(b"iTXt", ITXT + b'\0\0\0\0<x tiff:Orientation="6"/>'),
    "EXIF that is none": chunk(b"eXIf", b"garbage"),
    "EXIF cut short": chunk(b"eXIf", exif(6)[:12]),
    "EXIF orientation 9": chunk(b"eXIf", exif(9)),
    "acTL of an animation": chunk(b"acTL", struct.pack(">II", 2, 0)),
}


@pytest.mark.parametrize("name", ODD_CHUNKS)
def test_chunks_that_change_no_pixel(name: str) -> None:
    samples = noise(3, 8)
    data = png(samples, 2, 8, before=ODD_CHUNKS[name])
    assert np.array_equal(pixels(data), samples)
    assert np.array_equal(pixels(png(samples, 2, 8, after=ODD_CHUNKS[name]) + b"after the end"), samples)


def test_a_png_is_stored_as_it_is_only_if_every_reader_takes_it() -> None:
    square = noise(3, 8)[:7, :7]
    for before in (b"", ODD_CHUNKS["gAMA and cHRM"], chunk(b"tEXt", b"Software\0x")):
        assert store_image(png(square, 2, 8, before=before), Encoding(7, "png", 0)) == png(square, 2, 8, before=before)
    for name in ("2 MB of compressed XMP", "wrong CRC in tEXt", "a damaged profile", "private chunk"):
        stored = store_image(png(square, 2, 8, before=ODD_CHUNKS[name]), Encoding(7, "png", 0))
        assert len(stored) < 1000
        with Image.open(io.BytesIO(stored)) as image:
            assert np.array_equal(np.asarray(image), square)


DAMAGED = {
    "rows are missing": (png(noise(3, 8), 2, 8, lacking=56), "lacks its last 56 bytes of pixels"),
    "a row is missing": (png(noise(1, 16), 0, 16, lacking=19), "lacks its last 19 bytes"),
    "a pass is missing": (png(noise(3, 8), 2, 8, lacking=84, interlaced=True), "lacks its last 84 bytes"),
    "a byte is missing": (png(noise(1, 16), 0, 16, lacking=1), "PNG image does not decode"),
    "wrong CRC in tRNS": (png(noise(1, 8), 0, 8, before=chunk(b"tRNS", b"\0\1", crc=1)), "tRNS chunk is damaged"),
    "tRNS of a wrong length": (png(noise(3, 8), 2, 8, before=chunk(b"tRNS", b"\0\1")), "tRNS chunk has 2 bytes"),
    "no palette": (png(noise(1, 4), 3, 4), "indexed colours without a palette"),
    "an unknown critical chunk": (png(noise(1, 8), 0, 8, before=chunk(b"CgBI", b"")), "critical chunk 'CgBI'"),
    "depth 3": (png(noise(1, 2), 0, 4)[:24] + b"\3" + png(noise(1, 2), 0, 4)[25:], "IHDR chunk is damaged"),
    "cut": (png(noise(3, 8), 2, 8)[:-13], "cut short"),
    "no pixels": (png(noise(3, 8), 2, 8, pieces=0), "without pixels"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_png(name: str) -> None:
    data, message = DAMAGED[name]
    with pytest.raises(DecodeError, match=message):
        decode_image(data)


def test_black_pngs_are_not_taken_for_cut_ones() -> None:
    for colour, depth in COMBINATIONS:
        samples = np.zeros((HEIGHT, WIDTH, CHANNELS[colour]), np.uint16)
        before = chunk(b"PLTE", bytes(3)) if colour == 3 else b""
        expected = 255 if colour in (4, 6) else 0
        assert (pixels(png(samples, colour, depth, before=before)) == expected).all()


def eight_bits(samples: np.ndarray, bits: int) -> np.ndarray:
    return on_white(samples, np.full((HEIGHT, WIDTH, 1), 2**bits - 1), 2**bits - 1)


CMYK = noise(4, 8)
INK = ((255 - CMYK[..., :3].astype(int)) * (255 - CMYK[..., 3:].astype(int)) + 127) // 255
COLOUR_MAP = {320: tuple((PALETTE.astype(int).T.reshape(-1) * 257).tolist())}
TIFFS: dict[str, tuple[bytes, np.ndarray]] = {}
for order in "<>":
    for bits in (1, 4, 8, 16):
        grey = noise(1, bits)
        name = f"{order}{bits} bits"
        TIFFS[f"{name}, black is zero"] = tiff(grey, 1, bits, order=order), eight_bits(grey, bits)
        TIFFS[f"{name}, white is zero"] = tiff(grey, 0, bits, order=order), eight_bits(2**bits - 1 - grey, bits)
    rgb, rgb16 = noise(3, 8), noise(3, 16)
    TIFFS[f"{order}RGB"] = tiff(rgb, 2, 8, order=order), rgb
    TIFFS[f"{order}RGB, planar"] = tiff(rgb, 2, 8, order=order, planar=True), rgb
    TIFFS[f"{order}RGB, tiles"] = tiff(rgb, 2, 8, order=order, tile=16), rgb
    TIFFS[f"{order}RGB, deflated"] = tiff(rgb, 2, 8, order=order, deflate=True), rgb
    TIFFS[f"{order}RGB of 16 bits"] = tiff(rgb16, 2, 16, order=order), rgb16 >> 8
    TIFFS[f"{order}CMYK"] = tiff(CMYK, 5, 8, order=order), INK
    TIFFS[f"{order}pages"] = tiff(rgb, 2, 8, order=order, pages=3), rgb
    indices = noise(1, 8)
    TIFFS[f"{order}palette"] = tiff(indices, 3, 8, order=order, tags=COLOUR_MAP), PALETTE[indices[..., 0]]
    rgba = noise(4, 8)
    shown = on_white(rgba[..., :3], rgba[..., 3:], 255)
    TIFFS[f"{order}alpha"] = tiff(rgba, 2, 8, order=order, tags={338: (2,)}), shown
    TIFFS[f"{order}a fourth sample that is no alpha"] = tiff(rgba, 2, 8, order=order, tags={338: (0,)}), rgba[..., :3]
    grey_alpha = noise(2, 8)
    shown = on_white(grey_alpha[..., :1], grey_alpha[..., 1:], 255)
    TIFFS[f"{order}grey and alpha"] = tiff(grey_alpha, 1, 8, order=order, tags={338: (2,)}), shown
for orientation in range(1, 9):
    for bits, channels, photometric in ((8, 3, 2), (16, 1, 0)):
        upright = noise(channels, bits)
        expected = upright if bits == 8 else eight_bits(65535 - upright, 16)
        stored = tiff(turned(upright, orientation), photometric, bits, tags={274: (orientation,)})
        TIFFS[f"orientation {orientation} of {bits} bits"] = stored, expected


@pytest.mark.parametrize("name", TIFFS)
def test_tiff(name: str) -> None:
    data, expected = TIFFS[name]
    difference = np.abs(pixels(data).astype(int) - expected.astype(int)).max()
    assert difference <= (1 if "CMYK" in name else 0)


@pytest.mark.parametrize(
    ("dtype", "bits", "sample_format"),
    [("f4", 32, 3), ("u4", 32, 1), ("i2", 16, 2), ("i4", 32, 2)],
)
def test_tiffs_without_a_defined_brightness(dtype: str, bits: int, sample_format: int) -> None:
    samples = np.ones((HEIGHT, WIDTH, 1), dtype)
    with pytest.raises(DecodeError, match="no defined brightness"):
        decode_image(tiff(samples, 1, bits, tags={339: (sample_format,)}))


def test_tiffs_that_lack_strips_or_tiles() -> None:
    for options in ({}, {"planar": True}, {"order": ">"}):
        data = tiff(noise(3, 8), 2, 8, tags={278: (4,)}, **options)  # strips of 4 rows, the first of which is there
        with pytest.raises(DecodeError, match="lacks some of its strips or tiles"):
            decode_image(data)


def test_tiff_of_12_bits() -> None:
    samples = noise(1, 12)[:, :8].astype(np.int64)
    packed = "".join(f"{value:012b}" for value in samples.reshape(-1).tolist())
    data = tiff(samples, 1, 12, raw=int(packed, 2).to_bytes(len(packed) // 8, "big"))
    assert np.array_equal(pixels(data)[..., 0], (samples[..., 0] * 255 + 2047) // 4095)


def test_bmp() -> None:
    rgb, rgba = noise(3, 8), noise(4, 8)
    assert np.array_equal(pixels(bmp(rgb[..., ::-1], 24)), rgb)
    assert np.array_equal(pixels(bmp(rgb[..., ::-1], 24, top_down=True)), rgb)
    for bits in (1, 4, 8):
        indices = noise(1, bits)
        table = np.pad(PALETTE[: 2**bits, ::-1], ((0, 0), (0, 1)))
        assert np.array_equal(pixels(bmp(indices, bits, palette=table.tobytes())), PALETTE[indices[..., 0]])
    stored = rgba[..., [2, 1, 0, 3]]
    assert np.array_equal(pixels(bmp(stored, 32, alpha=True)), on_white(rgba[..., :3], rgba[..., 3:], 255))
    assert np.array_equal(pixels(bmp(stored, 32)), rgba[..., :3])  # its fourth byte means nothing
    stored[..., 3] = 0  # as Windows writes it: opaque, or nothing would be seen
    assert np.array_equal(pixels(bmp(stored, 32, alpha=True)), rgba[..., :3])


def test_netpbm() -> None:
    grey, wide, rgb, bits = noise(1, 8), noise(1, 16), noise(3, 8), noise(1, 1)
    size = f"{WIDTH} {HEIGHT}\n"
    words = " ".join(str(value) for value in bits.reshape(-1))
    packed = b"".join(np.packbits(row.reshape(-1).astype(np.uint8)).tobytes() for row in bits)
    black_is_one = np.broadcast_to(255 * (1 - bits), (HEIGHT, WIDTH, 3))
    for data, expected in (
        (b"P1\n" + size.encode() + words.encode(), black_is_one),
        (b"P4\n" + size.encode() + packed, black_is_one),
        (b"P5\n# a remark\n" + size.encode() + b"255\n" + grey.astype(np.uint8).tobytes(), eight_bits(grey, 8)),
        (b"P5 " + size.encode() + b"65535\n" + wide.astype(">u2").tobytes(), eight_bits(wide, 16)),
        (b"P6\n" + size.encode() + b"255\n" + rgb.astype(np.uint8).tobytes(), rgb),
    ):
        assert np.array_equal(pixels(data), expected)
