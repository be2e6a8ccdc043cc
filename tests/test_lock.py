"""The lock of a run directory: on this machine, and where only signs of life tell."""

import fcntl
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from vqscale import lock
from vqscale.lock import FolderLock

GONE = 2**22 + 1  # no process has this number


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT", 0.1)
    monkeypatch.setattr(lock, "LEASE", 0.6)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / ".lock"


def left_by(path: Path, **who: Any) -> None:
    """What a holder that was killed leaves."""
    path.write_text(json.dumps({"host": os.uname().nodename, "pid": GONE, "job_id": "", "beat": 3, **who}).ljust(256))


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without locks."""

    def refuse(*_: Any) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)


def test_the_file_says_who_holds_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    held = FolderLock(path)
    held.take()
    record = json.loads(path.read_text())
    assert (record["host"], record["pid"], record["job_id"]) == (os.uname().nodename, os.getpid(), "77")
    with pytest.raises(ValueError, match=rf"{path.parent} is in use by pid {os.getpid()} on .* \(job 77\)"):
        FolderLock(path).take()
    assert json.loads(path.read_text())["pid"] == os.getpid()
    held.release()
    assert path.read_text() == ""
    again = FolderLock(path)
    again.take()
    again.release()


def test_a_holder_gives_signs_of_life_until_it_releases(path: Path) -> None:
    held = FolderLock(path)
    held.take()
    first, until = json.loads(path.read_text())["beat"], time.monotonic() + 10
    while json.loads(path.read_text())["beat"] < first + 2:
        assert time.monotonic() < until
        time.sleep(0.02)
    held.release()
    time.sleep(0.3)
    assert path.read_text() == ""


def test_a_killed_holder_of_this_machine_is_followed_at_once(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    left_by(path)
    start = time.monotonic()
    held = FolderLock(path)
    held.take()
    assert time.monotonic() - start < 0.5 and not caplog.records
    held.release()


def test_a_silent_holder_of_another_machine_is_followed_after_its_lease(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    left_by(path, host="elsewhere", job_id="41")
    start = time.monotonic()
    held = FolderLock(path)
    held.take()
    assert time.monotonic() - start > 0.6
    assert "taken over from pid 4194305 on elsewhere (job 41): no sign of life for 0.6 s" in caplog.text
    held.release()


def _beat_elsewhere(path: Path, stop: threading.Event) -> None:
    beat = 0
    while not stop.wait(0.1):
        beat += 1
        left_by(path, host="elsewhere", beat=beat)


@pytest.mark.usefixtures("no_locks")
def test_a_living_holder_of_another_machine_is_left_alone(path: Path) -> None:
    left_by(path, host="elsewhere")
    stop = threading.Event()
    other = threading.Thread(target=_beat_elsewhere, args=(path, stop))
    other.start()
    try:
        with pytest.raises(ValueError, match="in use by pid 4194305 on elsewhere"):
            FolderLock(path).take()
    finally:
        stop.set()
        other.join()
    assert json.loads(path.read_text())["host"] == "elsewhere"


@pytest.mark.usefixtures("no_locks")
def test_without_locks_a_silent_holder_is_followed_and_a_living_one_is_not(path: Path) -> None:
    left_by(path)
    held = FolderLock(path)
    held.take()
    with pytest.raises(ValueError, match=f"in use by pid {os.getpid()}"):
        FolderLock(path).take()
    held.release()


def test_children_that_outlive_a_killed_holder_are_waited_for(path: Path) -> None:
    """They inherited its lock; they end within moments."""
    orphan = open(path, "a+")  # noqa: SIM115
    fcntl.flock(orphan, fcntl.LOCK_EX)
    left_by(path)
    threading.Timer(0.3, orphan.close).start()
    held = FolderLock(path)
    held.take()
    assert json.loads(path.read_text())["pid"] == os.getpid()
    held.release()


def test_a_lock_of_a_machine_that_is_gone_is_replaced(path: Path) -> None:
    server = open(path, "a+")  # noqa: SIM115 - an NFS server that has not noticed
    fcntl.flock(server, fcntl.LOCK_EX)
    left_by(path, host="elsewhere")
    held = FolderLock(path)
    held.take()
    assert json.loads(path.read_text())["pid"] == os.getpid()
    with pytest.raises(ValueError, match=f"in use by pid {os.getpid()}"):
        FolderLock(path).take()
    held.release()
    server.close()


def test_a_lock_is_written_through_no_link_and_waits_for_no_pipe(path: Path) -> None:
    other = path.with_name("other")
    other.write_text("mine")
    path.symlink_to(other)
    with pytest.raises(OSError, match="symbolic link"):
        FolderLock(path).take()
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match="is not a regular file"):
        FolderLock(path).take()
    assert other.read_text() == "mine"


def test_a_holder_cannot_act_on_the_terminal(path: Path) -> None:
    left_by(path, host=f"{os.uname().nodename}", pid=os.getpid(), job_id="7\x1b[31m\nforged")
    with open(path, "a+") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match=r"\(job 7\\x1b\[31m\\nforged\)"):
            FolderLock(path).take()


@pytest.mark.parametrize("content", ["{", "[" * 2000, "\xff", "null"])
def test_a_damaged_lock_is_taken_over(path: Path, content: str) -> None:
    path.write_bytes(content.encode("latin-1"))
    held = FolderLock(path)
    held.take()
    held.release()
