"""Shard specs -> paths.  In: `data-{000000..000128}.tar`, a glob or a folder.  Out: the tars, in order."""

import glob
from pathlib import Path

from webdataset.shardlists import expand_urls


def expand_spec(spec: str) -> list[Path]:
    """The absolute paths of the tars that a spec names: braces in their order, globs and folders sorted.

    Raises ValueError for a pipe or URL (nothing named by a spec is ever run), FileNotFoundError for what is not there.
    """
    if spec.startswith("pipe:") or "://" in spec:
        raise ValueError(f"source={spec}: only local paths can be indexed")
    if Path(spec).is_dir():
        paths = sorted(Path(spec).glob("*.tar"))
        if not paths:
            raise FileNotFoundError(f"source={spec}: the folder holds no .tar files")
    else:
        paths = [path for name in expand_urls(spec) for path in _existing(name)]
    if len(set(paths)) < len(paths):
        raise ValueError(f"source={spec}: names a tar twice")
    return [path.resolve() for path in paths]


def _existing(name: str) -> list[Path]:
    found = sorted(glob.glob(name)) if glob.has_magic(name) and not Path(name).exists() else [name]
    if not found:
        raise FileNotFoundError(f"source: nothing matches {name}")
    for path in found:
        if not Path(path).is_file():
            raise FileNotFoundError(f"source: there is no tar {path}")
    return [Path(path) for path in found]
