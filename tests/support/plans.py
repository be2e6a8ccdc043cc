"""What `vqscale plan` says of a run, beside what its ranks held."""

import json
from pathlib import Path

import pytest
from support.stages import CONFIGS

from vqscale.stages import plan


def assert_memory_as_planned(run_dir: Path, name: str, strategy: str, world: int, *overrides: str) -> None:
    """Each kind of bytes in the run's command.json is to 2 % what the plan of configs/debug/NAME.yaml says.

    Of the ranks, the fullest one counts. The data set must be where the config looks for it.
    """
    real = json.loads((run_dir / "command.json").read_text())["bytes_per_rank"]
    request = plan.load([str(CONFIGS / f"{name}.yaml"), f"world={world}", f"strategy={strategy}", *overrides])
    description, assumed = plan.describe(request)
    assert real and not assumed, "the data set is there"
    column = plan.column(request, description, plan.build_model(description), world, flops=1)
    for what, ranks in real.items():
        assert column[f"{what}, GiB"] * (1 << 30) == pytest.approx(max(ranks), rel=0.02), what
