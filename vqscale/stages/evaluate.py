"""Samples, reconstructions, codes and priors -> scores.json, report.html and a table on the terminal."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from vqscale import runtime
from vqscale.config import ReadsShards, fingerprint, run_of
from vqscale.data.cache import Cache
from vqscale.data.shards import write_atomically
from vqscale.evaluation import families, report
from vqscale.evaluation.collect import Reconstructions
from vqscale.evaluation.families import Bench
from vqscale.evaluation.features import Extractor, MissingPackage, load_extractor
from vqscale.evaluation.figures import grid_png
from vqscale.evaluation.gallery import first_of_each_class
from vqscale.evaluation.inputs import INPUT_KEYS, DataSet, Inputs, find_inputs
from vqscale.evaluation.nll import Codes, read_codes
from vqscale.evaluation.provenance import about_data, about_run, metrics_of_run
from vqscale.evaluation.scores import METRICS, Score, Scores, is_published_set
from vqscale.evaluation.statistics import PublishedReference
from vqscale.sources import Source


@dataclass(frozen=True)
class EvaluateConfig(ReadsShards):
    """What to evaluate; an input that is absent, or `none`, leaves out the metrics that need it."""

    recomputes: ClassVar[bool] = True
    samples: str = run_of("sample")  # sample shards, or any data set of images
    reference: str = run_of("pack")  # real images (the holdout part), or ADM's reference .npz
    vqvae: str = run_of("train_vqvae")
    codes: str = run_of("extract_codes")
    prior_top: str = run_of("train_prior_top")
    prior_middle: str = run_of("train_prior_middle")
    prior_bottom: str = run_of("train_prior_bottom")
    metrics: list[str] = field(default_factory=list)  # keys of scores.json without the level; [] = all that can be had
    extractor: str = "lite0"  # lite0 | inception
    weights: str = ""  # path of the extractor's weights; needed for inception
    allow_unverified_weights: bool = False  # use weights of unknown sha256, and mark every number
    weights_kind: str = ""  # ema | raw; "" = ema if there is one
    checkpoint: int = 0  # of the VQ-VAE, in images seen; 0 = the last checkpoint of a finished run
    batch: int = 64  # images at a time and rank
    workers: int = 1  # loader processes per rank
    reference_images: int = 0  # at most so many reference images; 0 = all
    nll_images: int = 0  # at most so many held-out code samples; 0 = all
    nll_train_images: int = 0  # also the NLL of so many training samples
    shuffled_conditioning: bool = True  # also the NLL with shuffled classes and shuffled upper codes
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


def main(config: EvaluateConfig) -> None:
    """Evaluate into `config.run_dir`. Raises ValueError for inputs that do not belong together, and for a metric asked
    for by name that cannot be computed."""
    scores = Scores(config.metrics)
    with runtime.run(config, "evaluate") as run:
        found = inputs_of(config, run.topology.device)
        identity = {"config": fingerprint(config), **found.identity()}
        if run.was_done and runtime.read_json(run.run_dir / "inputs.json") == identity:
            runtime.log.info("nothing left to do: %s is up to date", run.run_dir / "report.html")
            return
        shown = compute(config, run, scores, found)
        run.images_seen = max((score.n for score in scores.found.values()), default=0)
        if run.topology.is_main:
            write_results(config, run, scores, found, shown)
            if shown.nll_by_class:
                runtime.write_json(run.run_dir / "nll_by_class.json", shown.nll_by_class)
            runtime.write_json(run.run_dir / "inputs.json", identity)
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
        nll_images=config.nll_images,
    )


# --- computing --------------------------------------------------------------------------------------------------------


@dataclass
class Shown:
    """What the report shows besides the scores."""

    reconstructions: Reconstructions | None = None
    usage: dict[str, np.ndarray] = field(default_factory=dict)
    nll_by_class: dict[str, dict[str, float]] = field(default_factory=dict)  # level -> class -> nats per code


def compute(config: EvaluateConfig, run: runtime.Run, scores: Scores, found: Inputs) -> Shown:
    """All families of metrics, on all ranks."""
    extractor, why_none = _extractor(config, run, scores)
    families.leave_out_other_features(scores, extractor, why_none)
    scores.leave_out(["cas_top1", "cas_top5"], "a classifier trained on the samples is needed; this version has none")
    bench = Bench(
        scores,
        run.topology,
        extractor,
        run.run_dir / "statistics",
        run.run_dir / "bad.jsonl",
        lambda batches, name, total: _watched(run, batches, name, total),
        config.batch,
        config.workers,
        Cache.of(config),
    )
    _samples(config, bench, found)
    shown = Shown(_reconstructions(config, bench, found))
    _codes(config, bench, found, shown)
    return shown


def _extractor(config: EvaluateConfig, run: runtime.Run, scores: Scores) -> tuple[Extractor | None, str]:
    """The extractor, or why there is none: a missing package or path only matters if a metric needs it by name."""
    names = [*_SAMPLES, "reconstruction_fid", "reconstruction_fd_lite0"]
    if not scores.wants(*names):
        return None, "no metric of features was asked for"
    if config.extractor == "inception" and not config.weights:
        return None, "extractor=inception needs weights=PATH"
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
        runtime.log.warning("weights=%s are of unknown origin: no number is comparable with papers", config.weights)
    return extractor, ""


def _watched(run: runtime.Run, batches: Iterable[Any], name: str, total: int) -> Iterator[Any]:
    """The batches, under a progress bar; between two of them all ranks may stop together."""
    for batch in tqdm(batches, desc=name, total=total, unit="batch", disable=not run.topology.is_main):
        if reason := run.stop_agreed():
            run.stop(reason)
        yield batch


def _samples(config: EvaluateConfig, bench: Bench, found: Inputs) -> None:
    wanted = [name for name in _SAMPLES if bench.scores.wants(name) and name not in bench.scores.left_out]
    for key, data in (("samples", found.samples), ("reference", found.reference)):
        if data is None:
            bench.scores.leave_out(wanted, found.absent[key])
            return
    if not wanted:
        return
    assert found.samples is not None and found.reference is not None
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
    families.score_samples(bench, generated, real, about, published, config.kid_subset_size)


def _reconstructions(config: EvaluateConfig, bench: Bench, found: Inputs) -> Reconstructions | None:
    wanted = [name for name in _RECONSTRUCTION if bench.scores.wants(name) and name not in bench.scores.left_out]
    count_codes = found.codes is None and bench.scores.wants(*_USAGE)
    if found.vqvae is None:
        bench.scores.leave_out(wanted, found.absent["vqvae"])
        return None
    if not isinstance(found.reference, DataSet):
        why = found.absent.get("reference", "reference= is a file of statistics, real images are needed")
        bench.scores.leave_out(wanted, why)
        return None
    data = found.reference
    if not wanted and not count_codes:  # only pictures for the report
        data = DataSet(data.name, data.folder, data.manifest, max(1, config.num_reconstructions))
    return families.score_reconstructions(bench, found.vqvae, data, config.num_reconstructions)


def _codes(config: EvaluateConfig, bench: Bench, found: Inputs, shown: Shown) -> None:
    """Usage of codes, their order-0 entropy, and their likelihood under the priors."""
    scores = bench.scores
    if found.codes is None or found.train_codes is None:
        scores.leave_out([*_NLL, "order0_entropy"], found.absent["codes"])
        _usage_of_reconstructions(scores, found, shown)
        return
    if not scores.wants(*_NLL, *_USAGE, "order0_entropy"):
        return
    about = found.codes.describe()
    codes = read_codes(found.codes.folder, limit=config.nll_images, cache=bench.shards)
    shown.usage = {level: codes.usage(level) for level in codes.levels}
    families.score_usage(scores, shown.usage, len(codes), about)
    families.score_order0(scores, codes, found.train_codes.manifest.extra["usage"], about)
    _likelihood(config, bench, found, codes, about, shown)


def _usage_of_reconstructions(scores: Scores, found: Inputs, shown: Shown) -> None:
    if shown.reconstructions is None or not isinstance(found.reference, DataSet):
        scores.leave_out(_USAGE, found.absent["codes"])
        return
    shown.usage = shown.reconstructions.usage
    families.score_usage(scores, shown.usage, shown.reconstructions.n, found.reference.describe())


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


# --- results ----------------------------------------------------------------------------------------------------------


def write_results(config: EvaluateConfig, run: runtime.Run, scores: Scores, found: Inputs, shown: Shown) -> None:
    """scores.json, samples.png and report.html, each whole or not at all; the report last."""
    runtime.write_json(run.run_dir / "scores.json", scores.as_json())
    samples = _shown_samples(config, found)
    triples = _shown_reconstructions(found, shown)
    if samples or triples:
        originals, pictures = (list(triples[0]), list(triples[1])) if triples else ([], [])
        wide = config.samples_shown
        for path in filter(None, (str(run.run_dir / "samples.png"), config.picture)):
            grid_png(path, originals=originals[:wide], reconstructions=pictures[:wide], samples=samples)
    name = Path(config.run_dir).parent.name
    text = report.render(
        report.Report(
            title=f"{name}: evaluation",
            subtitle=f"{time.strftime('%Y-%m-%d')} · {_subtitle(found)}",
            scores={key: Score(**value) for key, value in scores.as_json().items()},
            left_out=scores.left_out,
            samples=samples,
            reconstructions=triples,
            usage=shown.usage,
            curves={source.path.name: metrics_of_run(source.path) for source in found.sources()},
            provenance=_provenance(run, found),
            footer=f"Written by vqscale evaluate · {run.run_dir / 'scores.json'} has the same numbers.",
        )
    )
    write_atomically(run.run_dir / "report.html", text.encode())


def _subtitle(found: Inputs) -> str:
    parts = []
    if found.samples is not None:
        parts.append(f"{found.samples.n:,} samples of {len(found.samples.manifest.classes)} classes")
    if isinstance(found.reference, DataSet):
        parts.append(f"{found.reference.n:,} reference images")
    if found.vqvae is not None:
        grids = ", ".join(f"{name} {h}×{w}" for name, (h, w) in _grids(found.vqvae))
        parts.append(f"{found.vqvae.description['resolution']} px, K = {found.vqvae.model.num_codes}, {grids}")
    return " · ".join(parts) or "no inputs"


def _grids(source: Source) -> list[tuple[str, tuple[int, int]]]:
    return list(zip(source.model.level_names, source.model.grids, strict=True))


def _shown_samples(config: EvaluateConfig, found: Inputs) -> dict[str, list[Tensor]]:
    if found.samples is None:
        return {}
    return first_of_each_class(
        found.samples.folder,
        found.samples.manifest,
        resolution=found.resolution_of(found.samples),
        per_class=config.samples_shown,
        most_classes=config.classes_shown,
        cache=Cache.of(config),
    )


def _shown_reconstructions(found: Inputs, shown: Shown) -> tuple[Tensor, Tensor, list[str]] | None:
    if shown.reconstructions is None or not isinstance(found.reference, DataSet):
        return None
    classes, labels = found.reference.manifest.classes, shown.reconstructions.labels.tolist()
    names = [classes[label] if 0 <= label < len(classes) else str(label) for label in labels]
    return shown.reconstructions.originals, shown.reconstructions.pictures, names


def _provenance(run: runtime.Run, found: Inputs) -> list[dict[str, Any]]:
    parts = [about_run(run.run_dir, "this evaluation")]
    for source in found.sources():
        facts = {"fingerprint": source.fingerprint, "weights": source.weights, "images seen": source.images_seen}
        parts.append(about_run(source.path, f"{source.description['kind']}: {source.path}", **facts))
    for name, data in (("samples", found.samples), ("reference", found.reference), ("codes", found.codes)):
        if isinstance(data, DataSet):
            parts.append(about_data(data.folder, data.manifest, f"{name}: {data.folder}"))
    return parts


def print_table(scores: Scores) -> None:
    """The scores on the terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="scores", title_justify="left")
    for column, justify in (("metric", "left"), ("value", "right"), ("n", "right"), ("extractor", "left")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for key, value in scores.as_json().items():
        score = Score(**value)
        shown = report.format_value(key, score.value)
        table.add_row(key, shown, f"{score.n:,}", score.extractor or "")
    console = Console()
    console.print(table)
    for reason, names in report.by_reason(scores.left_out).items():
        console.print(f"left out: {', '.join(names)}: {reason}", soft_wrap=True, markup=False, highlight=False)


def plan(config: EvaluateConfig) -> str:
    """Inputs that are there and those that are not, for --dry-run."""
    found = inputs_of(config, torch.device("cpu"))
    lines = [f"\n{name}: {value}" for name, value in found.identity().items()]
    return "".join(lines) + "".join(f"\nabsent: {reason}" for reason in found.absent.values())
