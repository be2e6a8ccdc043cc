"""IDX files and CIFAR-10's batches become shards with the pictures, labels and names that they hold."""

import gzip
import json
import struct
from pathlib import Path

import numpy as np
import pytest

from vqscale import cli
from vqscale.data.arrays import array_files, read_pictures
from vqscale.data.images import ImageReader
from vqscale.data.loader import build_loader
from vqscale.data.packing import Encoding, centred
from vqscale.data.shards import Manifest


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def write_mnist(folder: Path, train: int = 12, test: int = 5, zipped: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Random grey pictures of 6x4 pixels of three classes; returns those of the test part."""
    chance = np.random.default_rng(0)
    for part, count in (("train", train), ("t10k", test)):
        images, labels = chance.integers(0, 256, (count, 6, 4), np.uint8), np.arange(count) % 3
        for kind, data in (("images-idx3", idx(images)), ("labels-idx1", idx(labels))):
            name = f"{part}-{kind}-ubyte"
            (folder / (name + ".gz" * zipped)).write_bytes(gzip.compress(data) if zipped else data)
    return images, labels


def write_cifar(folder: Path) -> np.ndarray:
    """Two batches of three pictures and a test batch of two; returns the records of all."""
    table = np.random.default_rng(1).integers(0, 256, (8, 3073), np.uint8)
    table[:, 0] = np.arange(8) % 2
    for name, rows in (("data_batch_1", table[:3]), ("data_batch_2", table[3:6]), ("test_batch", table[6:])):
        (folder / f"{name}.bin").write_bytes(rows.tobytes())
    (folder / "batches.meta.txt").write_text("cat\ndog\n\n")
    return table


def packed(folder: Path) -> tuple[Manifest, dict[str, tuple[int, np.ndarray]]]:
    """key -> (label, pixels) of a data set."""
    manifest = Manifest.load(folder)
    reader = ImageReader(manifest.transform["resolution"])
    batch = next(iter(build_loader(folder, read=reader, global_batch=manifest.num_samples, shuffle_window=0)))
    keys = [key for shard in range(len(manifest.shards)) for key in manifest.index(folder, shard).keys]
    rows = zip(batch["label"].tolist(), batch["image"].numpy(), strict=True)
    return manifest, dict(zip(keys, rows, strict=True))


@pytest.mark.parametrize("zipped", [True, False])
def test_idx_files_are_packed_with_their_test_part_held_out(tmp_path: Path, zipped: bool) -> None:
    images, labels = write_mnist(tmp_path, zipped=zipped)
    config = tmp_path / "pack.yaml"
    config.write_text(f"source: {tmp_path}\nclass_names: [c, b, a]\nholdout: test\nresolution: 8\n")
    assert cli.main(["pack", str(config), f"run_dir={tmp_path / 'packed'}", "workers=1"]) == 0
    assert Manifest.load(tmp_path / "packed" / "train").num_samples == 12
    manifest, samples = packed(tmp_path / "packed" / "holdout")
    assert manifest.classes == ("c", "b", "a")
    for n in range(5):
        label, pixels = samples[f"t10k-images-idx3-ubyte/{n}"]
        assert label == labels[n]
        assert (pixels[:, 1:7, 2:6] == images[n]).all() and pixels.astype(int).sum() == 3 * images[n].astype(int).sum()


@pytest.mark.parametrize("word", ["labels=x", "classes_from=x"])
def test_other_labels_for_arrays_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], word: str) -> None:
    write_mnist(tmp_path)
    config = tmp_path / "pack.yaml"
    config.write_text(f"source: {tmp_path}\nholdout: test\nresolution: 8\n")
    assert cli.main(["pack", str(config), f"run_dir={tmp_path / 'packed'}", word]) == 1
    assert "has labels of its own: labels= and classes_from= do not apply" in capsys.readouterr().err


def test_a_file_without_pictures_leaves_nothing_to_train_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_mnist(tmp_path, train=0)
    config = tmp_path / "pack.yaml"
    config.write_text(f"source: {tmp_path}\nholdout: test\nresolution: 8\n")
    assert cli.main(["pack", str(config), f"run_dir={tmp_path / 'packed'}", "workers=1"]) == 1
    assert "no image is left to train on" in capsys.readouterr().err


def test_cifar_batches_are_packed_as_they_are(tmp_path: Path) -> None:
    table = write_cifar(tmp_path)
    config = tmp_path / "pack.yaml"
    config.write_text(f"source: {tmp_path}\nholdout: test\nresolution: 32\n")
    assert cli.main(["pack", str(config), f"run_dir={tmp_path / 'packed'}", "workers=1"]) == 0
    manifest, samples = packed(tmp_path / "packed" / "train")
    assert manifest.classes == ("cat", "dog")
    for n in range(6):
        label, pixels = samples[f"data_batch_{n // 3 + 1}/{n % 3}"]
        assert label == table[n, 0] and (pixels.reshape(-1) == table[n, 1:]).all()


def test_a_fraction_of_the_training_part_can_be_held_out_too(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    config = tmp_path / "pack.yaml"
    config.write_text(f"source: {tmp_path}\nholdout: 'every:4'\nresolution: 8\n")
    assert cli.main(["pack", str(config), f"run_dir={tmp_path / 'packed'}", "workers=1"]) == 0
    assert Manifest.load(tmp_path / "packed" / "holdout").num_samples == 3
    assert json.loads((tmp_path / "packed" / "train" / "dataset.json").read_text())["classes"] == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("train-images-idx3-ubyte", idx(np.zeros((2, 2, 2)))[:-1], "not a whole IDX file of 3 dimensions"),
        ("train-images-idx3-ubyte", b"", "not a whole IDX file of 3 dimensions"),
        ("train-images-idx3-ubyte", idx(np.zeros((2, 2))), "not a whole IDX file of 3 dimensions"),
        ("train-images-idx3-ubyte", idx(np.zeros((3, 2, 2))), "3 pictures, but 2 labels"),
        ("train-images-idx3-ubyte.gz", b"\x1f\x8b but no more", "does not unpack"),
        ("train-images-idx3-ubyte.gz", gzip.compress(idx(np.zeros((2, 2, 2))), mtime=0)[:-9], "does not unpack"),
        ("data_batch_1.bin", bytes(3072), "no whole number of CIFAR-10 records of 3073"),
        ("data_batch_1.bin", b"", "no whole number of CIFAR-10 records of 3073"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    for suffix in ("", ".gz"):
        labels = idx(np.zeros(2))
        (tmp_path / f"train-labels-idx1-ubyte{suffix}").write_bytes(gzip.compress(labels) if suffix else labels)
    (tmp_path / name).write_bytes(data)
    assert array_files(tmp_path, "train") == [name]
    with pytest.raises(ValueError, match=message) as caught:
        read_pictures(tmp_path / name)
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(np.zeros((2, 2, 2))))
    with pytest.raises(FileNotFoundError, match="train-labels-idx1-ubyte does not exist"):
        read_pictures(tmp_path / "train-images-idx3-ubyte")


def test_larger_pictures_are_resized_and_smaller_ones_keep_their_pixels() -> None:
    small = np.full((3, 2, 5), 7, np.uint8)
    assert centred(small, Encoding(8, "png", 0)).sum() == small.sum()
    for resize in ("bilinear", "adm"):
        larger = centred(np.full((3, 20, 10), 9, np.uint8), Encoding(8, "png", 0, resize))
        assert larger.shape == (3, 8, 8) and (larger == 9).all()
