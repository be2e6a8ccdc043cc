"""Trained classifiers: uint8 images -> logits, and their accuracy on a data set.

In: a run of `train_classifier` (or its export), images.  Out: logits; top-1 and top-5 accuracy over all ranks.
Shapes: b images, r pixels per side, c classes, f features.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Float64, Int, UInt8
from torch import Tensor

from vqscale.batch import as_float64
from vqscale.data.images import to_float, to_uint8
from vqscale.evaluation.features import Extractor, load_extractor
from vqscale.sources import Source, load_model
from vqscale.topology import ALONE, Topology

CLASS_PROBABILITY = "class_probability"  # in a sample's json: of its class, by the rejection network


def network_input(images: UInt8[Tensor, "b 3 r r"], extractor: Extractor | None) -> Float[Tensor, "b ..."]:
    """What a classifier takes: floats in [-1, 1], or the features of a frozen network."""
    if extractor is None:
        return to_float(images)
    return extractor(images).pooled.clone()  # a plain tensor, of which a gradient may be taken


@torch.no_grad()
def reconstructed(vqvae: Any, images: UInt8[Tensor, "b 3 r r"]) -> UInt8[Tensor, "b 3 r r"]:
    """What a VQ-VAE in eval mode makes of images, as it would be stored."""
    return to_uint8(vqvae(to_float(images)).reconstruction)


@dataclass(frozen=True)
class ImageClassifier:
    """A trained classifier and, for one that is linear on features, the frozen network below it."""

    source: Source
    extractor: Extractor | None = None

    @classmethod
    def load(
        cls, path: str | Path, device: torch.device, weights: Mapping[str, str], topology: Topology = ALONE
    ) -> "ImageClassifier":
        """From a run or an export. `weights`: extractor -> path of its weights, where the frozen network needs one.

        Raises ValueError if the frozen network is not the one that the classifier was trained on.
        """
        source = load_model(path, "classifier", device=device, topology=topology)
        name, trained_on = source.description["features"], source.description["features_sha256"]
        if not name:
            return cls(source)
        extractor = load_extractor(name, weights.get(name, ""), allow_unverified_weights=True, device=device)
        if extractor.weights_sha256 != trained_on:
            raise ValueError(
                f"{path}: trained on features of {name} {trained_on[:12]}, these are of {extractor.weights_sha256[:12]}"
            )
        return cls(source, extractor)

    @property
    def classes(self) -> list[str]:
        return list(self.source.description["classes"])

    @torch.no_grad()
    def __call__(self, images: UInt8[Tensor, "b 3 r r"]) -> Float[Tensor, "b c"]:
        """Logits of images on the classifier's device."""
        return self.source.model(network_input(images, self.extractor))

    @torch.no_grad()
    def probabilities_of(self, images: UInt8[Tensor, "b 3 r r"], labels: Int[Tensor, " b"]) -> Float64[Tensor, " b"]:
        """The classifier's probability of each image's class, on the CPU."""
        probabilities = as_float64(self(images)).softmax(1)
        return probabilities.gather(1, labels[:, None].to(probabilities.device))[:, 0].cpu()

    def identity(self) -> dict[str, str]:
        """What identifies the classifier and the features that it judges by."""
        about = self.source.description
        return {"classifier": self.source.fingerprint, **{k: about[k] for k in ("features", "features_sha256")}}


def hits(logits: Float[Tensor, "b c"], labels: Int[Tensor, " b"]) -> Float64[Tensor, "b 2"]:
    """Whether the label is the most likely class, and whether it is among the five most likely."""
    order = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    return as_float64(torch.stack([order[:, 0], order.any(1)], dim=1))


def accuracy(logits_of: Any, batches: Iterable[Mapping[str, Any]], topology: Topology) -> tuple[float, float, int]:
    """(top-1, top-5, n) of a function from uint8 images to logits over every image of all ranks' batches."""
    sums = as_float64(torch.zeros(3, device=topology.device))
    for batch in batches:
        image, label, weight = (batch[name].to(topology.device) for name in ("image", "label", "weight"))
        weight = as_float64(weight)
        sums[:2] += (hits(logits_of(image), label) * weight[:, None]).sum(0)
        sums[2] += weight.sum()
    right, right_5, n = topology.all_reduce_(sums).tolist()
    return right / n, right_5 / n, int(n)
