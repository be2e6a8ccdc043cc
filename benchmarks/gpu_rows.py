"""The rows of `gpu.py` with their goals, and what a part is given.

In: nothing.  Out: `ROWS`, by part in the order in which they run; `Case`; `Rows`, which are written after each value.

The goals are for one H100 or H200 at the paper's sizes, in seconds, shares or the unit that the row's name has. On a
CPU the sizes are small and only what does not depend on the machine is judged.
"""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measure import Row, at_least, at_most, exactly

NOT_REACHED = "not reached: the part ended before"


def _prior(level: str, share: float) -> dict[str, Row]:
    return {
        f"{level}/share of product rate": at_least(share, None, limit=1.0),
        f"{level}/step over its products": at_most(1.25, None, limit=1.0),
        f"{level}/compiled over eager": at_least(1.3, None, limit=1.7),
        f"{level}/activations kept over recomputed": at_least(None, None, limit=4 / 3),
        f"{level}/host synchronisations": at_most(1, None, limit=0),
    }


ROWS: dict[str, dict[str, Row]] = {
    "ceilings": {
        "ceilings/bf16 product TFLOP/s": at_least(None, None),
        "ceilings/device copy GB/s": at_least(None, None),
        "ceilings/pinned copy to the card GB/s": at_least(None, None),
        "ceilings/pinned copy from the card GB/s": at_least(None, None),
        "ceilings/pageable copy from the card GB/s": at_least(None, None),
        "ceilings/3x5 convolution TFLOP/s": at_least(None, None),
        "ceilings/3x5 convolution backward TFLOP/s": at_least(None, None),
    },
    "tests": {"tests/passed": exactly(1.0, None, limit=1.0)},
    "chain": {"chain/stages": exactly(1.0, None, limit=1.0), "chain/resumed after TERM": exactly(1.0, None, limit=1.0)},
    "vqvae": {
        "vqvae/images per second": at_least(8_000, None),
        "vqvae/step over its convolutions": at_most(1.5, None, limit=1.0),
        "vqvae/compiled over eager": at_least(1.3, None, limit=1.7),
        "vqvae/convolutions NHWC over NCHW": at_least(None, None),
        "vqvae/host synchronisations": at_most(1, None, limit=0),
        "vqvae/over the port": at_least(3.0, None),
        "vqvae/65,536 codes over 512 at 64 px": at_least(0.5, None, limit=1.0),
        "vqvae/65,536 codes over 512 at 256 px": at_least(0.5, None, limit=1.0),
    },
    "priors": _prior("top", 0.50) | _prior("bottom", 0.48),
    "sampling": {
        "sampling/batch 1 seconds": at_most(2.4, None, limit=0.35),
        "sampling/batch 8 seconds": at_most(None, None, limit=0.38),
        "sampling/batch 64 seconds": at_most(3.0, None, limit=0.84),
        "sampling/batch 256 seconds": at_most(4.8, None, limit=2.42),
        "sampling/graph over eager at 8": at_least(2.0, None),
    },
    "data": {
        "loader/4 workers images per second": at_least(None, None),
        "loader/8 workers images per second": at_least(None, None),
        "loader/14 workers images per second": at_least(None, None),
        "loader/over the VQ-VAE's step": at_least(1.3, None),
        "extract/encoder images per second": at_least(12_000, None),
        "extract/over its slower half": at_least(0.85, None, limit=1.0),
        "save/return over a pinned copy": at_most(1.5, None, limit=1.0),
    },
    "graphs": {f"graphs/{model}": exactly(None, None) for model in ("pixelcnn", "transformer", "vqvae")},
}
EVERYWHERE = ("chain", "graphs")  # parts that are judged on any machine


class Rows:
    """The rows of one part, in a file that is whole after each of them."""

    def __init__(self, part: str, path: Path, judged: bool):
        """judged: whether this machine and these sizes are those of the goals."""
        unjudged: Row = {} if judged or part in EVERYWHERE else {"goal": None, "limit": None}
        self.rows = {name: row | unjudged | {"reason": NOT_REACHED} for name, row in ROWS[part].items()}
        self._path = path
        self._write()

    def put(self, name: str, value: float, **details: Any) -> None:
        """A value; details may set `goal` and `limit` too."""
        row = self.rows[name]
        row.pop("reason", None)
        self.rows[name] = row | {"value": float(value), **details}
        self._write()
        print(f"  {name} {value:.4g} {details or ''}", flush=True)

    def fail(self, name: str, reason: str) -> None:
        """A row without a value stays so, for this reason; one that has a value keeps it."""
        if self.rows[name]["value"] is None:
            self.rows[name]["reason"] = one_line(reason)
            self._write()

    @contextlib.contextmanager
    def attempt(self, *names: str) -> Iterator[None]:
        """Whatever fails within is the reason why these rows have no value."""
        try:
            yield
        except Exception as error:
            reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            print(f"  {', '.join(names)}: {reason}", flush=True)
            for name in names:
                self.fail(name, reason)

    def _write(self) -> None:
        self._path.write_text(json.dumps(self.rows, indent=1) + "\n")


def one_line(text: str) -> str:
    return " ".join(text.split())[:200]


@dataclass
class Case:
    """What a part is given."""

    device: str  # cpu or cuda
    full: bool  # the paper's sizes, on a card
    rows: Rows
    earlier: dict[str, Row]  # of the parts before
    port: Path | None = None  # folder of the port's vqvae.py

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"
