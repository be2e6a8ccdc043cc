"""Encoded images -> RGB uint8, resized, cropped, flipped; uint8 <-> [-1, 1].

In: the bytes of a file.  Out: uint8 [3, h, w]. Ordinary 8-bit JPEGs go through torchvision, all else through PIL with
its traps handled: 16-bit, alpha, EXIF rotation, CMYK, palettes, animations, decompression bombs.
"""

import functools
import io
import struct
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn.functional import interpolate

from vqscale.data.parts import DecodeError
from vqscale.seeding import key_of, uniform

MAX_PIXELS = 150_000_000
# What PIL may open: formats that are pixels alone. EPS, for one, would start a program.
_PIL_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM")
SUFFIXES = ("jpg", "jpeg", "png", "gif", "bmp", "webp", "tif", "tiff", "ppm", "pgm")
_JPEG, _PNG = b"\xff\xd8", b"\x89PNG\r\n\x1a\n"
_CROP_LEFT, _CROP_TOP, _CROP_SIDE, _FLIP = (key_of(name) for name in ("left", "top", "side", "flip"))
_SMALLEST_CROP = 0.8  # of the shorter side


@dataclass(frozen=True)
class Header:
    """What an image's first bytes say. `plain`: 8-bit gray or RGB without transparency or rotation."""

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
    at = 8
    while at + 8 <= len(data):
        length, kind = struct.unpack(">I4s", data[at : at + 8])
        if kind in (b"tRNS", b"IDAT"):
            return kind == b"tRNS"
        at += 12 + length
    return False


def _jpeg_header(data: bytes) -> Header:
    """Walk the markers (ITU T.81, annex B) to the frame header."""
    at, rotated = 2, False
    while at + 4 <= len(data):
        if data[at] != 0xFF:
            break
        marker = data[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            if at + 10 > len(data):
                break
            depth, height, width, parts = struct.unpack(">BHHB", data[at + 4 : at + 10])
            return Header("jpg", width, height, depth == 8 and parts in (1, 3) and not rotated)
        if marker == 0xE1 and data[at + 4 : at + 10] == b"Exif\0\0":
            rotated = rotated or _exif_orientation(data[at + 10 : at + 2 + length]) != 1
        at += 2 + length
    raise DecodeError("a JPEG without a frame header")


def _exif_orientation(tiff: bytes) -> int:
    """The orientation tag of the first image directory; 1 (upright) where there is none, 0 where it is unreadable."""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    try:
        if order is None:
            return 0
        (at,) = struct.unpack_from(order + "I", tiff, 4)
        (count,) = struct.unpack_from(order + "H", tiff, at)
        for entry in range(at + 2, at + 2 + 12 * count, 12):
            tag, _, _, value = struct.unpack_from(order + "HHIH", tiff, entry)
            if tag == 0x0112:
                return value
    except struct.error:
        return 0
    return 1


def decode_image(data: bytes) -> Tensor:
    """The bytes of an image file -> uint8 RGB [3, h, w].

    Transparent pixels are composited on white, 16-bit values scaled, a JPEG's EXIF rotation applied; an animation
    gives its first frame. Raises DecodeError (a ValueError) for anything that does not decode whole.
    """
    data = bytes(data)
    header = read_header(data)
    # Not torchvision for PNG: its 0.29 ends the process (SIGSEGV) on about every damaged one.
    decode_jpeg = _jpeg_decoder() if header.format == "jpg" and header.plain else None
    if decode_jpeg is None:
        return _decode_with_pil(data)
    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)  # a copy: torch wants memory it could write to
    try:
        return decode_jpeg(encoded)
    except RuntimeError as error:
        raise DecodeError(str(error).splitlines()[0]) from None


@functools.cache
def _jpeg_decoder() -> Callable[[Tensor], Tensor] | None:
    """torchvision's, bytes uint8 [n] -> uint8 RGB [3, h, w]. Imported at the first JPEG, because it brings torch's
    compiler along, which takes as long to import as torch itself."""
    try:
        from torchvision.io import ImageReadMode

        # The operator, not the function around it, which warns at every image that it is deprecated (since 0.29)
        operator = torch.ops.image.decode_jpeg
    except (ImportError, AttributeError):  # gone: PIL decodes everything, at two thirds of the speed
        return None
    return lambda encoded: operator(encoded, ImageReadMode.RGB.value)


def _decode_with_pil(data: bytes) -> Tensor:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL warns of bombs (checked here) and of odd metadata
            with Image.open(io.BytesIO(data), formats=_PIL_FORMATS) as image:
                check_size(*image.size)
                image.load()
                array = np.array(to_rgb(image))
    except DecodeError:
        raise
    except Exception as error:  # PIL raises what it likes: OSError, SyntaxError, struct.error, EOFError, …
        raise DecodeError(f"{type(error).__name__}: {error}") from None
    return torch.from_numpy(array).permute(2, 0, 1).contiguous()


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL image -> mode RGB."""
    if image.format in ("JPEG", "MPO", "WEBP"):
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = _scale_16_bit(image)
    elif image.mode == "F":
        raise DecodeError("an image of floating-point pixels has no defined brightness")
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def _scale_16_bit(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise DecodeError("an image of 32-bit pixels has no defined brightness")
    return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))


def _resize(image: Tensor, resolution: int) -> Tensor:
    """uint8 [3, h, w] -> [3, R, R], bilinear with antialiasing."""
    if image.shape[-2:] == (resolution, resolution):
        return image.contiguous()
    size = (resolution, resolution)
    return interpolate(image[None], size, mode="bilinear", antialias=True, align_corners=False)[0].contiguous()


def resize_center_crop(image: Tensor, resolution: int) -> Tensor:
    """The central square of the shorter side, resized: uint8 [3, h, w] -> [3, R, R].

    Cutting before resizing gives the same picture as the other way round and stays small for a 1×10000 image.
    """
    height, width = image.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return _resize(image[:, top : top + side, left : left + side], resolution)


def random_crop(image: Tensor, resolution: int, *words: int) -> Tensor:
    """A square of 0.8 to 1 of the shorter side anywhere in the image, resized; addressed by the words."""
    height, width = image.shape[-2:]
    shrink = _SMALLEST_CROP + (1 - _SMALLEST_CROP) * uniform(*words, _CROP_SIDE)
    side = max(1, round(min(height, width) * shrink))
    top = int(uniform(*words, _CROP_TOP) * (height - side + 1))
    left = int(uniform(*words, _CROP_LEFT) * (width - side + 1))
    return _resize(image[:, top : top + side, left : left + side], resolution)


def random_flip(image: Tensor, *words: int) -> Tensor:
    """The image or its mirror image, with equal chance; addressed by the words."""
    return image.flip(-1) if uniform(*words, _FLIP) < 0.5 else image


def to_float(image: Tensor) -> Tensor:
    """uint8 in [0, 255] -> float32 in [-1, 1]."""
    return image.float() / 127.5 - 1


def to_uint8(image: Tensor) -> Tensor:
    """Float in [-1, 1] (clamped) -> uint8 in [0, 255], rounded."""
    return ((image.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


class ImageReader:
    """The `read` for images: {"image": uint8 [3, R, R]}, crop and flip addressed by (seed, position)."""

    part_names = SUFFIXES

    def __init__(self, resolution: int, flip: bool = False, crop: str = "center", seed: int = 0):
        if crop not in ("center", "random"):
            raise ValueError(f"crop={crop}: choose center or random")
        self.resolution, self.flip, self.crop, self.seed = resolution, flip, crop, seed
        _jpeg_decoder()  # imported here once, not again in every worker that is forked

    def __call__(self, parts: Mapping[str, Any], label: int, position: int) -> dict[str, Tensor]:
        """One sample; raises DecodeError."""
        data = next((parts[name] for name in SUFFIXES if name in parts), None)
        if data is None:
            raise DecodeError("the sample has no image part")
        image = decode_image(data)
        if self.crop == "random":
            image = random_crop(image, self.resolution, self.seed, position)
        else:
            image = resize_center_crop(image, self.resolution)
        return {"image": random_flip(image, self.seed, position) if self.flip else image}
