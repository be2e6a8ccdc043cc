"""`python without_linux.py`: the core of the debug chain, in this folder, with what macOS lacks taken away from it.

Worker processes import this file too, because macOS starts them afresh. Only the package is refused /proc and its kind:
libraries look for the system that they were built for.
"""

import ctypes
import fcntl
import os
import resource
import signal
import sys
import types
from pathlib import Path
from typing import Any

import torch  # noqa: F401  before the system seems to be another
import webdataset  # noqa: F401

ROOT = Path(__file__).parents[2]
PACKAGE = str(ROOT / "vqscale")
NOT_THERE = ("/proc", "/sys", "/dev/shm", "/dev/nvidia")
GONE = {
    os: "sched_getaffinity sched_setaffinity posix_fadvise POSIX_FADV_WILLNEED POSIX_FADV_DONTNEED posix_fallocate "
    "pidfd_open memfd_create eventfd splice copy_file_range fdatasync getrandom getxattr setxattr listxattr "
    "O_DIRECT O_TMPFILE O_PATH O_NOATIME",
    signal: "pidfd_send_signal sigtimedwait sigwaitinfo SIGPWR SIGRTMIN SIGRTMAX SIGPOLL",
    resource: "prlimit RLIMIT_MSGQUEUE RLIMIT_NICE RLIMIT_OFILE RLIMIT_RTPRIO RLIMIT_SIGPENDING",
}
STEPS = {
    "pack": ["num_drawn=64"],
    "train_vqvae": "total_images=64 init_images=32 evaluate_images=8 evaluate_every=32 save_every=32".split(),
    "extract_codes": ["workers=0"],
    "train_prior_top": ["total_images=64", "workers=0"],
    "train_prior_bottom": ["total_images=64", "workers=0"],
    "sample": ["samples_per_class=1"],
}


def refuse(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook: the package finds no file of Linux's."""
    if event not in ("open", "os.listdir", "os.scandir") or not str(arguments[0]).startswith(NOT_THERE):
        return
    frame: types.FrameType | None = sys._getframe(1)
    for _ in range(6):  # pathlib lies between
        if frame is not None and frame.f_code.co_filename.startswith(PACKAGE):
            raise FileNotFoundError(2, "No such file or directory", arguments[0])
        frame = frame and frame.f_back


class MacLibrary:
    """libSystem has neither of glibc's and Linux's calls."""

    def __init__(self, *_arguments: Any, **_options: Any):
        pass

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"dlsym(RTLD_DEFAULT, {name}): symbol not found")


def take_away() -> None:
    for module, names in GONE.items():
        for name in names.split():
            if hasattr(module, name):
                delattr(module, name)
    names = {name: value for name, value in os.sysconf_names.items() if "AVPHYS" not in name}
    os.sysconf_names = names
    fcntl.F_FULLFSYNC = 51  # type: ignore[attr-defined]  # unknown to this kernel, as to a file system that cannot
    library = ctypes.CDLL
    ctypes.CDLL = lambda name, *a, **k: MacLibrary() if name is None else library(name, *a, **k)  # type: ignore
    sys.modules["deepspeed"] = None  # type: ignore[assignment]
    sys.platform = "darwin"
    sys.addaudithook(refuse)


take_away()
sys.path.insert(0, str(ROOT))

from vqscale import cli  # noqa: E402


def main() -> None:
    for step, words in STEPS.items():
        stage = cli.stage_of(step)
        assert cli.main([stage, str(ROOT / "configs" / "debug" / f"{step}.yaml"), "device=cpu", *words]) == 0, step
    assert cli.main(["doctor", "megabytes=1"]) == 0
    zero = [str(ROOT / "configs" / "debug" / "train_vqvae.yaml"), "strategy=zero2", "run_dir=zero"]
    assert cli.main(["train_vqvae", *zero]) == 1


if __name__ == "__main__":
    main()
