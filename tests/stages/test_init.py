"""Training that starts from weights: what is taken from them, what stays frozen, and what is refused."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.distributed import run_ranks
from support.stages import CONFIGS, run_stage

from vqscale.cli import main
from vqscale.data.shards import Manifest
from vqscale.engine.checkpoint import find_latest
from vqscale.files import read_json
from vqscale.models.pretrained import save_pretrained
from vqscale.sources import load_model
from vqscale.stages import plan

SOURCE = "runs/debug/train_vqvae"
SHORT = ["global_batch=32", "total_images=64", "save_every=64", "log_every=32", "evaluate_every=64", "workers=0"]
DECODER = [f"init={SOURCE}", "freeze=[encoder,quantizer]", "seed=7"]


def tune(run_dir: str, *overrides: str) -> int:
    return run_stage("train_vqvae", "train_vqvae", f"run_dir={run_dir}", *SHORT, *overrides)


def tensors(run_dir: Path | str, prefix: str = "") -> dict[str, torch.Tensor]:
    latest = find_latest(Path(run_dir) / "checkpoints")
    assert latest is not None
    return latest.read(prefix)


def with_classes(folder: Path, names: Sequence[str]) -> None:
    """The same shards under other class names."""
    for split in ("train", "holdout"):
        old = Manifest.load(folder / split)
        Manifest.of(old.kind, old.shards, names, old.transform, old.extra).save(folder / split)


def check_plan(run_dir: str, strategy: str, world: int) -> None:
    """What the plan says of a run with a frozen encoder is what the run wrote down."""
    real = read_json(Path(run_dir) / "command.json")
    words = [f"world={world}", f"strategy={strategy}", *SHORT, *DECODER]
    request = plan.load([str(CONFIGS / "train_vqvae.yaml"), *words])
    description, _ = plan.describe(request)
    flops = plan.flops_of(request, description)
    assert flops == real["flops_per_image"]
    model = plan.build_model(description, request.trainer.freeze)
    column = plan.column(request, description, model, world, flops)
    for what, ranks in real["bytes_per_rank"].items():
        assert column[f"{what}, GiB"] * (1 << 30) == pytest.approx(max(ranks), rel=0.02), what
    thawed = plan.column(request, description, plan.build_model(description), world, flops)
    for row in ("gradients, GiB", "optimizer, GiB", "average, GiB", *(["sent per step, GB"] if world > 1 else [])):
        assert 0 < column[row] < thawed[row], row


@pytest.fixture
def tuned(chain: Path) -> Path:
    """A decoder that learned on, with the encoder and the codebooks of the chain's VQ-VAE."""
    assert tune("tuned", *DECODER) == 0
    return Path("tuned")


def test_a_tuned_decoder_leaves_codes_as_they_were(tuned: Path) -> None:
    before, after = load_model(SOURCE), load_model(tuned)
    own, other = before.model.state_dict(), after.model.state_dict()
    changed = {name for name in own if not torch.equal(own[name], other[name])}
    assert changed == {name for name in own if name.startswith(("levels.1.decoder.", "levels.1.upsample."))}
    images = torch.rand(8, 3, before.model.resolution, before.model.resolution) * 2 - 1
    for one, two in zip(before.model.encode(images), after.model.encode(images), strict=True):
        assert torch.equal(one, two)
    assert not torch.equal(before.model(images).reconstruction, after.model(images).reconstruction)
    assert after.fingerprint != before.fingerprint and after.tokenizer == before.tokenizer == before.fingerprint
    assert after.description["init"] == before.fingerprint == read_json(tuned / "init.json")["init"]
    check_plan("tuned", "single", 1)


def test_code_shards_and_priors_stay_valid_for_a_tuned_decoder(
    tuned: Path, chain: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert run_stage("extract_codes", "extract_codes", f"vqvae={tuned}") == 0
    assert "nothing left to do" in capsys.readouterr().err
    assert run_stage("extract_codes", "extract_codes", f"vqvae={tuned}", "run_dir=codes") == 0
    old, new = (Manifest.load(folder / "train") for folder in (chain / "extract_codes", Path("codes")))
    assert old.fingerprint == new.fingerprint and old.extra["tokenizer"] == new.extra["tokenizer"]
    assert run_stage("sample", "sample", f"vqvae={tuned}", "run_dir=drawn", "samples_per_class=1") == 0
    about = Manifest.load(Path("drawn")).extra
    assert about["vqvae"] == load_model(tuned).fingerprint != about["tokenizer"] == old.extra["tokenizer"]


def test_a_decoder_tuned_twice_keeps_the_first_tokenizer_also_in_an_export(tuned: Path) -> None:
    assert main(["export", str(tuned), "exported"]) == 0
    assert tune("again", "init=exported", "freeze=[encoder,quantizer]", "seed=8") == 0
    first, second = load_model("exported"), load_model("again")
    assert first.fingerprint != second.fingerprint == load_model("again").fingerprint
    assert second.tokenizer == first.tokenizer == load_model(SOURCE).fingerprint
    assert second.description["init"] == first.fingerprint


def test_weights_that_claim_the_codes_of_another_tokenizer_are_refused(tuned: Path) -> None:
    source = load_model(tuned)
    with torch.no_grad():
        source.model.levels[0].quantizer.embedding[0] += 1
    extra = {key: value for key, value in source.description.items() if key not in ("kind", "config")}
    save_pretrained("edited", source.model, kind="vqvae", config=source.description["config"], extra=extra)
    with pytest.raises(ValueError, match="edited: its encoder or codebooks are not those of the tokenizer"):
        load_model("edited")


@pytest.mark.parametrize("name", ["train_vqvae", "train_prior_bottom"])
def test_a_stopped_run_goes_on_as_in_one_go_without_its_source(chain: Path, name: str) -> None:
    stage = name.removesuffix("_bottom")
    words = [*SHORT, f"init=runs/debug/{name}", "seed=7", *(["freeze=[encoder,quantizer]"] if stage == name else [])]
    assert run_stage(stage, name, "run_dir=whole", *words, "total_images=128") == 0
    assert run_stage(stage, name, "run_dir=parts", *words) == 0
    shutil.rmtree(chain / name)
    assert run_stage(stage, name, "run_dir=parts", *words, "total_images=128") == 0
    one, two = tensors("whole"), tensors("parts")
    assert one.keys() == two.keys()
    assert [key for key in one if not torch.equal(one[key], two[key])] == []
    assert load_model("parts").description["init"] == load_model("whole").description["init"] != ""


def _rank(run_dir: str, *words: str) -> int:
    return tune(run_dir, *words)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero2", "zero3"])
def test_every_strategy_keeps_frozen_parts_and_goes_on_with_them(tuned: Path, strategy: str) -> None:
    words = [f"strategy={strategy}", *DECODER]
    assert run_ranks(_rank, 2, strategy, *words, timeout=300) == [0, 0]
    check_plan(strategy, strategy, 2)
    assert load_model(strategy).tokenizer == load_model(SOURCE).fingerprint
    expected = tensors(tuned)
    actual = tensors(strategy)
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-3, atol=1e-4, msg=name)
    assert run_ranks(_rank, 2, strategy, *words, "total_images=96", timeout=300) == [0, 0]
    assert load_model(strategy).tokenizer == load_model(SOURCE).fingerprint


@pytest.mark.parametrize("strategy", ["single", "fsdp"])
def test_a_prior_starts_from_weights_and_learns_new_classes(chain: Path, strategy: str) -> None:
    classes = Manifest.load(chain / "extract_codes" / "train").classes
    with_classes(chain / "extract_codes", [*classes, "more"])
    words = ["run_dir=prior", *SHORT, "learning_rate=0", f"strategy={strategy}", "init_ignore=[label]"]
    words += [f"init={chain / 'train_prior_top'}"]
    ranks = 1 if strategy == "single" else 2
    assert run_ranks(run_stage, ranks, "train_prior", "train_prior_top", *words, timeout=300) == [0] * ranks
    before, after = tensors(chain / "train_prior_top", "model."), tensors("prior", "model.")
    labels = {name for name in before if name.startswith("label")}
    assert labels and {name for name in before if not torch.equal(before[name], after[name])} == labels
    assert len(after[next(iter(labels))]) == len(before[next(iter(labels))]) + 1


def test_a_level_whose_codebook_is_left_out_gets_one_from_the_data(
    chain: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tune("new", f"init={SOURCE}", "init_ignore=[levels.0.quantizer]", "freeze=[]", "learning_rate=0") == 0
    assert "codebook initialisation: 100%" in capsys.readouterr().err
    before, after = tensors(SOURCE, "ema."), tensors("new", "model.")
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


def test_only_codebooks_or_only_the_encoder_can_be_frozen(chain: Path) -> None:
    before = load_model(SOURCE).model.state_dict()
    for part, frozen in (("quantizer", True), ("encoder", False)):
        assert tune(part, f"init={SOURCE}", f"freeze=[{part}]") == 0
        after = load_model(part)
        own = after.model.state_dict()
        assert torch.equal(own["levels.0.quantizer.embedding"], before["levels.0.quantizer.embedding"]) == frozen
        assert torch.equal(own["levels.0.to_code.weight"], before["levels.0.to_code.weight"]) != frozen
        assert after.tokenizer == after.fingerprint, "these codes are others"


BAD: list[tuple[list[str], str]] = [
    (["freeze=[encoder]"], "freeze=['encoder'] needs init="),
    (["init_ignore=[levels]"], "init_ignore=['levels'] needs init="),
    ([f"init={SOURCE}", "freeze=[decoder]"], "choose from encoder, quantizer"),
    (["init=nowhere"], "nowhere: no run and no exported model there"),
    (["init=runs/debug/train_prior_top"], "holds a prior model, expected a vqvae"),
    ([f"init={SOURCE}", "init_ignore=[levls]"], "init_ignore: no tensor's name begins with 'levls'"),
    ([*DECODER, "init_ignore=[levels.0]"], "leaves out levels.0."),
    ([*DECODER, "model.rectified_skip=true"], "config.rectified_skip is False, here True"),
    (
        [f"init={SOURCE}", "model.hidden=24"],
        f"init={SOURCE}: levels.0.encoder.0.weight has shape [8, 16, 4, 4], the model needs [12, 24, 4, 4]",
    ),
    ([f"init={SOURCE}", "model.residual_layers=2"], "is missing"),
]


@pytest.mark.parametrize(("words", "said"), BAD, ids=[said[:30] for _, said in BAD])
def test_what_does_not_fit_is_one_line_before_the_first_step(
    chain: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert tune("bad", *words) == 1
    error = [line for line in capsys.readouterr().err.splitlines() if line.strip()][-1]
    assert said in error, error
    assert not list(Path("bad").glob("checkpoints/*"))
    assert tune("bad", *DECODER) == 0, "the same run directory takes words that fit"


def test_another_source_is_refused_on_resume_and_taken_after_fresh(
    tuned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = [f"init={tuned}", *DECODER[1:]]
    assert tune("second", *DECODER) == 0
    assert tune("second", *other) == 1
    assert "init: was" in capsys.readouterr().err
    assert tune("second", *other, "fresh=true") == 0
    assert load_model("second").description["init"] == load_model(tuned).fingerprint


def test_a_prior_of_other_classes_or_codes_says_so(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    classes = Manifest.load(chain / "extract_codes" / "train").classes
    with_classes(chain / "extract_codes", classes[::-1])
    words = ["run_dir=prior", *SHORT, f"init={chain / 'train_prior_top'}"]
    assert run_stage("train_prior", "train_prior_top", *words) == 0
    assert "trained with other classes than those of the data" in capsys.readouterr().err


def test_what_frozen_parts_save_is_not_counted_as_computed(tuned: Path) -> None:
    def flops(run_dir: Path | str) -> Any:
        return json.loads((Path(run_dir) / "command.json").read_text())["flops_per_image"]

    assert flops(tuned) < 0.8 * flops(SOURCE)
