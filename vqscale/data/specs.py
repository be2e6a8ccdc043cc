"""Shard specs -> tars, in order.  In: `data-{000000..000128}.tar`, such a URL, a glob or a folder.  Out: each tar."""

import glob
from pathlib import Path

from webdataset.shardlists import expand_urls

from vqscale.data.remote import check_url, is_url
from vqscale.data.shardtable import look_together
from vqscale.topology import ALONE, Topology


def expand_spec(spec: str, allow_pipe: bool = False, topology: Topology = ALONE) -> list[str]:
    """The tars that a spec names, as absolute paths or URLs: braces in their order, globs and folders sorted.

    Collective: each tar is looked for by one rank.
    Raises FileNotFoundError for a path that is not there, ValueError for a URL that would not be opened; none is opened
    here, and no pipe is run.
    """
    if Path(spec).is_dir():
        # Names with a dot in front are hidden files, such as the ._a.tar that macOS leaves beside a.tar.
        names = [str(path) for path in sorted(Path(spec).glob("[!.]*.tar"))]
        if not names:
            raise FileNotFoundError(f"source={spec}: the folder holds no .tar files")
    else:
        names = expand_urls(spec)
    tars: list[str] = []
    for of_name in look_together(topology, names, lambda name: _existing(name, allow_pipe)):
        if isinstance(of_name, FileNotFoundError):
            raise of_name
        tars += of_name
    if len(set(tars)) < len(tars):
        raise ValueError(f"source={spec}: names a tar twice")
    return tars


def _existing(name: str, allow_pipe: bool) -> list[str] | FileNotFoundError:
    if is_url(name):
        check_url(name, allow_pipe)
        return [name]
    paths = sorted(glob.glob(name)) if glob.has_magic(name) and not Path(name).exists() else [name]
    if not paths:
        return FileNotFoundError(f"source: nothing matches {name}")
    for path in paths:
        if not Path(path).is_file():
            return FileNotFoundError(f"source: there is no tar {path}")
    return [str(Path(path).resolve()) for path in paths]
