"""Asked to stop at any moment, by any signal, twice: exit code 75, nothing half-made, and a rerun that ends alike."""

import importlib
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.stages import run_stage

from vqscale.engine.checkpoint import find_latest

Files = Callable[[Path], dict[str, bytes]]

# When -> (stage, config, what is called at that moment: module, class or "", function; at which call, signal).
MOMENTS: dict[str, tuple[str, str, str, str, int, str]] = {
    "codebook init": ("train_vqvae", "train_vqvae", "vqscale.models.vqvae:VQVAE", "_sample_vectors", 1, "SIGTERM"),
    "warm-up": ("train_vqvae", "train_vqvae", "vqscale.models.vqvae:VQVAE", "update_codebooks", 2, "SIGUSR1"),
    "a save": ("train_prior", "train_prior_top", "vqscale.engine.checkpoint:Checkpointer", "save", 1, "SIGTERM"),
    "evaluation": ("train_vqvae", "train_vqvae", "vqscale.stages.train_vqvae", "psnr_of", 1, "SIGHUP"),
    "evaluation of a prior": ("train_prior", "train_prior_top", "vqscale.stages.train_prior", "code_nll", 1, "SIGTERM"),
    "extraction": ("extract_codes", "extract_codes", "vqscale.stages.extract_codes", "_encode", 3, "SIGTERM"),
    "sampling": ("sample", "sample", "vqscale.models.sampling", "choose", 40, "SIGUSR1"),
}


def interrupt(monkeypatch: pytest.MonkeyPatch, where: str, name: str, call: int, number: signal.Signals) -> None:
    """Send the signal to this process, twice, at the `call`-th call of a function."""
    module, _, inner = where.partition(":")
    holder: Any = importlib.import_module(module)
    holder = getattr(holder, inner) if inner else holder
    real, calls = getattr(holder, name), 0

    def wrapped(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)
        return real(*arguments, **options)

    monkeypatch.setattr(holder, name, wrapped)


def results(run_dir: Path, files: Files) -> Any:
    """Tars of a run that makes tars, tensors of one that trains."""
    if found := files(run_dir):
        return found if not (run_dir / "checkpoints").is_dir() else tensors(run_dir)
    return {}


def tensors(run_dir: Path) -> dict[str, bytes]:
    latest = find_latest(run_dir / "checkpoints")
    assert latest is not None
    return {name: tensor.reshape(-1).view(torch.uint8).numpy().tobytes() for name, tensor in latest.read("").items()}


@pytest.mark.parametrize("moment", MOMENTS)
def test_stopped_by_a_signal_at_any_moment(
    chain: Path, files: Files, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    stage, name, where, function, call, number = MOMENTS[moment]
    words = ["run_dir=again"]
    if "evaluation" in moment:
        words.append("evaluate_images=62")
    with monkeypatch.context() as patch:
        interrupt(patch, where, function, call, signal.Signals[number])
        assert run_stage(stage, name, *words) == 75
    status = json.loads(Path("again/status.json").read_text())
    assert status["state"] == "stopped"
    assert status["images_seen"] == 0 if moment == "codebook init" else True
    assert not list(Path("again").rglob("*.tmp")) and not list(Path("again").rglob(".saving-*"))
    assert run_stage(stage, name, *words) == 0
    assert results(Path("again"), files) == results(chain / name, files) != {}
