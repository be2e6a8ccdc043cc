"""Packing one shard of images: the unit of work of `pack` and of its resume.

In: a `ShardJob`.  Out: the tar with its index, and a list of the images that did not decode. The result depends on the
job alone, so any number of processes writes the same bytes.
"""

import io
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from vqscale.data.arrays import read_pictures
from vqscale.data.drawn import draw
from vqscale.data.headers import MAX_PIXELS, read_header
from vqscale.data.images import adm_center_crop, decode_image, read_image_file, resize_center_crop
from vqscale.data.listing import Item
from vqscale.data.processes import made_progress
from vqscale.data.shards import ShardInfo, ShardWriter, shard_info
from vqscale.files import read_jsonl, write_atomically

_DRAW_BATCH = 50


@dataclass(frozen=True)
class Encoding:
    """How images are stored. `format`: png | jpg; `quality`: of jpg, 1 to 100; `resize`: bilinear | adm."""

    resolution: int
    format: str
    quality: int
    resize: str = "bilinear"


@dataclass(frozen=True)
class ShardJob:
    """Pack `items` of `folder` ("" = drawn with `seed`) into `tar`; list the bad ones in `bad_path`, a JSONL file of
    {"file", "error"} that is absent where there are none."""

    tar: Path
    bad_path: Path
    folder: str
    items: tuple[Item, ...]
    encoding: Encoding
    seed: int
    max_pixels: int = MAX_PIXELS


def finished(job: ShardJob) -> ShardInfo | None:
    """The shard that an earlier run wrote for this job, or None."""
    info = shard_info(job.tar)
    is_whole = info is not None and info.num_samples + len(list(read_jsonl(job.bad_path))) == len(job.items)
    return info if is_whole else None


def pack_shard(job: ShardJob) -> None:
    """Do the job. Images that do not decode are skipped and listed; other errors leave nothing behind."""
    bad: list[dict[str, str]] = []
    with ShardWriter(job.tar) as writer:
        for item, data in _drawn_images(job) if not job.folder else _images_of_folder(job, bad):
            made_progress()
            writer.write(item.key, {job.encoding.format: data, "cls": str(item.label).encode()})
        write_bad(job.bad_path, bad)  # before the tar appears: a finished shard has its list


def write_bad(path: Path, bad: Sequence[dict[str, str]]) -> None:
    """One line of JSON for each bad image; an empty list is no file."""
    if bad:
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in bad).encode())
    else:
        path.unlink(missing_ok=True)


def _drawn_images(job: ShardJob) -> Iterator[tuple[Item, bytes]]:
    for first in range(0, len(job.items), _DRAW_BATCH):
        items = job.items[first : first + _DRAW_BATCH]
        images, _ = draw(job.seed, np.array([item.index for item in items]), job.encoding.resolution)
        for item, image in zip(items, images, strict=True):
            yield item, encode_image(image, job.encoding)


def _images_of_folder(job: ShardJob, bad: list[dict[str, str]]) -> Iterator[tuple[Item, bytes]]:
    for item in job.items:
        path = os.path.join(job.folder, item.path)
        try:
            if item.index >= 0:
                picture = read_pictures(Path(path)).picture(item.index)
                yield item, encode_image(centred(picture, job.encoding, job.max_pixels), job.encoding)
            else:
                yield item, store_image(read_image_file(path, job.max_pixels), job.encoding, job.max_pixels)
        except (ValueError, OSError) as error:
            made_progress()
            bad.append({"file": path, "error": str(error)})


def store_image(data: bytes, encoding: Encoding, max_pixels: int = MAX_PIXELS) -> bytes:
    """The stored form of an image file: its own bytes if they fit, else decoded, resized, cropped and encoded.

    Raises DecodeError (a ValueError) for bytes that do not decode, even if they would be stored as they are, and for
    more than `max_pixels`, also on the way to the crop.
    """
    image = decode_image(data, max_pixels)
    header = read_header(data, max_pixels)
    fits = tuple(image.shape[-2:]) == (encoding.resolution, encoding.resolution)
    if fits and header.plain and header.format == encoding.format:
        return data
    return encode_image(_resized(image, encoding, max_pixels), encoding)


def _resized(image: UInt8[Tensor, "3 h w"], encoding: Encoding, max_pixels: int) -> UInt8[np.ndarray, "3 r r"]:
    if encoding.resize == "adm":
        return adm_center_crop(image, encoding.resolution, max_pixels).numpy()
    return resize_center_crop(image, encoding.resolution).numpy()


def centred(
    image: UInt8[np.ndarray, "3 h w"], encoding: Encoding, max_pixels: int = MAX_PIXELS
) -> UInt8[np.ndarray, "3 r r"]:
    """A smaller picture in the middle of a black one, each pixel as it was; a larger one is resized and cropped."""
    resolution = encoding.resolution
    if max(image.shape[1:]) > resolution:
        return _resized(torch.from_numpy(image.copy()), encoding, max_pixels)
    out = np.zeros((3, resolution, resolution), np.uint8)
    top, left = ((resolution - size) // 2 for size in image.shape[1:])
    out[:, top : top + image.shape[1], left : left + image.shape[2]] = image
    return out


def encode_image(image: UInt8[np.ndarray, "3 h w"], encoding: Encoding) -> bytes:
    """The bytes of a PNG, or of a JPEG with full-resolution colour."""
    out = io.BytesIO()
    picture = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
    if encoding.format == "png":
        picture.save(out, "PNG", compress_level=6)
    else:
        picture.save(out, "JPEG", quality=encoding.quality, subsampling=0)
    return out.getvalue()
