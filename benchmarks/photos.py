"""Pictures with a photograph's entropy, made by arithmetic: smooth noise of all sizes, and shapes with sharp edges.

In: a folder, how many, which size.  Out: JPEG shards with our index, and the same files in class folders.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from vqscale.data.shards import Manifest, ShardWriter

CLASSES, FIELDS, QUALITY = 10, 8, 90
SLOPE = 1.15  # of the amplitude over frequency; photographs have about 1


@dataclass(frozen=True)
class Photos:
    """A data set of JPEGs on disk: `shards` (tars, indexes, dataset.json) and `files` (one folder per class)."""

    shards: Path
    files: Path
    count: int

    @property
    def tars(self) -> list[str]:
        return sorted(str(path) for path in self.shards.glob("*.tar"))

    @property
    def bytes(self) -> int:
        return sum(path.stat().st_size for path in self.files.rglob("*.jpg"))


def make_photos(folder: Path, count: int, width: int, height: int, per_shard: int) -> Photos:
    """Write `count` JPEGs of width × height in shards of `per_shard`, and once more as files."""
    made = Photos(folder / "shards", folder / "files", count)
    made.shards.mkdir(parents=True)
    for label in range(CLASSES):
        (made.files / f"{label:02d}").mkdir(parents=True)
    encoded, infos = enumerate(_jpegs(count, width, height)), []
    for shard in range(-(-count // per_shard)):
        with ShardWriter(made.shards / f"{shard:06d}.tar") as writer:
            for _, (number, data) in zip(range(min(per_shard, count - shard * per_shard)), encoded, strict=False):
                label = number % CLASSES
                writer.write(f"{number:06d}", {"jpg": data, "cls": str(label).encode()})
                (made.files / f"{label:02d}" / f"{number:06d}.jpg").write_bytes(data)
        infos.append(writer.info)
    names = [f"{label:02d}" for label in range(CLASSES)]
    Manifest.of("images", [info for info in infos if info], names, {"resolution": min(width, height)}).save(made.shards)
    return made


def _jpegs(count: int, width: int, height: int) -> Iterator[bytes]:
    rng = np.random.default_rng(0)
    fields = [_noise(rng, height, width) for _ in range(FIELDS)]
    for _ in range(count):
        out = io.BytesIO()
        Image.fromarray(_picture(rng, fields)).save(out, "JPEG", quality=QUALITY)
        yield out.getvalue()


def _noise(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """float32 [h, w, 3] of unit variance, its amplitude falling with frequency; colours differ less than brightness."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :])
    frequency[0, 0] = np.inf
    planes = [np.fft.irfft2(np.fft.rfft2(rng.normal(size=(height, width))) / frequency**SLOPE) for _ in range(4)]
    brightness, *colours = (plane / plane.std() for plane in planes)
    return np.stack([brightness + 0.3 * colour for colour in colours], axis=-1).astype(np.float32)


def _picture(rng: np.random.Generator, fields: list[np.ndarray]) -> np.ndarray:
    """uint8 [h, w, 3]: two fields, shifted and mixed, and a few ellipses."""
    height, width, _ = fields[0].shape
    mixed = np.zeros_like(fields[0])
    for _ in range(2):
        shift = rng.integers(height), rng.integers(width)
        mixed += np.roll(fields[rng.integers(len(fields))], shift, axis=(0, 1))
    picture = 120 + 32 * mixed
    y, x = np.ogrid[:height, :width]
    for _ in range(rng.integers(1, 5)):
        centre, radii = rng.uniform(0, 1, 2) * (height, width), rng.uniform(0.05, 0.3, 2) * (height, width)
        inside = ((y - centre[0]) / radii[0]) ** 2 + ((x - centre[1]) / radii[1]) ** 2 < 1
        picture[inside] = 0.5 * picture[inside] + 0.5 * rng.uniform(0, 255, 3)
    return picture.clip(0, 255).astype(np.uint8)
