"""Feature statistics on disk, without pickle: a cache of our own, and ADM's reference files.

In: a FeatureSet and the facts that it is true for.  Out: `<key>.safetensors`, the key being a sha256 of those facts
(weights, preprocessing, data fingerprint, n, split); read back only under the same facts.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from vqscale.evaluation.moments import Gaussian
from vqscale.files import write_atomically


@dataclass(frozen=True)
class FeatureSet:
    """What the metrics need to know of n images.

    gaussian, spatial: None below 2 images or where there are no such features. features: float32 [m, F] and logits
    [m, C] of the first m <= n images in stored order, on the CPU.
    """

    n: int
    gaussian: Gaussian | None
    spatial: Gaussian | None
    features: Tensor
    logits: Tensor


def key_of_facts(facts: Mapping[str, Any]) -> str:
    """sha256 of the facts, hexadecimal."""
    return hashlib.sha256(json.dumps(dict(facts), sort_keys=True).encode()).hexdigest()


def statistics_path(folder: Path, facts: Mapping[str, Any]) -> Path:
    """Where the statistics for these facts are cached."""
    return folder / f"{key_of_facts(facts)[:24]}.safetensors"


def save_statistics(path: Path, found: FeatureSet, facts: Mapping[str, Any]) -> None:
    """Write atomically."""
    tensors = {"features": found.features.contiguous(), "logits": found.logits.contiguous()}
    for name, gaussian in (("pooled", found.gaussian), ("spatial", found.spatial)):
        if gaussian is not None:
            tensors[f"{name}.mean"] = gaussian.mean.contiguous()
            tensors[f"{name}.covariance"] = gaussian.covariance.contiguous()
    about = json.dumps({"key": key_of_facts(facts), "n": found.n, "facts": dict(facts)}, sort_keys=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, safetensors.torch.save(tensors, {"statistics": about}))


def load_statistics(path: Path, facts: Mapping[str, Any]) -> FeatureSet:
    """Read statistics back. Raises ValueError when the file is damaged or true for other facts (naming one)."""
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            about = json.loads((file.metadata() or {})["statistics"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (safetensors.SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a file of feature statistics ({error})") from None
    if about["key"] != key_of_facts(facts):
        have = about["facts"]
        name = next((name for name in facts if have.get(name) != facts[name]), "key")
        raise ValueError(f"{path}: statistics of other images: {name} is {have.get(name)}, expected {facts.get(name)}")
    n = int(about["n"])

    def gaussian(name: str) -> Gaussian | None:
        if f"{name}.mean" not in tensors:
            return None
        return Gaussian(n, tensors[f"{name}.mean"], tensors[f"{name}.covariance"])

    return FeatureSet(n, gaussian("pooled"), gaussian("spatial"), tensors["features"], tensors["logits"])


@dataclass(frozen=True)
class PublishedReference:
    """ADM's npz: moments of a whole set and a part of its images, uint8 [m, 3, h, w] (None where it has none)."""

    gaussian: Gaussian
    spatial: Gaussian | None
    images: Tensor | None


def read_published(path: Path) -> PublishedReference:
    """Read ADM's reference file (Dhariwal and Nichol 2021): mu, sigma, mu_s, sigma_s, arr_0.

    Raises FileNotFoundError, or ValueError for a file that is not one; nothing in it can run.
    """
    if not path.is_file():
        raise FileNotFoundError(f"reference={path}: there is no such file")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ("mu", "sigma", "mu_s", "sigma_s", "arr_0") if name in file}
    except (ValueError, OSError, BadZipFile, EOFError) as error:
        raise ValueError(f"reference={path}: not an .npz of plain arrays ({error})") from None
    if "mu" not in arrays or "sigma" not in arrays:
        raise ValueError(f"reference={path}: has no mu and sigma, only {', '.join(arrays) or 'unknown arrays'}")
    images = None
    if "arr_0" in arrays:
        images = torch.from_numpy(arrays["arr_0"]).permute(0, 3, 1, 2).contiguous()
    spatial = _gaussian(arrays, "mu_s", "sigma_s", path) if "mu_s" in arrays else None
    return PublishedReference(_gaussian(arrays, "mu", "sigma", path), spatial, images)


def _gaussian(arrays: Mapping[str, np.ndarray], mean: str, covariance: str, path: Path) -> Gaussian:
    mu, sigma = arrays[mean], arrays[covariance]
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise ValueError(f"reference={path}: {mean} {list(mu.shape)} and {covariance} {list(sigma.shape)} do not fit")
    # The file does not say how many images its moments are of.
    return Gaussian(0, torch.from_numpy(mu.astype(np.float64)), torch.from_numpy(sigma.astype(np.float64)))
