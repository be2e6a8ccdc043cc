"""The Fréchet distance of a model in training, at one evaluation after another.

In: uint8 images on every rank, those of the model and, once, those of the reference.  Out: the distance, equal at any
number of ranks. The reference's moments are cached in the run directory, under the facts that they are true for.
Shapes: b images, h w pixels.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from vqscale.engine.loop import FitConfig
from vqscale.engine.side_work import SideWork
from vqscale.evaluation.features import Extractor, load_extractor
from vqscale.evaluation.metrics import frechet
from vqscale.evaluation.passes import cached_statistics
from vqscale.evaluation.statistics import FeatureSet, Moments, save_statistics, statistics_path
from vqscale.fields import Choice, PathText
from vqscale.runtime import Run, log


@dataclass(frozen=True)
class DistanceConfig(FitConfig):
    """A trainer that can measure a Fréchet distance at its evaluations."""

    outputs: ClassVar[tuple[str, ...]] = (*FitConfig.outputs, "statistics")

    evaluate_fd: bool = False  # also a Fréchet distance: docs/evaluation.md, "While training"
    fd_extractor: Annotated[str, Choice("lite0", "lite2", "inception")] = "lite0"  # the network of its features
    fd_weights: PathText = ""  # path of that network's weights; inception needs it
    allow_unverified_weights: bool = False  # take weights of an unknown sha256


class TrainingDistance:
    """Between images of a model and a reference: `begin`, `add` for every batch, `figures`; on all ranks alike.

    `reference`: its moments; None until its images were added. `cost`: of what is timed with it, and of `figures`.
    """

    def __init__(self, extractor: Extractor, run: Run, key: str, facts: Mapping[str, Any]):
        """key: of metrics.jsonl. facts: what the reference depends on besides the extractor; `n` images are in it.

        Raises ValueError where the cached reference is one of other facts. Collective.
        """
        self.cost = SideWork("FD", run.topology.device)
        self._extractor, self._run, self._key = extractor, run, key
        self._facts = {**facts, "weights": extractor.weights_sha256, "preprocessing": extractor.preprocessing}
        self._path = statistics_path(run.run_dir / "statistics", self._facts)
        cached = cached_statistics(self._path, self._facts)
        self.reference = cached if all(run.topology.gather(cached is not None)) else None

    def begin(self) -> None:
        """An evaluation begins; what an evaluation that was left has added is gone."""
        self._moments: dict[str, Moments] = {}

    def add(self, images: UInt8[Tensor, "b 3 h w"], weight: Float[Tensor, " b"], to: str = "model") -> None:
        """Images of the model or, with to="reference", of the reference. weight: 0 (padding) and 1."""
        with torch.autocast(images.device.type, enabled=False):
            features = self._extractor(images).pooled
        if to not in self._moments:
            self._moments[to] = Moments(features.shape[1], features.device)
        self._moments[to].add(features, weight)

    def figures(self) -> Iterator[tuple[str, float]]:
        """The distance, and what it cost. Rank 0 has the value; NaN is where it is not defined, and the log says why.
        Collective."""
        with self.cost.timed():
            value = self._value()
        yield self._key, value
        yield from self.cost.figures().items()

    def _value(self) -> float:
        for moments in self._moments.values():
            moments.reduce_(self._run.topology.all_reduce_)
        try:
            if self.reference is None:
                self.reference = self._cached(_statistics(self._moments["reference"]))
            model = _statistics(self._moments["model"])
            return frechet(model, self.reference) if self._run.topology.is_main else math.nan
        except (ValueError, torch.linalg.LinAlgError) as error:
            log.warning("%s at %s images is null: %s", self._key, f"{self._run.images_seen:,}", error)
            return math.nan

    def _cached(self, reference: FeatureSet) -> FeatureSet:
        """The reference, written to the cache if none of its images is missing."""
        if self._run.topology.is_main and reference.n == self._facts["n"]:
            try:
                save_statistics(self._path, reference, self._facts)
            except OSError as error:
                log.warning("%s: not cached: %s", self._path, error.strerror)
        return reference


def _statistics(moments: Moments) -> FeatureSet:
    gaussian, none = moments.gaussian(), torch.zeros(0, moments.width)
    if not gaussian.covariance.isfinite().all():
        raise ValueError(f"the features of {gaussian.n} images are not finite")
    return FeatureSet(gaussian.n, {"pooled": gaussian}, none, none)


def open_distance(config: DistanceConfig, run: Run, key: str, **facts: Any) -> TrainingDistance:
    """The distance that `evaluate_fd=true` asks for. key: with {} for its name, `fid` or `fd_<extractor>`.

    Raises ValueError, before training, where there is no evaluation, are too few images, or is no such network.
    """
    if not config.evaluate_every:
        raise ValueError("evaluate_fd=true: evaluate_every=0 turns evaluations off; choose how often there is one")
    if facts["n"] <= 2:
        raise ValueError(f"evaluate_fd=true: needs more than 2 held-out images, there are {facts['n']}")
    unverified, device = config.allow_unverified_weights, run.topology.device
    try:
        name, weights = config.fd_extractor, config.fd_weights
        extractor = load_extractor(name, weights, allow_unverified_weights=unverified, device=device)
    except (ValueError, FileNotFoundError) as error:  # in the words of this config
        raise type(error)(re.sub(r"\b(extractor|weights)=", r"fd_\1=", str(error))) from None
    return TrainingDistance(extractor, run, key.format("fid" if name == "inception" else f"fd_{name}"), facts)
