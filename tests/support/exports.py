"""Small exported models of two levels that belong together, for 16 px."""

from pathlib import Path
from typing import Any

from support.vqvaes import vqvae

from vqscale.config import as_dict
from vqscale.models.init import initialise
from vqscale.models.pixelcnn import PixelCNN
from vqscale.models.pretrained import save_pretrained
from vqscale.models.prior import PriorConfig

CLASSES = ["star", "001", "a/b"]


def export_all(folder: Path) -> Path:
    """`folder` with a VQ-VAE and its priors."""
    tokenizer = export_vqvae(folder / "vqvae")
    for level in ("top", "bottom"):
        export_prior(folder / f"prior_{level}", tokenizer, level)
    return folder


def export_vqvae(folder: Path, **facts: Any) -> str:
    """Returns the fingerprint. `facts`: other values of config.json."""
    model = vqvae(resolution=16)
    extra = {"resolution": 16, "classes": CLASSES, "data": "", "weights": "ema", "images_seen": 640} | facts
    return save_pretrained(folder, model, kind="vqvae", config=as_dict(model.config), extra=extra)


def export_prior(folder: Path, tokenizer: str, level: str = "top", seed: int = 0, **facts: Any) -> str:
    """Returns the fingerprint. Untrained: `seed` makes another one."""
    config = PriorConfig(hidden=8, residual=8, layers=1, heads=2, class_dim=4, conditioning_layers=1)
    extra: dict[str, Any] = {"level": level, "num_codes": 16, "classes": CLASSES, "tokenizer": tokenizer, "data": ""}
    extra |= {"grid": [2, 2], "upper_grids": []} if level == "top" else {"grid": [4, 4], "upper_grids": [[2, 2]]}
    grids: dict[str, Any] = {"grid": tuple(extra["grid"]), "upper_grids": extra["upper_grids"]}
    model = PixelCNN(config, num_codes=16, num_classes=len(CLASSES), **grids)
    initialise(model, seed)
    return save_pretrained(folder, model, kind="prior", config=as_dict(config), extra=extra | facts)
