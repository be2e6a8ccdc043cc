"""Whatever keeps a worker from reading or sending a batch ends the stream with the cause and the remedy."""

import gc
import multiprocessing
import os
import resource
import signal
import tempfile
from collections.abc import Callable, Sequence
from multiprocessing import process
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from vqscale.data.workers import _InWorker, run_workers

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
    pytest.mark.timeout(60),
]
BATCHES = [[0], [1], [2]]


class Large(Dataset):
    """Batches that are too large to be sent inside a message; `before` is called first, in the worker."""

    def __init__(self, before: Callable[[], Any] = lambda: None):
        self._before = before

    def __getitems__(self, positions: Sequence[int]) -> Any:
        self._before()
        return {"image": torch.full((1, 3, 256, 256), positions[0], dtype=torch.uint8), "errors": []}


def raising(error: Exception) -> Callable[..., Any]:
    def fail(*_arguments: Any) -> Any:
        raise error

    return fail


def no_more_files() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))


def bus_error() -> None:
    os.kill(os.getpid(), signal.SIGBUS)


def read(dataset: Dataset, **options: Any) -> list[Any]:
    return list(run_workers(dataset, BATCHES, workers=1, **options))


def test_batches_arrive_in_order() -> None:
    assert [int(batch["image"][0, 0, 0, 0]) for batch in read(Large())] == [0, 1, 2]


@pytest.mark.parametrize(
    ("before", "message"),
    [
        (raising(ValueError("no such sample")), "^no such sample$"),
        (raising(FileNotFoundError("no such shard")), "^no such shard$"),
        (raising(MemoryError()), "cannot read a batch: MemoryError; free memory, or read without workers"),
        (
            no_more_files,
            r"cannot send a batch: .*open files.*; raise the limit of open files \(ulimit -n\), or read with",
        ),
        (bus_error, r"a loader worker has ended: .*DataLoader worker \(pid.*; free .*/dev/shm.*workers=0"),
    ],
)
def test_a_worker_that_fails_says_why(before: Callable[[], Any], message: str) -> None:
    with pytest.raises((OSError, ValueError), match=message) as error:
        read(Large(before))
    assert "\n" not in str(error.value)


def test_a_temporary_folder_whose_path_is_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / ("x" * 120)
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setitem(process.current_process()._config, "tempdir", str(folder))  # type: ignore[attr-defined]
    with pytest.raises(
        OSError, match="AF_UNIX path too long; TMPDIR is too long for a socket, set it to a shorter path"
    ):
        read(Large())


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (
            RuntimeError("unable to write to file </torch_1_2>: No space left on device (28)"),
            "enlarge the shared memory",
        ),
        (PermissionError(13, "Permission denied"), "make /dev/shm and TMPDIR writable"),
        (OSError(30, "Read-only file system"), "make /dev/shm and TMPDIR writable"),
    ],
)
def test_shared_memory_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch, error: Exception, remedy: str) -> None:
    monkeypatch.setattr(torch.UntypedStorage, "_share_fd_cpu_", raising(error))
    with pytest.raises(OSError, match=f"a loader worker cannot send a batch: .*{remedy}.*workers=0"):
        read(Large())


def test_workers_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fork", raising(BlockingIOError(11, "Resource temporarily unavailable")))
    with pytest.raises(OSError, match="loader workers cannot be started: .*temporarily unavailable.*workers=0"):
        read(Large())


def test_the_thread_that_pins_memory_passes_errors_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor + 1)
    sent = _InWorker(Large()).__getitems__([4])
    assert int(sent.pin_memory()["image"][0, 0, 0, 0]) == 5
    with pytest.raises(ValueError, match="^no such sample$"):
        _InWorker(Large(raising(ValueError("no such sample")))).__getitems__([4]).pin_memory().unpack()


def test_a_batch_that_cannot_be_received(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("multiprocessing.resource_sharer.DupFd.detach", raising(OSError(24, "Too many open files")))
    with pytest.raises(OSError, match="its batch is lost: .*Too many open files; raise the limit of open files"):
        read(Large())


def test_a_forked_child_leaves_the_garbage_of_its_parent() -> None:
    class Group:
        """Like a process group in a cycle of references: to finish it in the child would wait for ever."""

        def __init__(self) -> None:
            self.me, self.parent = self, os.getpid()

        def __del__(self) -> None:
            if os.getpid() != self.parent:
                os._exit(3)

    gc.disable()
    try:
        Group()
        child = multiprocessing.get_context("fork").Process(target=gc.collect)
        child.start()
        child.join()
    finally:
        gc.enable()
    assert child.exitcode == 0
