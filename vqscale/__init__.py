"""vqscale: distributed, large-scale training of VQ-VAE-2 and its PixelCNN priors.

The Python API (docs/api.md): `VQVAE.from_pretrained(path)` with `.encode` and `.decode`, and `sample(path)`.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["VQVAE", "sample"]

if TYPE_CHECKING:
    from vqscale.api import VQVAE, sample


def __getattr__(name: str) -> Any:
    """The API on first use: `import vqscale` alone does not wait for torch."""
    if name in __all__:
        return getattr(importlib.import_module("vqscale.api"), name)
    raise AttributeError(f"module 'vqscale' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
