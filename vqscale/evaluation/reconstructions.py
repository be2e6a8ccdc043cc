"""How well a VQ-VAE reproduces images: errors, the distance between the two sets, the usage of codes, and examples.

In: a `Bench`, a VQ-VAE and reference images.  Out: scores, equal at any number of ranks, and `ReconstructionResults`:
the figures, and pictures for the report.
Shapes: b images, m examples, h w pixels, k codes.
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from vqscale.batch import Batch
from vqscale.data.images import to_float, to_uint8
from vqscale.evaluation.classify import reconstructed
from vqscale.evaluation.features import Extractor, PerceptualDistance
from vqscale.evaluation.inputs import DataSet, Inputs, reference_facts
from vqscale.evaluation.intervals import frechet_error, interval
from vqscale.evaluation.metrics import frechet, psnr, ssim
from vqscale.evaluation.passes import Bench, Chunks, Rows, chunk_collector, chunked_pass, feature_rows, features_of
from vqscale.evaluation.protocols import UNVERIFIED, Facts, Standing, extractor_facts, judge
from vqscale.evaluation.scores import Score, keys_of, score_or_null
from vqscale.evaluation.statistics import FeatureSet
from vqscale.sources import Source
from vqscale.topology import Topology

USAGE = ("perplexity", "used_codes")  # taken from the reconstructions' codes where there are no code shards
_DISTANCES = ("reconstruction_fid", "reconstruction_fd_lite0", "reconstruction_fd_lite2")


@dataclass(frozen=True)
class Reconstructions:
    """Figures of n images.

    mse: of the plain output in [-1, 1] units, as in training. psnr, ssim, lpips: means over images of the uint8
    pictures; lpips is None where it was not computed. errors: standard errors of these means. usage: counts [k] by
    level.
    """

    n: int
    mse: float
    psnr: float
    ssim: float
    lpips: float | None
    errors: dict[str, float]
    usage: dict[str, np.ndarray]
    features: FeatureSet | None


@dataclass(frozen=True)
class Examples:
    """Images spread evenly over a set, what the VQ-VAE makes of them, and the names of their classes."""

    originals: UInt8[Tensor, "m 3 h w"]
    pictures: UInt8[Tensor, "m 3 h w"]
    names: list[str]


@dataclass(frozen=True)
class ReconstructionResults:
    """The figures, from which codes take their usage, and examples for the report."""

    figures: Reconstructions | None = None
    examples: Examples | None = None


def leave_out_reconstructions(bench: Bench, inputs: Inputs) -> None:
    """Without a VQ-VAE or reference images."""
    if why := inputs.absent.get("vqvae") or inputs.why_no_images():
        bench.scores.leave_out(keys_of("reconstruction"), why)


def score_reconstructions(bench: Bench, inputs: Inputs) -> ReconstructionResults:
    """Errors of the VQ-VAE on the reference images, and the distance between them and what it makes of them."""
    scores, config = bench.scores, bench.config
    if inputs.vqvae is None or not isinstance(inputs.reference, DataSet):
        return ReconstructionResults()
    data, model = inputs.reference, inputs.vqvae.model
    needed = scores.pending(keys_of("reconstruction")) or (inputs.codes is None and scores.wants(*USAGE))
    return ReconstructionResults(
        _score(bench, inputs.vqvae, data) if needed else None,
        examples_of(model, data, config.num_reconstructions, bench.topology) if config.num_reconstructions else None,
    )


def _score(bench: Bench, source: Source, data: DataSet) -> Reconstructions:
    scores, config, resolution = bench.scores, bench.config, source.description["resolution"]
    distances = scores.pending(_DISTANCES)
    extractor, perceptual = (bench.extractor if distances else None), bench.perceptual
    networks = [network.weights_sha256 for network in (extractor, perceptual) if network is not None]
    facts = {"vqvae": source.fingerprint, "data": data.manifest.fingerprint, "n": data.n, "networks": networks}
    rows = reconstruction_rows(source.model, bench.topology, extractor, perceptual)
    with chunked_pass(bench, facts, data, resolution, rows, "reconstructions") as chunks:
        with_lpips = perceptual is not None
        figures = gather_reconstructions(chunks, source.model, data.n, bench.topology, extractor, with_lpips)
    about, of_reference = data.describe(), reference_facts(data)

    def standing(key: str, facts: Facts) -> Standing:
        return judge(key, of_reference | facts, config.protocol)

    for key, name in (("reconstruction_mse", "mse"), ("psnr", "psnr"), ("ssim", "ssim")):
        mean, error = partial(getattr, figures, name), partial(figures.errors.__getitem__, name)
        scores.put(key, score_or_null(mean, data.n, about, None, standing(key, {}), error))
    if perceptual is not None and figures.lpips is not None:
        where = standing("lpips", {UNVERIFIED: not perceptual.verified})
        network = "vgg16, LPIPS 0.1", perceptual.weights_sha256, "none"
        lpips = Score(figures.lpips, data.n, about, *network, reason=where.reason, preparation=where.preparation)
        scores.put("lpips", replace(lpips, interval=interval(figures.lpips, figures.errors["lpips"])))
    if (generated := figures.features) is not None:
        real = features_of(bench, data, resolution)
        for key in distances:
            stands, distance = standing(key, extractor_facts(extractor)), partial(frechet, generated, real)
            deviation = partial(frechet_error, generated, real, paired=True)
            scores.put(key, score_or_null(distance, data.n, about, extractor, stands, deviation))
    return figures


def reconstruction_rows(
    vqvae: Any, topology: Topology, extractor: Extractor | None, perceptual: PerceptualDistance | None
) -> Rows:
    """Batches -> errors, codes, and features of the pictures, a row per image."""

    @torch.inference_mode()
    def rows(batch: Batch) -> dict[str, Tensor]:
        image = batch["image"].to(topology.device)
        target = to_float(image)
        output = vqvae(target)
        picture = to_uint8(output.reconstruction)
        error = (output.reconstruction.double() - target.double()).square().flatten(1).mean(1)
        values = {"mse": error, "psnr": psnr(picture, image), "ssim": ssim(picture, image)}
        if perceptual is not None:
            values["lpips"] = perceptual(picture, image)
        for name, codes in zip(vqvae.level_names, output.codes, strict=True):
            values[f"codes/{name}"] = codes.int()
        return values | (feature_rows(extractor(picture)) if extractor is not None else {})

    return rows


def gather_reconstructions(
    chunks: Chunks, vqvae: Any, total: int, topology: Topology, extractor: Extractor | None, with_lpips: bool
) -> Reconstructions:
    """The chunks of all ranks as one. Every rank must call it."""
    names = ["mse", "psnr", "ssim"] + ["lpips"] * with_lpips
    device = topology.device
    sums = torch.zeros(2, len(names), dtype=torch.float64, device=device)
    usage = {name: torch.zeros(vqvae.num_codes, dtype=torch.int64, device=device) for name in vqvae.level_names}
    collector = chunk_collector(total, vqvae.resolution, extractor, topology) if extractor is not None else None
    for chunk, rows in chunks:
        values = torch.stack([rows[name].double() for name in names])
        sums += torch.stack([values.sum(1), values.square().sum(1)]).to(device)
        for name, counts in usage.items():
            counts += torch.bincount(rows[f"codes/{name}"].flatten(), minlength=len(counts)).to(device)
        if collector is not None:
            collector.add_chunk(chunk, rows)
    for tensor in (sums, *usage.values()):
        topology.all_reduce_(tensor)
    means, squares = sums / total
    variances = (squares - means.square()).clamp_min(0) / (total - 1) if total > 1 else torch.full_like(means, math.nan)
    errors = dict(zip(names, variances.sqrt().tolist(), strict=True))
    mse, ratio, similarity, *distance = means.tolist()
    on_cpu = {name: counts.cpu().numpy() for name, counts in usage.items()}
    features = collector.finish() if collector is not None else None
    return Reconstructions(total, mse, ratio, similarity, distance[0] if distance else None, errors, on_cpu, features)


def examples_of(vqvae: Any, data: DataSet, count: int, topology: Topology) -> Examples:
    """`count` > 0 images and what the VQ-VAE makes of them. Raises ValueError for a damaged one."""
    images = data.images_at(spread(data.n, count).tolist(), vqvae.resolution)
    originals = torch.stack([image for image, _ in images])
    pictures = reconstructed(vqvae, originals.to(topology.device)).cpu()
    return Examples(originals, pictures, [name for _, name in images])


def spread(total: int, count: int) -> Int64[Tensor, " m"]:
    """`count` positions (at most `total`) spread evenly over 0 … total - 1, increasing."""
    count = min(total, count)
    return (2 * torch.arange(count) + 1) * total // (2 * max(1, count))
