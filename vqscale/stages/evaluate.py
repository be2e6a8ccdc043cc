"""Samples, reconstructions, codes and priors -> scores.json, report.html and a table on the terminal."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from tqdm import tqdm

from vqscale import runtime
from vqscale.config import ReadsShards, fingerprint, run_of
from vqscale.data.cache import Cache
from vqscale.evaluation import families
from vqscale.evaluation.cas import score_cas
from vqscale.evaluation.checks import check_extractor, check_metrics
from vqscale.evaluation.families import Bench
from vqscale.evaluation.features import NEED_A_PATH, Extractor, MissingPackage, load_extractor
from vqscale.evaluation.gallery import images_at
from vqscale.evaluation.inputs import INPUT_KEYS, DataSet, Inputs, find_inputs
from vqscale.evaluation.neighbours import Neighbours, find_neighbours
from vqscale.evaluation.nll import Codes, read_codes
from vqscale.evaluation.perceptual import PerceptualDistance, load_lpips
from vqscale.evaluation.reconstructions import Reconstructions, examples_of
from vqscale.evaluation.rejection import RATES, check_networks, check_rates, read_judged, score_rejection
from vqscale.evaluation.results import Shown, print_table, write_results
from vqscale.evaluation.scores import METRICS, Scores, is_published_set
from vqscale.evaluation.statistics import FeatureSet, PublishedReference
from vqscale.files import read_json, write_json


@dataclass(frozen=True)
class EvaluateConfig(ReadsShards):
    """What to evaluate; an input that is absent, or `none`, leaves out the metrics that need it."""

    recomputes: ClassVar[bool] = True
    samples: str = run_of("sample")  # sample shards, or any data set of images
    reference: str = run_of("pack")  # real images (the holdout part), or ADM's reference .npz
    training: str = run_of("pack")  # training images (the train part), for `neighbours`
    vqvae: str = run_of("train_vqvae")
    codes: str = run_of("extract_codes")
    prior_top: str = run_of("train_prior_top")
    prior_middle: str = run_of("train_prior_middle")
    prior_bottom: str = run_of("train_prior_bottom")
    classifier_samples: str = run_of("train_classifier_samples")
    classifier_reconstructions: str = run_of("train_classifier_reconstructions")
    classifier_real: str = run_of("train_classifier_real")
    metrics: list[str] = field(default_factory=list)  # keys of scores.json without the level; [] = all that can be had
    extractor: str = "lite0"  # lite0 | inception | vgg16 (precision and recall as first published)
    weights: str = ""  # path of the extractor's weights; needed for inception and vgg16
    vgg16_weights: str = ""  # path of torchvision's VGG16, for LPIPS
    allow_unverified_weights: bool = False  # use weights of unknown sha256, and mark every number
    weights_kind: str = ""  # ema | raw; "" = ema if there is one
    checkpoint: int = 0  # of the VQ-VAE, in images seen; 0 = the last checkpoint of a finished run
    batch: int = 64  # images at a time and rank
    workers: int = 1  # loader processes per rank
    reference_images: int = 0  # at most so many reference images; 0 = all
    neighbours: int = 0  # show so many samples beside their nearest training images, those that are closest
    training_images: int = 0  # look among the first so many training images; 0 = all, at most 50,000
    nll_images: int = 0  # at most so many held-out code samples; 0 = all
    nll_train_images: int = 0  # also the NLL of so many training samples
    shuffled_conditioning: bool = True  # also the NLL with shuffled classes and shuffled upper codes
    acceptance: list[float] = field(default_factory=lambda: list(RATES))  # shares kept by rejection; [] = no curve
    kid_subset_size: int = 1_000  # as in torch-fidelity; another size is not comparable with papers
    num_reconstructions: int = 12  # shown in the report and the picture
    samples_shown: int = 10  # per class, in the report and the picture
    classes_shown: int = 20  # at most so many classes there
    picture: str = ""  # also write the labelled grid here; "" = samples.png in the run directory


Config = EvaluateConfig

_RECONSTRUCTION = [m.key for m in METRICS.values() if m.family == "reconstruction"]
_SAMPLES = [m.key for m in METRICS.values() if m.family == "samples"]
_NLL = [m.key for m in METRICS.values() if m.family == "nll"]
_USAGE = ["perplexity", "used_codes"]
_CHECKED = 8  # reference images that the extractor is tried on


def main(config: EvaluateConfig) -> None:
    """Evaluate into `config.run_dir`. Raises ValueError for inputs that do not belong together, and for a metric asked
    for by name that cannot be computed."""
    scores = Scores(config.metrics)
    check_rates(config.acceptance)
    with runtime.run(config, "evaluate") as run:
        found = inputs_of(config, run.topology.device)
        identity = {"config": fingerprint(config), **found.identity()}
        if run.was_done and read_json(run.run_dir / "inputs.json") == identity:
            runtime.log.info("nothing left to do: %s is up to date", run.run_dir / "report.html")
            return
        shown = compute(config, run, scores, found)
        run.images_seen = max((score.n for score in scores.found.values()), default=0)
        if run.topology.is_main:
            write_results(config, run, scores, found, shown, Cache.of(config))
            if shown.nll_by_class:
                write_json(run.run_dir / "nll_by_class.json", shown.nll_by_class)
            write_json(run.run_dir / "inputs.json", identity)
            print_table(scores)
        run.topology.barrier()


def inputs_of(config: EvaluateConfig, device: torch.device) -> Inputs:
    """The inputs that are there. Raises ValueError for broken or unfinished ones, or if they don't belong together."""
    return find_inputs(
        {key: getattr(config, key) for key in INPUT_KEYS},
        device=device,
        weights_kind=config.weights_kind,
        checkpoint=config.checkpoint,
        reference_images=config.reference_images,
        training_images=config.training_images,
        nll_images=config.nll_images,
        weights={config.extractor: config.weights},
    )


# --- computing --------------------------------------------------------------------------------------------------------


def compute(config: EvaluateConfig, run: runtime.Run, scores: Scores, found: Inputs) -> Shown:
    """All families of metrics, on all ranks."""
    extractor, why_none = _extractor(config, run, scores)
    families.leave_out_other_features(scores, extractor, why_none)
    bench = Bench(
        scores,
        run.topology,
        extractor,
        _perceptual(config, run, scores),
        run.run_dir / "statistics",
        run.run_dir / "bad.jsonl",
        lambda batches, name, total: _watched(run, batches, name, total),
        lambda batches, name, total: _shared(run, batches, name, total),
        config.batch,
        config.workers,
        Cache.of(config),
    )
    shown = Shown()
    _samples(config, bench, found, shown)
    _codes(config, bench, found, _reconstructions(config, bench, found, shown), shown)
    score_cas(bench, found)
    return shown


def _extractor(config: EvaluateConfig, run: runtime.Run, scores: Scores) -> tuple[Extractor | None, str]:
    """The extractor, or why there is none: a missing package or path only matters if a metric needs it by name."""
    names = [*_SAMPLES, "reconstruction_fid", "reconstruction_fd_lite0"]
    if not scores.wants(*names):
        return None, "no metric of features was asked for"
    if config.extractor in NEED_A_PATH and not config.weights:
        return None, f"extractor={config.extractor} needs weights=PATH, {NEED_A_PATH[config.extractor]}"
    try:
        extractor = load_extractor(
            config.extractor,
            weights=config.weights,
            allow_unverified_weights=config.allow_unverified_weights,
            device=run.topology.device,
        )
    except MissingPackage as error:
        return None, str(error)
    if not extractor.verified:
        _warn_of_origin("weights", config.weights)
    return extractor, ""


def _warn_of_origin(key: str, path: str) -> None:
    runtime.log.warning("%s=%s are of unknown origin: none of its numbers is comparable with papers", key, path)


def _perceptual(config: EvaluateConfig, run: runtime.Run, scores: Scores) -> PerceptualDistance | None:
    """LPIPS, if its package and weights are there; else it is left out."""
    if not scores.wants("lpips"):
        return None
    why_none = f"lpips needs vgg16_weights=PATH, {NEED_A_PATH['vgg16']}"
    if config.vgg16_weights:
        try:
            perceptual = load_lpips(config.vgg16_weights, config.allow_unverified_weights, run.topology.device)
        except MissingPackage as error:
            why_none = str(error)
        else:
            if not perceptual.verified:
                _warn_of_origin("vgg16_weights", config.vgg16_weights)
            return perceptual
    scores.leave_out(["lpips"], why_none)
    return None


def _watched(run: runtime.Run, batches: Iterable[Any], name: str, total: int) -> Iterator[Any]:
    """The batches, under a progress bar; between two of them all ranks may stop together."""
    for batch in tqdm(batches, desc=name, total=total, unit="batch", disable=not run.topology.is_main):
        if reason := run.stop_agreed():
            run.stop(reason)
        yield batch


def _shared(run: runtime.Run, batches: Iterable[Any], name: str, total: int) -> Iterator[Any]:
    """The same for ranks that have different numbers of batches; they leave it together."""
    with run.stoppable(), tqdm(total=total, desc=name, unit="batch", disable=not run.topology.is_main) as bar:
        for batch in batches:
            run.poll()
            yield batch
            bar.update()


def _samples(config: EvaluateConfig, bench: Bench, found: Inputs, shown: Shown) -> None:
    wanted = [name for name in _SAMPLES if bench.scores.wants(name) and name not in bench.scores.left_out]
    for key, data in (("samples", found.samples), ("reference", found.reference)):
        if data is None:
            bench.scores.leave_out(wanted, found.absent[key])
            return
    if not wanted:
        return
    assert found.samples is not None and found.reference is not None and bench.extractor is not None
    judged = None
    if config.acceptance:
        check_networks(found.samples, bench.extractor)
        judged = read_judged(found.samples)
    generated = families.features_of(bench, found.samples, found.resolution_of(found.samples))
    if isinstance(found.reference, PublishedReference):
        real = families.published_features(bench, found.reference, config.reference)
        about, published = config.reference, True
    else:
        real = families.features_of(bench, found.reference, found.resolution_of(found.reference))
        about, published = (
            found.reference.describe(),
            is_published_set(found.reference.manifest, found.reference.n),
        )
    shown.checks = self_checks(bench, found, real)
    families.score_samples(bench, generated, real, about, published, config.kid_subset_size)
    if judged is not None:
        score_rejection(bench, judged, generated, real, about, config.acceptance, config.seed)
    if config.neighbours:
        shown.neighbours = _neighbours(config, bench, found, generated, real)


def self_checks(bench: Bench, found: Inputs, real: FeatureSet) -> list[str]:
    """Before any number. Raises CheckFailed where one would be wrong."""
    assert bench.extractor is not None
    lines, reference = check_metrics(real), found.reference
    if isinstance(reference, DataSet):
        few, size = range(min(_CHECKED, reference.n)), found.resolution_of(reference)
        images = [x for x, _ in images_at(reference.folder, reference.manifest, few, size, bench.shards)]
    else:
        assert reference is not None
        images = [] if reference.images is None else list(reference.images[:_CHECKED])
    if images:
        lines += check_extractor(bench.extractor, torch.stack(images).to(bench.topology.device))
    return lines


def _neighbours(
    config: EvaluateConfig, bench: Bench, found: Inputs, generated: FeatureSet, real: FeatureSet
) -> Neighbours | None:
    """Raises ValueError without training images: they were asked for."""
    if found.training is None:
        raise ValueError(f"neighbours={config.neighbours} needs training images: {found.absent['training']}")
    assert found.samples is not None
    resolution = found.resolution_of(found.samples)
    training = families.features_of(bench, found.training, resolution)
    if not bench.topology.is_main:
        return None
    return find_neighbours(
        found.samples,
        generated.features,
        found.training,
        training.features,
        real.features,
        count=config.neighbours,
        resolution=resolution,
        cache=bench.shards,
    )


def _reconstructions(config: EvaluateConfig, bench: Bench, found: Inputs, shown: Shown) -> Reconstructions | None:
    wanted = [name for name in _RECONSTRUCTION if bench.scores.wants(name) and name not in bench.scores.left_out]
    count_codes = found.codes is None and bench.scores.wants(*_USAGE)
    if found.vqvae is None:
        bench.scores.leave_out(wanted, found.absent["vqvae"])
        return None
    if not isinstance(found.reference, DataSet):
        why = found.absent.get("reference", "reference= is a file of statistics, real images are needed")
        bench.scores.leave_out(wanted, why)
        return None
    data, model = found.reference, found.vqvae.model
    if data.resolution not in (None, model.resolution):
        sizes = f"images of {data.resolution} px, but the VQ-VAE takes {model.resolution} px"
        raise ValueError(f"reference={data.name}: {sizes}")
    figures = families.score_reconstructions(bench, found.vqvae, data) if wanted or count_codes else None
    if config.num_reconstructions:
        shown.examples = examples_of(model, data, config.num_reconstructions, bench.topology, bench.shards)
    return figures


def _codes(
    config: EvaluateConfig, bench: Bench, found: Inputs, reconstructions: Reconstructions | None, shown: Shown
) -> None:
    """Usage of codes, their order-0 entropy, and their likelihood under the priors."""
    scores = bench.scores
    if found.codes is None or found.train_codes is None:
        scores.leave_out([*_NLL, "order0_entropy"], found.absent["codes"])
        _usage_of_reconstructions(scores, found, reconstructions, shown)
        return
    if not scores.wants(*_NLL, *_USAGE, "order0_entropy"):
        return
    about = found.codes.describe()
    codes = read_codes(found.codes.folder, limit=config.nll_images, cache=bench.shards)
    shown.usage = {level: codes.usage(level) for level in codes.levels}
    families.score_usage(scores, shown.usage, len(codes), about)
    families.score_order0(scores, codes, found.train_codes.manifest.extra["usage"], about)
    _likelihood(config, bench, found, codes, about, shown)


def _usage_of_reconstructions(
    scores: Scores, found: Inputs, reconstructions: Reconstructions | None, shown: Shown
) -> None:
    if reconstructions is None or not isinstance(found.reference, DataSet):
        scores.leave_out(_USAGE, found.absent["codes"])
        return
    shown.usage = reconstructions.usage
    families.score_usage(scores, shown.usage, reconstructions.n, found.reference.describe())


def _likelihood(config: EvaluateConfig, bench: Bench, found: Inputs, codes: Codes, about: str, shown: Shown) -> None:
    scores = bench.scores
    if not scores.wants(*_NLL):
        return
    priors = {level: found.priors[level] for level in codes.levels if level in found.priors}
    missing = {level: found.absent[f"prior_{level}"] for level in codes.levels if level not in priors}
    if not priors:
        scores.leave_out(_NLL, "; ".join(missing.values()))
        return
    for level, why in missing.items():
        scores.leave_out_level("nll", level, why)
    shuffled = config.shuffled_conditioning
    plain = families.score_nll(bench, priors, codes, about, shuffled=shuffled, seed=config.seed)
    assert found.codes is not None and found.train_codes is not None
    classes = found.codes.manifest.classes
    shown.nll_by_class = {
        level: {classes[label]: value for label, value in one.by_class().items()} for level, one in plain.items()
    }
    resolution = found.codes.manifest.extra["resolution"]
    nats = {level: one.per_code() for level, one in plain.items()}
    families.score_bits(scores, nats, codes, len(codes), resolution, about)
    if config.nll_train_images:
        families.score_train_nll(bench, priors, found.train_codes, config.nll_train_images)
    else:
        scores.leave_out(["nll_train"], "nll_train_images=0")
    for name in ("nll_shuffled_class", "nll_shuffled_upper"):
        if not any(key.startswith(name) for key in scores.found):
            why = "shuffled_conditioning=false" if not shuffled else "there is nothing to shuffle"
            scores.leave_out([name], why)


def plan(config: EvaluateConfig) -> str:
    """Inputs that are there and those that are not, for --dry-run."""
    found = inputs_of(config, torch.device("cpu"))
    lines = [f"\n{name}: {value}" for name, value in found.identity().items()]
    return "".join(lines) + "".join(f"\nabsent: {reason}" for reason in found.absent.values())
