"""What a plan says a rank holds is what it holds; FLOPs and activations are those of the step."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.distributed import run_ranks
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.checkpoint import checkpoint

from vqscale.config import load
from vqscale.engine import footprint, parallel
from vqscale.models.pixelcnn import PixelCNN
from vqscale.stages import train_prior
from vqscale.topology import Topology

MIB = 1 << 20
CONFIGS = Path(__file__).parents[2] / "configs" / "imagenet256"


class Stack(nn.Module):
    """Ten blocks of ten products: [512, 512] activations of one MiB each."""

    def __init__(self, checkpointing: bool):
        super().__init__()
        self.checkpointing = checkpointing
        self.blocks = nn.ModuleList(nn.Linear(512, 512, bias=False) for _ in range(10))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(self._ten, block, x, use_reentrant=False) if self.checkpointing else self._ten(block, x)
        return x

    def wrap_units(self) -> list[nn.Module]:
        return list(self.blocks)

    def _ten(self, block: nn.Module, x: Tensor) -> Tensor:
        for _ in range(10):
            x = torch.tanh(block(x))
        return x


@pytest.mark.parametrize(("checkpointing", "products", "least", "most"), [(False, 300, 100, 104), (True, 400, 19, 24)])
def test_flops_and_activations(checkpointing: bool, products: int, least: int, most: int) -> None:
    """100 outputs of tanh are kept, or 10 inputs of blocks and 10 outputs of the block that is recomputed. Three
    products per product: forward, gradient of the input, gradient of the weight; less that of the first input."""
    with FakeTensorMode():
        model, x = Stack(checkpointing), torch.zeros(512, 512)
        flops = footprint.step_flops(model, lambda: model(x).sum())
        peak = footprint.activation_bytes(model, lambda: model(x).sum())
    assert flops == (products - 1) * 2 * 512**3
    assert least * MIB <= peak <= most * MIB


def test_frozen_blocks_keep_nothing_for_backward() -> None:
    """Half of the blocks: their products are computed once, their outputs are gone, their weights have no state."""
    with FakeTensorMode():
        model, x = Stack(checkpointing=False), torch.zeros(512, 512)
        model.blocks[:5].requires_grad_(False)
        flops = footprint.step_flops(model, lambda: model(x).sum())
        peak = footprint.activation_bytes(model, lambda: model(x).sum())
    assert flops == (50 + 149) * 2 * 512**3
    assert 50 * MIB <= peak <= 54 * MIB
    how: dict[str, Any] = {"precision": "fp32", "accumulation": 1, "average": True}
    for strategy, share in (("single", 1), ("ddp", 1), ("fsdp", 2), ("zero3", 2), ("zero2", 2)):
        kept = footprint.bytes_per_rank(model, strategy, 2, 1, **how)
        assert kept["optimizer"] == 2 * kept["average"] == 10 * MIB // share, strategy
        assert kept["parameters"] == 10 * MIB // (1 if strategy == "zero2" else share)
        assert kept["gradients"] == 5 * MIB // share
    assert footprint.checkpoint_bytes(10, average=True, frozen=5) == 4 * (10 + 15)


def test_frozen_weights_are_gathered_in_forward_alone() -> None:
    how: dict[str, Any] = {"precision": "fp32", "accumulation": 2}
    for strategy, trained, frozen in (("ddp", 8, 0), ("fsdp", 20, 8), ("zero2", 12, 0), ("zero3", 24, 8)):
        sent = footprint.sent_per_step(1_000_000, strategy, 1000, 125, frozen=400_000, **how)
        assert sent == pytest.approx(600_000 * 0.999 * trained + 400_000 * 0.999 * frozen, abs=1), strategy
    sent = footprint.sent_per_step(1_000_000, "hsdp", 32, 4, precision="fp32", accumulation=1, frozen=400_000)
    assert sent == 4 * (3 * 600_000 + 400_000) * 7 // 8 + 2 * 4 * 75_000 * 3 // 4


def _paper_size_top_prior() -> PixelCNN:
    config = load(train_prior.Config, CONFIGS / "train_prior_top.yaml")
    return PixelCNN(config.model, num_codes=512, grid=(32, 32), num_classes=1000)


def _sharded(world: int) -> tuple[int, int]:
    """(elements of rank 0's shards, of the whole model) of the paper-size top prior under fsdp."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    with torch.device("meta"):
        model = _paper_size_top_prior()
    topology = Topology(0, world, 0, 8, world // 8, "fsdp", torch.device("cpu"))
    parallel._shard(model, topology, "bf16")
    parts = [p.to_local().numel() for p in model.parameters() if isinstance(p, DTensor)]
    assert len(parts) == len(list(model.parameters()))
    return sum(parts), sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("world", [512, 1024])
def test_no_rank_of_many_has_much_more_than_its_share(world: int) -> None:
    ((held, whole),) = run_ranks(_sharded, 1, world, timeout=300)
    assert held / (whole / world) <= 1.1
    with FakeTensorMode():
        model = _paper_size_top_prior()
    planned = footprint.bytes_per_rank(model, "fsdp", world, world // 8, precision="bf16", accumulation=1, average=True)
    assert planned["parameters"] == planned["gradients"] == planned["average"] == 4 * held
    assert planned["optimizer"] == 8 * held


@pytest.mark.parametrize(
    ("strategy", "accumulation", "bf16", "fp32"),
    [("single", 2, 0, 0), ("ddp", 2, 8, 8), ("fsdp", 2, 12, 20), ("zero2", 2, 12, 12), ("zero3", 2, 24, 24)],
)
def test_bytes_sent_per_weight(strategy: str, accumulation: int, bf16: int, fp32: int) -> None:
    """Rings move (n - 1) / n of a tensor: nearly all of it among many ranks."""
    for precision, expected in (("bf16", bf16), ("fp32", fp32)):
        how: dict[str, Any] = {"precision": precision, "accumulation": accumulation}
        sent = footprint.sent_per_step(1_000_000, strategy, 1000, 125, **how)
        assert sent == pytest.approx(expected * 999_000, abs=1)


def test_hsdp_sends_whole_weights_within_a_node_only() -> None:
    sent = footprint.sent_per_step(1_000_000, "hsdp", 32, 4, precision="fp32", accumulation=1)
    assert sent == 3 * 4 * 1_000_000 * 7 // 8 + 2 * 4 * 125_000 * 3 // 4


@pytest.mark.parametrize(("save", "between"), [(0.01, 1e7), (2.0, 5_000.0), (60.0, 3_600.0)])
def test_no_save_interval_loses_less(save: float, between: float) -> None:
    """Daly's equation 20 has the time of a whole run; the interval minimises it, up to the series' end."""

    def time(interval: float) -> float:
        return math.expm1((interval + save) / between) / interval

    interval = footprint.save_interval(save, between)
    assert min(time(interval * (1 + k / 100)) for k in range(-90, 300)) == pytest.approx(time(interval), rel=1e-5)
    assert time(interval) < 0.999999 * min(time(interval / 2), time(interval * 2))


def test_where_a_save_takes_longer_than_failures_are_apart() -> None:
    assert footprint.save_interval(200.0, 50.0) == 50.0
