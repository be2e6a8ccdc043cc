"""What an evaluation stands on: paths -> data sets and models that belong together, and why others are missing.

In: the paths of a config.  Out: `Inputs`, or one line saying which two of them do not fit.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vqscale.data.shards import Manifest, resolve
from vqscale.evaluation.classify import ImageClassifier
from vqscale.evaluation.scores import describe_set
from vqscale.evaluation.statistics import PublishedReference, read_published
from vqscale.sources import Source, load_prior, load_vqvae

LEVELS = ("top", "middle", "bottom")
LEARNED_FROM = {"samples": "samples", "reconstructions": "reconstructions", "real": "images"}  # by classifier_<key>
CLASSIFIERS = tuple(f"classifier_{name}" for name in LEARNED_FROM)
INPUT_KEYS = (
    "samples",
    "reference",
    "training",
    "vqvae",
    "codes",
    *(f"prior_{level}" for level in LEVELS),
    *CLASSIFIERS,
)


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
    training: DataSet | None = None
    vqvae: Source | None = None
    codes: DataSet | None = None
    train_codes: DataSet | None = None
    priors: dict[str, Source] = field(default_factory=dict)
    classifiers: dict[str, ImageClassifier] = field(default_factory=dict)  # by what they learned from
    absent: dict[str, str] = field(default_factory=dict)

    def identity(self) -> dict[str, str]:
        """What the result depends on besides the config: fingerprints by input."""
        data = {"samples": self.samples, "reference": self.reference, "training": self.training, "codes": self.codes}
        models = {"vqvae": self.vqvae, **{f"prior_{level}": prior for level, prior in self.priors.items()}}
        models |= {f"classifier_{name}": classifier.source for name, classifier in self.classifiers.items()}
        found = {name: one.manifest.fingerprint for name, one in data.items() if isinstance(one, DataSet)}
        return found | {name: one.fingerprint for name, one in models.items() if one is not None}

    def sources(self) -> list[Source]:
        """The models, the VQ-VAE first."""
        classifiers = (classifier.source for classifier in self.classifiers.values())
        return [source for source in (self.vqvae, *self.priors.values(), *classifiers) if source is not None]

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
    training_images: int = 0,
    nll_images: int = 0,
    weights: Mapping[str, str] | None = None,
) -> Inputs:
    """Everything that is there, by INPUT_KEYS; the path `none` leaves an input out. `weights`: extractor -> path.

    Raises ValueError for an input that is broken or unfinished, and if inputs do not belong together.
    """
    found = Inputs()
    found.samples = _data_set(paths, "samples", "sample", found)
    if paths["reference"].endswith(".npz"):
        found.reference = read_published(Path(paths["reference"]))
    else:
        found.reference = _data_set(paths, "reference", "pack", found, limit=reference_images)
    found.training = _data_set(paths, "training", "pack", found, split="train", limit=training_images)
    found.codes = _data_set(paths, "codes", "extract_codes", found, limit=nll_images)
    if found.codes is not None:
        found.train_codes = _data_set(paths, "codes", "extract_codes", found, split="train")
    for key in (key for key in INPUT_KEYS if key == "vqvae" or key.startswith(("prior_", "classifier_"))):
        try:
            if key in CLASSIFIERS and paths[key] != "none":
                found.classifiers[key.removeprefix("classifier_")] = ImageClassifier.load(paths[key], device, weights)
            else:
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
    for key in ("samples", "reference", "training"):
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
    if isinstance(found.reference, DataSet):
        if found.reference.manifest.kind == "samples":
            raise ValueError(
                f"reference={paths['reference']}: these are samples; are samples= and reference= the wrong way round?"
            )
        for name, classifier in found.classifiers.items():
            _check_classifier(paths, name, classifier.source.description, found, found.reference)


def _check_classifier(
    paths: Mapping[str, str], name: str, about: Mapping[str, Any], found: Inputs, reference: DataSet
) -> None:
    """A classifier must have learned from what its key says, from this evaluation's inputs, and not from the test."""
    key = f"classifier_{name}"
    where = f"{key}={paths[key]}"
    if about["learned_from"] != LEARNED_FROM[name]:
        raise ValueError(f"{where}: learned from {about['learned_from']}, expected {LEARNED_FROM[name]}")
    if about["classes"] != list(reference.manifest.classes):
        theirs = f"{len(about['classes'])} classes, reference={paths['reference']} {len(reference.manifest.classes)}"
        raise ValueError(f"{where}: has other classes than the reference ({theirs})")
    if reference.resolution not in (None, about["resolution"]):
        raise ValueError(f"{where}: takes images of {about['resolution']} px, the reference has {reference.resolution}")
    if about["data"] == reference.manifest.fingerprint:
        raise ValueError(f"{where}: learned from the very images it would be tested on, reference={paths['reference']}")
    belongs = {
        "samples": ("data", "samples", found.samples.manifest.fingerprint if found.samples else None),
        "reconstructions": ("vqvae", "vqvae", found.vqvae.fingerprint if found.vqvae else None),
    }
    field_name, other, expected = belongs.get(name, ("", "", None))
    if expected is not None and about[field_name] != expected:
        raise ValueError(
            f"{where}: learned from {other} {about[field_name]}, but {other}={paths[other]} is {expected}; "
            f"train it again or leave it out with {key}=none"
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
