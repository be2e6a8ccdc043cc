"""ADM's preparation of images, against PIL's filters computed here in integers, and what dataset.json says of it."""

import io
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image

from vqscale.data.images import adm_center_crop, decode_image, preparation
from vqscale.data.packing import Encoding, store_image
from vqscale.data.parts import DecodeError


def box(x: float) -> float:
    return float(-0.5 < x <= 0.5)


def bicubic(x: float) -> float:
    """Keys (1981), a = -0.5."""
    x = abs(x)
    if x < 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * (((x - 5) * x + 8) * x - 4) if x < 2 else 0


def filtered(pixels: np.ndarray, axis: int, size: int, kernel: Callable[[float], float], support: float) -> np.ndarray:
    """One pass of PIL's resize along an axis: weights of 22 bits, sums rounded to uint8."""
    length = pixels.shape[axis]
    scale = length / size
    widened = max(scale, 1.0)
    weights = np.zeros((size, length), np.int64)
    for n in range(size):
        centre = (n + 0.5) * scale
        first = max(0, math.floor(centre - support * widened + 0.5))
        stop = min(length, math.floor(centre + support * widened + 0.5))
        row = [kernel((x - centre + 0.5) / widened) for x in range(first, stop)]
        weights[n, first:stop] = [math.floor(w / sum(row) * 2**22 + 0.5) for w in row]
    sums = np.moveaxis(np.tensordot(weights, pixels.astype(np.int64), (1, axis)), 0, axis)
    return np.clip((sums + 2**21) >> 22, 0, 255).astype(np.uint8)


def resized(
    pixels: np.ndarray, height: int, width: int, kernel: Callable[[float], float], support: float
) -> np.ndarray:
    return filtered(filtered(pixels, 1, width, kernel, support), 0, height, kernel, support)


def reference(pixels: np.ndarray, resolution: int) -> np.ndarray:
    """Pixels [h, w, 3] -> [r, r, 3]: halved by boxes, then bicubic, then the central square."""
    height, width = pixels.shape[:2]
    while min(height, width) >= 2 * resolution:
        height, width = height // 2, width // 2
        pixels = resized(pixels, height, width, box, 0.5)
    scale = resolution / min(height, width)
    pixels = resized(pixels, round(height * scale), round(width * scale), bicubic, 2.0)
    top, left = (pixels.shape[0] - resolution) // 2, (pixels.shape[1] - resolution) // 2
    return pixels[top : top + resolution, left : left + resolution]


def picture(width: int, height: int) -> np.ndarray:
    """Edges, slopes and grain: [h, w, 3]."""
    rng = np.random.default_rng(width * 10_007 + height)
    y, x = np.mgrid[:height, :width]
    slopes = np.stack([255 * x // width, 255 * y // height, (x // 5 + y // 3) % 2 * 255], -1)
    return np.where(rng.random((height, width, 1)) < 0.5, slopes, rng.integers(0, 256, slopes.shape)).astype(np.uint8)


def encoded(pixels: np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind, **options)
    return out.getvalue()


def pixels_of(data: bytes) -> np.ndarray:
    return decode_image(data).permute(1, 2, 0).numpy()


SIZES = [
    *[(32, 32), (32, 47), (33, 32), (45, 41), (63, 64), (63, 200), (64, 64), (65, 64), (64, 131), (127, 128)],
    *[(128, 128), (129, 300), (255, 256), (301, 257), (500, 375), (67, 900), (31, 40), (7, 5), (1, 9), (20, 31)],
]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pixels_equal_the_reference(size: tuple[int, int]) -> None:
    for width, height in (size, size[::-1]):
        pixels = picture(width, height)
        image = torch.from_numpy(pixels.transpose(2, 0, 1).copy())
        for resolution in (32, 31):
            made = adm_center_crop(image, resolution)
            assert made.is_contiguous() and made.shape == (3, resolution, resolution)
            assert np.array_equal(made.permute(1, 2, 0).numpy(), reference(pixels, resolution))


def test_a_photograph_at_256_pixels_equals_the_reference() -> None:
    data = encoded(picture(500, 375), "JPEG", quality=90)
    stored = store_image(data, Encoding(256, "png", 0, "adm"))
    assert np.array_equal(pixels_of(stored), reference(pixels_of(data), 256))


def test_an_image_is_turned_upright_and_made_opaque_before() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    tall = encoded(picture(90, 70), "JPEG", quality=95, exif=exif)
    assert pixels_of(tall).shape == (90, 70, 3)
    alpha = np.where(picture(90, 70)[..., :1] < 128, 0, 255).astype(np.uint8)
    sheer = encoded(np.dstack([picture(90, 70), alpha]))
    for data in (tall, sheer):
        stored = store_image(data, Encoding(32, "png", 0, "adm"))
        assert np.array_equal(pixels_of(stored), reference(pixels_of(data), 32))


def test_an_image_that_fits_keeps_its_bytes() -> None:
    data = encoded(picture(32, 32))
    assert store_image(data, Encoding(32, "png", 0, "adm")) == data
    jpeg = encoded(picture(32, 32), "JPEG", quality=60)
    assert np.array_equal(pixels_of(store_image(jpeg, Encoding(32, "png", 0, "adm"))), pixels_of(jpeg))


def test_a_picture_that_grows_beyond_max_pixels_is_refused() -> None:
    data = encoded(picture(2, 2000))
    with pytest.raises(DecodeError, match="32×32000 pixels is over the limit of 1000000"):
        store_image(data, Encoding(32, "png", 0, "adm"), max_pixels=1_000_000)
    assert pixels_of(store_image(data, Encoding(32, "png", 0), max_pixels=1_000_000)).shape == (32, 32, 3)


@pytest.mark.parametrize(
    ("transform", "text"),
    [
        (
            {"resolution": 256, "resize": "adm", "crop": "center", "format": "png", "versions": {"pillow": "12"}},
            "resized by ADM's rule to 256 px, centre crop, PNG",
        ),
        (
            {"resolution": 64, "resize": "bilinear, antialiased", "crop": "center", "format": "jpg", "quality": 95},
            "resized bilinearly, antialiased, to 64 px, centre crop, JPEG of quality 95",
        ),
        (
            {"resolution": 32, "resize": "adm", "crop": "center; smaller images on black", "format": "png"},
            "resized by ADM's rule to 32 px, centre crop, smaller images on black, PNG",
        ),
        ({"resolution": 32, "resize": "none, drawn at this size", "format": "png"}, "drawn at 32 px, PNG"),
        ({"resolution": 8, "resize": "x\n", "crop": "left", "format": "gif"}, r"resize x\n, 8 px, crop left, gif"),
        ({"resolution": 256}, "preparation unknown"),
        ({"resolution": 256, "format": "png"}, "preparation unknown"),
        ({}, "preparation unknown"),
    ],
)  # fmt: skip
def test_a_preparation_in_one_phrase(transform: dict[str, object], text: str) -> None:
    assert preparation(transform) == text
