"""Models from disk: strange descriptions and weights are refused before memory is taken; which folder counts."""

import json
import math
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from support.exports import export_prior, export_vqvae
from support.port import port_state
from torch import Tensor

from vqscale import cli, sources
from vqscale.files import sealed
from vqscale.models import pretrained
from vqscale.models.pretrained import read_folder
from vqscale.sources import load_model, locate


def change_json(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    about = json.loads((folder / "config.json").read_text())
    about.pop("checksum", None)
    change(about)
    (folder / "config.json").write_text(json.dumps(sealed({k: v for k, v in about.items() if k != "fingerprint"})))


# ---- weights that are not finite


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["levels.0.encoder.0.weight", "levels.1.quantizer.cluster_size"])
def test_weights_that_are_not_finite_are_named(tmp_path, name, number):
    export_vqvae(tmp_path)
    tensors, about = read_folder(tmp_path)
    tensors[name].view(-1)[3] = number
    del about["fingerprint"]
    pretrained.write_folder(tmp_path, tensors, about)
    with pytest.raises(ValueError, match=rf"{tmp_path}: {name} has 1 of [\d,]+ numbers that are NaN or infinite"):
        load_model(tmp_path, "vqvae")


def test_weights_that_become_infinite_in_the_models_precision_are_named(tmp_path):
    export_vqvae(tmp_path)
    tensors, about = read_folder(tmp_path)
    name = "levels.0.encoder.0.weight"
    tensors[name] = tensors[name].double()
    tensors[name].view(-1)[0] = 1e300
    del about["fingerprint"]
    pretrained.write_folder(tmp_path, tensors, about)
    with pytest.raises(ValueError, match=f"{name} has 1 of .* numbers that are NaN or infinite as torch.float32"):
        load_model(tmp_path, "vqvae")


# ---- more than the file holds


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": 200_000}, r"has shape \[8, 16, 4, 4\], the model needs \[100000, 200000, 4, 4\]"),
        ({"residual_layers": 10**9}, "its config asks for more than .* parameters, where it has .* tensors"),
        ({"residual_layers": 2}, "levels.0.decoder.2.pointwise.bias is missing"),
        ({"downsample": [4, 2**40]}, "is not divisible by"),
    ],
)
def test_a_config_beside_small_weights_takes_no_memory(tmp_path, monkeypatch, change, message):
    export_vqvae(tmp_path)
    change_json(tmp_path, lambda about: about["config"].update(change))
    monkeypatch.setattr(safetensors.torch, "load_file", lambda _: pytest.fail("the weights were read"))
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path, "vqvae")


def test_a_checkpoint_takes_no_memory_before_it_fits(tmp_path, monkeypatch):
    """state.json of a run is no more to be believed than config.json."""

    class Checkpoint:
        images_seen, folder = 64, tmp_path
        state = type("State", (), {"model": {"kind": "vqvae", "resolution": 16, "classes": [], "config": {}}})

        def header(self, _prefix: str) -> dict[str, Tensor]:
            return {"a": torch.empty(10**12, device="meta")}

    (tmp_path / "checkpoints").mkdir()
    monkeypatch.setattr(sources, "_checkpoint_of", lambda *_: Checkpoint())
    with pytest.raises(ValueError, match="is missing"):
        load_model(tmp_path, "vqvae")


def test_a_config_json_that_is_far_too_long_is_not_read(tmp_path, monkeypatch):
    export_vqvae(tmp_path)
    monkeypatch.setattr(pretrained, "_MOST_JSON", 100)
    with pytest.raises(ValueError, match=r"config.json: [\d,]+ bytes, where a model's have at most 100"):
        load_model(tmp_path, "vqvae")


@pytest.mark.parametrize(
    ("fact", "value"),
    [
        *[("level", value) for value in ("../../x", "x/../../..", "/etc", "", "Top", 3, ["top"])],
        *[("classes", value) for value in ("star", ["a\nb"], ["\x1b[2J"], ["caf\udce9"], [1], {"a": 1})],
        *[("grid", value) for value in ([2], [2, 0], [2, 2.5], "22", [2, 10**9], [True, 2])],
        *[("upper_grids", value) for value in ([2, 2], "x", [[2]])],
        *[("num_codes", value) for value in (0, -1, "16", 10**9, None)],
        *[("images_seen", value) for value in ("many", -1, 1.5, [])],
        ("config", [1]),
        ("tokenizer", 7),
    ],
)
def test_facts_of_a_model_are_checked_where_they_are_read(tmp_path, fact, value):
    export_prior(tmp_path, "sha256:x")
    change_json(tmp_path, lambda about: about.update({fact: value}))
    with pytest.raises(ValueError, match=f"description of a prior model: {fact} must be "):
        load_model(tmp_path, "prior")


@pytest.mark.parametrize("fact", ["level", "classes", "tokenizer", "grid", "config"])
def test_a_fact_that_is_missing_is_named(tmp_path, fact):
    export_prior(tmp_path, "sha256:x")
    change_json(tmp_path, lambda about: about.pop(fact))
    with pytest.raises(ValueError, match=fact):
        load_model(tmp_path, "prior")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' * 100_000, "\xff", "1" * 5000, "NaN", ""])
def test_a_config_json_that_is_none_is_one_line(tmp_path, text):
    export_vqvae(tmp_path)
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="config.json: "):
        load_model(tmp_path, "vqvae")


# ---- files of torch.save


class Filler:
    """Pickled, it asks for memory: a bytearray is one of the types that torch's own unpickler makes."""

    def __reduce__(self) -> Any:
        return bytearray, (1 << 33,)


def compressed(path: Path) -> None:
    torch.save({"a": torch.zeros(1 << 20)}, path)
    with zipfile.ZipFile(path) as archive:
        content = [(entry, archive.read(entry)) for entry in archive.namelist()]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for entry, data in content:
            archive.writestr(entry, data)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (compressed, r"bytes that unpack to [\d,]+; torch.save does not compress"),
        (lambda path: torch.save({"a": Filler()}, path), "not a file of tensors alone"),
        (lambda path: torch.save({"a": torch.zeros(1).expand(1 << 40)}, path), "a is no plain tensor"),
        (lambda path: torch.save({"a": torch.empty(1 << 40, device="meta")}, path), "a is no plain tensor"),
        (lambda path: torch.save({"a": torch.eye(2).to_sparse()}, path), "a is no plain tensor"),
        (lambda path: torch.save(nan_state(), path), "levels.1.decoder.0.bias has 1 of 128 numbers that are NaN"),
        (lambda path: torch.save(port_state() | {"quantize_b.cluster_size": torch.zeros(3)}, path), r"has shape \[3\]"),
        (lambda path: torch.save(port_state() | {"quantize_t.embed": torch.zeros(3)}, path), r"has shape \[3\]"),
        (lambda path: torch.save(wide_state(), path), "the model needs"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, of sparse tensors
def test_checkpoints_of_others_are_bounded_by_their_size(tmp_path, capsys, make, message):
    path = tmp_path / "x.pt"
    make(path)
    assert cli.main(["import-checkpoint", str(path), str(tmp_path / "out")]) == 1
    line = capsys.readouterr().err
    assert str(path) in line and not (tmp_path / "out").exists()
    assert line.count("\n") == 1
    assert re.search(message, line), line


def nan_state() -> dict[str, Tensor]:
    state = port_state()
    state["dec.blocks.0.bias"][5] = math.nan
    return state


def wide_state() -> dict[str, Tensor]:
    """A megabyte that speaks of a model of terabytes."""
    return port_state() | {"enc_b.blocks.5.conv.1.weight": torch.zeros(2, 1 << 17, 1, 1)}


# ---- which folder counts


def test_one_folder_of_several_models_is_enough(tmp_path):
    tokenizer = export_vqvae(tmp_path / "vqvae")
    for level in ("top", "bottom"):
        export_prior(tmp_path / f"prior_{level}", tokenizer, level)
    assert load_model(tmp_path, "vqvae").path == tmp_path / "vqvae"
    assert load_model(tmp_path, "prior_bottom").path == tmp_path / "prior_bottom"
    shutil.move(tmp_path / "vqvae", tmp_path / "train_vqvae")
    for path in (tmp_path, tmp_path / "train_vqvae"):
        assert load_model(path, "vqvae").path == tmp_path / "train_vqvae"
    with pytest.raises(ValueError, match="holds a vqvae model, expected a prior"):
        load_model(tmp_path / "train_vqvae", "prior_top")
    with pytest.raises(FileNotFoundError, match="no run and no exported model there; `vqscale train_vqvae` makes one"):
        load_model(tmp_path / "nowhere", "vqvae")


def test_a_runs_checkpoints_win_over_an_export(tmp_path):
    export_vqvae(tmp_path / "vqvae")
    run = tmp_path / "train_vqvae"
    (run / "checkpoints").mkdir(parents=True)
    shutil.copy(tmp_path / "vqvae" / "config.json", run)
    shutil.copy(tmp_path / "vqvae" / "model.safetensors", run)
    assert locate(tmp_path, "vqvae") == run
    with pytest.raises(ValueError, match="this run is not started"):
        load_model(run)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights_kind": "raw"}, "weights_kind=raw cannot apply to an exported model, whose weights is ema"),
        ({"checkpoint": 320}, "checkpoint=320 cannot apply to an exported model, whose images_seen is 640"),
        ({"weights_kind": "none"}, "choose ema or raw"),
        ({"weights_kind": "ema", "checkpoint": 640}, ""),
    ],
)
def test_an_export_has_one_state(tmp_path, options, message):
    export_vqvae(tmp_path)
    if message:
        with pytest.raises(ValueError, match=message):
            load_model(tmp_path, "vqvae", **options)
    else:
        assert load_model(tmp_path, "vqvae", **options).images_seen == 640


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"config.json": '{"model_type": "gpt2"}'}, "config.json was not written by this program"),
        ({"model.safetensors": "weights"}, "model.safetensors was not written by this program"),
        ({"status.json": "{}"}, "is a run directory; choose a folder outside it"),
        ({"checkpoints/000000000640/state.json": "{}"}, "is a run directory; choose a folder outside it"),
    ],
)
def test_an_import_replaces_no_file_of_others(tmp_path, capsys, files, message):
    torch.save(port_state(), tmp_path / "x.pt")
    for name, text in files.items():
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_text(text)
    words = ["import-checkpoint", str(tmp_path / "x.pt"), str(tmp_path / "out"), "resolution=64"]
    assert cli.main(words) == 1
    assert message in capsys.readouterr().err
    assert {name: (tmp_path / "out" / name).read_text() for name in files} == files
    assert len([path for path in (tmp_path / "out").rglob("*") if path.is_file()]) == len(files)


def test_an_import_may_be_done_again(tmp_path):
    torch.save(port_state(), tmp_path / "x.pt")
    for _ in range(2):
        assert cli.main(["import-checkpoint", str(tmp_path / "x.pt"), str(tmp_path / "out"), "resolution=64"]) == 0
    assert load_model(tmp_path / "out", "vqvae").weights == "exported"
