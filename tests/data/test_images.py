"""Golden pixels for the odd files that folders of images hold."""

import io
import random
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from vqscale.data.headers import read_header
from vqscale.data.images import (
    ImageReader,
    decode_image,
    random_crop,
    random_flip,
    resize_center_crop,
    to_float,
    to_uint8,
)
from vqscale.data.parts import DecodeError

RED = (255, 0, 0)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def pixel(data: bytes, x: int = 0, y: int = 0) -> tuple[int, ...]:
    image = decode_image(data)
    assert image.dtype == torch.uint8 and image.shape[0] == 3 and image.is_contiguous()
    return tuple(image[:, y, x].tolist())


def photo(width: int = 40, height: int = 30) -> Image.Image:
    grid = np.mgrid[0:height, 0:width].transpose(1, 2, 0) * 5
    return Image.fromarray(np.dstack([grid, grid[..., :1] // 2 + 60]).astype(np.uint8))


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP"])
def test_ordinary_images_equal_pil(mode: str, kind: str) -> None:
    data = encoded(photo().convert(mode), kind)
    with Image.open(io.BytesIO(data)) as image:
        expected = np.array(image.convert("RGB")).transpose(2, 0, 1)
    assert np.array_equal(decode_image(data), expected)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_ordinary_images_take_the_fast_path(kind: str) -> None:
    header = read_header(encoded(photo(), kind))
    assert (header.plain, header.width, header.height) == (True, 40, 30)


def test_progressive_jpeg() -> None:
    assert decode_image(encoded(photo(), "JPEG", progressive=True)).shape == (3, 30, 40)


def test_alpha_is_composited_on_white() -> None:
    assert pixel(encoded(Image.new("RGBA", (2, 2), (*RED, 0)))) == (255, 255, 255)
    assert pixel(encoded(Image.new("RGBA", (2, 2), (*RED, 51)))) == (255, 204, 204)
    assert pixel(encoded(Image.new("RGBA", (2, 2), (*RED, 255)))) == RED
    assert pixel(encoded(Image.new("LA", (2, 2), (100, 0)))) == (255, 255, 255)
    assert pixel(encoded(Image.new("LA", (2, 2), (100, 255)))) == (100, 100, 100)


def test_palettes() -> None:
    image = Image.new("P", (2, 1), 1)
    image.putpalette([0, 0, 255, *RED])
    image.putpixel((1, 0), 0)
    assert pixel(encoded(image)) == RED and pixel(encoded(image), 1) == (0, 0, 255)
    assert pixel(encoded(image, transparency=1)) == (255, 255, 255)
    assert pixel(encoded(image, transparency=1), 1) == (0, 0, 255)
    assert pixel(encoded(image, "GIF")) == RED


def test_transparent_colours_of_images_without_alpha() -> None:
    assert pixel(encoded(Image.new("RGB", (1, 1), RED), transparency=RED)) == (255, 255, 255)
    assert pixel(encoded(Image.new("RGB", (1, 1), RED), transparency=(0, 0, 0))) == RED
    assert pixel(encoded(Image.new("L", (1, 1), 9), transparency=9)) == (255, 255, 255)


def test_16_bits_are_scaled() -> None:
    values = np.array([[0, 128, 257, 32896, 65535]], np.uint16)
    data = encoded(Image.fromarray(values))
    assert [pixel(data, x)[0] for x in range(5)] == [0, 0, 1, 128, 255]
    assert pixel(encoded(Image.fromarray(values), "TIFF"), 3) == (128, 128, 128)


def test_16_bit_rgb() -> None:
    assert pixel(raw_png(2, b"\0" + struct.pack(">3H", 65535, 32896, 0), 16)) == (255, 128, 0)


def raw_png(colour: int, row: bytes, depth: int, width: int = 1, height: int = 1) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")


def test_one_bit_cmyk_and_floats() -> None:
    assert pixel(encoded(Image.new("1", (9, 9), 1))) == (255, 255, 255)
    assert pixel(encoded(Image.new("1", (9, 9), 0))) == (0, 0, 0)
    red = pixel(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG"))
    assert red[0] > 250 and max(red[1:]) < 5
    with pytest.raises(DecodeError, match="floating-point"):
        decode_image(encoded(Image.new("F", (2, 2), 0.5), "TIFF"))


def test_an_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, (0, 255, 0))]
    for kind in ("GIF", "PNG"):
        assert pixel(encoded(frames[0], kind, save_all=True, append_images=frames[1:])) == RED


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_of_jpegs(orientation: int) -> None:
    upright = photo(48, 32)
    exif = Image.Exif()
    exif[0x0112] = orientation
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # PIL's transposition that undoes each
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(back[orientation]))
    decoded = decode_image(encoded(stored, "JPEG", quality=100, subsampling=0, exif=exif))
    assert decoded.shape == (3, 32, 48)
    assert np.abs(decoded.numpy().transpose(1, 2, 0).astype(int) - np.array(upright)).max() < 12


def test_damaged_files_raise() -> None:
    jpeg, png = encoded(photo(), "JPEG"), encoded(photo())
    empty = [b"", b"\xff\xd8", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"not an image", b"%!PS-Adobe-3.0 EPSF-3.0\n"]
    for data in [jpeg[: len(jpeg) // 2], png[: len(png) // 2], png[:40], *empty]:
        with pytest.raises(DecodeError):
            decode_image(data)


def test_no_truncation_crashes_or_passes() -> None:
    rng = random.Random(0)
    for data in (encoded(photo(), "JPEG"), encoded(photo()), encoded(photo().convert("P")), encoded(photo(), "GIF")):
        for _ in range(40):
            with pytest.raises(DecodeError):
                decode_image(data[: rng.randrange(len(data) * 9 // 10)])


def test_random_damage_raises_nothing_else() -> None:
    rng = random.Random(1)
    for kind in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"):
        whole = encoded(photo(), kind)
        for _ in range(40):
            data = bytearray(whole)
            for _ in range(3):
                data[rng.randrange(len(data))] = rng.randrange(256)
            try:
                assert decode_image(bytes(data)).shape[0] == 3
            except DecodeError:
                pass


@pytest.mark.parametrize("kind", ["PNG", "BMP", "JPEG"])
def test_bombs_are_refused_at_the_header(kind: str) -> None:
    data = bytearray(encoded(Image.new("L", (8, 8)), kind))
    if kind == "PNG":
        data = bytearray(raw_png(0, b"", 8, 20_000, 20_000))
    elif kind == "BMP":
        data[18:26] = struct.pack("<ii", 20_000, 20_000)
    else:
        at = data.index(b"\xff\xc0")
        data[at + 5 : at + 9] = struct.pack(">HH", 20_000, 20_000)
    with pytest.raises(DecodeError, match="20000×20000 pixels is over the limit|400000000 pixels. exceeds limit"):
        decode_image(bytes(data))


@pytest.mark.parametrize("size", [(1, 1), (1, 10_000), (10_000, 1), (3, 2), (64, 64), (65, 64), (500, 375)])
def test_any_size_gives_a_defined_result(size: tuple[int, int]) -> None:
    image = decode_image(encoded(Image.new("RGB", size, (10, 200, 30))))
    for result in (resize_center_crop(image, 64), random_crop(image, 64, 1, 2)):
        assert result.shape == (3, 64, 64) and result.is_contiguous()
        assert result.amin((1, 2)).tolist() == result.amax((1, 2)).tolist() == [10, 200, 30]


def test_resizing_keeps_the_centre_and_averages() -> None:
    image = torch.zeros(3, 40, 120, dtype=torch.uint8)
    image[:, :, 40:80] = 255
    assert resize_center_crop(image, 10).min() == 255
    checkers = (torch.arange(64)[:, None] + torch.arange(64)) % 2 * 255
    smooth = resize_center_crop(checkers.to(torch.uint8).expand(3, 64, 64), 8)
    assert 110 < smooth.min() <= smooth.max() < 145  # without antialiasing: 0 or 255


def test_crops_and_flips_are_addressed() -> None:
    image = torch.arange(3 * 50 * 70).reshape(3, 50, 70).to(torch.uint8)
    assert torch.equal(random_crop(image, 32, 5, 9), random_crop(image, 32, 5, 9))
    assert len({random_crop(image, 32, 5, p).numpy().tobytes() for p in range(50)}) == 50
    flipped = [torch.equal(random_flip(image, 5, p), image.flip(-1)) for p in range(200)]
    assert 70 < sum(flipped) < 130


def test_scaling_round_trip() -> None:
    values = torch.arange(256, dtype=torch.uint8)
    scaled = to_float(values)
    assert (scaled.min(), scaled.max(), scaled.dtype) == (-1, 1, torch.float32)
    assert torch.equal(to_uint8(scaled), values)
    assert to_uint8(torch.tensor([-9.0, 9.0])).tolist() == [0, 255]


def test_reader() -> None:
    reader = ImageReader(16, flip=True, crop="random", seed=1)
    data = encoded(photo(), "JPEG")
    first = reader({"jpg": data, "json": b"{}"}, 0, 5)["image"]
    assert first.shape == (3, 16, 16) and torch.equal(first, reader({"jpg": data}, 0, 5)["image"])
    with pytest.raises(DecodeError, match="no image part"):
        reader({"json": b"{}"}, 0, 5)
    with pytest.raises(ValueError, match="crop=middle"):
        ImageReader(16, crop="middle")
