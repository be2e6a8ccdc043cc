"""Which software runs: for command.json."""

import contextlib
import platform
import subprocess
from importlib import metadata
from pathlib import Path

LIBRARIES = ("vqscale", "torch", "torchvision", "deepspeed", "accelerate", "webdataset", "numpy", "pillow")


def git_commit() -> str:
    """Of the source tree this runs from, or "" where there is none."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def versions() -> dict[str, str]:
    """Of Python and the libraries that results depend on."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
