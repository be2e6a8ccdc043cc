"""What is the PixelCNN's own: how far it sees, and that it can be built at the paper's size."""

import math

import pytest
import torch
from support.priors import K, build, draw

from vqscale.models.pixelcnn import PixelCNN
from vqscale.models.prior import PriorConfig


def test_attention_reaches_beyond_the_convolutions():
    """One gated block reaches two places; with attention the last place sees the first."""

    def first_seen(attention_every: int) -> bool:
        model = build("pixelcnn", (8, 8), layers=1, attention_every=attention_every)
        codes = draw((1, 8, 8))
        changed = codes.clone()
        changed[0, 0, 0] = (codes[0, 0, 0] + 1) % K
        label = torch.tensor([0])
        return not torch.equal(model(codes, label)[..., -1, -1], model(changed, label)[..., -1, -1])

    assert first_seen(1) and not first_seen(0)


PAPER = {  # Razavi et al. 2019, ImageNet priors; the lower level also has 20 conditioning layers
    "top": (dict(hidden=512, residual=2048, layers=20, attention_every=5, heads=8, output_layers=20), (32, 32), []),
    "bottom": (dict(hidden=512, residual=1024, layers=20, conditioning_layers=20), (64, 64), [(32, 32)]),
}


@pytest.mark.parametrize("level", PAPER)
def test_paper_size_on_the_meta_device(level):
    sizes, grid, upper = PAPER[level]
    with torch.device("meta"):
        model = PixelCNN(PriorConfig(**sizes), num_codes=512, grid=grid, num_classes=1000, upper_grids=upper)
    counts = model.num_parameters()
    print(f"{level}: {counts['layers'] / 1e6:.1f}M in layers, {counts['embeddings'] / 1e6:.2f}M in embeddings")
    assert counts["layers"] + counts["embeddings"] == sum(p.numel() for p in model.parameters())
    names = [type(block).__name__ for block in model.blocks]
    assert names.count("GatedBlock") == 20 and names.count("AttentionBlock") == (4 if level == "top" else 0)
    if level == "top":
        assert names[5] == "AttentionBlock" and len(model.output) == 20
        assert 0.8e9 < counts["layers"] < 0.9e9  # 1.6B with full 5x5 kernels, of which 12 of 25 taps would be masked
    else:
        assert model.conditioning is not None and len(model.conditioning.blocks) == 20
        assert 0.5e9 < counts["layers"] < 0.6e9
    assert all(p.numel() == math.prod(p.shape) and p.is_meta for p in model.parameters())
