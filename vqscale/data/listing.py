"""A folder of images -> what to pack: files, keys, labels, classes, and the held-out split.

In: folders, a labels file, a rule.  Out: `Listing`, in an order that depends on the file names alone. Nothing is
decoded here.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import compress
from pathlib import Path

from vqscale.data.arrays import array_files, class_names, read_pictures
from vqscale.data.images import SUFFIXES
from vqscale.data.labels import check_class_names, read_labels
from vqscale.seeding import key_of, mix, uniform
from vqscale.text import printable

_HOLDOUT, _ORDER = key_of("holdout"), key_of("pack order")
_SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval", "holdout"}


@dataclass(frozen=True)
class Item:
    """One image to pack. `path`: relative to its folder; "" for drawn image number `index`. `identity`: of the file on
    its disk, the same for all links to it; 0 = unknown."""

    key: str
    label: int
    path: str = ""
    index: int = -1
    size: int = 0  # bytes of the file
    identity: int = 0


@dataclass(frozen=True)
class Listing:
    """The images of one folder, in sorted order. `ignored`: how many files have another suffix; `unclassified`:
    number of images beside the class folders, which have no class; `warnings`: what else was left out, or looks odd."""

    folder: str
    items: tuple[Item, ...]
    classes: tuple[str, ...]
    ignored: "Counter[str]" = field(default_factory=Counter)
    unclassified: int = 0
    warnings: tuple[str, ...] = ()

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
    size: int = 0
    identity: int = 0
    broken: bool = False  # a link that leads nowhere, or in a circle

    @property
    def suffix(self) -> str:
        """In lower case, without the dot."""
        _, dot, suffix = self.path.rpartition("/")[2].rpartition(".")
        return suffix.lower() if dot else ""

    @property
    def kind(self) -> str:
        """Its suffix, in words where it has none."""
        return "links that lead nowhere" if self.broken else f".{self.suffix}" if self.suffix else "without a suffix"

    @property
    def is_image(self) -> bool:
        return not self.broken and self.suffix in SUFFIXES


def list_folder(folder: str, labels: str = "", classes: Sequence[str] = ()) -> Listing:
    """The images under `folder`; their class is the first sub-folder, or what the file `labels` says.

    classes: the class names to use; () = those of the folders or the file. Raises FileNotFoundError for a missing
    folder, ValueError for one without images, for a class outside `classes` or with an unusable name, or for a labels
    file that does not fit (naming file and line).
    """
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"source folder {folder} does not exist")
    files = list(_walk(folder, "", set()))
    images = [file for file in files if file.is_image]
    others = [file for file in files if not file.is_image]
    if not images:
        what = f": {show_counts(_count_kinds(others))}" * bool(others)
        raise ValueError(f"source folder {folder} holds no images ({len(others)} other files){what}")
    warnings = _warn_of_broken_links(others)
    if labels:
        classified = images
        names, label_of = read_labels(labels, [file.path for file in images], classes)
    else:
        classified, names, label_of = _classes_from_folders(folder, images, classes)
        warnings += _warn_of_lost_classes(folder, images, others) + _warn_of_splits(folder, names)
    check_class_names(names, labels or f"source folder {folder}")
    items = [
        Item(key, label_of(file.path), file.path, size=file.size, identity=file.identity)
        for key, file in zip(unique_keys([file.path for file in classified]), classified, strict=True)
    ]
    ignored = _count_kinds([file for file in others if not file.broken])
    return Listing(folder, tuple(items), tuple(names), ignored, len(images) - len(classified), tuple(warnings))


def is_flat(folder: str) -> bool:
    """Whether no image lies in a sub-folder, so that folders cannot name classes."""
    return not any("/" in file.path and file.is_image for file in _walk(folder, "", set()))


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
        if entry.is_symlink() and not os.path.exists(entry.path):
            yield _File(path, broken=True)
        elif entry.is_dir():
            yield from _walk(root, path, above | {identity})
        elif entry.is_file():
            stat = entry.stat()
            yield _File(path, stat.st_size, hash((stat.st_dev, stat.st_ino)) if stat.st_ino else 0)


def _count_kinds(files: Sequence[_File]) -> "Counter[str]":
    return Counter(file.kind for file in files)


def show_counts(kinds: "Counter[str]") -> str:
    """Such as "12 .txt, 1 .heic", the most frequent first."""
    counts = [f"{count} {printable(kind)}" for kind, count in kinds.most_common()]
    return ", ".join(counts[:5] + ["…"] * (len(counts) > 5))


def _warn_of_broken_links(others: Sequence[_File]) -> list[str]:
    broken = [file.path for file in others if file.broken]
    return [f"{len(broken)} links lead nowhere, e.g. {printable(broken[0])}"] if broken else []


def _warn_of_lost_classes(folder: str, images: Sequence[_File], others: Sequence[_File]) -> list[str]:
    """Class folders that became no class."""
    with_images = {file.path.split("/", 1)[0] for file in images if "/" in file.path}
    contents: dict[str, list[_File]] = {
        entry.name: []
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name)
        if os.path.isdir(entry.path) and not entry.name.startswith(".") and entry.name not in with_images
    }
    for file in others:
        if (name := file.path.split("/", 1)[0]) in contents:
            contents[name].append(file)
    lost = [f"{printable(name)} ({show_counts(_count_kinds(files)) or 'empty'})" for name, files in contents.items()]
    if not lost:
        return []
    more = f" and {len(lost) - 5} more" * (len(lost) > 5)
    return [f"{len(lost)} folders hold no image and became no class: {', '.join(lost[:5])}{more}"]


def _warn_of_splits(folder: str, names: Sequence[str]) -> list[str]:
    if len(names) < 2 or not all(name.lower() in _SPLIT_NAMES for name in names):
        return []
    train = next((name for name in names if name.lower().startswith("train")), names[0])
    other = next(name for name in names if name != train)
    return [
        f"the folders {', '.join(names)} became the classes; if they are splits of one data set: "
        f"source={folder}/{train} holdout={folder}/{other}"
    ]


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
    check_class_names(classes, folder)
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
        text = printable(path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace"))
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

    A fraction above 0 holds out at least one of two or more. Links to one file stay together. Raises ValueError for
    a rule that is neither.
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
    files = {item.identity for item in items if item.key in chosen} - {0}
    held_out = [item.key in chosen or item.identity in files for item in items]
    return list(compress(items, [not out for out in held_out])), list(compress(items, held_out))


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
