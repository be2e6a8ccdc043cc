"""Training on a GPU: resumed bit for bit, unharmed by NaN, fed by workers, sharded at one rank, read on a CPU."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import priors
from support.devices import CUDA, DEVICES
from support.distributed import run_ranks
from support.stages import CONFIGS
from support.training import WIDTH, TinyConfig, TinyModel, assert_bit_identical, saved

from vqscale import cli
from vqscale.data.images import ImageReader
from vqscale.data.loader import build_loader
from vqscale.engine.loop import _on_device
from vqscale.engine.parallel import TorchEngine, make_engine
from vqscale.models.prior import nll
from vqscale.sources import load_model
from vqscale.topology import Topology, bring_up, set_arithmetic, take_down

WHOLE, HALF = "total_images=320", "total_images=160"
SHORT = ["deterministic=true", "warmup_images=32", "save_every=160", "log_every=160", "evaluate_every=0", "threads=1"]
VQVAE = ["train_vqvae", "train_vqvae", "init_images=64", *SHORT]
PRIOR = ["train_prior", "train_prior_top", "precision=bf16", "allow_collapsed_codes=true", *SHORT]


def run(device: str, stage: str, name: str, *words: str) -> None:
    """One stage of the debug configs, in this process."""
    assert cli.main([stage, str(CONFIGS / f"{name}.yaml"), f"device={device}", *words]) == 0


@pytest.fixture(scope="module", params=[pytest.param("cpu", marks=pytest.mark.slow), CUDA])
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """(device, runs/debug): a VQ-VAE and a prior trained in one go, and each once more in two halves, in `again`."""
    device, before = request.param, os.getcwd()
    os.chdir(tmp_path_factory.mktemp("runs"))
    try:
        run(device, "pack", "pack", "num_drawn=128", "samples_per_shard=32", "workers=1")
        for stage in (VQVAE, PRIOR):
            run(device, *stage, WHOLE)
            for images in (HALF, WHOLE):
                run(device, *stage, images, f"run_dir=runs/debug/again/{stage[1]}")
            if stage is VQVAE:
                run(device, "extract_codes", "extract_codes", "threads=1")
        yield device, Path.cwd() / "runs" / "debug"
    finally:
        set_arithmetic("", deterministic=False)
        os.chdir(before)


@pytest.mark.parametrize("name", ["train_vqvae", "train_prior_top"])
def test_a_resumed_run_ends_at_the_bits_of_one_in_one_go(runs: tuple[str, Path], name: str) -> None:
    _, folder = runs
    assert_bit_identical(saved(folder / name), saved(folder / "again" / name))


def test_a_checkpoint_is_read_on_the_cpu_and_on_the_device(runs: tuple[str, Path]) -> None:
    device, folder = runs
    here, there = (load_model(folder / "train_vqvae", "vqvae", device=place).model for place in ("cpu", device))
    state = {name: tensor.cpu() for name, tensor in there.state_dict().items()}
    assert_bit_identical(here.state_dict(), state)
    image = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.inference_mode():
        for one, other in zip(here.encode(image), there.encode(image.to(device)), strict=True):
            assert (one == other.cpu()).float().mean() > 0.99


def test_workers_that_start_after_the_device_give_the_same_batches(runs: tuple[str, Path]) -> None:
    """Through pinned memory, and a copy beside the work on a GPU."""
    device, folder = runs
    torch.zeros(1, device=device)
    options = {"read": ImageReader(32), "global_batch": 16, "shuffle_window": 4}
    expected = iter(build_loader(folder / "pack" / "train", workers=0, **options))
    loader = build_loader(folder / "pack" / "train", workers=2, pin_memory=device == "cuda", **options)
    found = _on_device(iter(loader), torch.device(device))
    try:
        for _ in range(12):
            batch, other = next(found), next(expected)
            assert batch["image"].device.type == device
            assert all(torch.equal(batch[name].cpu(), other[name]) for name in ("image", "label", "position", "bad"))
            (batch["image"].float() @ batch["image"].float()).sum()  # work that the next copy goes beside
    finally:
        found.close()


@pytest.mark.parametrize("device", DEVICES)
def test_a_step_whose_gradient_is_nan_changes_nothing_and_the_next_one_is_applied(device: str) -> None:
    topology = Topology(0, 1, 0, 1, 1, "single", torch.device(device))
    optimizer = {"betas": (0.9, 0.999), "weight_decay": 0.0}
    engine = TorchEngine(TinyModel(), topology, precision="fp32", accumulation=1, optimizer=optimizer)
    x = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(0)).to(device)

    def step(factor: float) -> tuple[bool, list[torch.Tensor]]:
        engine.begin_micro_batch(last=True)
        engine.backward(engine.model(x).square().mean() * factor)
        applied, _ = engine.step(1e-2, 1.0)
        return bool(applied), [tensor.clone() for tensor in engine.as_checkpoint_tensors({}).values()]

    (first, one), (second, two), (third, three) = (step(factor) for factor in (1.0, float("nan"), 1.0))
    assert (first, second, third) == (True, False, True)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(two, three, strict=True))


def losses_of(strategy: str, device: str) -> list[float]:
    """Of four steps of a small prior at one rank, in a process of its own."""
    config = TinyConfig(run_dir="", strategy="" if strategy == "fsdp" else strategy, device=device)
    topology = replace(bring_up(config), strategy=strategy)
    engine = make_engine(priors.build("pixelcnn", (4, 4)), topology, config, 1)
    codes, label = priors.draw((4, 4, 4)).to(device), torch.tensor([0, 1, 2, 3], device=device)
    losses = []
    for _ in range(4):
        engine.begin_micro_batch(last=True)
        loss = nll(engine.model(codes, label), codes)
        engine.backward(loss)
        engine.step(1e-2, 1.0)
        losses.append(float(loss.detach()))
    take_down(orderly=True)
    return losses


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("strategy", ["fsdp", "zero1"])
def test_one_rank_under_a_sharded_strategy_trains_as_a_single_process(strategy: str, device: str) -> None:
    """On a GPU under NCCL, which needs no network for itself."""
    variables = {"NCCL_SOCKET_IFNAME": "lo"}
    alone, sharded = (run_ranks(losses_of, 1, way, device, variables=variables)[0] for way in ("single", strategy))
    assert alone[-1] < alone[0]
    assert sharded == pytest.approx(alone, rel=1e-5)
