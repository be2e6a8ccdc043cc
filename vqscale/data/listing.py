"""A folder of images -> what to pack: files, keys, labels, classes, and the held-out split.

In: folders, a labels file, a rule.  Out: `Listing`, in an order that depends on the file names alone. Nothing is
decoded here.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vqscale.data.arrays import array_files, class_names, read_pictures
from vqscale.data.images import SUFFIXES
from vqscale.seeding import key_of, mix, uniform

_HOLDOUT, _ORDER = key_of("holdout"), key_of("pack order")


@dataclass(frozen=True)
class Item:
    """One image to pack. `path`: relative to its folder; "" for drawn image number `index`."""

    key: str
    label: int
    path: str = ""
    index: int = -1
    size: int = 0  # bytes of the file


@dataclass(frozen=True)
class Listing:
    """The images of one folder, in sorted order. `ignored`: number of files without an image suffix; `unclassified`:
    number of images beside the class folders, which have no class."""

    folder: str
    items: tuple[Item, ...]
    classes: tuple[str, ...]
    ignored: int = 0
    unclassified: int = 0

    @property
    def fingerprint(self) -> str:
        """sha256 over names, sizes and labels."""
        digest = hashlib.sha256()
        for item in self.items:
            digest.update(f"{item.path}\0{item.index}\0{item.size}\0{item.label}\n".encode("utf-8", "surrogateescape"))
        return "sha256:" + digest.hexdigest()


@dataclass(frozen=True)
class _File:
    path: str  # relative, with /
    size: int


def list_folder(folder: str, labels: str = "", classes: Sequence[str] = ()) -> Listing:
    """The images under `folder`; their class is the first sub-folder, or what the file `labels` says.

    classes: the class names to use; () = those of the folders or the file. Raises FileNotFoundError for a missing
    folder, ValueError for one without images, for a class outside `classes`, or for a labels file that does not fit
    (naming file and line).
    """
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"source folder {folder} does not exist")
    files = list(_walk(folder, "", set()))
    images = [file for file in files if _suffix(file.path) in SUFFIXES]
    if not images:
        raise ValueError(f"source folder {folder} holds no images ({len(files)} other files)")
    if labels:
        classified = images
        names, label_of = read_labels(labels, [file.path for file in images], classes)
    else:
        classified, names, label_of = _classes_from_folders(folder, images, classes)
    keys = unique_keys([file.path for file in classified])
    items = [Item(k, label_of(file.path), file.path, size=file.size) for k, file in zip(keys, classified, strict=True)]
    return Listing(folder, tuple(items), tuple(names), len(files) - len(images), len(images) - len(classified))


def _suffix(path: str) -> str:
    return path.rpartition("/")[2].rpartition(".")[2].lower() if "." in path.rpartition("/")[2] else ""


def is_flat(folder: str) -> bool:
    """Whether no image lies in a sub-folder, so that folders cannot name classes."""
    return not any("/" in file.path and _suffix(file.path) in SUFFIXES for file in _walk(folder, "", set()))


def _walk(root: str, inside: str, above: set[tuple[int, int]]) -> Iterator[_File]:
    """Files below root/inside in sorted order, without hidden ones; links are followed, but never in a circle."""
    stat = os.stat(os.path.join(root, inside))
    identity = (stat.st_dev, stat.st_ino)
    if identity in above:
        return
    for entry in sorted(os.scandir(os.path.join(root, inside)), key=lambda entry: entry.name):
        if entry.name.startswith("."):
            continue
        path = f"{inside}/{entry.name}" if inside else entry.name
        if entry.is_dir():
            yield from _walk(root, path, above | {identity})
        elif entry.is_file():
            yield _File(path, entry.stat().st_size)


def _classes_from_folders(
    folder: str, images: list[_File], classes: Sequence[str]
) -> tuple[list[_File], list[str], Callable[[str], int]]:
    inside = [file for file in images if "/" in file.path]
    if not inside:
        if len(classes) > 1:
            raise ValueError(f"source folder {folder} has no class folders, but there are {len(classes)} classes")
        return images, list(classes) or ["all"], lambda path: 0
    folders = sorted({file.path.split("/", 1)[0] for file in inside})
    names = list(classes) or folders
    number = {name: i for i, name in enumerate(names)}
    if unknown := [name for name in folders if name not in number]:
        raise ValueError(f"source folder {folder}: {unknown[0]!r} is not one of the {len(names)} known classes")
    return inside, names, lambda path: number[path.split("/", 1)[0]]


def read_labels(
    labels: str, paths: Sequence[str], classes: Sequence[str] = ()
) -> tuple[list[str], Callable[[str], int]]:
    """Read lines `filename class` (or tab-separated), the class by name or number.

    Returns the class names and the label of each path. Without `classes`, the names are those in the file, sorted;
    or the numbers up to the largest if all are numbers. Raises FileNotFoundError or ValueError naming file and line.
    """
    if not os.path.isfile(labels):
        raise FileNotFoundError(f"labels file {labels} does not exist")
    by_name = _by_path_and_name(paths)
    entries: dict[str, tuple[str, int]] = {}  # path -> (class, line)
    for number, line in enumerate(Path(labels).read_text().splitlines(), 1):
        if not line.strip():
            continue
        fields = line.strip().split("\t") if "\t" in line else line.strip().rsplit(None, 1)
        if len(fields) != 2:
            raise ValueError(f"{labels}, line {number}: expected `filename class`, found {line.strip()!r}")
        path = by_name.get(fields[0].strip().removeprefix("./"))
        if path is None:
            raise ValueError(f"{labels}, line {number}: there is no image {fields[0]!r}")
        if path in entries and entries[path][0] != fields[1].strip():
            raise ValueError(f"{labels}, line {number}: {fields[0]!r} has another class in line {entries[path][1]}")
        entries[path] = fields[1].strip(), number
    if missing := [path for path in paths if path not in entries]:
        raise ValueError(
            f"{labels}: no class for {missing[0]!r}" + f" and {len(missing) - 1} more" * (len(missing) > 1)
        )
    names = list(classes) or _names_in({name for name, _ in entries.values()})
    number_of = {name: i for i, name in enumerate(names)}
    table = {path: _number(name, number_of, f"{labels}, line {line}") for path, (name, line) in entries.items()}
    return names, table.__getitem__


def _by_path_and_name(paths: Sequence[str]) -> Mapping[str, str]:
    """Paths under their own name and, where it is the only one, under the bare file name."""
    bare: dict[str, list[str]] = {}
    for path in paths:
        bare.setdefault(path.rpartition("/")[2], []).append(path)
    return {**{name: same[0] for name, same in bare.items() if len(same) == 1}, **{path: path for path in paths}}


def _names_in(labels: set[str]) -> list[str]:
    if all(label.isascii() and label.isdigit() for label in labels):
        return [str(i) for i in range(max(int(label) for label in labels) + 1)]
    return sorted(labels)


def _number(name: str, number_of: Mapping[str, int], where: str) -> int:
    if name in number_of:
        return number_of[name]
    if name.lstrip("-").isdigit() and 0 <= int(name) < len(number_of):
        return int(name)
    raise ValueError(
        f"{where}: {name!r} is not one of the {len(number_of)} classes (a name, or 0 to {len(number_of) - 1})"
    )


def list_arrays(folder: str, part: str, names: Sequence[str] = ()) -> Listing:
    """The pictures of IDX files or CIFAR's batches: `part` is train | test, `names` the classes in the order of their
    numbers. Raises ValueError for a label beyond the names."""
    items, largest = [], 0
    if not (files := array_files(folder, part)):
        raise ValueError(f"source folder {folder} holds no {part} part of a known data set of arrays")
    for name in files:
        labels = read_pictures(Path(folder, name)).labels
        digits, stem = len(str(len(labels) - 1)), name.split(".")[0]
        items += [Item(f"{stem}/{n:0{digits}d}", int(label), name, n) for n, label in enumerate(labels)]
        largest = max(largest, int(labels.max()))
    classes = tuple(names) or class_names(folder, largest + 1)
    if largest >= len(classes):
        raise ValueError(f"{folder}: label {largest}, but {len(classes)} class names")
    return Listing(folder, tuple(items), classes)


def unique_keys(paths: Sequence[str]) -> list[str]:
    """A key per path: without suffix, dots in the last component replaced (a tar member's part begins at the first).

    A leading `__` is removed: webdataset skips such members as its own metadata.
    Where two paths would share a key (a.jpg and a.png), the later one gets its suffix, repeated until it is unique.
    """
    seen: set[str] = set()
    keys = []
    for path in paths:
        text = path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        if text.startswith("__"):
            text = text.lstrip("_")
        parent, slash, name = text.rpartition("/")
        stem, _, suffix = name.rpartition(".")
        key = parent + slash + stem.replace(".", "_")
        while key in seen:
            key += f"-{suffix}"
        seen.add(key)
        keys.append(key)
    return keys


def split_items(items: Sequence[Item], holdout: str) -> tuple[list[Item], list[Item]]:
    """(train, holdout): a fraction chosen by each key's hash, or `every:n` = every n-th in sorted order (0, n, 2n, …).

    A fraction above 0 holds out at least one of two or more. Raises ValueError for a rule that is neither.
    """
    every = holdout_every(holdout)
    if every:
        chosen = {item.key for item in items[::every]}
    else:
        fraction = holdout_fraction(holdout)
        scores = {item.key: uniform(_HOLDOUT, key_of(item.key)) for item in items}
        chosen = {key for key, score in scores.items() if score < fraction}
        if not chosen and fraction and len(items) > 1:
            chosen = {min(scores, key=lambda key: (scores[key], key))}
    return [item for item in items if item.key not in chosen], [item for item in items if item.key in chosen]


def holdout_every(holdout: str) -> int:
    """n of `every:n`, 0 for another rule. Raises ValueError for an n below 2."""
    if not holdout.startswith("every:"):
        return 0
    text = holdout.removeprefix("every:")
    if not text.isdigit() or int(text) < 2:
        raise ValueError(f"holdout={holdout}: every:n needs a whole n of at least 2")
    return int(text)


def holdout_fraction(holdout: str) -> float:
    """The fraction that a rule names. Raises ValueError when it is none in [0, 1)."""
    try:
        fraction = float(holdout or 0)
    except ValueError:
        raise ValueError(f"holdout={holdout} is neither a fraction, every:n nor a folder that exists") from None
    if not 0 <= fraction < 1:
        raise ValueError(f"holdout={holdout}: a fraction lies in [0, 1)")
    return fraction


def shuffled(items: Sequence[Item], seed: int) -> list[Item]:
    """The order in which samples are stored: by hash, so that every shard holds a mixture of the classes."""
    return sorted(items, key=lambda item: (mix(seed, _ORDER, key_of(item.key)), item.key))
