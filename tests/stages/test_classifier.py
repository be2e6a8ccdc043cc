"""train_classifier on the debug chain: what it learns from, under which strategies, and what it refuses."""

import json
import math
from pathlib import Path

import pytest
import torch
from support.distributed import run_ranks
from support.stages import run_stage
from support.vqvaes import vqvae
from torch.utils.flop_counter import FlopCounterMode

from vqscale.data.images import decode_image
from vqscale.data.parts import read_samples
from vqscale.data.shards import Manifest
from vqscale.evaluation import classify
from vqscale.evaluation.classify import ImageClassifier, hits, reconstructed
from vqscale.evaluation.features import WIDTHS, Extractor, Features
from vqscale.sources import Source, load_model
from vqscale.stages import train_classifier
from vqscale.stages.train_classifier import TrainClassifierConfig, training_step
from vqscale.training import flops_per_image

CPU = torch.device("cpu")


def last(run_dir: Path, key: str) -> float:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line][-1]


def test_real_images_teach_more_than_chance(whole_chain: Path) -> None:
    run_dir = whole_chain / "train_classifier_real"
    assert last(run_dir, "held_out/accuracy_top1") > 0.25  # of 10 classes
    assert last(run_dir, "held_out/accuracy_top5") > 0.7
    assert last(run_dir, "accuracy_top1") > 0.25


def test_a_classifier_says_what_it_learned_from(whole_chain: Path) -> None:
    vqvae = json.loads((whole_chain / "sample" / "dataset.json").read_text())["extra"]["vqvae"]
    for name, kind, data, tokenizer in (
        ("real", "images", "pack/train", ""),
        ("reconstructions", "reconstructions", "pack/train", vqvae),
        ("samples", "samples", "sample", ""),
    ):
        description = load_model(whole_chain / f"train_classifier_{name}", "classifier").description
        assert (description["learned_from"], description["vqvae"]) == (kind, tokenizer)
        assert description["data"] == Manifest.load(whole_chain / data).fingerprint


def test_hits_count_the_first_and_the_first_five() -> None:
    logits = torch.tensor([[0.0, 1, 2, 3, 4, 5, 6]]).repeat(3, 1)
    assert hits(logits, torch.tensor([6, 2, 1])).tolist() == [[1, 1], [0, 1], [0, 0]]
    assert hits(torch.tensor([[1.0, 0]]), torch.tensor([1])).tolist() == [[0, 1]]  # with two classes


def small_network(images: torch.Tensor) -> Features:
    pooled = torch.nn.functional.conv2d(images.float(), torch.ones(WIDTHS["lite0"], 3, 4, 4)).mean((2, 3))
    return Features(pooled, pooled)


@pytest.mark.parametrize("kind", ["vqvae", "features"])
def test_the_forward_of_a_frozen_network_counts_among_a_steps_flops(kind: str) -> None:
    frozen, images = vqvae().eval().requires_grad_(False), torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    description = {"kind": "classifier", "resolution": 16, "classes": ["a", "b"], "config": {}, "feature_width": 0}
    if kind == "vqvae":
        source, extractor = Source(frozen, {}, "sha256:0", Path(), "raw", 0), None
        with torch.no_grad(), FlopCounterMode(display=False) as below:
            reconstructed(frozen, images)
        own = flops_per_image(description, training_step(TrainClassifierConfig(), None, None))
    else:
        source, extractor = None, Extractor("lite0", "0", True, "", "", small_network)
        description |= {"config": {"network": "linear"}, "feature_width": WIDTHS["lite0"]}
        with FlopCounterMode(display=False) as below:
            extractor(images)
        own = 2 * 2 * 2 * WIDTHS["lite0"]  # forward, and the weight's gradient
    config = TrainClassifierConfig(features="lite0" if extractor else "")
    flops = flops_per_image(description | {kind: "of this"}, training_step(config, extractor, source))
    assert below.get_total_flops() > 0 and flops == own + below.get_total_flops()


def rank_of_classifier(overrides: list[str]) -> int:
    return run_stage("train_classifier", "train_classifier_real", *overrides)


def trained(run_dir: Path, world: int, strategy: str, *more: str) -> tuple[list[float], float]:
    """(losses of ten steps, accuracy after them)."""
    overrides = ["total_images=320", "log_every=32", "evaluate_every=320", "save_every=320", "workers=0", *more]
    overrides += [f"strategy={strategy}", f"run_dir={run_dir}"]
    assert run_ranks(rank_of_classifier, world, overrides) == [0] * world
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line], last(run_dir, "held_out/accuracy_top1")


def test_two_ranks_learn_what_one_learns(chain: Path) -> None:
    (alone, accuracy), (both, accuracy_of_both) = (
        trained(chain.parent / strategy, world, strategy, "precision=fp64")
        for world, strategy in ((1, "single"), (2, "ddp"))
    )
    assert both == pytest.approx(alone, rel=1e-9) and accuracy == accuracy_of_both


@pytest.mark.slow
@pytest.mark.parametrize(
    "strategy, precision", [("fsdp", "fp32"), ("fsdp", "bf16"), ("zero1", "fp32"), ("zero3", "fp32")]
)
def test_sharded_strategies_learn_the_same(chain: Path, strategy: str, precision: str) -> None:
    alone, _ = trained(chain.parent / "alone", 1, "single", f"precision={precision}")
    found, _ = trained(chain.parent / strategy, 2, strategy, f"precision={precision}")
    assert found == pytest.approx(alone, rel=1e-4 if precision == "fp32" else 2e-2)


@pytest.fixture
def features(monkeypatch: pytest.MonkeyPatch) -> Extractor:
    """A cheap network in place of EfficientNet-Lite0: mean colours of an 8 x 8 grid, widened to its 1280 features."""

    def network(images: torch.Tensor) -> Features:
        colours = torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 8).flatten(1)
        pooled = torch.nn.functional.pad(colours, (0, 1280 - colours.shape[1]))
        return Features(pooled, pooled)

    extractor = Extractor("lite0", "ab" * 32, True, "none", "colours", network)
    for module in (train_classifier, classify):
        monkeypatch.setattr(module, "load_extractor", lambda *_args, **_more: extractor)
    return extractor


def test_a_linear_layer_on_frozen_features(chain: Path, features: Extractor, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["model.network=linear", "features=lite0", "run_dir=linear", "learning_rate=0.005"]
    assert run_stage("train_classifier", "train_classifier_real", *words) == 0
    losses = [json.loads(line).get("loss") for line in Path("linear/metrics.jsonl").read_text().splitlines()]
    assert min(filter(None, losses)) < math.log(10) - 0.03  # colours alone say little of shapes
    loaded = ImageClassifier.load("linear", CPU, {})
    assert loaded.extractor is features and loaded.source.description["features_sha256"] == "ab" * 32
    assert loaded(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).shape == (2, 10)
    other = Extractor("lite0", "cd" * 32, True, "none", "colours", features.network)
    monkeypatch.setattr(classify, "load_extractor", lambda *_args, **_more: other)
    with pytest.raises(ValueError, match="trained on features of lite0 abababababab, these are of cdcdcdcdcdcd"):
        ImageClassifier.load("linear", CPU, {})


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    assert run_stage("train_classifier", "train_classifier_real", "run_dir=refused", *words) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("vqscale: error")]
    assert not Path("refused/config.yaml").exists()
    return line


def test_what_does_not_fit_is_one_line(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refusal(capsys, "data=runs/debug/extract_codes")
    assert "data=runs/debug/extract_codes: images or samples of one size are needed, this is codes" in line
    assert "features=lite0: model.network=small takes images" in refusal(capsys, "features=lite0")
    assert "model.network=linear needs features=lite0" in refusal(capsys, "model.network=linear")
    assert "nowhere: no run and no exported model there" in refusal(capsys, "vqvae=nowhere")
    assert "expected a vqvae" in refusal(capsys, "vqvae=runs/debug/train_classifier_real")
    path = chain / "pack" / "holdout" / "dataset.json"
    manifest = Manifest.load(path.parent)
    Manifest.of("images", manifest.shards, ["a", "b"], manifest.transform).save(path.parent)
    line = refusal(capsys)
    assert "test=runs/debug/pack: its 2 classes are not the 10 classes of data=runs/debug/pack" in line


def test_the_chains_classifiers_give_the_classification_accuracy_score(chain: Path) -> None:
    assert run_stage("evaluate", "evaluate", "run_dir=cas", "metrics=[cas_top1,cas_top5]") == 0
    scores = json.loads(Path("cas/scores.json").read_text())
    for top in ("1", "5"):
        assert 0 <= scores[f"cas_top{top}"]["value"] <= 1
        # The last held-out accuracy of the run itself: the same images, the same weights.
        own = last(chain / "train_classifier_real", f"held_out/accuracy_top{top}")
        assert scores[f"cas_top{top}/real"]["value"] == pytest.approx(own)
    assert scores["cas_top1/real"]["value"] > scores["cas_top1"]["value"]
    assert "train_classifier_samples: accuracy" in Path("cas/report.html").read_text()


def test_the_probability_of_its_class_is_stored_with_each_sample(
    chain: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    real = chain / "train_classifier_real"
    assert run_stage("sample", "sample", "run_dir=judged", f"rejection={real}") == 0
    judge = ImageClassifier.load(real, CPU, {})
    assert Manifest.load("judged").extra["rejection"]["classifier"] == judge.source.fingerprint
    plain = {key: parts["png"] for key, _, parts in read_samples(chain / "sample", ["png"])}
    for key, label, parts in read_samples("judged", ["png", "json"]):
        assert parts["png"] == plain[key]  # judging changes no pixel
        expected = judge(decode_image(parts["png"])[None]).double().softmax(1)[0, label]
        assert json.loads(parts["json"])["class_probability"] == pytest.approx(expected.item(), rel=1e-5)
    assert run_stage("sample", "sample", "run_dir=no", f"rejection={chain / 'train_classifier_samples'}") == 1
    assert "learned from samples, not from real images" in capsys.readouterr().err
