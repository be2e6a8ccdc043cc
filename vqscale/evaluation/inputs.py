"""What an evaluation stands on: paths -> data sets and models that belong together, and why others are missing.

In: the paths of a config.  Out: `Inputs`, or one line saying which two of them do not fit.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from vqscale.data.shards import Manifest, resolve
from vqscale.evaluation.scores import describe_set
from vqscale.evaluation.statistics import PublishedReference, read_published
from vqscale.sources import Source, load_prior, load_vqvae

LEVELS = ("top", "middle", "bottom")
INPUT_KEYS = ("samples", "reference", "vqvae", "codes", *(f"prior_{level}" for level in LEVELS))


@dataclass(frozen=True)
class DataSet:
    """A data set as an input: `name` as the user gave it, the folder of the part that is used, how many of it."""

    name: str
    folder: Path
    manifest: Manifest
    limit: int = 0  # the first so many; 0 = all

    @property
    def n(self) -> int:
        return min(self.limit or self.manifest.num_samples, self.manifest.num_samples)

    @property
    def resolution(self) -> int | None:
        """Pixels per side, None where the data set does not say."""
        return self.manifest.transform.get("resolution")

    def describe(self) -> str:
        return describe_set(self.manifest, str(self.folder), self.n)


@dataclass
class Inputs:
    """What was found. `absent`: by config key, why an input is missing."""

    samples: DataSet | None = None
    reference: DataSet | PublishedReference | None = None
    vqvae: Source | None = None
    codes: DataSet | None = None
    train_codes: DataSet | None = None
    priors: dict[str, Source] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)

    def identity(self) -> dict[str, str]:
        """What the result depends on besides the config: fingerprints by input."""
        data = {"samples": self.samples, "reference": self.reference, "codes": self.codes}
        models = {"vqvae": self.vqvae, **{f"prior_{level}": prior for level, prior in self.priors.items()}}
        found = {name: one.manifest.fingerprint for name, one in data.items() if isinstance(one, DataSet)}
        return found | {name: one.fingerprint for name, one in models.items() if one is not None}

    def sources(self) -> list[Source]:
        """The models, the VQ-VAE first."""
        return [source for source in (self.vqvae, *self.priors.values()) if source is not None]

    def resolution_of(self, data: DataSet) -> int:
        """Size at which images are read: the data set's own or, where it does not say, the model's."""
        if data.resolution is not None:
            return data.resolution
        if self.vqvae is None:
            raise ValueError(f"{data.name}: it does not say the size of its images, and there is no vqvae= to tell it")
        return self.vqvae.description["resolution"]


def find_inputs(
    paths: Mapping[str, str],
    *,
    device: torch.device,
    weights_kind: str = "",
    checkpoint: int = 0,
    reference_images: int = 0,
    nll_images: int = 0,
) -> Inputs:
    """Everything that is there, by INPUT_KEYS; the path `none` leaves an input out.

    Raises ValueError for an input that is broken or unfinished, and if inputs do not belong together.
    """
    found = Inputs()
    found.samples = _data_set(paths, "samples", "sample", found)
    if paths["reference"].endswith(".npz"):
        found.reference = read_published(Path(paths["reference"]))
    else:
        found.reference = _data_set(paths, "reference", "pack", found, limit=reference_images)
    found.codes = _data_set(paths, "codes", "extract_codes", found, limit=nll_images)
    if found.codes is not None:
        found.train_codes = _data_set(paths, "codes", "extract_codes", found, split="train")
    for key in (key for key in INPUT_KEYS if key == "vqvae" or key.startswith("prior_")):
        try:
            _load_model(paths, key, device, weights_kind, checkpoint, found)
        except FileNotFoundError as error:
            found.absent[key] = f"{key}={paths[key]}: {error}" if paths[key] not in str(error) else f"{key}: {error}"
    _check(paths, found)
    return found


def _data_set(
    paths: Mapping[str, str], key: str, made_by: str, found: Inputs, *, split: str = "holdout", limit: int = 0
) -> DataSet | None:
    path = paths[key]
    if path == "none":
        found.absent[key] = f"{key}=none"
        return None
    try:
        folder = resolve(path, split, made_by=made_by)
    except FileNotFoundError as error:
        found.absent[key] = f"{key}: {error}"
        return None
    return DataSet(path, folder, Manifest.load(folder), limit)


def _load_model(
    paths: Mapping[str, str], key: str, device: torch.device, weights_kind: str, checkpoint: int, found: Inputs
) -> None:
    if paths[key] == "none":
        found.absent[key] = f"{key}=none"
    elif key == "vqvae":
        found.vqvae = load_vqvae(paths[key], device=device, weights_kind=weights_kind, checkpoint=checkpoint)
    else:
        found.priors[key.removeprefix("prior_")] = load_prior(paths[key], device=device, weights_kind=weights_kind)


def _check(paths: Mapping[str, str], found: Inputs) -> None:
    for key in ("samples", "reference"):
        data = getattr(found, key)
        if isinstance(data, DataSet) and data.manifest.kind == "codes":
            raise ValueError(f"{key}={data.name}: images are needed, this is a data set of codes")
    if found.codes is not None and found.codes.manifest.kind != "codes":
        raise ValueError(f"codes={paths['codes']}: code shards are needed, these are {found.codes.manifest.kind}")
    _check_tokenizers(paths, found)
    if isinstance(found.reference, DataSet) and found.samples is not None:
        mine, theirs = found.samples.resolution, found.reference.resolution
        if None not in (mine, theirs) and mine != theirs:
            raise ValueError(
                f"samples={paths['samples']}: images of {mine} px, but reference={paths['reference']} has {theirs} px"
            )


def _check_tokenizers(paths: Mapping[str, str], found: Inputs) -> None:
    """Codes and priors must be of the VQ-VAE, or without one of each other."""
    tokenizers = {"vqvae": found.vqvae.fingerprint} if found.vqvae else {}
    if found.codes is not None:
        tokenizers["codes"] = found.codes.manifest.extra["tokenizer"]
    for level, prior in found.priors.items():
        if prior.description["level"] != level:
            raise ValueError(
                f"prior_{level}={paths[f'prior_{level}']}: this is a prior of the {prior.description['level']} level"
            )
        tokenizers[f"prior_{level}"] = prior.description["tokenizer"]
    for key, tokenizer in tokenizers.items():
        first, expected = next(iter(tokenizers.items()))
        if tokenizer != expected:
            raise ValueError(
                f"{key}={paths[key]} belongs to the tokenizer {tokenizer}, but {first}={paths[first]} to {expected}"
            )
