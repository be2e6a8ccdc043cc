"""extract_codes: images that cannot be read, outputs that are gone, inputs that have changed."""

import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.stages import run_stage
from support.vqvaes import vqvae
from torch import Tensor

from vqscale.data.shards import Manifest, ShardWriter, shard_info
from vqscale.files import write_json
from vqscale.models.vqvae import VQVAE
from vqscale.sources import Source
from vqscale.stages.extract_codes import _encode

Files = Callable[[Path], dict[str, bytes]]


def extract(*overrides: str) -> int:
    return run_stage("extract_codes", "extract_codes", *overrides)


def damage(folder: Path, count: int) -> list[str]:
    """Change a byte of the first pictures of shard 0; their keys."""
    index = Manifest.load(folder).index(folder, 0)
    data = bytearray((folder / "000000.tar").read_bytes())
    for row in range(count):
        data[int(index.offset["png"][row]) + 40] ^= 1
    (folder / "000000.tar").write_bytes(data)
    return [index.key(row) for row in range(count)]


def test_unreadable_images_are_counted_named_and_left_out(
    chain: Path, capsys: pytest.CaptureFixture[str], program_log: logging.Logger
) -> None:
    keys = damage(chain / "pack" / "train", 3)
    images = Manifest.load(chain / "pack" / "train")
    assert extract("run_dir=again", "max_bad_fraction=0.5") == 0
    said = capsys.readouterr().err
    assert f"train: 3 of {images.num_samples} images could not be read; see again/bad.jsonl" in said
    assert "train: 100%|" in said and f"{images.num_samples}/{images.num_samples}" in said
    named = [json.loads(line)["key"] for line in Path("again/bad.jsonl").read_text().splitlines()]
    assert named == keys
    codes = Manifest.load("again/train")
    assert (codes.num_samples, codes.extra["bad_images"]) == (images.num_samples - 3, 3)
    assert Manifest.load("again/holdout").extra["bad_images"] == 0


def test_more_unreadable_images_than_the_budget_end_the_run(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage(chain / "pack" / "train", 3)
    total = Manifest.load(chain / "pack" / "train").num_samples
    for fraction, allowed in (("0.003", 1), ("0", 0)):
        assert extract("run_dir=again", f"max_bad_fraction={fraction}") == 1
        said = capsys.readouterr().err
        assert f"{allowed + 1} of {total} images could not be read, more than the {allowed} that" in said
        assert not Path("again/train/000000.tar").exists() and not list(Path("again").rglob("*.tmp"))


def test_outputs_that_are_gone_are_made_again(chain: Path, files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    before, out = files(chain / "extract_codes"), chain / "extract_codes" / "train"
    names = ["000000.tar", "000001.index.safetensors", "dataset.json", "../holdout"]
    for name in names:
        shutil.rmtree(out / name) if (out / name).is_dir() else (out / name).unlink()
        assert extract() == 0
        assert files(chain / "extract_codes") == before, name
    path = out / "000000.index.safetensors"
    path.write_bytes(before["train/000000.index.safetensors"][:-1] + b"?")
    assert extract() == 0 and files(chain / "extract_codes") == before
    capsys.readouterr()
    assert extract() == 0
    assert "nothing left to do: the codes are in" in capsys.readouterr().err


def test_a_done_run_whose_inputs_are_away_stays_done(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(chain / "train_vqvae")
    assert extract() == 0
    assert "nothing left to do; not compared with the inputs, which are missing" in capsys.readouterr().err
    assert json.loads((chain / "extract_codes" / "status.json").read_text())["state"] == "done"
    shutil.rmtree(chain / "extract_codes" / "train")
    assert extract() == 1


def test_codes_of_a_vqvae_that_was_trained_further_are_stale(
    chain: Path, files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(chain / "extract_codes")
    assert run_stage("train_vqvae", "train_vqvae", "total_images=2240") == 0
    assert extract() == 1
    said = capsys.readouterr().err
    assert "vqvae was sha256:" in said and "fresh=true" in said and "nothing left to do" not in said
    assert files(chain / "extract_codes") == before
    assert extract("fresh=true") == 0
    assert files(chain / "extract_codes") != before


def test_codes_of_earlier_versions_are_held_to_their_source(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (chain / "extract_codes" / "inputs.json").unlink()
    out = chain / "extract_codes" / "train"
    write_json(
        out / "source.json", {"tokenizer": "sha256:0", "data": Manifest.load(chain / "pack" / "train").fingerprint}
    )
    assert extract() == 1
    assert "source.json: these code shards were made with tokenizer sha256:0, now it is" in capsys.readouterr().err
    assert shard_info(out / "000000.tar") is not None


def test_an_error_of_the_writer_is_one_line_and_leaves_nothing_half_written(
    chain: Path, files: Files, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write, written = ShardWriter.write, 0

    def fill_the_disk(writer: ShardWriter, key: str, parts: dict[str, bytes]) -> None:
        nonlocal written
        written += 1
        if writer.path.name == "000002.tar":
            raise OSError(28, "No space left on device", str(writer.path))
        write(writer, key, parts)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "write", fill_the_disk)
        assert extract("run_dir=again") == 1
    said = capsys.readouterr().err
    assert "vqscale: error: [Errno 28] No space left on device" in said and "Traceback" not in said
    assert [path.name for path in sorted(Path("again/train").glob("*.tar"))] == ["000000.tar", "000001.tar"]
    assert not list(Path("again").rglob("*.tmp"))
    assert extract("run_dir=again") == 0 and files(Path("again")) == files(chain / "extract_codes")


def test_a_block_that_does_not_fit_is_named(
    chain: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def encode(model: VQVAE, image: Tensor) -> list[Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(VQVAE, "encode", encode)
    assert extract("run_dir=again") == 1
    said = capsys.readouterr().err
    assert re.search(r"error: out of memory on cpu \(tried to allocate 2.00 GiB\): block=\d+ does not fit", said)
    assert "Traceback" not in said and not list(Path("again").rglob("*.tmp"))


class OnGpu(Tensor):
    """A CPU's tensor that says it is a GPU's."""

    is_cuda = property(lambda self: True)  # type: ignore[assignment]


def test_both_views_are_one_batch_on_a_gpu_and_two_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    model = vqvae(resolution=16).eval()
    source = Source(model, {}, "", Path(), "ema", 0)
    sizes, encode = list[int](), model.encode
    monkeypatch.setattr(model, "encode", lambda image: sizes.append(len(image)) or encode(image))
    image = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    codes = [_encode(source, one, flips=True)() for one in (image, image.as_subclass(OnGpu))]
    assert sizes == [3, 3, 6]
    single = _encode(source, image.flip(-1), flips=False)()
    for name, level in codes[0].items():
        assert level.dtype == torch.uint16 and level.shape[:2] == (3, 2)
        assert torch.equal(level[:, 1], single[name][:, 0]) and not torch.equal(level[:, 0], level[:, 1])
        assert torch.equal(level, torch.Tensor.as_subclass(codes[1][name], Tensor))
