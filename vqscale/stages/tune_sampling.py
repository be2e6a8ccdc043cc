"""VQ-VAE + priors + images -> the sampling options whose samples come nearest to real images.

In: the models; training images, which guide the search; held-out images, which judge its result. Out: `search.jsonl`,
a line per setting; `sample.yaml`, the best one for `vqscale sample`; `tuned.json`, that setting against the defaults on
the held-out images; `search.png`, the curves.

The search goes through the options of the levels one at a time, top level first: temperature, top_p, guidance. Rivals
of the current setting are compared on `coarse_samples`; the best of those that beat it there go on with `samples`. All
settings draw the same sample ids, so that their randomness is common. What it does next depends on the lines of
`search.jsonl` alone: run again, it reads them and goes on.
Shapes: b samples, n sorted labels, R pixels a side.
"""

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
import yaml
from torch import Tensor

from vqscale import runtime
from vqscale.batch import Batch
from vqscale.config import ReadsShards, StageConfig, as_dict, level_names, run_of
from vqscale.data.images import to_uint8
from vqscale.evaluation import passes, search
from vqscale.evaluation.features import EXTRACTORS
from vqscale.evaluation.figures import charts_png
from vqscale.evaluation.inputs import LEARNED_FROM, DataSet, EvaluateConfig, find_inputs
from vqscale.evaluation.metrics import PRC_NEIGHBOURS, frechet
from vqscale.evaluation.scores import Scores
from vqscale.evaluation.search import Line, Setting, SettingScores
from vqscale.evaluation.statistics import FeatureSet, key_of_facts
from vqscale.fields import Choice, NonNegativeFloat, NonNegativeInt, PathText, PositiveFraction, PositiveInt
from vqscale.files import write_atomically, write_json
from vqscale.models.sampling import SCHEDULES
from vqscale.stages.sample import Chain, SampleConfig, draw_level, load_chain
from vqscale.text import format_duration

_FEWEST = 2 * (PRC_NEIGHBOURS + 1)  # images, of whose halves precision and recall are defined
_DEFAULTS = {"temperature": 1.0, "top_p": 1.0, "guidance": 0.0, "guidance_schedule": "constant"}
_GOLDEN = (5**0.5 - 1) / 2  # steps of this share fill [0, 1) evenly, however many they are
_HEADER = "# The setting that vqscale tune_sampling found; tuned.json beside it has the evidence.\n"


@dataclass(frozen=True)
class TuneSamplingConfig(ReadsShards):
    """Where to look for sampling options, and at what cost."""

    needs_float64: ClassVar[bool] = True
    outputs: ClassVar[tuple[str, ...]] = (
        *("search.jsonl", "search.png", "tuned.json", "sample.yaml", "features", "statistics", "bad.jsonl"),
    )
    batch_key: ClassVar[str] = "batch"
    vqvae: PathText = run_of("train_vqvae")  # the VQ-VAE: a run or an exported folder
    prior_top: PathText = run_of("train_prior_top")  # the prior of the top level
    prior_middle: PathText = run_of("train_prior_middle")  # the prior of the middle level, if there is such a level
    prior_bottom: PathText = run_of("train_prior_bottom")  # the prior of the bottom level, if there is such a level
    training: PathText = run_of("pack")  # real images that guide the search (the train part)
    reference: PathText = run_of("pack")  # real images that judge its result (the holdout part)
    objective: Annotated[str, Choice("fd", "f1")] = "fd"  # the least Fréchet distance, or the best F1: see docs
    samples: PositiveInt = 2_000  # drawn of a setting that may win
    coarse_samples: PositiveInt = 500  # drawn of any setting
    survivors: PositiveInt = 2  # rivals that go on from coarse_samples to samples, of each option and level
    rounds: PositiveInt = 2  # through all options at most; the search ends after one that changed nothing
    refinements: NonNegativeInt = 1  # times to look halfway between the best value and its neighbours
    temperatures: list[NonNegativeFloat] = field(default_factory=lambda: [0.7, 0.8, 0.9, 1.0, 1.1])  # of each level
    top_ps: list[PositiveFraction] = field(default_factory=lambda: [0.8, 0.9, 0.95, 1.0])  # of each level
    guidances: list[NonNegativeFloat] = field(default_factory=lambda: [0.0, 0.5, 1.0, 2.0])  # with class_dropout
    guidance_schedules: list[Annotated[str, Choice(*SCHEDULES)]] = field(default_factory=lambda: [*SCHEDULES])  # if >0
    extractor: Annotated[str, Choice(*EXTRACTORS)] = "lite0"  # whose features are compared, as in evaluate
    weights: PathText = ""  # path of the extractor's weights; needed for inception and vgg16
    allow_unverified_weights: bool = False  # use weights of unknown sha256
    weights_kind: Annotated[str, Choice("", "ema", "raw")] = ""  # of the models; "" = ema if there is one
    precision: Annotated[str, Choice("fp32", "bf16")] = "fp32"  # of the priors
    graphs: bool = True  # a GPU replays each row of codes as a CUDA graph
    batch: PositiveInt = 64  # samples drawn, or images read, at a time and rank
    workers: NonNegativeInt = 1  # loader processes per rank
    training_images: NonNegativeInt = 10_000  # at most so many training images; 0 = all
    reference_images: NonNegativeInt = 0  # at most so many reference images; 0 = all

    def __post_init__(self) -> None:
        if not _FEWEST <= self.coarse_samples <= self.samples:
            needed = f"must be from {_FEWEST} to samples={self.samples}"
            raise ValueError(f"coarse_samples={self.coarse_samples}: {needed}")


Config = TuneSamplingConfig


def main(config: TuneSamplingConfig) -> None:
    """Search into `config.run_dir`. Raises ValueError for models or images that do not belong together, or too few."""
    with runtime.run(config, "tune_sampling") as run:
        chain = load_chain(sample_config(config, {}), run.topology.device, run.topology)
        bench, training, reference = open_images(config, chain, run)
        assert bench.extractor is not None
        images = {"training": training.fingerprint, "reference": reference.fingerprint}
        run.check_inputs(chain.fingerprints | images | {"extractor": bench.extractor.weights_sha256})
        done = [run.run_dir / name for name in ("tuned.json", "sample.yaml")]
        if run.topology.on_main(lambda: run.was_done and all(path.is_file() for path in done)):
            runtime.log.info("nothing left to do: the best setting is in %s", run.run_dir / "sample.yaml")
            return
        tuner = Tuner(config, chain, bench, training, reference)
        best = tuner.search()
        scores = tuner.compare(best)
        if run.topology.is_main:
            tuner.write_results(best, scores)
        run.topology.barrier()


def sample_config(config: TuneSamplingConfig, setting: Setting) -> SampleConfig:
    """What `vqscale sample` needs to draw with a setting."""
    given: dict[str, Any] = _shared(config, SampleConfig)
    given["run_dir"] = str(Path(config.run_dir).parent / "sample_tuned")
    for key, value in setting.items():
        option, level = key.split(".")
        given.setdefault(option, {})[level] = value
    return SampleConfig(**given)


def _shared(config: TuneSamplingConfig, other: type[StageConfig]) -> dict[str, Any]:
    return {name: value for name, value in vars(config).items() if name in other.__dataclass_fields__}


def open_images(config: TuneSamplingConfig, chain: Chain, run: runtime.Run) -> tuple[passes.Bench, DataSet, DataSet]:
    """What computes features, the training and the reference images. Raises ValueError where there are none, too few,
    or of other classes or another size than the models'."""
    none = [f"classifier_{name}" for name in LEARNED_FROM] + [f"prior_{level}" for level in level_names(3)]
    evaluation = EvaluateConfig(**_shared(config, EvaluateConfig) | dict.fromkeys(["samples", "codes", *none], "none"))
    inputs = find_inputs(evaluation, run.topology.device, run.topology)
    both = [_checked(key, getattr(inputs, key) or inputs.absent[key], chain) for key in ("training", "reference")]
    return passes.open_bench(evaluation, run, Scores(["precision"])), both[0], both[1]


def _checked(key: str, data: Any, chain: Chain) -> DataSet:
    """`data`, where it is images of the chain's classes; it is a text that says why there are none, or statistics."""
    if not isinstance(data, DataSet):
        raise ValueError(data if isinstance(data, str) else f"{key}={data.name}: statistics, real images are needed")
    if data.n < _FEWEST:
        raise ValueError(f"{key}={data.name}: {data.n} images, at least {_FEWEST} are needed")
    ours, theirs = len(chain.classes), len(data.manifest.classes)
    if list(data.manifest.classes) != chain.classes:
        raise ValueError(f"{key}={data.name}: has other classes ({theirs}) than the priors ({ours})")
    return data


def axes_of(chain: Chain, config: TuneSamplingConfig) -> Iterator[tuple[str, list[Any]]]:
    """All that can be searched, and its values. A prior without class dropout cannot be guided."""
    for level, prior in chain.priors.items():
        yield f"temperature.{level}", config.temperatures
        yield f"top_p.{level}", config.top_ps
        if prior.model.config.class_dropout:
            yield f"guidance.{level}", config.guidances
            yield f"guidance_schedule.{level}", config.guidance_schedules


class Tuner:
    """The search, on all ranks: each draws its share of a setting's samples, and all take the same way."""

    def __init__(
        self, config: TuneSamplingConfig, chain: Chain, bench: passes.Bench, training: DataSet, reference: DataSet
    ):
        self.config, self.bench, self.run = config, bench, bench.run
        self._chain, self._reference, self._began = chain, reference, time.monotonic()
        self._resolution = chain.vqvae.description["resolution"]
        self._labels = np.sort(training.labels())
        self._codes: dict[str, tuple[Setting, dict[range, Tensor]]] = {}  # by level
        self._path = self.run.run_dir / "search.jsonl"
        self.lines = self.run.topology.on_main(lambda: search.read_search(self._path))
        self.defaults: Setting = {key: _DEFAULTS[key.split(".")[0]] for key, _ in axes_of(chain, config)}
        self.run.images_seen = sum(self.settings.values())
        self._training, self._training_words = self._features_of(training), training.describe()

    @property
    def settings(self) -> dict[str, int]:
        """The settings that were measured, by key, and how many samples were drawn of each."""
        return {key_of_facts(line.setting): line.n for line in sorted(self.lines, key=lambda line: line.n)}

    # --- the way ----------------------------------------------------------------------------------------------------

    def search(self) -> Setting:
        """The best setting."""
        best = self.defaults
        for _ in range(self.config.rounds):
            before = best
            for key, values in axes_of(self._chain, self.config):
                best = self._along(best, key, values)
            if best == before:
                break
        return best

    def _along(self, best: Setting, key: str, values: Sequence[Any]) -> Setting:
        """The best setting along one axis, from the current one on."""
        option, level = key.split(".")
        if option == "guidance_schedule":
            others = [value for value in values if value != best[key] and best[f"guidance.{level}"]]
            best = self._contest(best, [{**best, key: value} for value in others])
        else:
            tried = {*values, best[key]}
            best = self._contest(best, [*self._walk(best, key, sorted(tried))])
            for _ in range(self.config.refinements):
                between = halfway(best[key], sorted(tried))
                tried |= {*between}
                best = self._contest(best, [{**best, key: value} for value in between])
        self._tell(key, best)
        return best

    def _walk(self, best: Setting, key: str, values: Sequence[float]) -> Iterator[Setting]:
        """Settings along an axis in both directions, each until one is worse than the one before it."""
        here = values.index(best[key])
        for way in (values[here + 1 :], values[:here][::-1]):
            last = self._loss(best, self.config.coarse_samples)
            for value in way:
                yield (setting := {**best, key: value})
                if (loss := self._loss(setting, self.config.coarse_samples)) > last:
                    break
                last = loss

    def _contest(self, best: Setting, rivals: Sequence[Setting]) -> Setting:
        """The best of all on `samples`, to which only the rivals go on that win on `coarse_samples`."""
        coarse = partial(self._loss, n=self.config.coarse_samples)
        ahead = sorted((rival for rival in rivals if coarse(rival) < coarse(best)), key=coarse)
        if not ahead:
            return best
        return min([best, *ahead[: self.config.survivors]], key=partial(self._loss, n=self.config.samples))

    def _loss(self, setting: Setting, n: int) -> float:
        """What the search makes small."""
        line = next((line for line in self.lines if line.n == n and line.setting == setting), None)
        line = line or self._measure(setting, n)
        return line.fd if self.config.objective == "fd" else -line.f1

    def _tell(self, key: str, best: Setting) -> None:
        """After an option: its settings are measured, and their features can go."""
        spent = format_duration(time.monotonic() - self._began)
        told = (key, best[key], len(self.settings), self.run.images_seen, spent)
        if self.run.topology.is_main:
            shutil.rmtree(self.run.run_dir / "features", ignore_errors=True)
            runtime.log.info("%s=%s; %d settings, %d samples, %s since the start", *told)
        self.run.topology.barrier()

    # --- measuring --------------------------------------------------------------------------------------------------

    def _measure(self, setting: Setting, n: int) -> Line:
        """A new line of search.jsonl."""
        features = self._features(setting, range(n))

        def write() -> Line:
            real = self._training
            line = Line(n, setting, frechet(features, real), *search.shares(features.features, real.features))
            text = "".join(json.dumps(vars(line)) + "\n" for line in [*self.lines, line])
            write_atomically(self._path, text)
            return line

        self.lines.append(self.run.topology.on_main(write))
        self.run.images_seen = sum(self.settings.values())
        return self.lines[-1]

    def _features(self, setting: Setting, ids: range) -> FeatureSet:
        """Of the samples with these ids, from files where they were computed before."""
        topology, batch, extractor = self.run.topology, self.config.batch, self.bench.extractor
        assert extractor is not None
        folder = self.run.run_dir / "features" / key_of_facts(setting)[:24]
        chunks = [range(first, min(first + batch, ids.stop)) for first in range(ids.start, ids.stop, batch)]
        mine = chunks[topology.rank :: topology.world_size]
        missing = passes.unfinished(folder, mine)
        changed = [f"{key}={value}" for key, value in setting.items() if value != self.defaults[key]]
        watched = self.bench.watch(missing, " ".join(changed) or "the defaults")
        drawn = (self._draw(setting, chunk) for chunk in watched)
        with self.run.stoppable():  # within a block of samples, too
            passes.compute_chunks(
                folder, missing, drawn, lambda images: passes.feature_rows(extractor(images["image"])), batch
            )
        collector = passes.chunk_collector(len(ids), self._resolution, extractor, topology)
        for chunk, rows in passes.read_chunks(folder, mine):
            collector.add_chunk(range(chunk.start - ids.start, chunk.stop - ids.start), rows)
        return _in_order(collector.finish())

    def _features_of(self, images: DataSet) -> FeatureSet:
        return _in_order(passes.features_of(self.bench, images, self._resolution))

    @torch.inference_mode()
    def _draw(self, setting: Setting, ids: range) -> Batch:
        """Images uint8 [b, 3, R, R] of these samples, whose classes are as frequent as among the training images."""
        config, device = sample_config(self.config, setting), self.run.topology.device
        padded = torch.arange(ids.start, ids.start + self.config.batch).clamp_max(ids.stop - 1)
        places = (padded.double() * _GOLDEN % 1 * len(self._labels)).long()
        label, given, options = torch.from_numpy(self._labels)[places].to(device), padded.to(device), Setting()
        codes: list[Tensor] = []
        for level in self._chain.priors:
            options |= {key: value for key, value in setting.items() if key.endswith(f".{level}")}
            kept = self._codes_of(level, options)
            if ids not in kept:
                kept[ids] = draw_level(config, self._chain, level, label, codes, given, self.run.poll)
            codes.append(kept[ids])
        images = to_uint8(self._chain.vqvae.model.decode(codes))[: len(ids)]
        return {"image": images, "weight": torch.ones(len(ids))}

    def _codes_of(self, level: str, options: Setting) -> dict[range, Tensor]:
        """By ids the codes that were drawn last, if with these options: those of the upper levels stay the same while a
        lower one is tuned. Of the lowest nothing is kept."""
        if level == [*self._chain.priors][-1]:
            return {}
        if self._codes.get(level, ({}, {}))[0] != options:
            self._codes[level] = (dict(options), {})
        return self._codes[level][1]

    # --- the end ----------------------------------------------------------------------------------------------------

    def compare(self, best: Setting) -> SettingScores:
        """The best setting and the defaults, on samples and images that the search has not seen."""
        ids = range(self.config.samples, 2 * self.config.samples)
        real = self._features_of(self._reference)
        chosen, defaults = (self._features(setting, ids) for setting in (best, self.defaults))
        scores = self.run.topology.on_main(lambda: search.compare_settings(chosen, defaults, real, self.config.seed))
        self.run.images_seen += 2 * len(ids)
        return scores

    def write_results(self, best: Setting, scores: SettingScores) -> None:
        """search.png, sample.yaml, tuned.json; the samples' features go."""
        run_dir, config, extractor = self.run.run_dir, self.config, self.bench.extractor
        assert extractor is not None
        if charts := search.search_charts(self.lines, config.objective):
            write_atomically(run_dir / "search.png", charts_png(charts))
        written = {key: value for key, value in as_dict(sample_config(config, best)).items() if value not in ("", {})}
        write_atomically(run_dir / "sample.yaml", _HEADER + yaml.safe_dump(written, sort_keys=False))
        about = {"extractor": extractor.name, "weights_sha256": extractor.weights_sha256, "samples": config.samples}
        about |= {"training": self._training_words, "reference": self._reference.describe()}
        cost = {"settings": len(self.settings), "samples_drawn": self.run.images_seen}
        settings = {"objective": config.objective, "chosen": best, "defaults": self.defaults}
        tuned = settings | {"scores": scores} | about | cost
        write_json(run_dir / "tuned.json", tuned)
        runtime.log.info("%s", search.result_in_words(tuned))
        shutil.rmtree(run_dir / "features", ignore_errors=True)


def _in_order(features: FeatureSet) -> FeatureSet:
    """With moments of the rows in their order: the same to the last bit on any number of ranks."""
    return features.subset(torch.arange(len(features.features)))


def halfway(value: float, values: Sequence[float]) -> list[float]:
    """Between a value and its neighbours among sorted values."""
    here = values.index(value)
    return [round((value + other) / 2, 6) for other in values[max(0, here - 1) : here + 2] if other != value]


def plan(config: TuneSamplingConfig) -> str:
    """The most that the search can draw, for --dry-run."""
    axes = dict(axes_of(load_chain(sample_config(config, {}), torch.device("cpu")), config))
    coarse = config.rounds * sum(len(values) + 2 * config.refinements for values in axes.values())
    full = config.rounds * len(axes) * (1 + config.survivors + config.refinements)
    return (
        f"\nsearched: {', '.join(axes)}\nat most {coarse} settings of {config.coarse_samples:,} samples, of which "
        f"{full} go on to {config.samples:,}; then twice {config.samples:,} samples to compare"
    )
