"""Cached sampling of a prior, in units of one teacher-forced forward over the same batch.

    python benchmarks/sampling.py [--json FILE] [--quick] [--levels top bottom] [--batches 8 32] [--dtype fp32|bf16]
                                  [--device cuda]

In: nothing. Out: a table, and with --json {"top": {"8": {"value", "cost_in_forwards", "prefix_cost_in_forwards", ...}},
...}: `value` is `cost_in_forwards`, its limit what the floor (below) would cost.
The priors have random weights, at least 80M parameters in convolutions and linear layers, K = 512. `top` and `bottom`
are PixelCNNs with the paper's kernel, attention placement (every 5 layers, top only) and stacks at about half its
widths; `transformer_top` and `transformer_bottom`, measured when asked for, are transformers of the same size. Within
one row all costs are measured in one run, forward and sampling in turns, so that a slower hour of the machine moves
both.

Also printed: what one forward's arithmetic and one reading of the per-code weights per code would cost at the matrix
product rate and memory bandwidth measured here (`floor_seconds`), and the share of it that sampling reaches.
"""

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from measure import Row, arguments, at_most, finish, memory_rate, product_rate, timed
from torch import Tensor

from vqscale.models.causal import GatedBlock
from vqscale.models.init import initialise
from vqscale.models.prior import PriorConfig
from vqscale.models.sampling import Options, RowSampler, draw_uniforms
from vqscale.models.transformer_block import TransformerBlock
from vqscale.sources import PRIORS
from vqscale.topology import keep_freed_memory

K, CLASSES = 512, 1000
TOP = PriorConfig(hidden=256, residual=768, layers=10, attention_every=5, heads=8, filter=5, output_layers=10)
BOTTOM = PriorConfig(hidden=256, residual=512, layers=12, filter=5, output_layers=4, conditioning_layers=12)
TRANSFORMER_TOP = PriorConfig("transformer", hidden=768, residual=2048, layers=12, heads=12)
TRANSFORMER_BOTTOM = PriorConfig(
    "transformer", hidden=768, residual=2048, layers=9, heads=12, conditioning_layers=2, conditioning_hidden=256
)
CONFIGS = {
    "top": TOP,
    "bottom": BOTTOM,
    "transformer_top": TRANSFORMER_TOP,
    "transformer_bottom": TRANSFORMER_BOTTOM,
}
QUICK = PriorConfig(hidden=64, residual=128, layers=4, attention_every=2, output_layers=2, conditioning_layers=2)
QUICK_TRANSFORMER = PriorConfig("transformer", hidden=64, residual=128, layers=3, conditioning_layers=2)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
GOALS = {8: 2.0, 32: 1.3}  # forwards, by batch


def build(level: str, quick: bool, device: str) -> Any:
    """The level's prior with random weights."""
    lower = level.endswith("bottom")
    side = (16 if quick else 64) if lower else (8 if quick else 32)
    config = CONFIGS[level]
    if quick:
        config = QUICK if config.kind == "pixelcnn" else QUICK_TRANSFORMER
    upper = [(side // 2, side // 2)] if lower else []
    prior = PRIORS[config.kind](config, num_codes=K, grid=(side, side), num_classes=CLASSES, upper_grids=upper).eval()
    initialise(prior, seed=0)
    return prior.to(device)


class Case:
    """One prior at one batch size: its inputs, and the three computations that are timed."""

    def __init__(self, prior: Any, batch: int, dtype: torch.dtype):
        rng = torch.Generator().manual_seed(0)
        self.prior, self.batch, self.dtype = prior, batch, dtype
        self.height, self.width = prior.grid
        self.device = next(prior.parameters()).device
        self.codes = torch.randint(K, (batch, *prior.grid), generator=rng).to(self.device)
        self.label = torch.randint(CLASSES, (batch,), generator=rng).to(self.device)
        self.upper = [torch.randint(K, (batch, *grid), generator=rng).to(self.device) for grid in prior.upper_grids]

    def forward(self, rows: int | None = None) -> float:
        """Seconds of one teacher-forced forward over the first `rows` rows."""
        low = self.dtype != torch.float32
        with torch.inference_mode(), torch.autocast(self.device.type, self.dtype, enabled=low):
            return timed(lambda: self.prior(self.codes[:, :rows], self.label, self.upper))

    def prefix(self) -> float:
        """Seconds to draw all codes by running all rows so far again for each, from two of the codes."""
        quarters = [self.height // 4, self.height - self.height // 4]
        return statistics.mean(self.forward(rows) for rows in quarters) * self.height * self.width

    def sample(self, rows: Sequence[int]) -> float:
        """Seconds to draw `rows`, scaled to the whole grid; the preparation of weights included once.

        A row left out keeps its random codes: later rows do the same arithmetic on them.
        """
        uniforms = draw_uniforms(0, len(self.upper), torch.arange(self.batch), self.height * self.width).to(self.device)
        with torch.inference_mode():
            start = time.perf_counter()
            state = self.prior.sampling_weights(self.dtype).state(self.batch)
            sampler = RowSampler(state, Options(1.0, 0, 1.0, 0.0))
            state.codes.copy_(self.codes)
            state.reset(self.label, self.upper)
            prepared = time.perf_counter() - start
            drawn = timed(lambda: self._draw(sampler, uniforms, rows))
        return prepared + drawn * self.height / len(rows)

    def _draw(self, sampler: RowSampler, uniforms: Tensor, rows: Sequence[int]) -> None:
        temperatures = torch.ones(self.width, dtype=torch.float64, device=self.device)
        for row in rows:
            sampler.draw(row, uniforms[row * self.width : (row + 1) * self.width], temperatures)


def evenly(height: int, count: int) -> list[int]:
    """`count` rows spread over the grid, centred: attention's cost grows along it."""
    return [(2 * n + 1) * height // (2 * count) for n in range(count)]


def code_weights(prior: Any) -> int:
    """Weights that every single code needs: of a PixelCNN horizontal stack, attention, output stack and logits; of a
    transformer all but those that make keys and values of the level above."""
    parts = [prior.logits, *getattr(prior, "output", [])]
    for block in prior.blocks:
        if isinstance(block, GatedBlock):
            parts += [block.horizontal, block.horizontal_out]
        elif isinstance(block, TransformerBlock):
            parts += [block.attention, block.mlp, *([block.cross.query, block.cross.out] if block.cross else [])]
        else:
            parts.append(block)
    return sum(p.numel() for part in parts for p in part.parameters())


def floor_seconds(case: Case, flops: float, bandwidth: float) -> float:
    """What no implementation of this model goes below here: rows at the product's rate, codes at the slower of two."""
    per_code, places = code_weights(case.prior), case.height * case.width
    size = torch.finfo(case.dtype).bits // 8
    per_row = (case.prior.num_parameters()["layers"] - per_code) * 2 * case.batch * places / flops
    return per_row + places * max(per_code * size / bandwidth, per_code * 2 * case.batch / flops)


def measure(case: Case, seconds: float, rates: tuple[float, float]) -> Row:
    """One cell of the table in about `seconds`: they decide how often a forward and how many rows are measured."""
    case.forward(1)  # allocations and thread pools
    first = case.forward()
    repeats = max(0, min(4, int(seconds / first / 10)))
    prefix = case.prefix()
    rows = max(2, min(case.height, int(case.height * (seconds / first - 2 - repeats) / 1.5)))
    sample = case.sample(evenly(case.height, rows))
    forward, floor = statistics.median([first, *(case.forward() for _ in range(repeats))]), floor_seconds(case, *rates)
    return at_most(
        GOALS.get(case.batch),
        sample / forward,
        limit=floor / forward,
        cost_in_forwards=sample / forward,
        prefix_cost_in_forwards=prefix / forward,
        parameters=case.prior.num_parameters()["layers"],
        forward_seconds=forward,
        sample_seconds=sample,
        images_per_second=case.batch / sample,
        floor_seconds=floor,
        share_of_floor=floor / sample,
        prefix_extrapolated_from_codes=2,
        **({"extrapolated_from_rows": rows} if rows < case.height else {}),
    )


def show(level: str, batch: str, cell: Row) -> None:
    rows = cell.get("extrapolated_from_rows")
    print(
        f"{level:18} batch {batch:>3}  {cell['parameters'] / 1e6:6.1f}M  forward {cell['forward_seconds']:7.2f} s  "
        f"sampling {cell['sample_seconds']:7.2f} s = {cell['cost_in_forwards']:5.2f} forwards"
        f"{f' (extrapolated from {rows} rows)' if rows else ''}, {cell['images_per_second']:.3f} images/s; "
        f"floor {cell['floor_seconds']:.2f} s ({cell['share_of_floor']:.0%} reached); re-running the prefix "
        f"{cell['prefix_cost_in_forwards']:.0f} forwards (extrapolated from 2 codes)",
        flush=True,
    )


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = arguments(__doc__, minutes=20)  # when short, fewer rows are drawn and scaled
    parser.add_argument("--levels", nargs="+", choices=CONFIGS, default=["top", "bottom"])
    parser.add_argument("--batches", nargs="+", type=int, default=[8, 32])
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="arithmetic; bf16 pays on hardware that has it")
    args = parser.parse_args(argv)
    keep_freed_memory()
    rates = product_rate(torch.float32, args.device), memory_rate(args.device)
    print(f"matrix product {rates[0] / 1e9:.0f} GFLOP/s, memory {rates[1] / 1e9:.1f} GB/s, {args.dtype}")
    results: dict[str, Any] = {level: {} for level in args.levels}
    # a bottom cell has four times the codes of a top one, and a batch of 32 four times the work of 8
    shares = {
        (level, batch): batch * (4 if level.endswith("bottom") else 1)
        for level in args.levels
        for batch in args.batches
    }
    for (level, batch), share in shares.items():
        case = Case(build(level, args.quick, args.device), batch, DTYPES[args.dtype])
        results[level][str(batch)] = measure(case, args.minutes * 60 * share / sum(shares.values()), rates)
        show(level, str(batch), results[level][str(batch)])
    return finish(args, results)


if __name__ == "__main__":
    main()
