"""Our numbers against torch_fidelity.calculate_metrics on the same images, with its networks at random weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_fidelity
from torch import Tensor
from torch.utils.data import Dataset
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics
from torchvision.models import vgg16

from vqscale.evaluation import metrics
from vqscale.evaluation.features import Extractor, load_extractor
from vqscale.evaluation.passes import Collector
from vqscale.evaluation.statistics import FeatureSet
from vqscale.topology import Topology


class Blank(FeatureExtractorInceptionV3):
    """The network before any weights are loaded."""

    def load_state_dict(self, *_args: Any, **_more: Any) -> None:  # type: ignore[override]
        return None


class Images(Dataset):
    """Bare uint8 tensors, as torch-fidelity wants them."""

    def __init__(self, images: Tensor):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


def scenes(n: int, seed: int) -> Tensor:
    coarse = torch.rand(n, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    return (torch.nn.functional.interpolate(coarse, size=48, mode="bicubic").clamp(0, 1) * 255).byte()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inception")
    torch.save({}, folder / "empty.pth")
    torch.manual_seed(0)
    network = Blank("blank", ["2048"], feature_extractor_weights_path=str(folder / "empty.pth"))
    for module in network.modules():  # random weights at their default scale die out over 48 layers
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    torch.save(network.state_dict(), folder / "random.pth")
    return folder / "random.pth"


def noise(n: int, seed: int) -> Tensor:
    """Pictures of another size and kind: a colour each, and grain of the seed's strength."""
    generator = torch.Generator().manual_seed(seed)
    grain = torch.randn(n, 3, 40, 40, generator=generator) * 20 * seed
    return (torch.rand(n, 3, 1, 1, generator=generator) * 255 + grain).clamp(0, 255).byte()


def collected(extractor: Extractor, images: Tensor, topology: Topology) -> FeatureSet:
    collector = Collector(extractor, len(images), topology)
    for first in range(0, len(images), 7):  # other batches than the library's
        rows = images[first : first + 7]
        collector.add(rows, torch.arange(first, first + len(rows)), torch.ones(len(rows)))
    return collector.finish()


@pytest.mark.slow
@pytest.mark.parametrize("draw", [scenes, noise])
def test_metrics_equal_calculate_metrics(weights: Path, topology: Topology, draw: Callable[[int, int], Tensor]) -> None:
    generated, real = draw(12, 1), draw(14, 2)
    extractor = load_extractor("inception", weights=str(weights), allow_unverified_weights=True)
    sets = [collected(extractor, images, topology) for images in (generated, real)]
    theirs = torch_fidelity.calculate_metrics(
        input1=Images(generated),
        input2=Images(real),
        cuda=False,
        batch_size=10,
        isc=True,
        kid=True,
        prc=True,
        kid_subset_size=9,
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(weights),
        cache=False,
        save_cpu_ram=True,  # no worker processes
        verbose=False,
    )
    ours, reference = sets
    assert metrics.kid(ours.features, reference.features, 9) == pytest.approx(
        theirs["kernel_inception_distance_mean"], rel=1e-5
    )
    assert metrics.inception_score(ours.logits) == pytest.approx(theirs["inception_score_mean"], rel=1e-6)
    assert metrics.precision_recall(ours.features, reference.features) == (theirs["precision"], theirs["recall"])
    library = fid_features_to_statistics(ours.features)
    pooled, spatial = ours.gaussians["pooled"], ours.gaussians["spatial"]
    torch.testing.assert_close(pooled.mean, torch.from_numpy(library["mu"]).double(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(pooled.covariance, torch.from_numpy(library["sigma"]), rtol=1e-5, atol=1e-8)
    assert spatial.mean.shape == (7 * 17 * 17,)


@pytest.mark.slow
def test_precision_and_recall_of_vgg16_equal_calculate_metrics(tmp_path: Path, topology: Topology) -> None:
    torch.manual_seed(0)
    torch.save(vgg16().state_dict(), tmp_path / "random.pth")
    generated, real = scenes(9, 1), noise(8, 2)
    extractor = load_extractor("vgg16", weights=str(tmp_path / "random.pth"), allow_unverified_weights=True)
    ours, reference = (collected(extractor, images, topology) for images in (generated, real))
    theirs = torch_fidelity.calculate_metrics(
        input1=Images(generated),
        input2=Images(real),
        cuda=False,
        batch_size=4,
        prc=True,
        feature_extractor="vgg16",
        feature_extractor_weights_path=str(tmp_path / "random.pth"),
        cache=False,
        save_cpu_ram=True,
        verbose=False,
    )
    assert metrics.precision_recall(ours.features, reference.features) == (theirs["precision"], theirs["recall"])
    assert ours.features.shape == (9, 4096)
