"""The examples and the trained model that ships with them."""

import json
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch

import vqscale
from vqscale.models.prior import nll
from vqscale.sources import load_model

EXAMPLES = Path(__file__).parents[1] / "examples"
MODEL = EXAMPLES / "clipart64"
CLOTHES = EXAMPLES / "fashion32"
SIGNS = EXAMPLES / "gtsrb32"


@pytest.mark.parametrize("model", [MODEL, CLOTHES, SIGNS], ids=lambda path: path.name)
def test_the_model_is_small_and_its_card_complete(model: Path) -> None:
    assert sum(path.stat().st_size for path in model.rglob("*") if path.is_file()) <= 25e6
    card = (model / "README.md").read_text()
    assert "not stated" not in card and "Not recorded" not in card and "No evaluation" not in card
    assert all(f"\n## {title}\n" in card for title in ("Models", "Use", "Data", "Commands", "Scores", "Licence"))
    for name in ("vqvae", "prior_top", "prior_bottom"):
        fingerprint = json.loads((model / name / "config.json").read_text())["fingerprint"]
        assert f"`{fingerprint[:19]}`" in card


def test_every_cell_of_the_notebook(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    matplotlib.use("Agg")
    shown: list[str] = []

    def show() -> None:
        shown.append(plt.gca().get_title())
        plt.close()

    monkeypatch.setattr(plt, "show", show)
    monkeypatch.chdir(EXAMPLES)
    notebook = json.loads(Path("clipart64.ipynb").read_text())
    assert not any(cell.get("outputs") for cell in notebook["cells"])
    names: dict[str, object] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    assert len(shown) == 3 and capsys.readouterr().out == "[(8, 8, 8), (8, 16, 16)] of 512\n"


def test_samples_look_like_what_the_vqvae_knows_and_like_their_class() -> None:
    vqvae = vqscale.VQVAE.from_pretrained(MODEL)
    images, count = vqscale.sample(MODEL, samples_per_class=8, seed=1), len(vqvae.classes)
    codes = vqvae.encode(images)
    error = (vqvae.decode(codes) - images).square().mean()
    assert float(error) < 0.1 * float(images.var()), "a picture of what it was not trained on comes back much worse"
    noise = torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert float((vqvae.decode(vqvae.encode(noise)) - noise).square().mean()) > 0.3 * float(noise.var())
    prior, label = load_model(MODEL / "prior_top", "prior").model, torch.arange(count).repeat_interleave(8)
    with torch.inference_mode():
        own, *others = (float(nll(prior(codes[0], (label + n) % count, []), codes[0])) for n in (0, 1, 5, 11))
    assert own < min(others), "a prior that ignored the class would give all four the same"


def test_samples_of_clothes_are_in_the_data_sets_order() -> None:
    names = "tshirt trouser pullover dress coat sandal shirt sneaker bag boot".split()
    assert vqscale.VQVAE.from_pretrained(CLOTHES).classes == names
    images = vqscale.sample(CLOTHES, samples_per_class=8, seed=1)
    assert images.shape == (80, 3, 32, 32)
    light = dict(zip(names, (images.mean(1).unflatten(0, (10, 8)).mean(1) + 1) / 2, strict=True))
    assert light["trouser"].mean() < light["pullover"].mean(), "two legs are less than a body and two sleeves"
    assert light["sneaker"][:9].mean() < 0.1 < light["boot"][:9].mean() + light["bag"][:9].mean(), "sneakers are low"


def test_samples_of_traffic_signs_have_the_colours_of_their_classes() -> None:
    names = vqscale.VQVAE.from_pretrained(SIGNS).classes
    assert len(names) == 43 and names[14] == "stop" and names[35] == "straight_only"
    red, blue = (
        vqscale.sample(SIGNS, classes=classes, samples_per_class=8, seed=1)
        for classes in (["stop", "no_entry"], [33, 34, 35])
    )
    assert red.shape == (16, 3, 32, 32) and blue.shape == (24, 3, 32, 32)
    centre = (..., slice(8, 24), slice(8, 24))
    assert (red[:, 0] > red[:, 2])[centre].float().mean() > 0.7, "red signs have more red than blue"
    assert (blue[:, 2] > blue[:, 0])[centre].float().mean() > 0.7, "blue signs have more blue than red"
