"""Classifiers: what goes in and comes out, where they start, and that an image is judged alone."""

import math

import pytest
import torch
from torch import Tensor, nn

from vqscale.models.classifier import Classifier, ClassifierConfig, PreActivationBlock
from vqscale.models.init import initialise

SMALL = ClassifierConfig(hidden=8, stages=2, blocks=1)


def classifier(config: ClassifierConfig = SMALL, classes: int = 5, features: int = 0) -> Classifier:
    model = Classifier(config, classes, features)
    initialise(model, 3)
    return model


def images(n: int, side: int = 16) -> Tensor:
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(n)) * 2 - 1


@pytest.mark.parametrize("network, side", [("small", 16), ("resnet50", 64)])
def test_images_become_logits_and_every_class_starts_as_likely(network: str, side: int) -> None:
    model = classifier(ClassifierConfig(network=network, hidden=8, stages=2, blocks=1))
    logits = model(images(2, side))
    assert logits.shape == (2, 5) and not logits.any()
    loss = nn.functional.cross_entropy(logits, torch.tensor([0, 4]))
    assert loss.item() == pytest.approx(math.log(5))


def test_resnet50_is_the_paper_sized_one() -> None:
    with torch.device("meta"):
        model = Classifier(ClassifierConfig(network="resnet50"), 1000)
    assert (
        sum(parameter.numel() for parameter in model.parameters()) == 25_557_032
    )  # He et al. 2015, torchvision's count
    assert len(model.wrap_units()) == 3 + 4 + 6 + 3
    assert not list(model.buffers())  # no running statistics


def test_linear_is_one_layer_on_features() -> None:
    model = classifier(ClassifierConfig(network="linear"), classes=3, features=7)
    assert model(torch.ones(2, 7)).shape == (2, 3)
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == {
        "network.weight": (3, 7),
        "network.bias": (3,),
    }


def test_an_image_is_judged_alone() -> None:
    """What a batch holds besides does not matter: that is why ranks may share it as they like."""
    model = classifier()
    nn.init.normal_(model.network.head.weight)  # type: ignore[union-attr, arg-type]
    together = model(images(6))
    torch.testing.assert_close(torch.cat([model(x[None]) for x in images(6)]), together)


def test_blocks_start_as_their_shortcut() -> None:
    block = PreActivationBlock(4, 4, stride=1)
    initialise(block, 0)
    x = torch.randn(2, 4, 6, 6)
    assert torch.equal(block(x), x)


def test_every_stage_but_the_first_halves_the_picture() -> None:
    model = classifier(ClassifierConfig(hidden=4, stages=3, blocks=2, stem_stride=2))
    shapes: list[tuple[int, ...]] = []
    for block in model.wrap_units():
        block.register_forward_hook(lambda _m, _i, output: shapes.append(tuple(output.shape[1:])))
    model(images(1, 32))
    assert shapes == [(4, 16, 16)] * 2 + [(8, 8, 8)] * 2 + [(16, 4, 4)] * 2


def test_it_learns_what_tells_two_classes_apart() -> None:
    model, labels = classifier(classes=2), torch.arange(32) % 2
    x = images(32) * 0.2 + (labels * 1.0 - 0.5)[:, None, None, None]
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(30):
        loss = nn.functional.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float((model(x).argmax(1) == labels).float().mean()) == 1


@pytest.mark.parametrize(
    "options, said",
    [({"network": "resnet18"}, "network=resnet18"), ({"hidden": 7}, "hidden=7"), ({"blocks": 0}, "blocks=0")],
)
def test_mistakes_name_the_key(options: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ClassifierConfig(**options)  # type: ignore[arg-type]
