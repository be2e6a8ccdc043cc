"""Feature statistics: streaming moments, the Fréchet distance, and both on disk without pickle.

In: features [n, F] with weights 0 or 1, on any number of ranks.  Out: `Gaussian`s and a `FeatureSet`; on disk
`<key>.safetensors`, the key being a sha256 of the facts that the set is true for (weights, preprocessing, data
fingerprint, n, split), read back only under the same facts. ADM's reference files are read too.
Shapes: n images, f features, s spatial features, c logits, h w pixels.
"""

import hashlib
import json
import math
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from jaxtyping import Float, Float32, Float64, Int, UInt8
from torch import Tensor

from vqscale.batch import as_float64
from vqscale.files import sha256_of, write_atomically


@dataclass(frozen=True)
class Gaussian:
    """Mean and unbiased covariance of n samples."""

    n: int
    mean: Float64[Tensor, "f"]
    covariance: Float64[Tensor, "f f"]


class Moments:
    """n, sum f and sum f f^T in float64. Ranks may add unequal numbers of samples; `reduce_` makes them one."""

    def __init__(self, width: int, device: torch.device | str = "cpu"):
        # One buffer, so that ranks are summed in one collective: [n, sum f, sum f f^T].
        self._buffer = as_float64(torch.zeros(1 + width + width * width, device=device))
        self.width = width

    def add(self, features: Float[Tensor, "b f"], weight: Float[Tensor, " b"] | None = None) -> None:
        """weight: 0 (padding) and 1; None = all 1."""
        kept = features if weight is None else features[weight > 0]
        kept = as_float64(kept).to(self._buffer.device)
        self._buffer[0] += len(kept)
        self._buffer[1 : 1 + self.width] += kept.sum(0)
        self._outer.addmm_(kept.T, kept)

    @property
    def _outer(self) -> Tensor:
        return self._buffer[1 + self.width :].view(self.width, self.width)

    @property
    def n(self) -> int:
        """Samples added so far."""
        return int(self._buffer[0].item())

    def reduce_(self, all_reduce: Callable[[Tensor], Tensor]) -> None:
        """Sum over ranks, once, after the last `add`."""
        all_reduce(self._buffer)

    def gaussian(self) -> Gaussian:
        """Mean and unbiased covariance. Raises ValueError below 2 samples."""
        n = self.n
        if n < 2:
            raise ValueError(f"moments of {n} images: a covariance needs at least 2")
        mean = self._buffer[1 : 1 + self.width] / n
        covariance = (self._outer - n * torch.outer(mean, mean)) / (n - 1)
        return Gaussian(n, mean.cpu(), ((covariance + covariance.T) / 2).cpu())


def moments_of(features: Float[Tensor, "n f"]) -> Gaussian:
    """The Gaussian of features in memory."""
    moments = Moments(features.shape[1])
    moments.add(features)
    return moments.gaussian()


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|mean_a - mean_b|^2 + tr(A) + tr(B) - 2 tr((A B)^(1/2)) (Heusel et al. 2017, eq. 6), in float64.

    With factors A = F F^T and B = G G^T the last trace is the sum of the singular values of F^T G: the eigenvalues of
    A B are their squares, and no matrix root is taken of a product that isn't symmetric. Below zero only by rounding,
    then 0.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features of different widths: {len(a.mean)} and {len(b.mean)}")
    shift = (a.mean - b.mean).square().sum()
    cross = torch.linalg.svdvals(_factor(a.covariance).T @ _factor(b.covariance)).sum()
    return max(0.0, float(shift + a.covariance.trace() + b.covariance.trace() - 2 * cross))


def transport_roots(
    a: Float64[Tensor, "f f"], b: Float64[Tensor, "f f"]
) -> tuple[Float64[Tensor, "f r"], Float64[Tensor, "f r"]]:
    """(R, Q) with R R^T the optimal map from covariance a to b, and Q Q^T the one back, on the directions that vary.

    With a = F F^T, b = G G^T and F^T G = U S V^T the maps are F+^T U S U^T F+ and G+^T V S V^T G+.
    """
    left, right = _factor(a), _factor(b)
    u, s, v = torch.linalg.svd(left.T @ right, full_matrices=False)
    return left / left.square().sum(0) @ (u * s.sqrt()), right / right.square().sum(0) @ (v.T * s.sqrt())


def _factor(covariance: Float[Tensor, "f f"]) -> Float[Tensor, "f r"]:
    """F with F F^T = covariance; directions without variance are left out."""
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > values[-1].clamp_min(0) * len(values) * torch.finfo(torch.float64).eps
    return vectors[:, kept] * values[kept].sqrt()


@dataclass(frozen=True)
class FeatureSet:
    """What the metrics need to know of n images.

    gaussians: of the `pooled` features and, where there are such, the `spatial` ones; none below 2 images. features,
    logits: of the first m <= n images in stored order, on the CPU.
    """

    n: int
    gaussians: dict[str, Gaussian]
    features: Float32[Tensor, "m f"]
    logits: Float32[Tensor, "m c"]

    def subset(self, rows: Int[Tensor, " k"]) -> "FeatureSet":
        """These rows alone, without spatial features."""
        features = self.features[rows]
        gaussians = {"pooled": moments_of(features)} if len(rows) > 1 else {}
        return FeatureSet(len(rows), gaussians, features, self.logits[rows])


# --- on disk ---------------------------------------------------------------------------------------------------------


def key_of_facts(facts: Mapping[str, Any]) -> str:
    """sha256 of the facts, hexadecimal."""
    return hashlib.sha256(json.dumps(dict(facts), sort_keys=True).encode()).hexdigest()


def statistics_path(folder: Path, facts: Mapping[str, Any]) -> Path:
    """Where the statistics for these facts are cached."""
    return folder / f"{key_of_facts(facts)[:24]}.safetensors"


class DamagedFile(ValueError):
    """A file of tensors is not as it was written; what it holds can be computed again."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor], **about: Any) -> None:
    """Write tensors of the CPU, and what is true of them, atomically and with a checksum of both."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    text = json.dumps({**about, "checksum": _checksum(contiguous, about)}, sort_keys=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, safetensors.torch.save(contiguous, {"statistics": text}))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_tensors` wrote. Raises DamagedFile where the file is damaged or was edited, OSError without one."""
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            about = dict(json.loads((file.metadata() or {})["statistics"]))
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        checksum = about.pop("checksum")
    except (safetensors.SafetensorError, KeyError, ValueError, TypeError) as error:
        raise DamagedFile(f"{path}: not a file of feature statistics ({error})") from None
    if checksum != _checksum(tensors, about):
        raise DamagedFile(f"{path}: was damaged or edited, its checksum is not the one written in it")
    return tensors, about


def _checksum(tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(dict(about), sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_statistics(path: Path, statistics: FeatureSet, facts: Mapping[str, Any]) -> None:
    """Write atomically."""
    tensors = {"features": statistics.features, "logits": statistics.logits}
    for name, gaussian in statistics.gaussians.items():
        tensors |= {f"{name}.mean": gaussian.mean, f"{name}.covariance": gaussian.covariance}
    write_tensors(path, tensors, key=key_of_facts(facts), n=statistics.n, facts=dict(facts))


def load_statistics(path: Path, facts: Mapping[str, Any]) -> FeatureSet:
    """Read statistics back. Raises DamagedFile, and ValueError when they are true for other facts (naming one)."""
    tensors, about = read_tensors(path)
    if about["key"] != key_of_facts(facts):
        have = about["facts"]
        name = next((name for name in facts if have.get(name) != facts[name]), "key")
        raise ValueError(f"{path}: statistics of other images: {name} is {have.get(name)}, expected {facts.get(name)}")
    n, names = int(about["n"]), [name.removesuffix(".mean") for name in tensors if name.endswith(".mean")]
    gaussians = {name: Gaussian(n, tensors[f"{name}.mean"], tensors[f"{name}.covariance"]) for name in names}
    return FeatureSet(n, gaussians, tensors["features"], tensors["logits"])


_ARRAYS = ("mu", "sigma", "mu_s", "sigma_s", "arr_0")
_MOST_BYTES = 16 << 30  # of a reference file's arrays; 10,000 images of 512 px are 7.9 GB
_FREE_BYTES, _MOST_EXPANSION = 256 << 20, 20  # above so many bytes, an array may be so many times its compressed size


@dataclass(frozen=True)
class PublishedReference:
    """ADM's npz, `name` as the user gave it: moments of a whole set and, where it has them, some of its images."""

    name: str
    fingerprint: str
    gaussians: dict[str, Gaussian]  # pooled and, where the file has them, spatial
    images: UInt8[Tensor, "m 3 h w"] | None

    def describe(self) -> str:
        """In one phrase, as a data set does it."""
        return self.name


def read_published(path: str | Path) -> PublishedReference:
    """Read ADM's reference file (Dhariwal and Nichol 2021): mu, sigma, mu_s, sigma_s, arr_0.

    Raises FileNotFoundError, or ValueError for a file that is not one; nothing in it can run, and its size is known
    before it is read.
    """
    where = f"reference={path}"
    if not Path(path).is_file():
        raise FileNotFoundError(f"{where}: there is no such file")
    try:
        with zipfile.ZipFile(path) as archive:
            _check_sizes(archive)
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in _ARRAYS if name in file}
    except (ValueError, OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{where}: not an .npz of plain arrays ({error})") from None
    if "mu" not in arrays or "sigma" not in arrays:
        raise ValueError(f"{where}: has no mu and sigma, only {', '.join(arrays) or 'unknown arrays'}")
    gaussians = {"pooled": _gaussian(arrays, "mu", "sigma", where)}
    if {"mu_s", "sigma_s"} <= arrays.keys():
        gaussians["spatial"] = _gaussian(arrays, "mu_s", "sigma_s", where)
    return PublishedReference(str(path), f"sha256:{sha256_of(Path(path))}", gaussians, _images(arrays, where))


def _check_sizes(archive: zipfile.ZipFile) -> None:
    """From the headers alone. Raises ValueError for arrays larger than they may be, or than their bytes."""
    members = [info for info in archive.infolist() if info.filename.removesuffix(".npy") in _ARRAYS]
    if (total := sum(info.file_size for info in members)) > _MOST_BYTES:
        raise ValueError(f"arrays of {total:,} bytes, at most {_MOST_BYTES:,} are read")
    for info in members:
        if info.file_size > _FREE_BYTES + _MOST_EXPANSION * info.compress_size:
            raise ValueError(f"{info.filename}: {info.compress_size:,} bytes that expand to {info.file_size:,}")
        with archive.open(info) as file:
            readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            version = np.lib.format.read_magic(file)
            if version not in readers:
                raise ValueError(f"{info.filename}: array format {version}")
            shape, _, dtype = readers[version](file)
        if dtype.hasobject:
            raise ValueError(f"{info.filename}: holds pickled objects")
        if (size := math.prod(shape) * dtype.itemsize) > info.file_size:
            raise ValueError(f"{info.filename}: an array of {size:,} bytes in {info.file_size:,}")


def _images(arrays: Mapping[str, np.ndarray], where: str) -> UInt8[Tensor, "m 3 h w"] | None:
    if "arr_0" not in arrays:
        return None
    images = arrays["arr_0"]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"{where}: arr_0 is {images.dtype} {list(images.shape)}, expected uint8 [m, h, w, 3]")
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous() if len(images) else None


def _gaussian(arrays: Mapping[str, np.ndarray], mean: str, covariance: str, where: str) -> Gaussian:
    mu, sigma = arrays[mean], arrays[covariance]
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise ValueError(f"{where}: {mean} {list(mu.shape)} and {covariance} {list(sigma.shape)} do not fit")
    for name, values in ((mean, mu), (covariance, sigma)):
        if values.dtype.kind not in "fiu" or not np.isfinite(values).all():
            raise ValueError(f"{where}: {name} holds values that are no finite numbers")
    # The file does not say how many images its moments are of.
    return Gaussian(0, torch.from_numpy(mu.astype(np.float64)), torch.from_numpy(sigma.astype(np.float64)))
