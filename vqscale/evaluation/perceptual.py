"""LPIPS (Zhang et al. 2018): how different two pictures look, by the features of a verified VGG16.

In: pairs of uint8 images.  Out: one distance each. The heads (v0.1) come with the package `lpips`, the network of
torchvision's is read from a path.
"""

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vqscale.data.images import to_float
from vqscale.evaluation.features import VGG16_SHA256, MissingPackage, read_weights

_SMALLEST = 16  # px: VGG16 halves the image four times


@dataclass(frozen=True)
class PerceptualDistance:
    """`weights_sha256`: of VGG16's file, hexadecimal. `verified`: whether these are torchvision's weights."""

    weights_sha256: str
    verified: bool
    network: Any

    @torch.inference_mode()
    def __call__(self, images: Tensor, others: Tensor) -> Tensor:
        """uint8 [b, 3, h, w] twice, at their own size -> float32 [b]; 0 for equal ones. Raises ValueError below 16
        px."""
        if min(images.shape[-2:]) < _SMALLEST:
            raise ValueError(f"LPIPS needs images of {_SMALLEST} px or more, got {list(images.shape[-2:])}")
        distance: Tensor = self.network(to_float(images), to_float(others))
        return distance.flatten()


def load_lpips(weights: str, allow_unverified_weights: bool, device: torch.device | str) -> PerceptualDistance:
    """LPIPS with VGG16, version 0.1. weights: the path of torchvision's VGG16.

    Raises ValueError for a missing package, other weights, or an unknown sha256 unless `allow_unverified_weights`;
    FileNotFoundError for a missing file.
    """
    try:
        from lpips import LPIPS
    except ImportError:
        raise MissingPackage("lpips needs a package that is not here: pip install 'vqscale[lpips]'") from None
    tensors, sha256, verified = read_weights(weights, VGG16_SHA256, allow_unverified_weights, "vgg16_weights")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of arguments that torchvision has renamed
        network = LPIPS(net="vgg", pnet_rand=True, verbose=False)  # the heads are read, VGG16 follows
    try:  # net.slice2.5.weight is features.5.weight
        own = {name: tensors[f"features.{name.split('.', 1)[1]}"] for name in network.net.state_dict()}
        network.net.load_state_dict(own)
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"vgg16_weights={weights}: not the weights of VGG16 ({str(error).strip()[:160]})") from None
    return PerceptualDistance(sha256, verified, network.eval().requires_grad_(False).to(device))
