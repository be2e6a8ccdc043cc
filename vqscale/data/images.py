"""Encoded images -> RGB uint8, resized, cropped, flipped; uint8 <-> [-1, 1]; how a data set's images were prepared.

In: the bytes of a file.  Out: uint8 [3, h, w]. Ordinary 8-bit JPEGs go through torchvision, all others through PIL
with its traps handled: 16-bit, alpha, EXIF rotation, CMYK, palettes, animations, decompression bombs.

h w: the size of the file's image; r: the resolution asked for.
"""

import contextlib
import functools
import io
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, UnidentifiedImageError
from PIL import TiffImagePlugin as tiff
from torch import Tensor
from torch.nn.functional import interpolate

from vqscale.data.headers import MAX_PIXELS, Header, check_size, exif_orientation, read_header
from vqscale.data.kinds import format_of
from vqscale.data.parts import DecodeError
from vqscale.seeding import key_of, uniform
from vqscale.text import printable

SUFFIXES = tuple("jpg jpeg jpe jfif png apng gif bmp dib webp avif tif tiff ppm pgm pbm pnm".split())
_WHITE_IS_ZERO, _UNSIGNED, _SEPARATE = 0, 1, 2  # in a TIFF's tags
# Pillow reads this one in little-endian files alone.
tiff.OPEN_INFO.setdefault((b"MM", _WHITE_IS_ZERO, (1,), 1, (16,), ()), ("I;16B", "I;16B"))
_BYTES_PER_PIXEL, _BYTES_BESIDE_PIXELS = 8, 1 << 26  # four uncompressed samples of 16 bits; text and profiles
_ADDRESS = re.compile(r" ?<[^<>]* at 0x[0-9a-f]+>")
_CROP_LEFT, _CROP_TOP, _CROP_SIDE, _FLIP = (key_of(name) for name in ("left", "top", "side", "flip"))
_SMALLEST_CROP = 0.8  # of the shorter side
# What `transform` in dataset.json says of resizing and cropping, and how `preparation` puts it
ADM, BILINEAR, DRAWN = "adm", "bilinear, antialiased", "none, drawn at this size"
CENTER, CENTER_OR_PADDED = "center", "center; smaller images on black"
_RESIZED = {ADM: "resized by ADM's rule to", BILINEAR: "resized bilinearly, antialiased, to", DRAWN: "drawn at"}
_CROPPED = {CENTER: "centre crop", CENTER_OR_PADDED: "centre crop, smaller images on black"}
_STORED = {"png": "PNG", "jpg": "JPEG"}


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS) -> UInt8[Tensor, "3 h w"]:
    """The bytes of an image file -> uint8 RGB [3, h, w].

    Transparent pixels are composited on white, 16-bit values scaled, an EXIF orientation applied; an animation gives
    its first frame; colour profiles are ignored. Raises DecodeError (a ValueError) for anything that does not decode
    whole, and for more than `max_pixels`.
    """
    data = bytes(data)
    header = read_header(data, max_pixels)
    # Not torchvision for PNG: its 0.29 ends the process (SIGSEGV) on about every damaged one.
    decode_jpeg = _jpeg_decoder() if header.format == "jpg" and header.plain else None
    if decode_jpeg is None:
        return _decode_with_pil(data, header, max_pixels)
    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)  # a copy: torch needs writable memory
    try:
        return decode_jpeg(encoded)
    except RuntimeError as error:
        raise DecodeError(f"JPEG image does not decode: {str(error).splitlines()[0].split(', ')[-1]}") from None


def read_image_file(path: str | Path, max_pixels: int = MAX_PIXELS) -> bytes:
    """The bytes of an image file. Raises DecodeError, before all of it is read, for another kind of file and for one
    that is longer than `max_pixels` can be; OSError when it cannot be read."""
    limit = _BYTES_PER_PIXEL * max_pixels + _BYTES_BESIDE_PIXELS
    with open(path, "rb") as file:
        head = file.read(4096)
        format_of(head)
        if (size := os.fstat(file.fileno()).st_size) > limit:
            raise DecodeError(f"a file of {size} bytes is over the limit of {limit} (8 per pixel of max_pixels=)")
        return head + file.read(limit)


@functools.cache
def _jpeg_decoder() -> Callable[[Tensor], Tensor] | None:
    """torchvision's decoder: bytes uint8 [n] -> uint8 RGB [3, h, w]. Imported at the first JPEG: it imports torch's
    compiler, which takes as long as torch itself."""
    try:
        from torchvision.io import ImageReadMode

        # The operator, not the function around it, which warns at every image that it is deprecated (since 0.29)
        operator = torch.ops.image.decode_jpeg
    except (ImportError, AttributeError):  # removed: PIL decodes everything, at two thirds of the speed
        return None
    return lambda encoded: operator(encoded, ImageReadMode.RGB.value)


def _decode_with_pil(data: bytes, header: Header, max_pixels: int) -> UInt8[Tensor, "3 h w"]:
    try:
        with _without_limits_of_pil():
            if header.png is not None:
                pixels = _upright(header.png.decode(), header.orientation)
            else:
                pixels = _open_with_pil(data, header.format, max_pixels)
    except DecodeError:
        raise
    except UnidentifiedImageError:
        raise DecodeError(f"{_pil_name(header.format)} image does not decode: damaged, or of an unread kind") from None
    except Exception as error:  # PIL raises many kinds: OSError, SyntaxError, struct.error, EOFError, …
        reason = _ADDRESS.sub("", str(error)) or type(error).__name__
        raise DecodeError(f"{_pil_name(header.format)} image does not decode: {reason}") from None
    return torch.from_numpy(np.array(pixels.transpose(2, 0, 1), order="C"))


def _pil_name(name: str) -> str:
    """PIL's name of a format. It may open those of `format_of` alone, which hold pixels: EPS would start a program."""
    return "JPEG" if name == "jpg" else name.upper()


@contextlib.contextmanager
def _without_limits_of_pil() -> Iterator[None]:
    """PIL's own limit of pixels gives way to `max_pixels`; its warnings are of that, and of odd metadata."""
    limit = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _open_with_pil(data: bytes, name: str, max_pixels: int) -> UInt8[np.ndarray, "h w 3"]:
    if name == "jpg":
        data = data[:2] + data[data.index(0xFF, 2) :]  # PIL takes no bytes between the first two markers
    with Image.open(io.BytesIO(data), formats=(_pil_name(name),)) as image:
        check_size(*image.size, max_pixels)
        if name == "tiff":
            _check_strips(image)
        image.load()  # turns a TIFF upright
        orientation = 1 if name == "tiff" else exif_orientation(image.info.get("exif", b""))
        return _upright(np.asarray(to_rgb(image)), orientation)


def _check_strips(image: Image.Image) -> None:
    """PIL leaves pixels black for which a TIFF names no strip or tile."""
    tags = image.tag_v2  # type: ignore[attr-defined]
    width, height = tags[tiff.IMAGEWIDTH], tags[tiff.IMAGELENGTH]  # as stored, before any turn
    planes = len(tags[tiff.BITSPERSAMPLE]) if tags.get(tiff.PLANAR_CONFIGURATION) == _SEPARATE else 1
    tiles = [tile[1] for tile in image.tile]  # type: ignore[attr-defined]
    area = sum((min(right, width) - left) * (min(bottom, height) - top) for left, top, right, bottom in tiles)
    if area < width * height * planes:
        raise DecodeError("a TIFF that lacks some of its strips or tiles")


def _upright(pixels: UInt8[np.ndarray, "h w 3"], orientation: int) -> UInt8[np.ndarray, "h2 w2 3"]:
    """The stored pixels turned as EXIF (2.32, section 4.6.4) says."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels[:, ::-1] if orientation in (2, 3, 6, 7) else pixels


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL image -> mode RGB."""
    if image.mode.startswith("I"):
        image = _scale_16_bit(image)
    elif image.mode == "F":
        raise DecodeError("an image of floating-point pixels has no defined brightness")
    if image.format == "BMP" and image.mode == "RGBA" and image.getchannel("A").getextrema() == (0, 0):
        return image.convert("RGB")  # Windows writes zeros where there is no transparency
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def _scale_16_bit(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    tags = getattr(image, "tag_v2", {})  # of a TIFF
    bits = tags.get(tiff.BITSPERSAMPLE, (16,))[0]
    if bits > 16 or tags.get(tiff.SAMPLEFORMAT, (_UNSIGNED,))[0] != _UNSIGNED or values.min() < 0:
        raise DecodeError("an image of 32-bit or signed pixels has no defined brightness")
    most = 2**bits - 1
    if tags.get(tiff.PHOTOMETRIC_INTERPRETATION) == _WHITE_IS_ZERO:
        values = most - values
    return Image.fromarray(((values * 255 + most // 2) // most).astype(np.uint8))


def _resize(image: UInt8[Tensor, "3 h w"], resolution: int) -> UInt8[Tensor, "3 r r"]:
    """Bilinear with antialiasing."""
    if image.shape[-2:] == (resolution, resolution):
        return image.contiguous()
    return interpolate(image[None], resolution, mode="bilinear", antialias=True, align_corners=False)[0].contiguous()


def resize_center_crop(image: UInt8[Tensor, "3 h w"], resolution: int) -> UInt8[Tensor, "3 r r"]:
    """The central square of the shorter side, resized.

    Cropping before resizing gives the same picture as after it and stays small for a 1×10000 image.
    """
    height, width = image.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return _resize(image[:, top : top + side, left : left + side], resolution)


def adm_center_crop(
    image: UInt8[Tensor, "3 h w"], resolution: int, max_pixels: int = MAX_PIXELS
) -> UInt8[Tensor, "3 r r"]:
    """As the ADM evaluation suite prepares images (Dhariwal & Nichol 2021; `center_crop_arr` of guided-diffusion):
    halved by a box filter while the shorter side is at least twice the resolution, resized by PIL's bicubic filter,
    then cropped. Raises DecodeError for an image so long and narrow that it has more than `max_pixels` before the crop.
    """
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    while min(picture.size) >= 2 * resolution:
        picture = _resize_with_pil(picture, picture.width // 2, picture.height // 2, Image.Resampling.BOX)
    scale = resolution / min(picture.size)
    width, height = round(picture.width * scale), round(picture.height * scale)
    check_size(width, height, max_pixels)
    left, top = (width - resolution) // 2, (height - resolution) // 2
    picture = _resize_with_pil(picture, width, height, Image.Resampling.BICUBIC)
    pixels = np.asarray(picture.crop((left, top, left + resolution, top + resolution)))
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


def _resize_with_pil(picture: Image.Image, width: int, height: int, kernel: Image.Resampling) -> Image.Image:
    """Across, then down, rounded in between. One call does so before Pillow 13, as when the published references were
    made; from 13 on it goes down first where that saves work, which changes last bits."""
    return picture.resize((width, picture.height), kernel).resize((width, height), kernel)


def preparation(transform: Mapping[str, Any]) -> str:
    """How the images of a data set were prepared, in one phrase, from `transform` of its dataset.json: "resized by
    ADM's rule to 256 px, centre crop, PNG". "preparation unknown" where it does not say, as with tars of others."""
    resize, crop, stored = (str(transform.get(key, "")) for key in ("resize", "crop", "format"))
    if not (resize and stored and "resolution" in transform):
        return "preparation unknown"
    words = [f"{_RESIZED.get(resize, f'resize {resize},')} {transform['resolution']} px"]
    words += [_CROPPED.get(crop, f"crop {crop}")] * bool(crop)
    words += [_STORED.get(stored, stored) + (f" of quality {transform['quality']}" if "quality" in transform else "")]
    return printable(", ".join(words))


def random_crop(image: UInt8[Tensor, "3 h w"], resolution: int, *words: int) -> UInt8[Tensor, "3 r r"]:
    """A square of 0.8 to 1 of the shorter side anywhere in the image, resized; addressed by the words."""
    height, width = image.shape[-2:]
    shrink = _SMALLEST_CROP + (1 - _SMALLEST_CROP) * uniform(*words, _CROP_SIDE)
    side = max(1, round(min(height, width) * shrink))
    top = int(uniform(*words, _CROP_TOP) * (height - side + 1))
    left = int(uniform(*words, _CROP_LEFT) * (width - side + 1))
    return _resize(image[:, top : top + side, left : left + side], resolution)


def random_flip(image: UInt8[Tensor, "3 h w"], *words: int) -> UInt8[Tensor, "3 h w"]:
    """The image or its mirror image, with equal chance; addressed by the words."""
    return image.flip(-1) if uniform(*words, _FLIP) < 0.5 else image


def to_float(image: UInt8[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """uint8 in [0, 255] -> float32 in [-1, 1]."""
    return image.float() / 127.5 - 1


def to_uint8(image: Float[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    """Float in [-1, 1] (clamped) -> uint8 in [0, 255], rounded."""
    return ((image.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


class ImageReader:
    """The `read` of image data sets: {"image": uint8 [3, r, r]}, crop and flip addressed by (seed, position)."""

    part_names = SUFFIXES

    def __init__(
        self, resolution: int, flip: bool = False, crop: str = "center", seed: int = 0, max_pixels: int = MAX_PIXELS
    ):
        if crop not in ("center", "random"):
            raise ValueError(f"crop={crop}: choose center or random")
        self.resolution, self.flip, self.crop, self.seed = resolution, flip, crop, seed
        self.max_pixels = max_pixels
        _jpeg_decoder()  # imported once here, not again in every forked worker

    def __call__(self, parts: Mapping[str, Any], label: int, position: int) -> dict[str, Tensor]:
        """One sample; raises DecodeError."""
        data = next((parts[name] for name in SUFFIXES if name in parts), None)
        if data is None:
            raise DecodeError("the sample has no image part")
        image = decode_image(data, self.max_pixels)
        if self.crop == "random":
            image = random_crop(image, self.resolution, self.seed, position)
        else:
            image = resize_center_crop(image, self.resolution)
        return {"image": random_flip(image, self.seed, position) if self.flip else image}
