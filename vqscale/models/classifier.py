"""Image classifiers: what the classification accuracy score trains, and rejection sampling asks.

In: images [b, 3, h, w] in [-1, 1], or features [b, f] of a frozen network.  Out: logits [b, k].

Normalisation is over groups of channels, not over batches: what the network says of an image depends on that image
alone, so that training is the same at any number of ranks and no running statistics need to be kept equal.

Legend: b batch, f width of features, k classes, c channels, h w grid.
"""

import math
from dataclasses import dataclass
from typing import Annotated

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vqscale.fields import Choice, PositiveInt, Range, check_values
from vqscale.models.init import RELU_GAIN, with_init_scale

NETWORKS = ("small", "resnet50", "linear")
_GROUPS = 32  # of channels; Wu and He 2018


@dataclass(frozen=True)
class ClassifierConfig:
    network: Annotated[str, Choice(*NETWORKS)] = "small"  # small: up to 64 px; resnet50: 256; linear: features
    hidden: Annotated[int, Range(ge=2)] = 64  # small: channels of the first stage, doubled in each later one
    stages: PositiveInt = 3  # small: each halves the picture, the first excepted
    blocks: PositiveInt = 2  # small: residual blocks per stage
    stem_stride: PositiveInt = 1  # small: 2 halves the picture before the first stage

    def __post_init__(self) -> None:
        check_values(self)
        if self.hidden % 2:
            raise ValueError(f"hidden={self.hidden}: an even number is needed")


class Norm(nn.GroupNorm):
    """Group normalisation in the type of its input, whatever that of its weights."""

    def __init__(self, channels: int):
        super().__init__(math.gcd(_GROUPS, channels // 2), channels)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, gain: float = RELU_GAIN) -> nn.Conv2d:
    return with_init_scale(nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False), gain)


class PreActivationBlock(nn.Module):
    """shortcut(x) + 3x3(ReLU(norm(3x3(ReLU(norm(x)))))) (He et al. 2016, arXiv 1603.05027); starts as the shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.norm_1, self.norm_2 = Norm(inputs), Norm(outputs)
        self.conv_1 = _conv(inputs, outputs, 3, stride)
        self.conv_2 = _conv(outputs, outputs, 3, gain=0.0)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else _conv(inputs, outputs, 1, stride, gain=1.0)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h2 w2"]:
        """A grid `stride` times smaller."""
        y = self.conv_1(F.relu(self.norm_1(x)))
        return self.shortcut(x) + self.conv_2(F.relu(self.norm_2(y)))


class SmallResNet(nn.Module):
    """A residual network for small pictures: a stem, stages of blocks, the mean over the grid, one linear layer."""

    def __init__(self, config: ClassifierConfig, num_classes: int):
        super().__init__()
        widths = [config.hidden * 2**stage for stage in range(config.stages)]
        self.stem = _conv(3, widths[0], 3, config.stem_stride, gain=1.0)
        blocks = []
        for stage, width in enumerate(widths):
            for n in range(config.blocks):
                inputs = widths[max(0, stage - 1)] if n == 0 else width
                blocks.append(PreActivationBlock(inputs, width, stride=2 if n == 0 and stage > 0 else 1))
        self.blocks = nn.Sequential(*blocks)
        self.norm = Norm(widths[-1])
        self.head = _head(widths[-1], num_classes)

    def forward(self, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b k"]:
        return self.head(F.relu(self.norm(self.blocks(self.stem(image)))).mean(dim=(2, 3)))


def _head(inputs: int, num_classes: int) -> nn.Linear:
    return with_init_scale(nn.Linear(inputs, num_classes), 0.0)  # every class equally likely before the first step


def _resnet50(num_classes: int) -> nn.Module:
    from torchvision.models import resnet50  # half a second that nobody else needs

    network = resnet50(num_classes=num_classes, norm_layer=Norm)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            with_init_scale(module, RELU_GAIN)
    with_init_scale(network.fc, 0.0)
    network.blocks = [block for n in range(1, 5) for block in getattr(network, f"layer{n}")]
    return network


class Classifier(nn.Module):
    """One of NETWORKS for `num_classes` classes; `features`: width of the features that `linear` works on."""

    def __init__(self, config: ClassifierConfig, num_classes: int, features: int = 0):
        super().__init__()
        if config.network == "linear":
            self.network: nn.Module = _head(features, num_classes)
        else:
            self.network = SmallResNet(config, num_classes) if config.network == "small" else _resnet50(num_classes)

    def wrap_units(self) -> list[nn.Module]:
        """The residual blocks: what the engine may compile and shard on its own."""
        return list(getattr(self.network, "blocks", []))

    def forward(self, x: Float[Tensor, "b 3 h w"] | Float[Tensor, "b f"]) -> Float[Tensor, "b k"]:
        """Images in [-1, 1], or features for `linear`."""
        return self.network(x.to(next(self.parameters()).dtype))
