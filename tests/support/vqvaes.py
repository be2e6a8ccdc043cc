"""Small VQ-VAEs for tests, their loss and one update of their codebooks."""

import torch
import torch.nn.functional as F
from support.quantizers import ALONE
from torch import Tensor, nn

from vqscale.models.init import initialise
from vqscale.models.quantizer import QuantizerConfig, Ranks
from vqscale.models.vqvae import VQVAE, VQVAEConfig, VQVAEOutput

SIZES = dict(hidden=16, residual_hidden=8, residual_layers=1)


def images(count: int = 4, resolution: int = 16, seed: int = 3) -> Tensor:
    return torch.rand(count, 3, resolution, resolution, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def vqvae(downsample=(4, 2), resolution: int = 16, seed: int = 0, fitted: bool = True, **options) -> VQVAE:
    codebook = {name: options.pop(name) for name in ("codebook", "restart_below") if name in options}
    config = VQVAEConfig(
        downsample=list(downsample),
        quantizer=QuantizerConfig(num_codes=options.pop("num_codes", 16), code_dim=8, **codebook),
        **(SIZES | options),
    )
    model = VQVAE(config, resolution=resolution)
    initialise(model, seed)
    if fitted:
        model.init_codebooks([images(8, resolution, seed=9)], seed=0)
    return model


def loss_of(model: nn.Module, image: Tensor, position: Tensor | None = None) -> Tensor:
    out: VQVAEOutput = model(image, position)
    return F.mse_loss(out.reconstruction, image) + out.commitment


def update(model: VQVAE, step: int = 0, applied: bool = True, ranks: Ranks = ALONE) -> dict[str, Tensor]:
    return model.update_codebooks(ranks, seed=0, images_seen=step, applied=applied, learning_rate=1e-3)
