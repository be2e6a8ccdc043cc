"""vqscale: distributed, large-scale training of VQ-VAE-2 and its PixelCNN priors.

The Python API (docs/api.md): `VQVAE.from_pretrained(path)` with `.encode` and `.decode`, and `sample(path)`.
"""

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["VQVAE", "sample"]

# How often an OpenMP thread looks for the others before it sleeps. By default it looks for milliseconds, and programs
# that share cores crawl (benchmarks/neighbour.py). Torch's library reads the variable once, when torch is imported.
SPINS = 3_000
if "torch" not in sys.modules and {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}.isdisjoint(os.environ):
    os.environ["GOMP_SPINCOUNT"] = str(SPINS)

if TYPE_CHECKING:
    from vqscale.api import VQVAE, sample


def __getattr__(name: str) -> Any:
    """The API on first use: `import vqscale` alone does not wait for torch."""
    if name in __all__:
        return getattr(importlib.import_module("vqscale.api"), name)
    raise AttributeError(f"module 'vqscale' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
