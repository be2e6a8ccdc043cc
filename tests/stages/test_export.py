"""`vqscale export` and `vqscale import-checkpoint`: folders that every stage takes, and the Python API on them."""

import io
import json
import os
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.port import pictures, port_forward, port_state
from support.stages import run_stage
from torch import Tensor

import vqscale
from vqscale import cli
from vqscale.api import VQVAE, sample
from vqscale.data.images import decode_image, to_float, to_uint8
from vqscale.data.parts import read_samples
from vqscale.data.shards import Manifest, resolve
from vqscale.evaluation.report import format_score
from vqscale.evaluation.scores import Score
from vqscale.sources import Source, load_model
from vqscale.stages.export import ExportConfig, Exported, card

ROOT = Path(__file__).parents[2]
MODELS = ("vqvae", "prior_top", "prior_bottom")


@pytest.fixture(scope="module")
def exported(whole_chain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The debug chain's three models, exported."""
    out = tmp_path_factory.mktemp("exported") / "debug"
    assert cli.main(["export", str(whole_chain), str(out), "licence=cc0-1.0", "about=Drawn figures, ten kinds."]) == 0
    return out


def error_of(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert cli.main([str(word) for word in words]) == 1
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    return line


# ---- export


def test_an_experiment_becomes_a_folder_per_model_with_the_runs_own_fingerprints(
    whole_chain: Path, exported: Path
) -> None:
    assert sorted(path.name for path in exported.iterdir()) == ["README.md", *sorted(MODELS)]
    codes = Manifest.load(whole_chain / "extract_codes" / "train")
    for name in MODELS:
        run, folder = load_model(whole_chain / f"train_{name}"), load_model(exported / name)
        assert folder.fingerprint == run.fingerprint and folder.images_seen == run.images_seen
        config = json.loads((exported / name / "config.json").read_text())
        assert config["fingerprint"] == run.fingerprint and config["config"] == run.description["config"]
        assert config["transform"] == run.description["transform"]
        assert config["weights"] == run.weights and config["provenance"]["strategy"] == "single"
        assert (codes.extra["tokenizer"] == run.fingerprint) == (name == "vqvae")
        assert (exported / name / "model.safetensors").stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0o22)
    os.umask(mask)
    return mask


def test_bytes_depend_on_the_weights_only(whole_chain: Path, exported: Path, tmp_path: Path) -> None:
    run = whole_chain / "train_vqvae"
    assert cli.main(["export", str(run), str(tmp_path / "one")]) == 0
    assert cli.main(["export", str(run), str(tmp_path / "raw"), "weights_kind=raw"]) == 0
    first = (exported / "vqvae" / "model.safetensors").read_bytes()
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == first
    assert (tmp_path / "raw" / "model.safetensors").read_bytes() != first
    assert load_model(tmp_path / "raw").fingerprint != load_model(tmp_path / "one").fingerprint
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == [
        *("README.md", "config.json", "model.safetensors")
    ]


def test_an_earlier_checkpoint_is_exported_as_it_is(whole_chain: Path, tmp_path: Path) -> None:
    assert cli.main(["export", str(whole_chain / "train_vqvae"), str(tmp_path / "early"), "checkpoint=1280"]) == 0
    assert load_model(tmp_path / "early").images_seen == 1280


def test_the_card_says_what_the_runs_say(whole_chain: Path, exported: Path, tmp_path: Path) -> None:
    text = (exported / "README.md").read_text()
    assert text.startswith("---\nlicense: cc0-1.0\n") and "Drawn figures, ten kinds." in text
    scores = json.loads((whole_chain / "evaluate" / "scores.json").read_text())
    error = format_score("reconstruction_mse", Score(**scores["reconstruction_mse"]))
    assert re.fullmatch(r"0\.\d{3} \(0\.\d+–0\.\d+\)", error)
    assert (
        f"| Reconstruction MSE, in [-1, 1] units | {error} | 62 | no: papers have no common protocol for it |" in text
    )
    assert "578 samples" in text and "10 classes: circle, square" in text
    commands = [line.split()[1:3] for line in text.splitlines() if line.startswith("    vqscale ")]
    assert [stage for stage, _ in commands] == [
        *("pack", "train_vqvae", "extract_codes", "train_prior", "train_prior"),
        *("train_classifier", "train_classifier", "sample", "train_classifier", "evaluate"),
    ]
    assert commands[3][1] == "train_prior_top/config.yaml", "run by a program, as these tests are"
    assert cli.main(["export", str(whole_chain / "train_vqvae"), str(tmp_path), "weights_kind=raw"]) == 0
    raw = (tmp_path / "README.md").read_text()
    assert "not stated: ask whoever exported this" in raw and "license:" not in raw
    assert "No evaluation of these weights" in raw, "scores of the averaged weights are not the raw ones'"


def test_the_card_holds_the_commands_as_they_were_typed(chain: Path, tmp_path: Path) -> None:
    command = json.loads((chain / "train_vqvae" / "command.json").read_text())
    command |= {"argv": ["/somewhere/bin/vqscale", "train_vqvae", "mine.yaml", "seed=3"], "world_size": 8}
    command |= {"strategy": "ddp", "device": "cuda:0"}
    (chain / "train_vqvae" / "command.json").write_text(json.dumps(command))
    assert cli.main(["export", str(chain / "train_vqvae"), str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "README.md").read_text()
    assert "\n    vqscale train_vqvae mine.yaml seed=3\n" in text and "somewhere" not in text
    assert "Strategy ddp, 8 ranks, cuda:0;" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{runs}"], "usage: vqscale export RUN_DIR OUT_DIR"),
        (["{runs}", "checkpoint=1"], "usage: vqscale export RUN_DIR OUT_DIR"),
        (["{runs}/pack", "{out}"], "no run of train_vqvae or train_prior there"),
        (["{runs}", "{out}", "checkpoint=640"], "checkpoint=640 is of one run, but"),
        (["{runs}/train_vqvae", "{out}", "checkpoint=7"], "no checkpoint at 7 images; there are"),
        (["{runs}/train_prior_top", "{out}", "weights_kind=ema"], "weights_kind=ema, but the run kept no weight EMA"),
        (["{runs}", "{out}", "license=mit"], "unknown key license; did you mean licence?"),
    ],
)
def test_what_cannot_be_exported(
    whole_chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    out = tmp_path / "out"
    assert message in error_of(capsys, "export", *(word.format(runs=whole_chain, out=out) for word in words))
    assert not out.exists()


@pytest.mark.parametrize("out", ["{run}", "{run}/export", "{run}/log/export"])
def test_no_export_goes_into_a_run(chain: Path, capsys: pytest.CaptureFixture[str], out: str) -> None:
    run = chain / "train_vqvae"
    before = sorted(run.rglob("*"))
    assert "is a run directory; choose" in error_of(capsys, "export", run, out.format(run=run))
    assert sorted(run.rglob("*")) == before


@pytest.mark.parametrize("name", ["README.md", "config.json"])
def test_files_of_others_are_not_replaced(
    whole_chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (tmp_path / name).write_text("mine")
    assert f"{name} was not written by export" in error_of(capsys, "export", whole_chain / "train_vqvae", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == "mine"


# ---- the card of models that strangers made

HOSTILE = "<script>x</script>|[a](http://b)\n\n# c"


def model(level: str = "", name: str = "sha256:one", classes: tuple[str, ...] = ("cat",)) -> Exported:
    about = {"config": {"downsample": [4]}, "classes": list(classes), "data": "sha256:data", "resolution": 8}
    about |= {"kind": "prior", "level": level, "grid": [2, 2], "num_codes": 4} if level else {"kind": "vqvae"}
    return Exported(Source(torch.nn.Linear(1, 1), about, name, Path("nowhere"), "ema", 10), ".")


def write_json_files(root: Path, files: dict[str, object]) -> None:
    for name, value in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(json.dumps(value))


def test_foreign_text_stays_text_in_the_card(tmp_path: Path) -> None:
    argv = ["vqscale", "pack", "a.yaml", f"run_dir={HOSTILE}", "source=http://u:PASSWORD@h/my a.tar?sig=SECRET"]
    write_json_files(tmp_path, {"pack/command.json": {"stage": "pack", "argv": argv, "device": HOSTILE}})
    text = card([model(classes=(HOSTILE, "`tick`"))], tmp_path, ExportConfig(licence="mit\nextra: x"))
    outside_code = [line for line in text.splitlines() if not line.startswith("    ")]
    assert not any(re.search(r"(?<!\\)[<|\[]\w", line) for line in outside_code if not line.startswith("tags"))
    assert "\n# c" not in text and "\nextra" not in text
    assert "SECRET" not in text and "PASSWORD" not in text
    (command,) = [line for line in text.splitlines() if line.startswith("    vqscale")]
    assert "'source=http://***@h/my a.tar?sig=***'" in command


def test_a_classifier_has_a_card_too(tmp_path: Path) -> None:
    source = model().source
    source.description.update(kind="classifier", learned_from="samples")
    text = card([Exported(source, ".")], tmp_path, ExportConfig(about="caf\udce9\nmore"))
    assert "classifier, 8 px, learned from samples" in text and "caf\\udce9\nmore" in text


@pytest.mark.parametrize(
    ("drawn_from", "used", "printed"),
    [
        ("sha256:one", "sha256:samples", ["FID", "NLL, top"]),
        ("sha256:earlier", "sha256:samples", ["NLL, top"]),
        ("sha256:one", "sha256:others", ["NLL, top"]),
    ],
)
def test_scores_of_earlier_samples_are_not_printed(
    tmp_path: Path, drawn_from: str, used: str, printed: list[str]
) -> None:
    scores = {"fid": {"value": 5.0, "n": 9}, "nll/top": {"value": 2.0, "n": 9}, "strange": {"value": 1.0, "n": 1}}
    samples = {"fingerprint": "sha256:samples", "extra": {"vqvae": "", "priors": {"top": drawn_from}}}
    inputs = {"prior_top": "sha256:one", "samples": used}
    files = {"evaluate/scores.json": scores, "evaluate/inputs.json": inputs, "sample/dataset.json": samples}
    write_json_files(tmp_path, files)
    text = card([model("top")], tmp_path, ExportConfig())
    assert [word for word in ("FID", "NLL, top") if f"| {word}" in text] == printed


# ---- the Python API


def test_encode_and_decode_from_a_folder_and_from_a_run(whole_chain: Path, exported: Path) -> None:
    images = torch.stack([*_pixels(whole_chain / "pack" / "holdout", 4)])
    one, other = VQVAE.from_pretrained(exported / "vqvae"), VQVAE.from_pretrained(whole_chain)
    assert one.fingerprint == other.fingerprint == load_model(exported / "vqvae", "vqvae").fingerprint
    assert (one.resolution, one.num_codes, one.grids) == (32, 32, [(4, 4), (8, 8)]) and len(one.classes) == 10
    codes = one.encode(images)
    assert [level.shape for level in codes] == [(4, 4, 4), (4, 8, 8)] and codes[0].dtype == torch.int64
    for same in (other.encode(images), one.encode(to_float(images))):
        assert all(torch.equal(a, b) for a, b in zip(codes, same, strict=True))
    decoded = one.decode(codes)
    assert decoded.shape == (4, 3, 32, 32) and -1 <= decoded.min() < decoded.max() <= 1
    plain = load_model(exported / "vqvae", "vqvae").model(to_float(images)).reconstruction
    torch.testing.assert_close(decoded, plain.clamp(-1, 1))


def test_the_codes_are_those_of_extraction(whole_chain: Path, exported: Path) -> None:
    top = VQVAE.from_pretrained(exported).encode(torch.stack([*_pixels(whole_chain / "pack" / "holdout", 4)]))[0]
    for found, (_, _, parts) in zip(
        top, read_samples(whole_chain / "extract_codes" / "holdout", ["top.npy"]), strict=False
    ):
        views = np.load(io.BytesIO(parts["top.npy"]))
        assert np.array_equal(views[0], found.numpy())


def _pixels(folder: Path, count: int) -> Iterator[Tensor]:
    """The first images of a folder of shards, uint8."""
    for _, (_, _, parts) in zip(range(count), read_samples(folder, ["png"]), strict=False):
        yield decode_image(parts["png"])


def test_image_files_are_read_as_pack_reads_them(exported: Path, tmp_path: Path) -> None:
    Image.new("RGB", (90, 50), (255, 0, 0)).save(tmp_path / "red.png")
    images = VQVAE.from_pretrained(exported).load_images([tmp_path / "red.png"] * 2)
    assert images.shape == (2, 3, 32, 32) and images[0, 0].min() == 1 and images[0, 1].max() == -1


def test_samples_are_those_of_the_stage(whole_chain: Path, exported: Path) -> None:
    """Two per class with seed 0, in blocks of 8, as configs/debug/sample.yaml has it."""
    stored = torch.stack([*_pixels(whole_chain / "sample", 20)])
    found = sample(exported, samples_per_class=2, batch=8)
    assert found.shape == (20, 3, 32, 32) and found.dtype == torch.float32
    assert torch.equal(to_uint8(found), stored)
    assert torch.equal(sample(whole_chain, samples_per_class=2, batch=8), found)
    assert not torch.equal(sample(exported, samples_per_class=2, seed=1, batch=8), found)


def test_a_folder_remembers_how_its_samples_were_drawn(chain: Path, exported: Path, tmp_path: Path) -> None:
    words = ["temperature={top: 0.5, bottom: 0.8}", "temperature_end.bottom=0.6", "top_p.bottom=0.7"]
    assert run_stage("sample", "sample", "fresh=true", *words) == 0
    assert cli.main(["export", str(chain), str(tmp_path)]) == 0
    stated = [json.loads((tmp_path / name / "config.json").read_text()).get("sampling") for name in MODELS]
    assert stated == [None, {"temperature": 0.5}, {"temperature": 0.8, "temperature_end": 0.6, "top_p": 0.7}]
    text = (tmp_path / "README.md").read_text()
    assert "\n\n- `prior_top` draws with `temperature 0.5`, unless `sample` is told otherwise\n- `prior_bottom`" in text
    assert "draws with" not in (exported / "README.md").read_text()
    as_drawn = sample(tmp_path, samples_per_class=2, batch=8)
    assert torch.equal(to_uint8(as_drawn), torch.stack([*_pixels(chain / "sample", 20)]))
    same = {"temperature": {"top": 0.5, "bottom": 0.8}, "top_p": {"bottom": 0.7}}
    for options in (same, {"temperature": 1, "top_p": 1}):
        told, plain = (sample(folder, samples_per_class=2, batch=8, **options) for folder in (tmp_path, exported))
        assert torch.equal(told, plain) and not torch.equal(told, as_drawn)


def test_a_folder_of_newer_weights_says_nothing_of_older_samples(chain: Path, tmp_path: Path) -> None:
    assert run_stage("sample", "sample", "fresh=true", "temperature.top=0.5") == 0
    words = ["total_images=2560", "fresh=true", "evaluate_every=0"]
    assert run_stage("train_prior", "train_prior_bottom", *words) == 0
    assert cli.main(["export", str(chain), str(tmp_path)]) == 0
    assert "sampling" not in json.loads((tmp_path / "prior_top" / "config.json").read_text())


def test_options_of_sampling(exported: Path) -> None:
    likeliest = sample(exported, classes=["star", 0], temperature=0)
    assert torch.equal(likeliest, sample(exported, classes=["star", 0], temperature=0, seed=9))
    assert torch.equal(likeliest, sample(exported, classes=["star", 0], top_k={"top": 1, "bottom": 1}, seed=3))
    assert len(likeliest) == 2


def test_mistakes_in_the_api_are_named(exported: Path, tmp_path: Path) -> None:
    vqvae = VQVAE.from_pretrained(exported)
    image = torch.zeros(1, 3, 32, 32)
    for call, message in [
        (lambda: vqvae.encode(image + 200), "images reach 200"),
        (lambda: vqvae.encode(torch.zeros(1, 3, 16, 16)), "16, 16"),
        (lambda: vqvae.decode(list(reversed(vqvae.encode(image)))), "codes have grids"),
        (lambda: vqvae.decode([level * 0 + 32 for level in vqvae.encode(image)]), "codes from 32 to 32, but K = 32"),
        (lambda: sample(exported, classes=["sun"]), "'sun' is no class name of the 10"),
        (lambda: sample(exported, classes=[]), "nothing to sample"),
        (lambda: sample(exported, top_k={"middle": 3}), "top_k.middle: the levels of"),
        (lambda: sample(exported, guidance=1), r"guidance\.(top|bottom)=1\.0.*class_dropout=0"),
        (lambda: sample(exported, temperature=-1), "temperature=.*-1.*must be at least 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    for call in (lambda: VQVAE.from_pretrained(tmp_path), lambda: sample(tmp_path), lambda: sample(exported / "vqvae")):
        with pytest.raises((FileNotFoundError, ValueError)):
            call()


def test_the_package_exports_a_handful_of_names() -> None:
    assert vqscale.VQVAE is VQVAE and vqscale.sample is sample
    assert set(dir(vqscale)) >= {"VQVAE", "sample", "__version__"}
    with pytest.raises(AttributeError, match="no attribute 'vqvae'"):
        vqscale.vqvae  # noqa: B018


def test_the_quickstart(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = tmp_path / "quickstart.png"
    monkeypatch.setattr(sys, "argv", ["quickstart.py", str(exported), str(picture)])
    runpy.run_path(str(ROOT / "examples" / "quickstart.py"), run_name="__main__")
    with Image.open(picture) as shown:
        assert shown.size == (10 * 34 + 2, 2 * 34 + 2), "a column per class, samples above their reconstructions"


def test_a_stage_takes_an_exported_folder(chain: Path, exported: Path) -> None:
    words = [f"{name}={exported / name}" for name in MODELS]
    assert run_stage("sample", "sample", f"run_dir={chain / 'again'}", *words) == 0
    assert (chain / "again" / "000000.tar").read_bytes() == (chain / "sample" / "000000.tar").read_bytes()


# ---- import


def test_an_imported_checkpoint_is_a_tokenizer_as_any_other(chain: Path, tmp_path: Path) -> None:
    state = port_state()
    torch.save({f"module.{name}": tensor for name, tensor in state.items()}, tmp_path / "vqvae_560.pt")
    out = tmp_path / "port"
    assert cli.main(["import-checkpoint", str(tmp_path / "vqvae_560.pt"), str(out), "resolution=64"]) == 0
    vqvae = VQVAE.from_pretrained(out)
    codes, expected = port_forward(state, pictures())
    assert all(torch.equal(a, b) for a, b in zip(vqvae.encode(pictures()), codes, strict=True))
    torch.testing.assert_close(vqvae.decode(codes), expected.clamp(-1, 1), rtol=1e-5, atol=1e-5)
    provenance = json.loads((out / "config.json").read_text())["provenance"]
    assert provenance["file"] == "vqvae_560.pt" and len(provenance["sha256"]) == 64
    small = tmp_path / "small"
    assert cli.main(["import-checkpoint", str(tmp_path / "vqvae_560.pt"), str(small), "resolution=32"]) == 0
    words = [f"run_dir={chain / 'ported'}", f"data={chain / 'pack' / 'holdout'}", f"vqvae={small}"]
    assert run_stage("extract_codes", "extract_codes", *words) == 0
    codes = Manifest.load(resolve(str(chain / "ported"), "holdout"))
    assert codes.extra["tokenizer"] == VQVAE.from_pretrained(small).fingerprint


def test_a_mistake_at_import_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"logits.weight": torch.zeros(2)}, tmp_path / "prior.pt")
    line = error_of(capsys, "import-checkpoint", tmp_path / "prior.pt", tmp_path / "out")
    assert "logits.weight is no tensor of a rosinality/vq-vae-2-pytorch model" in line
    assert "usage: vqscale import-checkpoint FILE OUT_DIR" in error_of(capsys, "import-checkpoint", "x.pt")
    torch.save(port_state(), tmp_path / "vqvae.pt")
    line = error_of(capsys, "import-checkpoint", tmp_path / "vqvae.pt", tmp_path / "out", "resolution=60")
    assert "resolution=60 is not divisible by 8" in line
    assert not (tmp_path / "out").exists()
