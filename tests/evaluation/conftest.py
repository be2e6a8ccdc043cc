"""A small finished pipeline on disk: images, a VQ-VAE, codes, priors and samples, none of them trained."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from support.extractors import SIDE, projection
from torch import Tensor, nn

from vqscale.config import as_dict
from vqscale.data.codes import pack_codes
from vqscale.data.images import to_float
from vqscale.data.shards import Manifest, ShardWriter
from vqscale.evaluation.features import Extractor
from vqscale.evaluation.figures import png_bytes
from vqscale.models.init import initialise
from vqscale.models.pixelcnn import PixelCNN
from vqscale.models.pretrained import save_pretrained
from vqscale.models.prior import PriorConfig
from vqscale.models.quantizer import QuantizerConfig
from vqscale.models.vqvae import VQVAE, VQVAEConfig

CLASSES = ["disc", "stripes", "plain"]


def draw(count: int, seed: int, label: int | None = None) -> tuple[Tensor, list[int]]:
    """Images uint8 [n, 3, 16, 16] of three classes in turn, and their labels."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:SIDE, :SIDE]
    images, labels = [], []
    for n in range(count):
        kind = n % 3 if label is None else label
        fore, back = rng.integers(0, 256, (2, 3, 1, 1))
        mask = [(x - 8) ** 2 + (y - 8) ** 2 < 25, (x // 2) % 2 == 0, np.zeros_like(x, bool)][kind]
        images.append(np.where(mask, fore, back).astype(np.uint8))
        labels.append(kind)
    return torch.from_numpy(np.stack(images)), labels


def write_images(
    folder: Path, images: Tensor, labels: list[int], kind: str = "images", per_shard: int = 10
) -> Manifest:
    """A data set of PNGs."""
    folder.mkdir(parents=True)
    shards = []
    for number, first in enumerate(range(0, len(images), per_shard)):
        with ShardWriter(folder / f"{number:06d}.tar") as writer:
            for n in range(first, min(first + per_shard, len(images))):
                png = png_bytes(images[n])
                writer.write(f"{n:06d}", {"png": png, "cls": str(labels[n]).encode()})
        assert writer.info is not None
        shards.append(writer.info)
    manifest = Manifest.of(kind, shards, CLASSES, {"resolution": images.shape[-1], "format": "png"})
    manifest.save(folder)
    return manifest


@pytest.fixture(name="write_images")
def _write_images() -> Callable[..., Manifest]:
    return write_images


@dataclass(frozen=True)
class World:
    """Paths of the pipeline's parts. `tokenizer`: the VQ-VAE's fingerprint."""

    root: Path
    tokenizer: str
    train: Tensor
    holdout: Tensor
    samples: Tensor

    def overrides(self, **changes: object) -> list[str]:
        """The words of `vqscale evaluate` that name the parts."""
        names = ("samples", "vqvae", "codes", "prior_top", "prior_bottom")
        words = {name: str(self.root / name) for name in names} | {"reference": str(self.root / "pack")}
        words |= {"prior_middle": "none", "device": "cpu", "threads": "1", "workers": "0", "batch": "8"}
        return [f"{key}={value}" for key, value in (words | changes).items()]


def _encode(model: VQVAE, images: Tensor) -> list[Tensor]:
    with torch.inference_mode():
        return model.encode(to_float(images))


def _write_codes(folder: Path, model: VQVAE, images: Tensor, labels: list[int], tokenizer: str) -> None:
    folder.mkdir(parents=True)
    codes = dict(zip(model.level_names, _encode(model, images), strict=True))
    with ShardWriter(folder / "000000.tar") as writer:
        for n, label in enumerate(labels):
            parts = pack_codes({name: level[n][None].numpy().astype(np.uint16) for name, level in codes.items()})
            writer.write(f"{n:06d}", parts | {"cls": str(label).encode()})
    assert writer.info is not None
    usage = {name: torch.bincount(level.flatten(), minlength=model.num_codes).tolist() for name, level in codes.items()}
    extra = {
        "tokenizer": tokenizer,
        "num_codes": model.num_codes,
        "levels": {name: list(grid) for name, grid in zip(model.level_names, model.grids, strict=True)},
        "views": 1,
        "resolution": SIDE,
        "usage": usage,
    }
    Manifest.of("codes", [writer.info], CLASSES, {}, extra).save(folder)


def _save_prior(folder: Path, model: VQVAE, level: str, tokenizer: str) -> None:
    config = PriorConfig(hidden=16, residual=16, layers=2, filter=3, conditioning_layers=1, class_dim=8)
    grids = dict(zip(model.level_names, model.grids, strict=True))
    upper = [] if level == "top" else [grids["top"]]
    prior = PixelCNN(config, num_codes=model.num_codes, grid=grids[level], num_classes=len(CLASSES), upper_grids=upper)
    initialise(prior, 5)
    generator = torch.Generator().manual_seed(0)
    for parameter in prior.parameters():  # nothing at 0, as an untrained prior has it, so that conditioning shows
        nn.init.normal_(parameter, std=0.3, generator=generator)
    facts = {"level": level, "num_codes": model.num_codes, "grid": list(grids[level]), "upper_grids": upper}
    extra = facts | {"classes": CLASSES, "tokenizer": tokenizer, "data": "sha256:0"}
    save_pretrained(folder, prior, kind="prior", config=as_dict(config), extra=extra)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Made once; tests must not change it."""
    root = tmp_path_factory.mktemp("world")
    train, train_labels = draw(40, 1)
    holdout, holdout_labels = draw(26, 2)
    samples, sample_labels = draw(21, 3)
    write_images(root / "pack" / "train", train, train_labels)
    write_images(root / "pack" / "holdout", holdout, holdout_labels)
    write_images(root / "samples", samples, sample_labels, "samples")
    write_images(root / "larger", torch.zeros(3, 3, 24, 24, dtype=torch.uint8), [0, 1, 2], "samples")
    config = VQVAEConfig(
        hidden=8, residual_hidden=4, residual_layers=1, downsample=[2, 2], quantizer=QuantizerConfig(16, 4)
    )
    model = VQVAE(config, resolution=SIDE)
    initialise(model, 0)
    model.init_codebooks([to_float(train)], seed=0)
    model.eval()
    extra = {"resolution": SIDE, "classes": CLASSES, "data": "sha256:0"}
    tokenizer = save_pretrained(root / "vqvae", model, kind="vqvae", config=as_dict(config), extra=extra)
    _write_codes(root / "codes" / "train", model, train, train_labels, tokenizer)
    _write_codes(root / "codes" / "holdout", model, holdout, holdout_labels, tokenizer)
    for level in model.level_names:
        _save_prior(root / f"prior_{level}", model, level, tokenizer)
    return World(root, tokenizer, train, holdout, samples)


@pytest.fixture
def quick() -> Extractor:
    """An extractor that costs nothing, under Inception's name."""
    return projection("inception")
