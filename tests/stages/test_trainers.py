"""What trainers share: data that is away, inputs that are stale, codebooks that take their time."""

import dataclasses
import json
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.stages import CONFIGS, run_stage
from support.vqvaes import images, vqvae

from vqscale import cli
from vqscale.data.images import to_float, to_uint8
from vqscale.data.shards import Manifest
from vqscale.files import read_json
from vqscale.models.vqvae import VQVAE
from vqscale.sources import load_model
from vqscale.stages import train_vqvae
from vqscale.stages.train_vqvae import TrainVQVAEConfig

TRAINERS = [
    ("train_vqvae", "train_vqvae", "pack"),
    ("train_prior", "train_prior_top", "extract_codes"),
    ("train_classifier", "train_classifier_real", "pack"),
]


@pytest.mark.parametrize(("stage", "name", "data"), TRAINERS)
def test_a_finished_run_stays_done_without_its_data(
    chain: Path, capsys: pytest.CaptureFixture[str], stage: str, name: str, data: str
) -> None:
    before = read_json(chain / name / "status.json")
    shutil.move(chain / data, chain / "elsewhere")
    assert run_stage(stage, name) == 0
    assert f"nothing left to do: already trained on {before['images_seen']:,} images" in capsys.readouterr().err
    after = read_json(chain / name / "status.json")
    assert (after["state"], after["images_seen"]) == ("done", before["images_seen"])
    assert run_stage(stage, name, f"total_images={2 * before['images_seen']}") == 1  # there is more to do, without data
    assert data in capsys.readouterr().err


@pytest.mark.parametrize(("stage", "name", "data"), TRAINERS)
def test_inputs_that_have_changed_are_named_and_fresh_starts_over(
    chain: Path, capsys: pytest.CaptureFixture[str], stage: str, name: str, data: str
) -> None:
    folder = chain / data / "train"
    manifest = Manifest.load(folder)
    extra: dict[str, Any] = {**manifest.extra, "tokenizer": "sha256:" + 64 * "7"} if data == "extract_codes" else {}
    Manifest.of(manifest.kind, manifest.shards[:-1], manifest.classes, manifest.transform, extra).save(folder)
    assert run_stage(stage, name) == 1
    told = capsys.readouterr().err
    assert f"runs/debug/{name}: made of other inputs: data was sha256:" in told and "fresh=true" in told
    assert ("tokenizer was sha256:" in told) == (data == "extract_codes")
    assert read_json(chain / name / "status.json")["state"] == "done"
    small = ["fresh=true", "total_images=64", "global_batch=32", "save_every=64", "evaluate_every=0"]
    assert run_stage(stage, name, *small) == 0
    assert sorted(path.name for path in (chain / name / "checkpoints").iterdir()) == ["000000000064"]


def test_codebooks_start_before_the_loss_of_checkpoints_could_be_seen(
    chain: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The refusal comes first, and the start of the codebooks shows how far it is."""
    shutil.rmtree(chain / "train_vqvae" / "checkpoints")
    assert run_stage("train_vqvae", "train_vqvae") == 1
    told = capsys.readouterr().err
    assert "the checkpoints of this run are gone" in told and "codebook initialisation" not in told
    assert run_stage("train_vqvae", "train_vqvae", "fresh=true", "total_images=32", "evaluate_every=0") == 0
    assert "codebook initialisation: 100%" in capsys.readouterr().err


def test_inputs_are_recorded_at_the_first_start(whole_chain: Path) -> None:
    codes = json.loads((whole_chain / "extract_codes" / "train" / "dataset.json").read_text())
    recorded = read_json(whole_chain / "train_prior_top" / "inputs.json")
    assert recorded["tokenizer"] == codes["extra"]["tokenizer"]
    assert recorded["data"] == Manifest.load(whole_chain / "extract_codes" / "train").fingerprint


def test_the_same_images_may_say_less_of_their_preparation(chain: Path) -> None:
    """As tars do that were packed here and indexed elsewhere."""
    folder = chain / "pack" / "train"
    dataclasses.replace(Manifest.load(folder), transform={"resolution": 32}).save(folder)
    assert run_stage("train_vqvae", "train_vqvae", "total_images=1984", "evaluate_every=0") == 0
    assert load_model(chain / "train_vqvae").description["transform"] == {"resolution": 32}


def test_a_batch_that_does_not_fit_is_named_with_a_plan_that_can_be_run(
    chain: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def forward(*arguments: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    words = ["run_dir=again", "micro_batch=8", "model.hidden=20"]
    monkeypatch.setattr(sys, "argv", ["vqscale", "train_vqvae", str(CONFIGS / "train_vqvae.yaml"), *words])
    with monkeypatch.context() as patch:
        patch.setattr(VQVAE, "forward", forward)
        assert run_stage("train_vqvae", "train_vqvae", *words) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert "micro_batch=8 (8 images at a time) does not fit" in said
    told = re.search("`vqscale (.*)` says what fits", said)
    assert told and cli.main(shlex.split(told[1])) == 0
    assert "train_vqvae under single" in capsys.readouterr().out


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_the_errors_of_upper_levels_alone_count_as_much_as_asked(levels: int) -> None:
    model, image = vqvae([4, 2, 2][:levels], resolution=32), images(3, 32)
    batch: Any = {"image": to_uint8(image), "position": torch.arange(3)}
    shown = to_float(batch["image"])

    def step(weight: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return train_vqvae.training_step(TrainVQVAEConfig(upper_weight=weight))(model, batch)

    loss, told = step(0.5)
    plain, before = step(0)
    alone = [F.mse_loss(model.decode_upper(model(shown).codes[:count]), shown) for count in range(1, levels)]
    torch.testing.assert_close(loss, plain + 0.5 * sum(alone))
    names = [f"reconstruction_mse/{name}" for name in ("top", "middle")[: levels - 1]]
    assert told.keys() - before.keys() == set(names)
    torch.testing.assert_close([told[name] for name in names], alone)
