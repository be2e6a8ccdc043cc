"""Codes: how they are used, and their likelihood under the priors, exact at any number of ranks.

In: a `Bench`, code shards and priors; without code shards, the usage of the reconstructions' codes.  Out: scores, and
`CodeResults` for the report: usage by level, nats per code by class.
Shapes: n samples, h w the grid of a level, k codes.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from jaxtyping import Float64, Int, Int64
from torch import Tensor, nn

from vqscale.batch import codes_of
from vqscale.data.codes import CodeReader
from vqscale.data.sequential import sequential_batches
from vqscale.evaluation import metrics
from vqscale.evaluation.inputs import DataSet, Inputs
from vqscale.evaluation.passes import Bench
from vqscale.evaluation.reconstructions import USAGE, Reconstructions
from vqscale.evaluation.scores import Score, keys_of
from vqscale.models.codebook import perplexity
from vqscale.models.prior import code_nll
from vqscale.seeding import generator, key_of
from vqscale.sources import Source
from vqscale.topology import Topology


@dataclass(frozen=True)
class Codes:
    """The codes of n samples in stored order, levels top first. `about`: their data set in one phrase."""

    labels: Int64[Tensor, " n"]
    levels: dict[str, Tensor]  # int32 [n, h, w]
    num_codes: int
    about: str

    def __len__(self) -> int:
        return len(self.labels)

    def above(self, level: str) -> list[str]:
        """Names of the levels above `level`, top first."""
        names = list(self.levels)
        return names[: names.index(level)]

    def usage(self, level: str) -> Int[np.ndarray, " k"]:
        """How often each code of a level occurs."""
        return np.bincount(self.levels[level].flatten().numpy(), minlength=self.num_codes)


def read_codes(data: DataSet) -> Codes:
    """All codes of code shards, or the first `data.limit`; the unflipped view.

    Every rank reads all of them. Raises ValueError for a sample that can't be read.
    """
    extra, total = data.manifest.extra, data.n
    reader = CodeReader(extra["levels"], views=extra["views"], num_codes=extra["num_codes"])
    batches = list(sequential_batches(data.folder, read=reader, batch=min(256, total), limit=total, cache=data.cache))
    weight = torch.cat([batch["weight"] for batch in batches])
    if int(weight.sum()) != total:
        raise ValueError(f"codes={data.folder}: {total - int(weight.sum())} of {total} samples could not be read")
    levels = {name: torch.cat([codes_of(batch, name) for batch in batches])[:total] for name in extra["levels"]}
    labels = torch.cat([batch["label"] for batch in batches])[:total]
    return Codes(labels, levels, extra["num_codes"], data.describe())


@dataclass(frozen=True)
class Likelihood:
    """By class: nats summed over the codes of its samples, and how many codes those are."""

    nats: Float64[Tensor, " classes"]
    codes: Float64[Tensor, " classes"]

    def per_code(self) -> float:
        """Mean nats per code over all samples."""
        return float(self.nats.sum() / self.codes.sum())

    def by_class(self) -> dict[int, float]:
        """Mean nats per code of each class that has samples."""
        return {label: float(self.nats[label] / n) for label, n in enumerate(self.codes.tolist()) if n}


@torch.inference_mode()
def likelihood(
    prior: nn.Module,
    codes: Codes,
    level: str,
    topology: Topology,
    *,
    batch: int = 32,
    labels_of: Int64[Tensor, " n"] | None = None,
    upper_of: Int64[Tensor, " n"] | None = None,
    watch: Callable[[range], Iterable[int]] = iter,
) -> Likelihood:
    """Nats of `level`'s codes under a prior in eval mode, over all samples of all ranks, by their own class.

    labels_of, upper_of: the samples whose class or upper codes each sample is given instead of its own.
    watch: passes on where each batch starts, equally often on every rank.
    """
    own = torch.arange(len(codes))
    labels_of, upper_of = (own if rows is None else rows for rows in (labels_of, upper_of))
    sums = torch.zeros(2, int(codes.labels.max()) + 1, dtype=torch.float64, device=topology.device)
    for first in watch(range(0, len(codes), topology.world_size * batch)):
        rows = own[first + topology.rank * batch :][:batch]
        if not len(rows):
            continue
        target = codes.levels[level][rows].long().to(topology.device)
        upper = [codes.levels[name][upper_of[rows]].long().to(topology.device) for name in codes.above(level)]
        logits = prior(target, codes.labels[labels_of[rows]].to(topology.device), upper)
        each = code_nll(logits, target).double().flatten(1)
        own_class = codes.labels[rows].to(topology.device)
        sums[0].index_add_(0, own_class, each.sum(1))
        sums[1].index_add_(0, own_class, torch.full_like(each[:, 0], each.shape[1]))
    nats, counts = topology.all_reduce_(sums).cpu()
    return Likelihood(nats, counts)


def other_samples(n: int, seed: int) -> Int64[Tensor, " n"]:
    """For each of n samples another one, each chosen once: one cycle addressed by the seed."""
    order = torch.randperm(n, generator=generator(seed, key_of("other samples")))
    partner = torch.empty(n, dtype=torch.int64)
    partner[order] = order.roll(-1)
    return partner


def other_classes(labels: Int64[Tensor, " n"], seed: int) -> Int64[Tensor, " n"]:
    """For each sample one of another class, each chosen once.

    Among the samples sorted by class, the one as far ahead as the largest class is big. Where a class holds more than
    half of the samples, no such exchange exists and some keep their class.
    """
    shuffled = torch.randperm(len(labels), generator=generator(seed, key_of("other classes")))
    order = shuffled[labels[shuffled].argsort(stable=True)]
    largest = int(torch.bincount(labels).max())
    partner = torch.empty_like(labels)
    partner[order] = order.roll(-min(largest, max(1, len(labels) // 2)))
    return partner


def bits_per_dim(nats_per_code: Mapping[str, float], grids: Mapping[str, tuple[int, int]], resolution: int) -> float:
    """All levels' nats per image / (ln 2 · 3 · R²): what the codes alone cost per pixel value.

    Not a likelihood of images: the decoder's error is not coded. Comparable between our runs, not with papers.
    """
    nats = sum(nats_per_code[level] * h * w for level, (h, w) in grids.items())
    return nats / (math.log(2) * 3 * resolution**2)


# --- scores -----------------------------------------------------------------------------------------------------------

_SHUFFLED = ("nll_shuffled_class", "nll_shuffled_upper")
_OWN_CODES = "a figure of this tokenizer's codes on this data set"
_ONLY_CODES = "of the codes alone: what the decoder gets wrong is not coded"


@dataclass(frozen=True)
class CodeResults:
    """For the report. usage: counts [k] by level. nll_by_class: level -> class -> nats per code."""

    usage: dict[str, np.ndarray] = field(default_factory=dict)
    nll_by_class: dict[str, dict[str, float]] = field(default_factory=dict)


def leave_out_codes(bench: Bench, inputs: Inputs) -> None:
    """Without codes or priors; and likelihoods that the config does not ask for."""
    scores, config = bench.scores, bench.config
    if inputs.codes is None:
        scores.leave_out([*keys_of("nll"), "order0_entropy"], inputs.absent["codes"])
        if inputs.vqvae is None or not isinstance(inputs.reference, DataSet):
            scores.leave_out(USAGE, inputs.absent["codes"])
        return
    levels = inputs.codes.manifest.extra["levels"]
    missing = {level: inputs.absent[f"prior_{level}"] for level in levels if level not in inputs.priors}
    if len(missing) == len(levels):
        scores.leave_out(keys_of("nll"), "; ".join(missing.values()))
        return
    for level, why in missing.items():
        scores.leave_out_level("nll", level, why)
    if missing:
        why = f"it needs a prior for every level, there is none for {', '.join(missing)}"
        scores.leave_out(["bits_per_dim"], why)
    if not config.nll_train_images:
        scores.leave_out(["nll_train"], "nll_train_images=0")
    if not config.shuffled_conditioning:
        scores.leave_out(_SHUFFLED, "shuffled_conditioning=false")


def score_codes(bench: Bench, inputs: Inputs, reconstructions: Reconstructions | None) -> CodeResults:
    """Usage of the codes, their order-0 entropy, and their likelihood under the priors."""
    scores = bench.scores
    if inputs.codes is None:
        if reconstructions is None:
            return CodeResults()
        assert isinstance(inputs.reference, DataSet)
        _score_usage(bench, reconstructions.usage, reconstructions.n, inputs.reference.describe())
        return CodeResults(reconstructions.usage)
    if not scores.wants(*keys_of("nll"), *USAGE, "order0_entropy"):
        return CodeResults()
    assert inputs.train_codes is not None
    codes = read_codes(inputs.codes)
    usage = {level: codes.usage(level) for level in codes.levels}
    _score_usage(bench, usage, len(codes), codes.about)
    train_usage = inputs.train_codes.manifest.extra["usage"]
    for level in codes.levels:
        entropy = metrics.order0_entropy(usage[level], np.asarray(train_usage[level], np.float64))
        _put(bench, f"order0_entropy/{level}", entropy, codes)
    return CodeResults(usage, _score_likelihood(bench, inputs, codes))


def _put(bench: Bench, key: str, value: float, codes: Codes, reason: str = _OWN_CODES) -> None:
    bench.scores.put(key, Score(value, len(codes), codes.about, reason=reason))


def _score_usage(bench: Bench, usage: Mapping[str, np.ndarray], n: int, about: str) -> None:
    for level, counts in usage.items():
        values = {"perplexity": float(perplexity(torch.from_numpy(counts))), "used_codes": float((counts > 0).sum())}
        for key, value in values.items():
            bench.scores.put(f"{key}/{level}", Score(value, n, about, reason=_OWN_CODES))


# --- likelihood -------------------------------------------------------------------------------------------------------


def _score_likelihood(bench: Bench, inputs: Inputs, codes: Codes) -> dict[str, dict[str, float]]:
    """Nats and bits per code of every level that has a prior. Returns the nats by level and class."""
    scores = bench.scores
    if not scores.pending(keys_of("nll")):
        return {}
    assert inputs.codes is not None and inputs.train_codes is not None
    manifest = inputs.codes.manifest
    priors = {level: inputs.priors[level] for level in codes.levels if level in inputs.priors}
    by_level = {}
    for level, prior in priors.items():
        by_level[level] = _likelihood(bench, prior, codes, level)
        nats = by_level[level].per_code()
        _put(bench, f"nll/{level}", nats, codes)
        _put(bench, f"bits_per_code/{level}", nats / math.log(2), codes)
        _score_shuffled(bench, prior, codes, level)
    if scores.pending(["bits_per_dim"]):
        nats_per_code = {level: one.per_code() for level, one in by_level.items()}
        value = bits_per_dim(nats_per_code, manifest.extra["levels"], manifest.extra["resolution"])
        _put(bench, "bits_per_dim", value, codes, _ONLY_CODES)
    if scores.pending(["nll_train"]):
        _score_train_nll(bench, priors, read_codes(inputs.train_codes))
    for name in scores.pending(_SHUFFLED):
        if not any(key.startswith(name) for key in scores.by_key):
            scores.leave_out([name], "there is nothing to shuffle")
    return {
        level: {manifest.classes[label]: nats for label, nats in one.by_class().items() if math.isfinite(nats)}
        for level, one in by_level.items()
    }


def _likelihood(bench: Bench, prior: Source, codes: Codes, level: str, **exchanged: Tensor) -> Likelihood:
    batch, watch = bench.config.batch, partial(bench.watch, title=f"NLL {level}")
    return likelihood(prior.model, codes, level, bench.topology, batch=batch, watch=watch, **exchanged)


def _score_shuffled(bench: Bench, prior: Source, codes: Codes, level: str) -> None:
    """Nats with another sample's class, and with another sample's upper codes: what the conditioning is worth."""
    exchanges: dict[str, dict[str, Tensor]] = {}
    if len(codes.labels.unique()) > 1:
        exchanges["nll_shuffled_class"] = {"labels_of": other_classes(codes.labels, bench.config.seed)}
    if codes.above(level) and len(codes) > 1:
        exchanges["nll_shuffled_upper"] = {"upper_of": other_samples(len(codes), bench.config.seed)}
    for key in bench.scores.pending(exchanges):
        value = _likelihood(bench, prior, codes, level, **exchanges[key]).per_code()
        _put(bench, f"{key}/{level}", value, codes)


def _score_train_nll(bench: Bench, priors: Mapping[str, Source], codes: Codes) -> None:
    """Nats per code on the first training samples: the distance to the held-out ones is overfitting."""
    for level, prior in priors.items():
        _put(bench, f"nll_train/{level}", _likelihood(bench, prior, codes, level).per_code(), codes)
