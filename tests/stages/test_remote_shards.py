"""The stages on a data set behind a web server: the same weights and codes as from the files."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.stages import run_stage
from support.web import serving

from vqscale import cli
from vqscale.engine.checkpoint import find_latest

SIZES = ("total_images=128", "evaluate_every=64", "save_every=0", "init_images=32", "evaluate_images=32")


def test_training_and_extraction(
    whole_chain: Path,
    tmp_path: Path,
    files: Callable[[Path], dict[str, bytes]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    pack, vqvae = whole_chain / "pack", whole_chain / "train_vqvae"
    cache = [f"cache_dir={tmp_path / 'cache'}", "workers=2"]
    with serving(pack) as web:
        shards = {split: len(list((pack / split).glob("*.tar"))) for split in ("train", "holdout")}
        urls = {s: f"{web.url}/{s}/{{000000..{count - 1:06d}}}.tar" for s, count in shards.items()}
        Path("index.yaml").write_text(
            f"source: {urls['train']}\nholdout: {urls['holdout']}\nclasses_from: {pack}\nworkers: 1\n"
        )
        assert cli.main(["index", "index.yaml", "run_dir=unsized"]) == 0
        assert run_stage("train_vqvae", "train_vqvae", "data=unsized", "run_dir=none", *cache) == 1
        assert "does not say the size of its images" in capsys.readouterr().err
        assert cli.main(["index", "index.yaml", "run_dir=index", "resolution=32"]) == 0
        web.asked.clear()
        for data, run in ((str(pack), "local"), ("index", "remote")):
            assert run_stage("train_vqvae", "train_vqvae", f"data={data}", f"run_dir={run}", *SIZES, *cache) == 0
            of = [f"data={data}", f"vqvae={vqvae}", f"run_dir={run}_codes"]
            assert run_stage("extract_codes", "extract_codes", *of, *cache) == 0
        assert {name for name, _ in web.asked} == {
            f"{s}/{n:06d}.tar" for s, count in shards.items() for n in range(count)
        }
    trained, again = tensors(Path("local")), tensors(Path("remote"))
    assert trained.keys() == again.keys() and all(torch.equal(trained[name], again[name]) for name in trained)
    local, remote = files(Path("local_codes")), files(Path("remote_codes"))
    tars = [name for name in local if name.endswith(".tar")]
    assert len(tars) == sum(shards.values()) and [local[n] for n in tars] == [remote[n] for n in tars]


def tensors(run_dir: Path) -> dict[str, torch.Tensor]:
    latest = find_latest(run_dir / "checkpoints")
    assert latest is not None
    return latest.read("")
