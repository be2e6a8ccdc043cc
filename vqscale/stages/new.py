"""The configs, launch files and Slurm scripts of this version -> a folder to work in.

In: a clone, or an installed package with its copies of them.  Out: DIR/{configs,launch,slurm}, to be edited.
"""

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from vqscale.config import Request, read_request

USAGE = "DIR"
_FOLDERS = ("configs", "launch", "slurm")


@dataclass(frozen=True)
class NewConfig:
    """Nothing: the folder is all there is to say."""


Config = NewConfig


def load(words: Sequence[str]) -> Request[NewConfig]:
    """From `DIR`; see `read_request`."""
    return read_request(NewConfig, words, f"new {USAGE}", paths=1)


def main(request: Request[NewConfig]) -> None:
    """Copy all or nothing. Raises ValueError where one of the folders is there already, FileNotFoundError where the
    package was installed without them."""
    (target,) = request.paths
    source = _source()
    for name in _FOLDERS:
        if (target / name).exists():
            raise ValueError(f"{target / name} exists already: name a new folder, or one without {', '.join(_FOLDERS)}")
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".new-", dir=target) as copies:
        for name in _FOLDERS:
            shutil.copytree(source / name, Path(copies, name))
        for name in _FOLDERS:
            Path(copies, name).rename(target / name)
    print(f"{target}: {', '.join(_FOLDERS)}; next: cd {target}; vqscale run configs/demo")


def _source() -> Path:
    """The clone, else `share/vqscale` of the environment, where pip put the files of `data-files` in pyproject.toml."""
    clone = Path(__file__).parents[2]
    if (clone / "pyproject.toml").is_file():
        return clone
    for file in metadata.files("vqscale") or ():
        if file.match("share/vqscale/launch/single.yaml") and (path := Path(str(file.locate()))).is_file():
            return path.resolve().parents[1]
    raise FileNotFoundError("this installation of vqscale has no configs: install its wheel by pip, or clone it")
