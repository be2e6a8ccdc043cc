"""Small quantizers for tests, and one update of their codebook."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vqscale.models.quantizer import (
    QuantizerConfig,
    VectorQuantizer,
    update_quantizers,
)

K, D = 8, 4


class Rank(NamedTuple):
    """One of several ranks, with a sum over all of them."""

    rank: int
    world_size: int
    all_reduce_: Callable[[Tensor], object]


ALONE = Rank(0, 1, lambda total: None)


def quantizer(**options) -> VectorQuantizer:
    options = {"num_codes": K, "code_dim": D, "restart_below": 0.0, "decay_warmup": 0} | options
    made = VectorQuantizer(QuantizerConfig(**options))
    made.set_codebook(torch.randn(made.embedding.shape, generator=torch.Generator().manual_seed(1)))
    return made


def inputs(images: int = 6, side: int = 4, seed: int = 2, dim: int = D) -> Tensor:
    return torch.randn(images, dim, side, side, generator=torch.Generator().manual_seed(seed))


def update(q: VectorQuantizer, images: int, **options) -> dict[str, Tensor]:
    options = {"ranks": ALONE, "key": 7, "applied": True, "learning_rate": 1e-2} | options
    return update_quantizers({"top": q}, images=images, **options)


def learn(q: VectorQuantizer, z: Tensor) -> dict[str, Tensor]:
    q(z, torch.arange(len(z)))
    return update(q, len(z))


def state(q: VectorQuantizer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in q.state_dict().items()}


def with_dead_codes(**options) -> VectorQuantizer:
    q = quantizer(restart_below=0.2, **options)
    q.embedding[[2, 5]] += 100
    q.embedding_sum.copy_(q.embedding)
    q.cluster_size.fill_(6)
    q.cluster_size[[2, 5]] = 0.1
    q.embedding_sum.copy_(q.embedding * q.cluster_size[:, None])
    return q
