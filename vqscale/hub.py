"""The Hugging Face Hub: the name of a repository -> a folder of models; an exported folder -> a repository.

In: `org/name`.  Out: a folder as `vqscale export` writes it, in the cache of the library huggingface_hub.  Only
config.json and model.safetensors of the models that are asked for are downloaded: nothing that can hold a pickle.
"""

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vqscale.files import read_json
from vqscale.models.pretrained import CONFIG, WEIGHTS
from vqscale.text import one_line

_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def local_folder(path: str | Path, models: Sequence[str], revision: str | None = None) -> Path:
    """`path` if it exists, or is no text of the form org/name; else the repository's `models` (vqvae, prior_top, …) in
    the cache, downloaded where they are not there yet.

    revision: a branch, a tag or a commit of the repository; None = its main branch.
    Raises ValueError for a revision of a path, and for a name while huggingface_hub is not installed;
    FileNotFoundError for a repository or a revision that does not exist, or that is not in the cache while the Hub
    cannot be reached, or that holds no such export; OSError for a download that fails.
    """
    if isinstance(path, str) and _NAME.fullmatch(path) and not Path(path).exists():
        return _download(path, ["", *models], revision)
    if revision is not None:
        raise ValueError(f"revision={revision}: only a name on the Hub, org/name, has revisions; {path} is a path")
    return Path(path)


def _download(name: str, models: Sequence[str], revision: str | None) -> Path:
    """The configs first: weights are downloaded only of models that `export` wrote."""
    library = _library(f"{name}: there is no such folder here, and to look on the Hub")
    with _one_line_errors(library, f"{name}: no such folder here", revision):
        configs = [(Path(model) / CONFIG).as_posix() for model in models]
        folder = Path(library.snapshot_download(name, revision=revision, allow_patterns=configs))
        weights = [
            (Path(model) / WEIGHTS).as_posix()
            for model in models
            if "fingerprint" in read_json(folder / model / CONFIG)
        ]
        if weights:  # of the same commit: the snapshot's folder has its name
            library.snapshot_download(name, revision=folder.name, allow_patterns=weights)
            return folder
    raise FileNotFoundError(f"{name}: this repository on the Hub has no {' or '.join(models[1:])} that export wrote")


def check_push(name: str) -> None:
    """Raises ValueError where a push to `name` cannot succeed: a wrong name, no huggingface_hub, no token."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"push={name}: a name on the Hub has the form org/name")
    if not _library(f"push={name}").get_token():
        raise ValueError(f"push={name}: no token for the Hub here; `hf auth login` stores one, or set HF_TOKEN")


def push(folder: Path, files: Sequence[str], name: str, *, private: bool) -> str:
    """Upload `files` of a folder in one commit, into a repository that is made if there is none (private: only then).

    Returns the commit's URL. Raises OSError naming the cause.
    """
    library = _library(f"push={name}")
    with _one_line_errors(library, f"push={name}"):
        api = library.HfApi()
        api.create_repo(name, private=private or None, exist_ok=True)
        operations = [library.CommitOperationAdd(file, folder / file) for file in files]
        return api.create_commit(name, operations, commit_message="vqscale export").commit_url


def _library(purpose: str) -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError:
        raise ValueError(f"{purpose} needs a package that is not here: pip install 'vqscale[hub]'") from None
    return huggingface_hub


@contextlib.contextmanager
def _one_line_errors(library: Any, where: str, revision: str | None = None) -> Iterator[None]:
    """The library's errors, whose texts have many lines, as one line; OSError, since none of them is a mistake here."""
    errors, endpoint = library.errors, library.constants.ENDPOINT
    try:
        yield
    except errors.RevisionNotFoundError:
        raise FileNotFoundError(f"{where}, and on {endpoint} it has no revision {revision}") from None
    except errors.RepositoryNotFoundError:
        raise FileNotFoundError(
            f"{where}, and no repository of this name on {endpoint}; a private one needs `hf auth login`"
        ) from None
    except errors.LocalEntryNotFoundError as error:
        cause = one_line(error.__cause__ or error)
        raise FileNotFoundError(f"{where}, not all of it in the cache, and no answer of {endpoint}: {cause}") from None
    except Exception as error:  # of three HTTP libraries, depending on the version
        cause = f": {one_line(error.__cause__)}" if error.__cause__ else ""
        raise OSError(f"{where}: {endpoint}: {type(error).__name__}: {one_line(error)}{cause}") from None
