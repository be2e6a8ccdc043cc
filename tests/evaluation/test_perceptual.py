"""LPIPS against its formula, written down here once more, on the published heads and random VGG16 weights."""

import json
from pathlib import Path
from typing import Any

import lpips
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models import vgg16

from vqscale import cli
from vqscale.data.images import to_float, to_uint8
from vqscale.evaluation.features import PerceptualDistance, load_lpips
from vqscale.sources import load_model

BEFORE_POOLING = (3, 8, 15, 22, 29)  # the ReLUs whose outputs are compared


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("vgg") / "random.pth"
    torch.save(vgg16().state_dict(), path)
    return path


@pytest.fixture(scope="module")
def distance(weights: Path) -> PerceptualDistance:
    return load_lpips(str(weights), True, "cpu")


def pictures(seed: int) -> Tensor:
    draws = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, 3, 32, 32), generator=draws, dtype=torch.uint8)


@torch.inference_mode()
def by_the_formula(weights: Path, images: Tensor, others: Tensor) -> Tensor:
    """Zhang et al. 2018, equation 1, with the inputs scaled as ImageNet's networks want them."""
    network, heads = vgg16(), torch.load(Path(lpips.__file__).parent / "weights/v0.1/vgg.pth", "cpu", weights_only=True)
    network.load_state_dict(torch.load(weights, weights_only=True))
    x = torch.cat([images, others]).float() / 255
    x = (x - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    total = torch.zeros(len(images))
    for number, layer in enumerate(network.features[:30]):
        x = layer(x)
        if number in BEFORE_POOLING:
            one, other = F.normalize(x, dim=1, eps=1e-10).chunk(2)
            head = heads[f"lin{BEFORE_POOLING.index(number)}.model.1.weight"]
            total += ((one - other).square() * head[0]).sum(1).mean((1, 2))
    return total


def test_it_is_the_formula(weights: Path, distance: PerceptualDistance) -> None:
    one, other = pictures(1), pictures(2)
    torch.testing.assert_close(distance(one, other), by_the_formula(weights, one, other), rtol=1e-3, atol=1e-6)
    assert distance(one, one).tolist() == [0, 0, 0]
    assert not distance.verified


def test_it_grows_with_noise(distance: PerceptualDistance) -> None:
    flat = torch.full((3, 3, 32, 32), 128, dtype=torch.uint8)
    noise = pictures(3).float() - 128
    near, far = (distance(flat, (flat + share * noise).byte()) for share in (0.05, 0.5))
    assert (near < far).all() and (near > 0).all()


def test_what_is_refused(weights: Path, tmp_path: Path, distance: PerceptualDistance) -> None:
    with pytest.raises(ValueError, match="16 px or more, got .*15"):
        distance(pictures(1)[..., :15], pictures(2)[..., :15])
    with pytest.raises(ValueError, match="vgg16_weights=.*expected 397923af"):
        load_lpips(str(weights), False, "cpu")
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"vgg16_weights=.*not the weights of VGG16 \('features.0.bias'\)"):
        load_lpips(str(tmp_path / "other.pth"), True, "cpu")


def test_the_stage_reports_it(world: Any, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "evaluate.yaml"
    config.write_text("metrics: [lpips]\n")
    words = world.overrides(run_dir=tmp_path / "run", batch=5)
    assert cli.main(["evaluate", str(config), *words]) == 1
    assert "metrics=lpips cannot be computed: lpips needs vgg16_weights=PATH" in capsys.readouterr().err
    trusted = [f"vgg16_weights={weights}", "allow_unverified_weights=true"]
    assert cli.main(["evaluate", str(config), *words, *trusted]) == 0
    score = json.loads((tmp_path / "run" / "scores.json").read_text())["lpips"]
    model = load_model(world.root / "vqvae", "vqvae").model
    made = to_uint8(model(to_float(world.holdout)).reconstruction.detach())
    assert score["value"] == pytest.approx(float(by_the_formula(weights, made, world.holdout).mean()), rel=1e-3)
    assert score["n"] == 26 and "weights of unknown origin" in score["reason"]
    (log,) = (tmp_path / "run" / "log").glob("*.log")
    assert f"vgg16_weights={weights} are of unknown origin" in log.read_text()
