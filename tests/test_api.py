"""The Python API: numbers of any library, one path as one, and a ValueError that names the option."""

import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.exports import export_all, export_prior, export_vqvae

from vqscale.api import VQVAE, sample


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_all(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize(
    ("classes", "count"),
    [
        (np.int64(2), 1),
        (2, 1),
        ("star", 1),
        ("001", 1),
        (("star", 1, np.uint8(2)), 3),
        (np.array([0, 2]), 2),
        (np.array(2), 1),
        (torch.tensor([0, 2]), 2),
        (np.array(["star", "001"]), 2),
        ((name for name in ("star", "001")), 2),
        (["star", "star"], 2),
        ("all", 3),
    ],
)
def test_classes_in_any_form(models: Path, classes: Any, count: int) -> None:
    assert sample(models, classes=classes).shape == (count, 3, 16, 16)


def test_integers_are_indices_and_text_is_names(models: Path) -> None:
    """The class "001" is the second one, and 1 is its index."""
    assert torch.equal(sample(models, classes=["001"]), sample(models, classes=1))


def test_numbers_of_other_libraries(models: Path) -> None:
    plain = sample(models, classes=[0], samples_per_class=2, seed=3, temperature=0.5, top_k=4, batch=2)
    same = sample(
        models,
        classes=[0],
        samples_per_class=np.int32(2),
        seed=np.uint64(3),
        temperature={"top": np.float32(0.5), "bottom": Fraction(1, 2)},
        top_k=np.int64(4),
        batch=np.int8(2),
        threads=np.int64(1),
    )
    assert torch.equal(plain, same)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *[
            ({"classes": [value]}, "classes: ")
            for value in (True, 3, -1, 1.0, None, "sun", np.int64(9), np.bool_(True))
        ],
        *[({"classes": value}, "classes: ") for value in (None, 1.0, True, 3, {"sun": 1})],
        *[({"device": value}, "device=.* cannot be used") for value in ("gpu", "cuda:99", "meta:x", None)],
        *[({"batch": value}, "batch=.*must be at least 1") for value in (0, -3, np.int64(0))],
        *[({"batch": value}, "batch=.*takes an integer") for value in (True, 1.5, "many", None, math.nan)],
        *[({"samples_per_class": value}, "samples_per_class=") for value in (0, -1, True, 2.5)],
        *[({"temperature": value}, "temperature=.*must be at least 0") for value in (math.nan, -1, math.inf)],
        *[({"temperature": value}, "temperature=.*takes a number") for value in ("hot", True)],
        *[({"top_k": value}, "top_k=") for value in (-1, 1.5, True, math.nan)],
        *[({"top_p": value}, "top_p=.*must be above 0 and at most 1") for value in (0, 1.1, math.nan)],
        *[({"guidance": value}, "guidance=") for value in (math.nan, math.inf)],
        *[({"threads": value}, "threads=") for value in (-1, True, 0.5)],
        *[({"seed": value}, "seed=") for value in (-1, "x", 1.5, True)],
        ({"temperature": {"side": 1.0}}, "temperature.side: the levels of"),
    ],
)
def test_options_out_of_range_are_named(models: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample(models, **options)


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ("cold", "sampling is 'cold': options by name are needed, of temperature, "),
        ({"heat": 1}, "sampling is {'heat': 1}: options by name"),
        ({"run_dir": "x"}, "sampling is {'run_dir': 'x'}: options by name"),
        ({"temperature": -1}, "sampling: temperature=.*must be at least 0"),
        ({"guidance": "much"}, "sampling: guidance=.*takes a number"),
    ],
)
def test_a_folder_that_says_no_options_is_named(tmp_path: Path, stated: Any, message: str) -> None:
    tokenizer = export_vqvae(tmp_path / "vqvae")
    for level in ("top", "bottom"):
        export_prior(tmp_path / f"prior_{level}", tokenizer, level, sampling=stated)
    with pytest.raises(ValueError, match=f"^{tmp_path}/prior_top/config.json: {message}"):
        sample(tmp_path)


def test_threads_hold_for_the_call_alone(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", counts.append)
    before = torch.get_num_threads()
    sample(models, classes=[0], threads=3)
    assert counts == [3, before]


def test_one_path_is_one_picture(models: Path, tmp_path: Path) -> None:
    model = VQVAE.from_pretrained(models)
    path = tmp_path / "a.png"
    Image.new("RGB", (20, 30), (255, 0, 0)).save(path)
    one = model.load_images([path])
    assert one.shape == (1, 3, 16, 16)
    assert torch.equal(model.load_images(str(path)), one) and torch.equal(model.load_images(path), one)
    assert torch.equal(model.load_images(iter([path, path])), one.repeat(2, 1, 1, 1))
    with pytest.raises(ValueError, match="no paths were given"):
        model.load_images([])
    path.write_bytes(b"<!doctype html>")
    with pytest.raises(ValueError, match=f"^{path}: "):
        model.load_images(path)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.full((1, 3, 16, 16), math.nan), "images reach nan"),
        (torch.zeros(3, 16, 16), r"images have shape \[3, 16, 16\]"),
        (torch.zeros(1, 16, 16, 3), r"images have shape \[1, 16, 16, 3\]"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.int64), "images are torch.int64"),
    ],
)
def test_images_that_are_none(models: Path, images: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VQVAE.from_pretrained(models).encode(images)


@pytest.mark.parametrize(
    ("top", "message"),
    [
        (torch.zeros(1, 2, 2), "codes are torch.float32"),
        (torch.zeros(2, 2, 2, dtype=torch.int64), r"codes are of \[2, 1\] images"),
        (torch.full((1, 2, 2), -1), "codes from -1 to -1, but K = 16"),
    ],
)
def test_codes_that_are_none(models: Path, top: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VQVAE.from_pretrained(models).decode([top, torch.zeros(1, 4, 4, dtype=torch.int64)])


def test_codes_in_any_type_of_integers(models: Path) -> None:
    model = VQVAE.from_pretrained(models)
    codes = [torch.full((1, 2, 2), 3), torch.full((1, 4, 4), 15)]
    expected = model.decode(codes)
    for dtype in (torch.uint8, torch.uint16, torch.int32):
        assert torch.equal(model.decode([level.to(dtype) for level in codes]), expected)
