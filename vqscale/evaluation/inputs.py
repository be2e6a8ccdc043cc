"""What an evaluation works on: its config, and the data sets and models that the config names.

In: `EvaluateConfig`.  Out: `Inputs` that belong together, with the reason for every one that is missing; or one line
that names the two inputs that do not fit.  Shapes: r pixels a side.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from vqscale.config import ReadsShards, level_names, run_of
from vqscale.data.cache import Cache
from vqscale.data.images import SUFFIXES, decode_image, preparation, resize_center_crop
from vqscale.data.parts import read_samples
from vqscale.data.shards import Manifest, resolve
from vqscale.evaluation.classify import ImageClassifier
from vqscale.evaluation.features import EXTRACTORS, NEED_A_PATH
from vqscale.evaluation.protocols import (
    ADM_REFERENCE,
    ADM_SHA256,
    IMAGENET_VALIDATION,
    PROTOCOLS,
    Facts,
    benchmark_of,
    differences,
    image_set_facts,
    merged,
    sample_facts,
    weights_fact,
)
from vqscale.evaluation.scores import METRICS
from vqscale.evaluation.statistics import PublishedReference, read_published
from vqscale.fields import Choice, NonNegativeInt, PathText, PositiveFraction, PositiveInt
from vqscale.files import sha256_of
from vqscale.runtime import log
from vqscale.sources import Source, load_model
from vqscale.topology import ALONE, Topology

LEARNED_FROM = {"samples": "samples", "reconstructions": "reconstructions", "real": "images"}  # by classifier_<key>
_MADE_OF = {"samples": ("data", "samples"), "reconstructions": ("vqvae", "vqvae")}  # its fact that is an input's
MOST_CODES = 65_536  # samples of codes, which are held in memory; ImageNet's validation set is 50,000
T = TypeVar("T")


@dataclass(frozen=True)
class EvaluateConfig(ReadsShards):
    """What to evaluate; an input that is absent, or `none`, leaves out the metrics that need it."""

    recomputes: ClassVar[bool] = True
    needs_float64: ClassVar[bool] = True
    outputs: ClassVar[tuple[str, ...]] = (
        *("scores.json", "report.html", "samples.png", "nll_by_class.json", "statistics", "bad.jsonl"),
    )
    batch_key: ClassVar[str] = "batch"
    samples: PathText = run_of("sample")  # sample shards, or any data set of images
    reference: PathText = run_of("pack")  # real images (the holdout part), or ADM's reference .npz
    training: PathText = run_of("pack")  # training images (the train part), for `neighbours`
    vqvae: PathText = run_of("train_vqvae")  # the VQ-VAE: a run or an exported folder
    codes: PathText = run_of("extract_codes")  # code shards of the VQ-VAE
    prior_top: PathText = run_of("train_prior_top")  # the prior of the top level
    prior_middle: PathText = run_of("train_prior_middle")  # the prior of the middle level
    prior_bottom: PathText = run_of("train_prior_bottom")  # the prior of the bottom level
    classifier_samples: PathText = run_of("train_classifier_samples")  # learned from samples, for CAS
    classifier_reconstructions: PathText = run_of("train_classifier_reconstructions")  # learned from reconstructions
    classifier_real: PathText = run_of("train_classifier_real")  # learned from real images, for CAS and rejection
    tuning: PathText = run_of("tune_sampling")  # a search for sampling options, whose curves the report shows
    metrics: list[str] = field(default_factory=list)  # keys of scores.json without the level; [] = all possible
    protocol: Annotated[str, Choice("", *PROTOCOLS)] = ""  # measure as these papers do, or refuse; "" = judge alone
    extractor: Annotated[str, Choice(*EXTRACTORS)] = "lite0"  # vgg16: for precision and recall as first published
    weights: PathText = ""  # path of the extractor's weights; needed for inception and vgg16
    vgg16_weights: PathText = ""  # path of torchvision's VGG16, for LPIPS
    allow_unverified_weights: bool = False  # use weights of unknown sha256, and mark every number
    weights_kind: Annotated[str, Choice("", "ema", "raw")] = ""  # "" = ema if there is one
    checkpoint: NonNegativeInt = 0  # of the VQ-VAE, in images seen; 0 = the last checkpoint of a finished run
    batch: PositiveInt = 64  # images at a time and rank
    workers: NonNegativeInt = 1  # loader processes per rank
    reference_images: NonNegativeInt = 0  # at most so many reference images; 0 = all
    neighbours: NonNegativeInt = 0  # show so many samples beside their nearest training images, those that are closest
    training_images: NonNegativeInt = 0  # look among the first so many training images; 0 = all, at most 50,000
    nll_images: NonNegativeInt = 0  # at most so many held-out code samples; 0 = all
    nll_train_images: NonNegativeInt = 0  # also the NLL of so many training samples
    shuffled_conditioning: bool = True  # also the NLL with shuffled classes and shuffled upper codes
    acceptance: list[PositiveFraction] = field(default_factory=lambda: [1.0, 0.7, 0.5, 0.3, 0.1, 0.05])  # of rejection
    kid_subset_size: PositiveInt = 1_000  # as in torch-fidelity
    num_reconstructions: NonNegativeInt = 12  # shown in the report and the picture
    samples_shown: NonNegativeInt = 10  # per class, in the report and the picture
    classes_shown: NonNegativeInt = 20  # at most so many classes there
    picture: PathText = ""  # also write the labelled grid here; "" = samples.png in the run directory


@dataclass(frozen=True)
class DataSet:
    """A data set as an input: `name` as the user gave it, the folder of the split that is used, how many of it, and
    where copies of remote shards are kept."""

    name: str
    folder: Path
    manifest: Manifest
    limit: int = 0  # the first so many; 0 = all
    cache: Cache = field(default_factory=Cache)

    @property
    def n(self) -> int:
        return min(self.limit or self.manifest.num_samples, self.manifest.num_samples)

    @property
    def resolution(self) -> int | None:
        """Pixels per side, None where the data set does not say."""
        return self.manifest.transform.get("resolution")

    @property
    def fingerprint(self) -> str:
        return self.manifest.fingerprint

    @property
    def split(self) -> str | None:
        """What images these are: ImageNet's validation set by its counts and names, else as recorded; None where
        unknown."""
        if self.n == 50_000 and benchmark_of(self.manifest.classes) == "ImageNet":
            shipped = {f"ILSVRC2012_val_{number:08d}" for number in range(1, 50_001)}
            if (np.bincount(self.labels(), minlength=1000) == 50).all() and self._names() == shipped:
                return IMAGENET_VALIDATION
        extra = self.manifest.extra
        return f"{extra['split']} of {extra.get('source', 'unknown')}" if "split" in extra else None

    def labels(self, shards: Sequence[int] | None = None) -> Int64[np.ndarray, " n"]:
        """Of all images of these shards (None: all shards) in stored order, whatever the limit."""
        shards = range(len(self.manifest.shards)) if shards is None else shards
        return np.concatenate([self.manifest.index(self.folder, shard).labels for shard in shards])

    def _names(self) -> set[str]:
        """Of its image files, without folders and suffixes."""
        shards = range(len(self.manifest.shards))
        keys = (key for shard in shards for key in self.manifest.index(self.folder, shard).keys)
        return {key.rpartition("/")[2] for key in keys}

    def describe(self) -> str:
        """In one phrase: where, what and how many."""
        return f"{self.folder}, {self.fingerprint[:19]}, {self.n} {self.manifest.kind}"

    def images_at(self, positions: Sequence[int], resolution: int) -> list[tuple[UInt8[Tensor, "3 r r"], str]]:
        """(image, class name) at each position in stored order. Raises ValueError for a damaged one."""
        return [
            (resize_center_crop(decode_image(next(iter(parts.values()))), resolution), self.manifest.classes[label])
            for _, label, parts in read_samples(self.folder, SUFFIXES, positions, self.cache)
        ]


def reference_facts(reference: DataSet | PublishedReference) -> Facts:
    """What protocols ask of a reference."""
    if isinstance(reference, DataSet):
        return image_set_facts(reference.n, reference.split, reference.manifest.transform)
    sha256, images = reference.fingerprint.removeprefix("sha256:"), reference.images
    is_adm = sha256 == ADM_SHA256
    return {
        "reference": ADM_REFERENCE if is_adm else f"a file of statistics (sha256 {sha256[:12]})",
        "reference images": 0 if images is None else len(images),
        "reference resolution": None if images is None else images.shape[-1],
        "preparation": "ADM's own" if is_adm else preparation({}),
    }


@dataclass(frozen=True)
class Inputs:
    """The inputs of one evaluation. Codes come with those of the training images, or not at all.

    absent: by config key, why an input is missing.
    """

    samples: DataSet | None = None
    reference: DataSet | PublishedReference | None = None
    training: DataSet | None = None
    vqvae: Source | None = None
    codes: DataSet | None = None
    train_codes: DataSet | None = None
    priors: dict[str, Source] = field(default_factory=dict)  # by level
    classifiers: dict[str, ImageClassifier] = field(default_factory=dict)  # by what they learned from
    weights: dict[str, str] = field(default_factory=dict)  # by config key, sha256: of weights, of tuning's result
    absent: dict[str, str] = field(default_factory=dict)

    @property
    def data_sets(self) -> dict[str, DataSet | PublishedReference]:
        """What there is of data, by config key; train_codes is the other part of codes."""
        keys = ("samples", "reference", "training", "codes", "train_codes")
        return {key: data for key in keys if (data := getattr(self, key)) is not None}

    @property
    def models(self) -> dict[str, Source]:
        """The models by config key, the VQ-VAE first."""
        models = {"vqvae": self.vqvae} if self.vqvae is not None else {}
        models |= {f"prior_{level}": prior for level, prior in self.priors.items()}
        return models | {f"classifier_{name}": classifier.source for name, classifier in self.classifiers.items()}

    def identity(self) -> dict[str, str]:
        """What the result depends on besides the config: fingerprints by input."""
        data = {key: one.fingerprint for key, one in self.data_sets.items()}
        return self.weights | data | {key: model.fingerprint for key, model in self.models.items()}

    def resolution_of(self, data: DataSet) -> int:
        """Size at which images are read: the data set's own or, where it does not say, the model's."""
        if data.resolution is not None:
            return data.resolution
        if self.vqvae is None:
            raise ValueError(f"{data.name}: it does not say the size of its images, and there is no vqvae= to tell it")
        return self.vqvae.description["resolution"]

    def why_no_images(self) -> str:
        """Why the reference cannot be read as images; "" if it can."""
        if isinstance(self.reference, DataSet):
            return ""
        return self.absent.get("reference", "reference= is a file of statistics, real images are needed")


def find_inputs(config: EvaluateConfig, device: torch.device, topology: Topology = ALONE) -> Inputs:
    """Everything that exists; the path `none` leaves an input out. Collective.

    Raises ValueError for an input that is broken or unfinished, and if inputs do not belong together.
    """
    absent: dict[str, str] = {}
    weights = {key: Path(getattr(config, key)) for key in ("weights", "vgg16_weights")}
    weights["tuning"] = Path(config.tuning) / "tuned.json"
    ranks: Any = {"device": device, "topology": topology}
    model = partial(load_model, weights_kind=config.weights_kind, **ranks)
    classifier = partial(ImageClassifier.load, weights={config.extractor: config.weights}, **ranks)

    def find(key: str, load: Callable[[str], T]) -> T | None:
        path = getattr(config, key)
        if path == "none":
            absent[key] = f"{key}=none"
            return None
        try:
            return load(path)
        except (FileNotFoundError, ValueError) as error:
            why = f"{key}: {error}" if path in str(error) else f"{key}={path}: {error}"
            if isinstance(error, ValueError):
                raise ValueError(why) from None
            absent[key] = why
            return None

    def data(key: str, made_by: str, split: str = "holdout", limit: int = 0) -> DataSet | None:
        def load(path: str) -> DataSet:
            folder = resolve(path, split, made_by=made_by)
            return DataSet(path, folder, Manifest.load(folder), limit, Cache.of(config))

        return find(key, load)

    def prior(name: str) -> Source | None:
        return find(name, partial(model, name=name))

    def codes(split: str, images: int) -> DataSet | None:
        return data("codes", "extract_codes", split, min(images or MOST_CODES, MOST_CODES))

    inputs = Inputs(
        samples=data("samples", "sample"),
        reference=read_published(config.reference)
        if config.reference.endswith(".npz")
        else data("reference", "pack", limit=config.reference_images),
        training=data("training", "pack", "train", config.training_images),
        train_codes=(train_codes := codes("train", config.nll_train_images)),
        codes=codes("holdout", config.nll_images) if train_codes else None,
        vqvae=find("vqvae", partial(model, name="vqvae", checkpoint=config.checkpoint)),
        priors=_present({level: prior(f"prior_{level}") for level in level_names(3)}),
        classifiers=_present({name: find(f"classifier_{name}", classifier) for name in LEARNED_FROM}),
        weights={key: f"sha256:{sha256_of(path)}" for key, path in weights.items() if path.is_file()},
        absent=absent,
    )
    _check(config, inputs)
    _check_protocol(config, inputs)
    _warn_of_overlap(config, inputs)
    return inputs


def _present(values: Mapping[str, T | None]) -> dict[str, T]:
    return {name: value for name, value in values.items() if value is not None}


# --- do they fit the protocol? ----------------------------------------------------------------------------------------


def follow_protocol(config: EvaluateConfig) -> EvaluateConfig:
    """The config with the metrics and the extractor of its protocol. Raises ValueError where it asks for others."""
    if not config.protocol:
        return config
    wants = PROTOCOLS[config.protocol].wants
    where = f"protocol={config.protocol}"
    if other := [metric for metric in config.metrics if metric not in wants]:
        raise ValueError(f"metrics=[{','.join(other)}]: {where} has {', '.join(wants)}")
    if config.extractor not in (EvaluateConfig.extractor, "inception"):
        raise ValueError(f"extractor={config.extractor}: {where} wants inception")
    return replace(config, metrics=config.metrics or list(wants), extractor="inception")


def _check_protocol(config: EvaluateConfig, inputs: Inputs) -> None:
    """Raises ValueError with all that does not fit the protocol which the config names."""
    if not config.protocol:
        return
    protocol, families = PROTOCOLS[config.protocol], {METRICS[metric].family for metric in config.metrics}
    needed = ["samples"] * ("samples" in families) + ["vqvae"] * ("reconstruction" in families) + ["reference"]
    reasons = [inputs.absent[key] for key in needed if key in inputs.absent]
    facts: Facts = {}
    if inputs.samples is not None:
        facts |= sample_facts(inputs.samples.n, inputs.samples.manifest.transform)
    if inputs.reference is not None:
        facts |= reference_facts(inputs.reference)
    if sha256 := inputs.weights.get("weights"):
        facts["extractor weights"] = weights_fact(sha256.removeprefix("sha256:"))
    else:
        reasons.append(f"weights={config.weights}: no file, {NEED_A_PATH['inception']} is needed")
    wants = merged(protocol, config.metrics)
    reasons += differences({name: want for name, want in wants.items() if name in facts}, facts)
    if reasons:
        raise ValueError(f"protocol={config.protocol} cannot be followed: {'; '.join(reasons)}")


# --- do they belong together? -----------------------------------------------------------------------------------------


def _check(config: EvaluateConfig, inputs: Inputs) -> None:
    for key, data in inputs.data_sets.items():
        if isinstance(data, DataSet):
            _check_kind(key.removeprefix("train_"), data)
    for level, prior in inputs.priors.items():
        _check_prior(config, level, prior.description, inputs.codes)
    _check_fresh(config, inputs)
    if isinstance(inputs.reference, DataSet):
        _check_reference(config, inputs, inputs.reference)
        for name, classifier in inputs.classifiers.items():
            _check_classifier(config, name, classifier.source.description, inputs, inputs.reference)


def _check_kind(key: str, data: DataSet) -> None:
    kind = data.manifest.kind
    if key == "codes" and kind != "codes":
        raise ValueError(f"codes={data.name}: code shards are needed, these are {kind}")
    if key != "codes" and kind == "codes":
        raise ValueError(f"{key}={data.name}: images are needed, this is a data set of codes")
    if not data.n:
        raise ValueError(f"{key}={data.name}: a data set without samples")


def _check_reference(config: EvaluateConfig, inputs: Inputs, reference: DataSet) -> None:
    ours, theirs = inputs.samples and inputs.samples.resolution, reference.resolution
    if None not in (ours, theirs) and ours != theirs:
        raise ValueError(
            f"samples={config.samples}: images of {ours} px, but reference={config.reference} has {theirs} px"
        )
    if reference.manifest.kind == "samples":
        raise ValueError(
            f"reference={config.reference}: these are samples; are samples= and reference= the wrong way round?"
        )
    if inputs.vqvae is not None and theirs not in (None, inputs.vqvae.model.resolution):
        needed = f"the VQ-VAE takes {inputs.vqvae.model.resolution} px"
        raise ValueError(f"reference={config.reference}: images of {theirs} px, but {needed}")


def _check_prior(config: EvaluateConfig, level: str, about: Mapping[str, Any], codes: DataSet | None) -> None:
    where = f"prior_{level}={getattr(config, f'prior_{level}')}"
    if about["level"] != level:
        raise ValueError(f"{where}: this is a prior of the {about['level']} level")
    if codes is not None and len(about["classes"]) != (count := len(codes.manifest.classes)):
        raise ValueError(f"{where}: a prior of {len(about['classes'])} classes, but codes={codes.name} has {count}")


def _check_fresh(config: EvaluateConfig, inputs: Inputs) -> None:
    """Codes and priors must be of the VQ-VAE, or without one of each other; samples must be drawn from these models.

    Raises ValueError naming all that are not, and the way on.
    """
    stale = [*_other_tokenizers(config, inputs), *_other_models_of_samples(config, inputs)]
    if stale:
        keys = list(dict.fromkeys(key for key, _ in stale))
        raise ValueError(
            f"{'; '.join(why for _, why in stale)}: make {' and '.join(keys)} again with fresh=true, "
            f"or leave out what does not belong ({' '.join(f'{key}=none' for key in keys)})"
        )


def _other_tokenizers(config: EvaluateConfig, inputs: Inputs) -> Iterator[tuple[str, str]]:
    tokenizers = [("vqvae", inputs.vqvae.tokenizer)] if inputs.vqvae else []
    tokenizers += [("codes", data.manifest.extra["tokenizer"]) for data in (inputs.codes, inputs.train_codes) if data]
    for level, prior in inputs.priors.items():
        tokenizers.append((f"prior_{level}", prior.description["tokenizer"]))
    for key, tokenizer in tokenizers:
        first, expected = tokenizers[0]
        if tokenizer != expected:
            paths = getattr(config, key), getattr(config, first)
            yield key, f"{key}={paths[0]} belongs to the tokenizer {tokenizer}, but {first}={paths[1]} to {expected}"


def _other_models_of_samples(config: EvaluateConfig, inputs: Inputs) -> Iterator[tuple[str, str]]:
    """`vqscale sample` records the models that it draws from; samples of other programs say nothing."""
    if inputs.samples is None:
        return
    extra = inputs.samples.manifest.extra
    drawn_from = {"vqvae": extra.get("vqvae")}
    drawn_from |= {f"prior_{level}": fingerprint for level, fingerprint in extra.get("priors", {}).items()}
    for key, model in inputs.models.items():
        if drawn_from.get(key) not in (None, model.fingerprint):
            where = f"{key}={getattr(config, key)} is {model.fingerprint}"
            yield "samples", f"samples={config.samples} was drawn from {key} {drawn_from[key]}, but {where}"


def _warn_of_overlap(config: EvaluateConfig, inputs: Inputs) -> None:
    """Images that are on both sides of a comparison make it look better than it is."""
    pairs = [("samples", "reference")] + [("training", "reference"), ("samples", "training")] * bool(config.neighbours)
    for one, other in pairs:
        a, b = getattr(inputs, one), getattr(inputs, other)
        if isinstance(a, DataSet) and isinstance(b, DataSet):
            shards = [{*data.manifest.column("sha256")} for data in (a, b)]
            if common := len(shards[0] & shards[1]):
                log.warning(
                    "%s=%s and %s=%s have %d of %d shards in common: the same images are compared with themselves",
                    *(one, a.folder, other, b.folder, common, len(shards[0])),
                )


def _check_classifier(
    config: EvaluateConfig, name: str, about: Mapping[str, Any], inputs: Inputs, reference: DataSet
) -> None:
    """A classifier must have learned from what its key says, from this evaluation's inputs, and not from the test."""
    key = f"classifier_{name}"
    where = f"{key}={getattr(config, key)}"
    if about["learned_from"] != LEARNED_FROM[name]:
        raise ValueError(f"{where}: learned from {about['learned_from']}, expected {LEARNED_FROM[name]}")
    if about["classes"] != list(reference.manifest.classes):
        theirs = f"{len(about['classes'])} classes, reference={config.reference} {len(reference.manifest.classes)}"
        raise ValueError(f"{where}: has other classes than the reference ({theirs})")
    if reference.resolution not in (None, about["resolution"]):
        raise ValueError(f"{where}: takes images of {about['resolution']} px, the reference has {reference.resolution}")
    if about["data"] == reference.manifest.fingerprint:
        raise ValueError(f"{where}: learned from the very images it would be tested on, reference={config.reference}")
    made_of, other = _MADE_OF.get(name, ("", ""))
    expected = inputs.identity().get(other)
    if expected is not None and about[made_of] != expected:
        raise ValueError(
            f"{where}: learned from {other} {about[made_of]}, but {other}={getattr(config, other)} is {expected}; "
            f"train it again or leave it out with {key}=none"
        )
