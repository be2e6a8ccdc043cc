"""Statistics on disk: no pickle, true for their facts only."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from vqscale.evaluation.statistics import (
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
    return FeatureSet(30, moments_of(x), moments_of(x[:, :3]), x, x[:, :4])


def test_round_trip_is_exact(tmp_path: Path) -> None:
    found, path = feature_set(), tmp_path / "cache" / "s.safetensors"
    save_statistics(path, found, FACTS)
    back = load_statistics(path, FACTS)
    assert back.n == 30 and back.gaussian is not None and back.spatial is not None
    assert torch.equal(back.gaussian.covariance, found.gaussian.covariance)  # type: ignore[union-attr]
    assert torch.equal(back.spatial.mean, found.spatial.mean)  # type: ignore[union-attr]
    assert torch.equal(back.features, found.features) and torch.equal(back.logits, found.logits)


def test_a_set_without_moments_has_none_after_the_round_trip(tmp_path: Path) -> None:
    save_statistics(tmp_path / "s", FeatureSet(1, None, None, torch.ones(1, 2), torch.ones(1, 2)), FACTS)
    assert load_statistics(tmp_path / "s", FACTS).gaussian is None


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


def test_adms_file_is_read(tmp_path: Path) -> None:
    mu, sigma, images = np.arange(4.0), np.eye(4), np.zeros((3, 8, 8, 3), np.uint8)
    images[0, 0, 0] = [1, 2, 3]
    np.savez(tmp_path / "r.npz", mu=mu, sigma=sigma, mu_s=mu[:2], sigma_s=sigma[:2, :2], arr_0=images)
    found = read_published(tmp_path / "r.npz")
    assert found.gaussian.mean.tolist() == [0, 1, 2, 3] and found.gaussian.covariance.dtype == torch.float64
    assert found.spatial is not None and found.images is not None
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
