"""Our numbers against torch_fidelity.calculate_metrics on the same images, with its Inception at random weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch_fidelity
from torch import Tensor
from torch.utils.data import Dataset
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics

from vqscale.evaluation import metrics
from vqscale.evaluation.collect import Collector
from vqscale.evaluation.features import load_extractor
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


@pytest.mark.slow
def test_metrics_equal_calculate_metrics(weights: Path, place: Topology) -> None:
    generated, real = scenes(12, 1), scenes(14, 2)
    extractor = load_extractor("inception", weights=str(weights), allow_unverified_weights=True)
    sets = []
    for images in (generated, real):
        collector = Collector(extractor, len(images), place)
        for first in range(0, len(images), 7):  # other batches than the library's
            rows = images[first : first + 7]
            collector.add(rows, torch.arange(first, first + len(rows)), torch.ones(len(rows)))
        sets.append(collector.finish())
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
    assert ours.gaussian is not None and ours.spatial is not None
    torch.testing.assert_close(ours.gaussian.mean, torch.from_numpy(library["mu"]).double(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.gaussian.covariance, torch.from_numpy(library["sigma"]), rtol=1e-5, atol=1e-8)
    assert ours.spatial.mean.shape == (7 * 17 * 17,)
