"""Jobs for worker processes, which import them by name."""

import os
import signal
import time

from vqscale.data.processes import made_progress


def work(steps: int) -> int:
    for _ in range(steps):
        time.sleep(0.25)
        made_progress()
    return steps


def stand_still(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


def die(_: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
