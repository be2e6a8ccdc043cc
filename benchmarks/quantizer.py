"""The quantizer's training step against a plain one by cdist and one-hot vectors: seconds and peak memory.

    python benchmarks/quantizer.py [--json FILE] [--quick] [--minutes M] [--device cuda]

In: nothing. Out: rows `<K>/throughput`, the plain version's seconds over ours, in turns; `<K>/memory`, its peak bytes
over ours, each measured in a process of its own that does nothing else.

A step is quantizing N vectors of 64 dimensions, the backward pass to them, and the moving averages' update; fp32. Both
choose the same codes, which is checked first. Restarts of dead codes are off: the plain version has none.
"""

import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measure import Row, alone, arguments, at_least, finish, in_turns, median, ratio
from torch import Tensor

from vqscale.models.quantizer import QuantizerConfig, VectorQuantizer, update_quantizers

DIM, DECAY, BETA = 64, 0.99, 0.25
SIZES = {512: 32_768, 8_192: 8_192, 65_536: 4_096}  # K -> N: what the plain version's N x K matrices leave room for
QUICK = {512: 1_024, 8_192: 256, 65_536: 128}


class Ours:
    def __init__(self, codebook: Tensor):
        config = QuantizerConfig(len(codebook), DIM, decay=DECAY, decay_warmup=0, commitment=BETA, restart_below=0)
        self.quantizer = VectorQuantizer(config)
        self.quantizer.to(codebook.device)
        self.quantizer.set_codebook(codebook)
        self.topology = alone(codebook.device.type)

    def __call__(self, vectors: Tensor) -> Tensor:
        """One training step on vectors [n, D]; returns the codes [n]."""
        z = vectors.t().reshape(1, DIM, 1, len(vectors)).requires_grad_()
        out = self.quantizer(z)
        (out.vectors.square().mean() + out.commitment).backward()
        update_quantizers({"top": self.quantizer}, self.topology, key=0, images=1, applied=True, learning_rate=0.0)
        return out.codes.flatten()


class Plain:
    """As the usual ports write it: all distances at once, codes as one-hot rows, counts and sums as products."""

    def __init__(self, codebook: Tensor):
        self.codebook, self.sums, self.size = codebook.clone(), codebook.clone(), torch.ones_like(codebook[:, 0])

    def __call__(self, vectors: Tensor) -> Tensor:
        """The same step."""
        z = vectors.clone().requires_grad_()
        codes = torch.cdist(z.detach(), self.codebook).argmin(1)
        one_hot = F.one_hot(codes, len(self.codebook)).to(z.dtype)
        nearest = one_hot @ self.codebook
        commitment = BETA * F.mse_loss(z, nearest)
        straight = z + (nearest - z).detach()
        (straight.square().mean() + commitment).backward()
        self.size.lerp_(one_hot.sum(0), 1 - DECAY)
        self.sums.lerp_(one_hot.t() @ vectors, 1 - DECAY)
        self.codebook = self.sums / self.size.clamp_min(1e-6)[:, None]
        return codes


KINDS = {"ours": Ours, "plain": Plain}


def inputs(num_codes: int, count: int, device: str) -> tuple[Tensor, Tensor]:
    """A codebook [K, D] and vectors [n, D], from a seed."""
    rng = torch.Generator().manual_seed(0)
    return torch.randn(num_codes, DIM, generator=rng).to(device), torch.randn(count, DIM, generator=rng).to(device)


def peak_bytes(kind: str, num_codes: int, count: int, device: str) -> int:
    """What a step adds to the memory of a process that does nothing else, at its highest."""
    command = [sys.executable, __file__, "--peak", kind, str(num_codes), str(count), "--device", device]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def _tell_peak(kind: str, num_codes: int, count: int, device: str) -> None:
    small, few = inputs(16, 16, device)
    KINDS[kind](small)(few)  # libraries and thread pools
    codebook, vectors = inputs(num_codes, count, device)
    step = KINDS[kind](codebook)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(vectors)
        print(torch.cuda.max_memory_allocated() - before)
        return
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = _status("VmRSS")
    step(vectors)
    print(_status("VmHWM") - before)


def _status(key: str) -> int:
    """A line of the kernel's account of this process, in bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[key].split()[0]) * 1024


def measure(num_codes: int, count: int, seconds: float, device: str) -> dict[str, Row]:
    """The two rows of one K."""
    codebook, vectors = inputs(num_codes, count, device)
    steps = {name: kind(codebook) for name, kind in KINDS.items()}
    same = (steps["ours"](vectors) == steps["plain"](vectors)).float().mean()
    assert same > 0.999, f"K={num_codes}: the two versions agree on {same:.2%} of the codes"
    taken = in_turns({name: partial(step, vectors) for name, step in steps.items()}, 200, seconds)
    peaks = {name: peak_bytes(name, num_codes, count, device) for name in KINDS}
    rate = count / median(taken["ours"])
    told = ", ".join(f"{name} {peak / 1e6:.0f} MB" for name, peak in peaks.items())
    print(f"K = {num_codes}, {count} vectors: {rate:.3g} vectors/s; at most {told}", flush=True)
    return {
        "throughput": at_least(None, ratio(taken["plain"], taken["ours"]), vectors_per_second=rate),
        "memory": at_least(None, peaks["plain"] / peaks["ours"], peak_bytes=peaks),
    }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = arguments(__doc__, minutes=3)
    parser.add_argument("--peak", nargs=3, metavar=("KIND", "K", "N"), help="tell one step's peak memory, nothing else")
    args = parser.parse_args(argv)
    if args.peak:
        _tell_peak(args.peak[0], *map(int, args.peak[1:]), args.device)
        return {}
    sizes = QUICK if args.quick else SIZES
    seconds = 60 * args.minutes / len(sizes)
    return finish(
        args, {str(codes): measure(codes, count, 0.7 * seconds, args.device) for codes, count in sizes.items()}
    )


if __name__ == "__main__":
    main()
