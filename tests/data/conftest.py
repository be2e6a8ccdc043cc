"""Small data sets of drawn images and of codes."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from webdataset.tariterators import group_by_keys, tar_file_iterator

from vqscale.data.codes import pack_codes
from vqscale.data.drawn import CLASSES, draw
from vqscale.data.shards import Manifest, ShardWriter

SIZES = (7, 1, 13, 5, 11)  # uneven, odd, one of a single sample


@pytest.fixture(scope="session")
def read_as_webdataset() -> Callable[[Path], list[dict[str, Any]]]:
    """What webdataset makes of a tar (its own reader, on a file that we close)."""

    def read(path: Path) -> list[dict[str, Any]]:
        with open(path, "rb") as file:
            return list(group_by_keys({**member, "__url__": str(path)} for member in tar_file_iterator(file)))

    return read


def png(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(array).save(out, "PNG", compress_level=1)
    return out.getvalue()


@pytest.fixture(scope="session")
def make_images() -> Callable[[Path], Path]:
    """Writes a data set of 37 images of 12 pixels in 5 uneven shards."""

    def make(folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        infos, first = [], 0
        for shard, size in enumerate(SIZES):
            images, labels = draw(0, np.arange(first, first + size), 12)
            with ShardWriter(folder / f"{shard:06d}.tar") as writer:
                for i in range(size):
                    parts = {"png": png(images[i].transpose(1, 2, 0)), "cls": str(labels[i]).encode()}
                    writer.write(f"{CLASSES[labels[i]]}/{first + i:04d}", parts)
            infos.append(writer.info)
            first += size
        Manifest.of("images", infos, CLASSES).save(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def images(make_images: Callable[[Path], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of images that no test changes."""
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture
def own_images(make_images: Callable[[Path], Path], tmp_path: Path) -> Path:
    """The same for a test that damages it."""
    return make_images(tmp_path / "images")


@pytest.fixture(scope="session")
def codes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 samples of two levels with two views each; code = 100·sample + view (top), + 10 (bottom)."""
    folder = tmp_path_factory.mktemp("codes")
    infos = []
    for shard in range(2):
        with ShardWriter(folder / f"{shard:06d}.tar") as writer:
            for row in range(12):
                value = 100 * (12 * shard + row)
                top = np.stack([np.full((2, 2), value + view, np.uint16) for view in range(2)])
                bottom = np.stack([np.full((4, 4), value + 10 + view, np.uint16) for view in range(2)])
                writer.write(f"{shard}-{row}", {**pack_codes({"top": top, "bottom": bottom}), "cls": b"1"})
        infos.append(writer.info)
    extra = {"levels": {"top": [2, 2], "bottom": [4, 4]}, "views": 2, "num_codes": 4096}
    Manifest.of("codes", infos, ["a", "b"], extra=extra).save(folder)
    return folder
