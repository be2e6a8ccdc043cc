"""Statistics on disk: no pickle, true for their facts only."""

import io
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch

from vqscale.evaluation import statistics
from vqscale.evaluation.statistics import (
    DamagedFile,
    FeatureSet,
    load_statistics,
    moments_of,
    read_published,
    save_statistics,
    statistics_path,
)

FACTS = {"weights": "ab", "preprocessing": "p", "data": "sha256:1", "n": 30, "split": "holdout"}


def feature_set() -> FeatureSet:
    x = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
    return FeatureSet(30, {"pooled": moments_of(x), "spatial": moments_of(x[:, :3])}, x, x[:, :4])


def test_round_trip_is_exact(tmp_path: Path) -> None:
    found, path = feature_set(), tmp_path / "cache" / "s.safetensors"
    save_statistics(path, found, FACTS)
    back = load_statistics(path, FACTS)
    assert back.n == 30 and back.gaussians.keys() == {"pooled", "spatial"}
    assert torch.equal(back.gaussians["pooled"].covariance, found.gaussians["pooled"].covariance)
    assert torch.equal(back.gaussians["spatial"].mean, found.gaussians["spatial"].mean)
    assert torch.equal(back.features, found.features) and torch.equal(back.logits, found.logits)


def test_a_set_without_moments_has_none_after_the_round_trip(tmp_path: Path) -> None:
    save_statistics(tmp_path / "s", FeatureSet(1, {}, torch.ones(1, 2), torch.ones(1, 2)), FACTS)
    assert load_statistics(tmp_path / "s", FACTS).gaussians == {}


@pytest.mark.parametrize("name, value", [("data", "sha256:2"), ("weights", "cd"), ("n", 31), ("split", "train")])
def test_other_facts_are_another_file_and_are_refused(tmp_path: Path, name: str, value: object) -> None:
    other = FACTS | {name: value}
    assert statistics_path(tmp_path, FACTS) != statistics_path(tmp_path, other)
    save_statistics(tmp_path / "s", feature_set(), FACTS)
    with pytest.raises(ValueError, match=f"{name} is {FACTS[name]}, expected {value}"):
        load_statistics(tmp_path / "s", other)


@pytest.mark.parametrize("content", [b"", b"\0" * 40, pickle.dumps({"mu": 1})])
def test_a_damaged_file_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "s").write_bytes(content)
    with pytest.raises(ValueError, match="not a file of feature statistics"):
        load_statistics(tmp_path / "s", FACTS)


def edited(path: Path, change: Callable[[dict[str, torch.Tensor], dict[str, str]], None]) -> None:
    """The file with other tensors or metadata, as a well-formed file."""
    with safetensors.safe_open(str(path), framework="pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata())
    change(tensors, metadata)
    safetensors.torch.save_file(tensors, path, metadata)


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors, _: tensors["pooled.mean"].add_(1),
        lambda tensors, _: tensors["features"].mul_(2),
        lambda tensors, _: tensors.pop("spatial.mean"),
        lambda _, metadata: metadata.update(statistics=metadata["statistics"].replace('"n": 30', '"n": 31')),
        lambda _, metadata: metadata.update(statistics=metadata["statistics"].replace('"checksum"', '"sum"')),
        lambda _, metadata: metadata.update(statistics="[]"),
    ],
)
def test_an_edited_file_is_not_believed(tmp_path: Path, change: Any) -> None:
    save_statistics(tmp_path / "s", feature_set(), FACTS)
    edited(tmp_path / "s", change)
    with pytest.raises(DamagedFile, match="statistics|damaged or edited"):
        load_statistics(tmp_path / "s", FACTS)


def test_adms_file_is_read(tmp_path: Path) -> None:
    mu, sigma, images = np.arange(4.0), np.eye(4), np.zeros((3, 8, 8, 3), np.uint8)
    images[0, 0, 0] = [1, 2, 3]
    np.savez(tmp_path / "r.npz", mu=mu, sigma=sigma, mu_s=mu[:2], sigma_s=sigma[:2, :2], arr_0=images)
    found = read_published(tmp_path / "r.npz")
    pooled = found.gaussians["pooled"]
    assert pooled.mean.tolist() == [0, 1, 2, 3] and pooled.covariance.dtype == torch.float64
    assert "spatial" in found.gaussians and found.images is not None
    assert found.images.shape == (3, 3, 8, 8) and found.images[0, :, 0, 0].tolist() == [1, 2, 3]
    np.savez(tmp_path / "m.npz", mu=mu, sigma=sigma)
    assert read_published(tmp_path / "m.npz").images is None


def test_a_reference_that_is_not_one_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.npz"):
        read_published(tmp_path / "gone.npz")
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(ValueError, match=r"text\.npz: not an \.npz"):
        read_published(tmp_path / "text.npz")
    np.savez(tmp_path / "pickled.npz", mu=np.array([{"a": 1}], dtype=object), sigma=np.eye(1))
    with pytest.raises(ValueError, match=r"pickled\.npz: not an \.npz of plain arrays"):
        read_published(tmp_path / "pickled.npz")
    np.savez(tmp_path / "other.npz", x=np.ones(2))
    with pytest.raises(ValueError, match=r"other\.npz: has no mu and sigma"):
        read_published(tmp_path / "other.npz")
    np.savez(tmp_path / "shape.npz", mu=np.ones(3), sigma=np.eye(4))
    with pytest.raises(ValueError, match="do not fit"):
        read_published(tmp_path / "shape.npz")


GOOD = {"mu": np.zeros(4), "sigma": np.eye(4)}


@pytest.mark.parametrize(
    "arrays, said",
    [
        ({"mu": np.full(4, np.nan)}, "mu holds values that are no finite numbers"),
        ({"sigma": np.full((4, 4), np.inf)}, "sigma holds values that are no finite numbers"),
        ({"mu": np.array(["a"] * 4)}, "mu holds values that are no finite numbers"),
        ({"arr_0": np.zeros((2, 8, 8, 3), np.float32)}, r"arr_0 is float32 \[2, 8, 8, 3\], expected uint8"),
        ({"arr_0": np.zeros((2, 3, 8, 8), np.uint8)}, r"arr_0 is uint8 \[2, 3, 8, 8\], expected uint8"),
        ({"mu_s": np.zeros(3), "sigma_s": np.eye(4)}, "mu_s .* and sigma_s .* do not fit"),
    ],
)
def test_a_reference_of_other_arrays_is_one_line(tmp_path: Path, arrays: dict[str, np.ndarray], said: str) -> None:
    np.savez(tmp_path / "r.npz", **GOOD | arrays)
    with pytest.raises(ValueError, match=f"r\\.npz: {said}"):
        read_published(tmp_path / "r.npz")


def header(shape: tuple[int, ...], dtype: str = "|u1") -> bytes:
    """The start of an .npy file that says it holds this."""
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": dtype, "fortran_order": False, "shape": shape})
    return out.getvalue()


@pytest.mark.parametrize(
    "member, said",
    [
        (header((1 << 20, 256, 256, 3)) + b"short", "an array of 206,158,430,208 bytes in"),
        (header((100, 100, 100, 3)) + bytes(3_000_000), "bytes that expand to 3,000,128"),
        (header((3,), "|O") + b"pickle", "holds pickled objects"),
        (b"\x93NUMPY\x09\x00" + bytes(60), r"array format \(9, 0\)"),
        (b"no array", "magic string"),
    ],
)
def test_the_size_of_a_reference_is_known_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, member: bytes, said: str
) -> None:
    monkeypatch.setattr(statistics, "_FREE_BYTES", 1_000_000)
    monkeypatch.setattr(np, "load", lambda *_, **__: pytest.fail("it was read"))
    np.savez(tmp_path / "r.npz", **GOOD)
    with zipfile.ZipFile(tmp_path / "r.npz", "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("arr_0.npy", member)
    with pytest.raises(ValueError, match=f"r\\.npz: not an .npz of plain arrays .*{said}"):
        read_published(tmp_path / "r.npz")


def test_a_reference_beyond_the_budget_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "_MOST_BYTES", 1_000)
    np.savez(tmp_path / "r.npz", **GOOD, arr_0=np.zeros((9, 8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match=r"arrays of 2,\d\d\d bytes, at most 1,000 are read"):
        read_published(tmp_path / "r.npz")
