"""Trained classifiers at work: uint8 images -> logits, and how often they are right on a data set.

In: a run of `train_classifier` (or its export), images.  Out: logits [b, C]; top-1 and top-5 accuracy over all ranks.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vqscale.data.images import to_float, to_uint8
from vqscale.evaluation.features import Extractor, load_extractor
from vqscale.sources import Source, load_classifier
from vqscale.topology import Topology

CLASS_PROBABILITY = "class_probability"  # in a sample's json: what the rejection network thinks of its class


def network_input(images: Tensor, extractor: Extractor | None) -> Tensor:
    """uint8 [b, 3, R, R] -> what a classifier takes: floats in [-1, 1], or the features of a frozen network."""
    if extractor is None:
        return to_float(images)
    return extractor(images).pooled.clone()  # a plain tensor, of which a gradient may be taken


@torch.no_grad()
def reconstructed(vqvae: Any, images: Tensor) -> Tensor:
    """uint8 [b, 3, R, R] -> what a VQ-VAE in eval mode makes of them, uint8 as it would be stored."""
    return to_uint8(vqvae(to_float(images)).reconstruction)


@dataclass(frozen=True)
class ImageClassifier:
    """A trained classifier and, for one that is linear on features, the frozen network below it."""

    source: Source
    extractor: Extractor | None = None

    @classmethod
    def load(
        cls, path: str | Path, device: torch.device, weights: Mapping[str, str] | None = None
    ) -> "ImageClassifier":
        """From a run or an export. `weights`: extractor -> path of its weights, where the frozen network needs one.

        Raises ValueError if the frozen network is not the one that the classifier was trained on.
        """
        source = load_classifier(path, device=device)
        name, trained_on = source.description["features"], source.description["features_sha256"]
        if not name:
            return cls(source)
        extractor = load_extractor(
            name, weights=(weights or {}).get(name, ""), allow_unverified_weights=True, device=device
        )
        if extractor.weights_sha256 != trained_on:
            raise ValueError(
                f"{path}: trained on features of {name} {trained_on[:12]}, these are of {extractor.weights_sha256[:12]}"
            )
        return cls(source, extractor)

    @property
    def classes(self) -> list[str]:
        return list(self.source.description["classes"])

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Logits [b, C] of uint8 [b, 3, R, R] on the classifier's device."""
        return self.source.model(network_input(images, self.extractor))

    @torch.no_grad()
    def probabilities_of(self, images: Tensor, labels: Tensor) -> Tensor:
        """How likely the classifier finds each image's class: float64 [b], on the CPU."""
        likely = self(images).double().softmax(1)
        return likely.gather(1, labels[:, None])[:, 0].cpu()

    def describe(self) -> dict[str, str]:
        """What must be known of a network that judges: which one it is, and what it sees with."""
        about = self.source.description
        return {"classifier": self.source.fingerprint, **{k: about[k] for k in ("features", "features_sha256")}}


def hits(logits: Tensor, labels: Tensor) -> Tensor:
    """float64 [b, 2]: whether the label is the likeliest class, and whether it is among the five likeliest."""
    order = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    return torch.stack([order[:, 0], order.any(1)], dim=1).double()


def accuracy(logits_of: Any, batches: Iterable[Mapping[str, Any]], topology: Topology) -> tuple[float, float, int]:
    """(top-1, top-5, n) of a function from uint8 images to logits over every image of all ranks' batches."""
    sums = torch.zeros(3, dtype=torch.float64, device=topology.device)
    for batch in batches:
        image, label, weight = (batch[name].to(topology.device) for name in ("image", "label", "weight"))
        weight = weight.double()
        sums[:2] += (hits(logits_of(image), label) * weight[:, None]).sum(0)
        sums[2] += weight.sum()
    right, right_5, n = topology.all_reduce_(sums).tolist()
    return right / n, right_5 / n, int(n)
