"""Our numbers against torch_fidelity's on the same images, with its networks at random weights."""

import json
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_fidelity
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torch_fidelity import fidelity
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics
from torchvision.models import vgg16

from vqscale import cli
from vqscale.data.shards import Manifest
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


def save_pictures(folder: Path, images: Tensor) -> None:
    """PNG and JPEG files of several sizes."""
    folder.mkdir(parents=True)
    for n, pixels in enumerate(images.permute(0, 2, 3, 1).numpy()):
        Image.fromarray(pixels).resize((110 + 21 * n, 260 - 13 * n)).save(folder / f"{n}.{('png', 'jpg')[n % 2]}")


def unpack(data: Path, folder: Path) -> Path:
    """The pictures of a packed data set as files, by an ordinary tar reader."""
    folder.mkdir()
    for tar in sorted(data.glob("*.tar")):
        with tarfile.open(tar) as members:
            for member in filter(lambda one: one.name.endswith(".png"), members):
                file = members.extractfile(member)
                assert file is not None
                (folder / member.name.replace("/", "-")).write_bytes(file.read())
    return folder


@pytest.mark.slow
def test_fid_of_packed_images_equals_the_command_of_torch_fidelity(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_pictures(tmp_path / "images" / "scene", scenes(9, 1))
    save_pictures(tmp_path / "held_out" / "scene", noise(8, 3))
    (tmp_path / "pack.yaml").write_text("source: images\nholdout: held_out\nresolution: 64\nresize: adm\n")
    (tmp_path / "evaluate.yaml").write_text("reference: packed\nsamples: packed/train\nmetrics: [fid]\n")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["pack", "pack.yaml", "run_dir=packed", "holdout_format=png", "device=cpu"]) == 0
    given = [f"weights={weights}", "allow_unverified_weights=true", "extractor=inception", "run_dir=scored"]
    nothing = [f"{name}=none" for name in ("vqvae", "codes", "prior_top", "prior_bottom", "prior_middle")]
    assert cli.main(["evaluate", "evaluate.yaml", *given, *nothing, "device=cpu", "workers=0"]) == 0
    inputs = [str(unpack(tmp_path / "packed" / split, tmp_path / split)) for split in ("train", "holdout")]
    assert [len(list(Path(folder).iterdir())) for folder in inputs] == [9, 8]
    capsys.readouterr()
    words = ["--cpu", "--fid", "--input1", inputs[0], "--input2", inputs[1], "--json", "--no-cache", "--silent"]
    words += ["--feature-extractor-weights-path", str(weights), "--save-cpu-ram"]
    monkeypatch.setattr(sys, "argv", ["fidelity", *words])
    fidelity.main()
    theirs = json.loads(capsys.readouterr().out)["frechet_inception_distance"]
    ours = json.loads((tmp_path / "scored" / "scores.json").read_text())["fid"]
    assert ours["value"] == pytest.approx(theirs, rel=1e-5)
    assert Manifest.load(tmp_path / "packed" / "holdout").transform["resize"] == "adm"
