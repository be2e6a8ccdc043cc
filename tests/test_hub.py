"""Models on the Hugging Face Hub, against a stand-in of it: pushed, loaded, cached, and one line where that fails."""

import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from support import hub as stand_in
from support.exports import export_all, export_prior
from support.loads import save_run
from support.vqvaes import images

from vqscale import cli
from vqscale.api import VQVAE, sample
from vqscale.hub import local_folder

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of huggingface_hub's own upload
NAME = "somebody/tiny"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_all(tmp_path_factory.mktemp("models"))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[stand_in.Hub]:
    """A hub that this process uses, in an empty folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with stand_in.serving() as hub:
        stand_in.use_here(monkeypatch, hub, tmp_path / "cache")
        yield hub


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- loading


def test_codes_and_images_are_those_of_the_folder(hub: stand_in.Hub, models: Path) -> None:
    hub.commit(NAME, contents(models))
    ours, theirs = VQVAE.from_pretrained(NAME), VQVAE.from_pretrained(models)
    assert ours.fingerprint == theirs.fingerprint
    assert all(torch.equal(a, b) for a, b in zip(ours.encode(images()), theirs.encode(images()), strict=True))
    assert sorted(hub.downloads()) == ["vqvae/config.json", "vqvae/model.safetensors"], "no weights of the priors"
    assert torch.equal(sample(NAME, seed=3), sample(models, seed=3))


def test_a_second_load_downloads_nothing_and_the_cache_serves_without_a_hub(hub: stand_in.Hub, models: Path) -> None:
    hub.commit(NAME, contents(models))
    first = sample(NAME)
    before = len(hub.downloads())
    assert torch.equal(sample(NAME), first) and len(hub.downloads()) == before
    hub.down = True
    assert torch.equal(sample(NAME), first)


def test_a_revision_is_loaded_as_it_was(hub: stand_in.Hub, models: Path, tmp_path: Path) -> None:
    earlier = hub.commit(NAME, contents(models))
    tokenizer = VQVAE.from_pretrained(models).fingerprint
    export_prior(tmp_path / "later" / "prior_top", tokenizer, seed=1)
    hub.commit(NAME, contents(tmp_path / "later"))
    assert torch.equal(sample(NAME, revision=earlier), sample(models))
    assert not torch.equal(sample(NAME), sample(models))


def test_nothing_pickled_is_downloaded(hub: stand_in.Hub, models: Path) -> None:
    evil = pickle.dumps("x")
    others = {name: evil for name in ("pytorch_model.bin", "vqvae/model.pt", "vqvae/checkpoints/a.pkl", "status.json")}
    hub.commit(NAME, contents(models) | others)
    folder = local_folder(NAME, ["vqvae", "prior_top"])
    assert {path.name for path in folder.rglob("*") if path.is_file()} == {"config.json", "model.safetensors"}


def test_a_folder_of_that_name_wins(hub: stand_in.Hub, tmp_path: Path, models: Path) -> None:
    export_all(tmp_path / "here" / NAME)
    VQVAE.from_pretrained(NAME)
    with pytest.raises(FileNotFoundError, match="no run and no exported model there"):
        VQVAE.from_pretrained(Path("somebody/else"))
    with pytest.raises(ValueError, match="revision=v1: only a name on the Hub, org/name, has revisions; somebody/tiny"):
        VQVAE.from_pretrained(NAME, revision="v1")
    assert hub.asked == []


# ---- what is not there


def refusal(name: str = NAME, revision: str | None = None) -> str:
    with pytest.raises(FileNotFoundError) as error:
        VQVAE.from_pretrained(name, revision=revision)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_repository_or_a_revision_that_does_not_exist(hub: stand_in.Hub, models: Path) -> None:
    assert refusal() == (
        f"{NAME}: no such folder here, and no repository of this name on {hub.url}; a private one needs `hf auth login`"
    )
    hub.commit(NAME, contents(models))
    assert refusal(revision="v9") == f"{NAME}: no such folder here, and on {hub.url} it has no revision v9"


def test_a_repository_of_another_program(hub: stand_in.Hub) -> None:
    hub.commit(NAME, {"config.json": b'{"model_type": "gpt2"}', "model.safetensors": bytes(1000)})
    assert refusal() == f"{NAME}: this repository on the Hub has no vqvae that export wrote"
    assert hub.downloads() == ["config.json"]


def test_no_connection(hub: stand_in.Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.down = True
    assert f"{NAME}: no such folder here, not all of it in the cache, and no answer of {hub.url}: " in refusal()
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    assert "refused" in refusal()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refusal()


def test_a_name_that_the_hub_cannot_have(hub: stand_in.Hub) -> None:
    with pytest.raises(OSError, match="^runs/a--b: no such folder here: .*HFValidationError: Cannot have -- or .. in"):
        VQVAE.from_pretrained("runs/a--b")


def test_without_the_package(hub: stand_in.Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"^somebody/tiny: .* needs a package that is not here: .*'vqscale\[hub\]'"):
        VQVAE.from_pretrained(NAME)


# ---- pushing


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experiment") / "train_vqvae"
    save_run(str(folder))
    return folder


def push_error(capsys: pytest.CaptureFixture[str], run: Path, *words: str) -> str:
    assert cli.main(["export", str(run), "out", *words]) == 1
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    return line


_PROGRAM = """
import sys
from vqscale import cli
from vqscale.api import VQVAE
run, name = sys.argv[1:]
assert cli.main(["export", run, "out", "--push", name, "licence=cc0-1.0", "dataset=somebody/pictures"]) == 0
print(VQVAE.from_pretrained(name).fingerprint == VQVAE.from_pretrained("out").fingerprint)
"""


def test_a_process_pushes_and_loads_by_the_librarys_environment(hub: stand_in.Hub, run: Path, tmp_path: Path) -> None:
    here = tmp_path / "here"
    environment = os.environ | stand_in.settings(hub, tmp_path / "home")
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, str(run), NAME], cwd=here, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    ((sha, files),) = hub.repositories[NAME]
    assert done.stdout.splitlines()[-2:] == [f"{hub.url}/{NAME}/commit/{sha}", "True"]
    assert files == contents(here / "out") and set(files) == {"README.md", "config.json", "model.safetensors"}
    card = files["README.md"].decode()
    assert card.startswith(
        "---\nlicense: cc0-1.0\nlibrary_name: vqscale\npipeline_tag: image-feature-extraction\ntags: [vq-vae-2]\n"
        'datasets: ["somebody/pictures"]\n---\n'
    )
    assert f'from_pretrained("{NAME}")' in card and "FOLDER" not in card


def test_a_push_goes_on_top_of_another_and_stays_private(
    hub: stand_in.Hub, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", stand_in.TOKEN)
    words = ["export", str(run), "out", f"push={NAME}", "private=true"]
    Path("out").mkdir()
    Path("out/.env").write_text("SECRET=1")
    assert cli.main([*words, "licence=Mine, all rights reserved"]) == 0
    assert cli.main([*words, "weights_kind=raw"]) == 0
    (_, first), (_, second) = hub.repositories[NAME]
    assert first.keys() == second.keys() and ".env" not in first
    assert b'license: other\nlicense_name: "Mine, all rights reserved"\n' in first["README.md"]
    assert first["model.safetensors"] != second["model.safetensors"]
    assert VQVAE.from_pretrained(NAME).fingerprint == VQVAE.from_pretrained("out").fingerprint
    monkeypatch.delenv("HF_TOKEN")
    assert hub.private == {NAME}
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "another")
    assert "a private one needs `hf auth login`" in refusal()


def test_a_push_that_cannot_succeed_writes_nothing(
    hub: stand_in.Hub, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "push=tiny: a name on the Hub has the form org/name" in push_error(capsys, run, "push=tiny")
    assert f"push={NAME}: no token for the Hub here; `hf auth login`" in push_error(capsys, run, f"push={NAME}")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install 'vqscale[hub]'" in push_error(capsys, run, f"push={NAME}")
    assert hub.asked == [] and not Path("out").exists()


def test_a_push_that_fails_leaves_the_folder(
    hub: stand_in.Hub, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_another")
    assert f"push={NAME}" in push_error(capsys, run, f"push={NAME}")
    monkeypatch.setenv("HF_TOKEN", stand_in.TOKEN)
    assert '"license" must be one of' in push_error(capsys, run, f"push={NAME}", "licence=gpl-99")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in push_error(capsys, run, f"push={NAME}")
    assert VQVAE.from_pretrained("out").num_codes == 16
