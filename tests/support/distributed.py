"""Real processes for tests: `run_ranks(function, 2)` runs a module-level function of a test file on gloo ranks.

Ranks are forked from a server that has imported once what they need, so that a rank starts in a tenth of a second
instead of eight, and shares nothing with the test's own process.  They see what torchrun would tell them.
"""

import contextlib
import importlib.util
import inspect
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(
    [
        "vqscale.stages.train_vqvae",
        "vqscale.stages.train_prior",
        "vqscale.stages.evaluate",
        "accelerate",
        "deepspeed",
        "torch.utils.tensorboard",
        "support.distributed",
    ]
)
# A process has one such server, which the program's own pools in the tests' process must not start without these.
multiprocessing.context.BaseContext.set_forkserver_preload = lambda *_: None  # type: ignore[method-assign]


class Ranks:
    """Started processes, in rank order."""

    def __init__(self, function: Callable[..., Any], world: int, arguments: Sequence[Any], extra: Mapping[str, str]):
        port = str(free_port())
        self._output = tempfile.NamedTemporaryFile(prefix="ranks-")  # noqa: SIM115 - lives as long as this object
        self._processes, self._pipes = [], []
        for rank in range(world):
            variables = launcher_variables(rank, world, port) | dict(extra)
            reader, writer = _server.Pipe(duplex=False)
            task = (inspect.getfile(function), function.__name__, tuple(arguments), variables)
            process = _server.Process(target=_rank_main, args=(task, writer, self._output.name))
            process.start()
            writer.close()
            self._processes.append(process)
            self._pipes.append(reader)
        self.pids: list[int] = [process.pid for process in self._processes]

    def signal(self, number: int, ranks: Sequence[int] | None = None) -> None:
        """Send a signal to those of `ranks` (all without) that still run."""
        for rank in range(len(self.pids)) if ranks is None else ranks:
            if self._processes[rank].is_alive():
                os.kill(self.pids[rank], number)

    def alive(self) -> bool:
        """Whether all of them still run."""
        return all(process.is_alive() for process in self._processes)

    def wait(self, timeout: float = 120) -> list[int]:
        """Exit codes, negative for a signal; what still runs at the timeout is killed."""
        until = time.monotonic() + timeout
        for process in self._processes:
            process.join(max(0.0, until - time.monotonic()))
        self.signal(signal.SIGKILL)
        for process in self._processes:
            process.join()
        return [process.exitcode for process in self._processes]

    def results(self, timeout: float = 120) -> list[Any]:
        """What each rank returned. Raises AssertionError with tracebacks and output when a rank failed or hung."""
        until = time.monotonic() + timeout
        answers = [_receive(pipe, until) for pipe in self._pipes]
        failures = [f"rank {rank}: {value}" for rank, (good, value) in enumerate(answers) if not good]
        codes = self.wait(1.0 if failures else max(5.0, until - time.monotonic()))
        assert not failures, "\n".join([f"exit codes {codes}", *failures, self.output()[-3000:]])
        return [value for _, value in answers]

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        self._output.close()

    def output(self) -> str:
        """What the ranks have printed so far."""
        return Path(self._output.name).read_text(errors="replace")


def run_ranks(
    function: Callable[..., Any],
    world: int,
    *arguments: Any,
    timeout: float = 120,
    variables: Mapping[str, str] | None = None,
) -> list[Any]:
    """`function(*arguments)` on `world` ranks; their results in rank order. world=1 is a process without a launcher."""
    with started(function, world, *arguments, variables=variables) as ranks:
        return ranks.results(timeout)


@contextlib.contextmanager
def started(
    function: Callable[..., Any], world: int, *arguments: Any, variables: Mapping[str, str] | None = None
) -> Iterator[Ranks]:
    """Ranks to do something to while they run; none is left afterwards."""
    ranks = Ranks(function, world, arguments, variables or {})
    try:
        yield ranks
    finally:
        ranks.wait(0)
        ranks.close()


def launcher_variables(rank: int, world: int, port: str) -> dict[str, str]:
    """What torchrun would set; nothing for a single process."""
    if world == 1:
        return {}
    here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "GROUP_WORLD_SIZE": 1}
    return {name: str(value) for name, value in here.items()} | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _receive(pipe: Connection, until: float) -> tuple[bool, Any]:
    try:
        if not pipe.poll(max(0.0, until - time.monotonic())):
            return False, "no answer in time"
        return pickle.loads(pipe.recv_bytes())
    except EOFError:
        return False, "died without an answer"


def _rank_main(task: tuple[str, str, tuple[Any, ...], dict[str, str]], answer: Connection, output: str) -> None:
    import torch

    threading.Thread(target=_end_with_the_tests, daemon=True).start()
    path, name, arguments, variables = task
    printed = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    os.environ.update(variables)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # as in a program that was not forked from this server
    try:
        result = (True, getattr(_load(path), name)(*arguments))
    except BaseException:
        result = (False, traceback.format_exc())
    # Plain pickle: torch's own way of sending tensors would need this process to stay.
    answer.send_bytes(pickle.dumps(result))
    answer.close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0 if result[0] else 1)


def _end_with_the_tests() -> None:
    """Nothing outlives tests that were killed."""
    tests = multiprocessing.parent_process()
    assert tests is not None
    tests.join()
    os._exit(1)


def _load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location("test_on_ranks", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["test_on_ranks"] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    return module
