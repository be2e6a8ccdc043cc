"""How long a checkpoint keeps training waiting, in units of a synchronous save and of training steps.

    python benchmarks/checkpoint.py [--json FILE] [--quick] [--minutes M] [--device cuda] [--folder DIR]

In: nothing. Out, with --json {"blocked": …, "slowed": …, "blocked_steps": …, "shared": …}, rows of {"value", "goal",
"limit"}:
`blocked` is the time until save() returns and training may go on, over the time of a save that is waited for (written,
hashed, fsynced, renamed); `slowed` adds what the steps beside the writing lose, over the same. Rounds of plain steps,
steps beside a save, and a synchronous save take turns. The state is a prior's: weights, both moments, EMA.
`shared` is what 8 ranks gain by sharing the work of a save and of a resume, each at the rate of a node's own link
(shared_saves.py).
"""

import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from measure import Row, alone, arguments, at_most, finish, median, timed
from shared_saves import measure_shared
from torch import Tensor
from train_step import Trainer, Way

from vqscale.engine.checkpoint import Checkpointer, CheckpointState
from vqscale.engine.ema import WeightEMA

STEPS = 4  # beside one save
MOST = 12  # rounds


class Saves:
    """A trainer and its checkpoints, the next one always under a new number."""

    def __init__(self, folder: Path, quick: bool, device: str):
        self.trainer = Trainer("prior", Way("fp32"), quick, device)
        self.trainer()  # Adam's state
        averages = WeightEMA(self.trainer.engine.local_weights(), halflife=1, rampup=0).averages
        self.tensors: Mapping[str, Tensor] = self.trainer.engine.as_checkpoint_tensors(averages)
        self.checkpoints = Checkpointer(folder, alone(device), keep=1)
        self.count = 0

    @property
    def size(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    def save(self) -> None:
        self.count += 1
        self.checkpoints.save(dict(self.tensors), CheckpointState(self.count, data={}))

    def synchronous(self) -> None:
        self.save()
        self.checkpoints.wait()

    def steps(self) -> None:
        for _ in range(STEPS):
            self.trainer()


def measure(saves: Saves, minutes: float) -> dict[str, Row]:
    saves.synchronous()
    columns: dict[str, list[float]] = {"steps": [], "blocked": [], "beside": [], "synchronous": []}
    end = time.perf_counter() + 60 * minutes
    while len(columns["steps"]) < MOST and (time.perf_counter() < end or not columns["steps"]):
        columns["steps"].append(timed(saves.steps))
        columns["blocked"].append(timed(saves.save))
        columns["beside"].append(timed(saves.steps))
        saves.checkpoints.wait()
        columns["synchronous"].append(timed(saves.synchronous))
    plain, blocked, beside, whole = (median(column) for column in columns.values())
    print(
        f"{saves.size / 1e6:.0f} MB: a synchronous save takes {whole:.2f} s, save() returns after {blocked:.3f} s; "
        f"{STEPS} steps take {plain:.2f} s, beside the writing {beside:.2f} s"
    )
    return {
        "blocked": at_most(0.2, blocked / whole),
        "slowed": at_most(None, (blocked + max(0.0, beside - plain)) / whole),
        "blocked_steps": at_most(None, blocked / (plain / STEPS)),
    }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = arguments(__doc__, minutes=3)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="the disk to write to")
    parser.add_argument("--port", type=int, default=29_561)
    args = parser.parse_args(argv)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    folder = Path(tempfile.mkdtemp(prefix="checkpoint-", dir=args.folder))
    try:
        rows: dict[str, Any] = dict(measure(Saves(folder, args.quick, args.device), args.minutes))
        megabytes, seconds = (8, 1) if args.quick else (400, 20 * args.minutes)
        rows["shared"] = measure_shared(folder / "shared", args.port, megabytes, seconds)
    finally:
        shutil.rmtree(folder)
        dist.destroy_process_group()
    return finish(args, rows)


if __name__ == "__main__":
    main()
