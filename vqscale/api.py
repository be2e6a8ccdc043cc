"""The Python API: trained models on disk -> codes, images, samples.

In: paths of exported folders or of done runs.  Out: tensors.  Images are float [n, 3, R, R] in [-1, 1]; codes are one
int64 [n, h, w] per level, the top level first, in 0 … K - 1.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vqscale.config import level_names
from vqscale.data.images import decode_image, resize_center_crop, to_float
from vqscale.sources import load_vqvae
from vqscale.stages.sample import SampleConfig, check_options, chosen_classes, draw, load_chain

PerLevel = float | Mapping[str, float]  # one number for all levels, or one by level name


class VQVAE:
    """A trained VQ-VAE.

    resolution: R. num_codes: K. grids: (h, w) per level, top first. classes: names, in the order of labels; may be
    empty. fingerprint: of the weights, as data sets of codes state it.
    """

    def __init__(self, model: Any, classes: Sequence[str], fingerprint: str):
        self.model, self.classes, self.fingerprint = model, list(classes), fingerprint
        self.resolution: int = model.resolution
        self.num_codes: int = model.num_codes
        self.grids: list[tuple[int, int]] = model.grids

    @classmethod
    def from_pretrained(cls, path: str | Path, *, device: str = "cpu") -> "VQVAE":
        """From an exported folder, a done run of train_vqvae, or a folder that holds either beside its priors.

        Raises FileNotFoundError where there is none, ValueError for one that is unfinished or damaged.
        """
        source = load_vqvae(_inside(path, "vqvae"), device=device)
        return cls(source.model, source.description["classes"], source.fingerprint)

    @torch.inference_mode()
    def encode(self, images: Tensor) -> list[Tensor]:
        """Images, float [n, 3, R, R] in [-1, 1] or uint8 -> codes int64 [n, h, w] per level, top first.

        Raises ValueError for another size or range.
        """
        if images.dtype == torch.uint8:
            images = to_float(images)
        elif images.numel() and (most := float(images.abs().max())) > 1.01:
            raise ValueError(f"images reach {most:g}: floats must be in [-1, 1]; uint8 in [0, 255] is taken as well")
        return self.model.encode(images.to(self._device))

    @torch.inference_mode()
    def decode(self, codes: Sequence[Tensor]) -> Tensor:
        """Codes int [n, h, w] per level, top first -> images float [n, 3, R, R] in [-1, 1].

        Raises ValueError for other grids, or codes that are not in 0 … K - 1.
        """
        if [tuple(level.shape[1:]) for level in codes] != self.grids:
            raise ValueError(f"codes have grids {[tuple(level.shape[1:]) for level in codes]}, needed are {self.grids}")
        for level in codes:
            if level.numel() and not 0 <= int(level.min()) <= int(level.max()) < self.num_codes:
                raise ValueError(f"codes from {int(level.min())} to {int(level.max())}, but K = {self.num_codes}")
        return self.model.decode([level.to(self._device) for level in codes]).float().clamp(-1, 1)

    def load_images(self, paths: Sequence[str | Path]) -> Tensor:
        """Image files -> float [n, 3, R, R] in [-1, 1]: the central square, resized, as `vqscale pack` does it."""
        pixels = [resize_center_crop(decode_image(Path(path).read_bytes()), self.resolution) for path in paths]
        return to_float(torch.stack(pixels))

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device


def sample(
    path: str | Path,
    *,
    classes: Any = "all",
    samples_per_class: int = 1,
    seed: int = 0,
    temperature: PerLevel = 1.0,
    top_k: PerLevel = 0,
    top_p: PerLevel = 1.0,
    guidance: PerLevel = 0.0,
    batch: int = 32,
    device: str = "cpu",
) -> Tensor:
    """New images, float [n, 3, R, R] in [-1, 1], class by class in the order of `classes`.

    path: a folder with a VQ-VAE and a prior per level, exported (`vqvae`, `prior_top`, …) or an experiment's done runs
    (`train_vqvae`, `train_prior_top`, …). classes: "all", or names and indices. seed: the same seed gives the same
    images, those of `vqscale sample` with the same seed and batch. temperature, top_k, top_p, guidance: as there; one
    number, or one by level: {"top": 0.9}.

    Raises FileNotFoundError for a model that is not there, ValueError for models that do not belong together, an
    unknown class or an option out of range.
    """
    models: dict[str, Any] = {f"prior_{level}": str(_inside(path, f"prior_{level}")) for level in level_names(3)}
    config = SampleConfig(seed=seed, vqvae=str(_inside(path, "vqvae")), **models)
    chain = load_chain(config, torch.device(device))
    levels = chain.vqvae.model.level_names
    config = replace(
        config,
        temperature=_by_level(temperature, levels),
        top_k={level: int(value) for level, value in _by_level(top_k, levels).items()},
        top_p=_by_level(top_p, levels),
        guidance=_by_level(guidance, levels),
    )
    check_options(config, chain)
    chosen = chosen_classes(classes, chain.classes)
    labels = torch.tensor(chosen, dtype=torch.int64).repeat_interleave(samples_per_class).to(device)
    if not len(labels):
        raise ValueError(f"nothing to sample: {samples_per_class} samples of {len(chosen)} classes")
    ids = torch.arange(len(labels), device=device)
    drawn = [draw(config, chain, some, of) for some, of in zip(labels.split(batch), ids.split(batch), strict=True)]
    return to_float(torch.cat(drawn))


def _by_level(value: PerLevel, levels: Sequence[str]) -> dict[str, float]:
    return dict(value) if isinstance(value, Mapping) else {level: float(value) for level in levels}


def _inside(path: str | Path, model: str) -> Path:
    """Where a model lies: `path/vqvae` exported, `path/train_vqvae` as a run, else `path` itself."""
    inside = (Path(path) / model, Path(path) / f"train_{model}")
    if (Path(path) / "config.json").is_file():
        return Path(path)
    return next((folder for folder in inside if folder.is_dir()), inside[0] if model != "vqvae" else Path(path))
