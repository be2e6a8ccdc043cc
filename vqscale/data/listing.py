"""A folder of images -> what to pack: files, keys, labels, classes, and the held-out split.

In: folders, a labels file, a rule.  Out: `Listing`, in an order that depends on the file names alone. Nothing is
decoded here.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from vqscale.data.arrays import array_files, class_names, read_pictures
from vqscale.data.images import SUFFIXES
from vqscale.data.labels import check_class_names, read_labels
from vqscale.seeding import key_of, mix, uniform
from vqscale.text import printable

_HOLDOUT, _ORDER = key_of("holdout"), key_of("pack order")
_SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval", "holdout"}


@dataclass(frozen=True, slots=True)
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

    def renamed(self, names: Sequence[str]) -> "Listing":
        """The same images, their classes called `names` in the order of their numbers; () = as they are called.

        Raises ValueError for another number of names than of classes, or a name that cannot be used.
        """
        if not names:
            return self
        if len(names) != len(self.classes):
            first, last = map(printable, (self.classes[0], self.classes[-1]))
            raise ValueError(
                f"source folder {self.folder} has {len(self.classes)} classes ({first} to {last}), "
                f"but class_names has {len(names)} names"
            )
        check_class_names(names, "class_names")
        return replace(self, classes=tuple(names))

    def split(self, holdout: str) -> "dict[str, Listing]":
        """The listings of `train` and `holdout`. holdout: a fraction, chosen by each key's hash, or `every:n` = every
        n-th in sorted order (0, n, 2n, …).

        A fraction above 0 holds out at least one of two or more. Links to one file stay together. Raises ValueError
        for a rule that is neither.
        """
        every, fraction = parse_holdout(holdout)
        if every:
            chosen = {item.key for item in self.items[::every]}
        else:
            scores = {item.key: uniform(_HOLDOUT, key_of(item.key)) for item in self.items}
            chosen = {key for key, score in scores.items() if score < fraction}
            if not chosen and fraction and len(self.items) > 1:
                chosen = {min(scores, key=lambda key: (scores[key], key))}
        files = {item.identity for item in self.items if item.key in chosen} - {0}
        chosen |= {item.key for item in self.items if item.identity in files}
        train = tuple(item for item in self.items if item.key not in chosen)
        held_out = tuple(item for item in self.items if item.key in chosen)
        return {"train": replace(self, items=train), "holdout": Listing(self.folder, held_out, self.classes)}


@dataclass(frozen=True, slots=True)
class _File:
    path: str  # relative, with /
    size: int = 0
    identity: int = 0
    broken: bool = False  # a link that leads nowhere, or in a circle

    @property
    def folder(self) -> str:
        """The first sub-folder; "" for a file beside them."""
        return self.path.partition("/")[0] if "/" in self.path else ""

    @property
    def suffix(self) -> str:
        """In lower case, without the dot."""
        return os.path.splitext(self.path)[1][1:].lower()

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
    files = _files_in(folder)
    images = [file for file in files if file.is_image]
    others = [file for file in files if not file.is_image]
    if not images:
        what = f": {show_counts(Counter(file.kind for file in others))}" * bool(others)
        raise ValueError(f"source folder {folder} holds no images ({len(others)} other files){what}")
    warnings = _warn_of_broken_links(others)
    if labels:
        names, label_of = read_labels(labels, [file.path for file in images], classes)
    else:
        names, label_of = _labels_from_folders(folder, images, classes)
        warnings += _warn_of_lost_classes(folder, images, others) + _warn_of_splits(folder, names)
    check_class_names(names, labels or f"source folder {folder}")
    classified = [file for file in images if file.path in label_of]
    items = [
        Item(key, label_of[file.path], file.path, size=file.size, identity=file.identity)
        for key, file in zip(unique_keys([file.path for file in classified]), classified, strict=True)
    ]
    ignored = Counter(file.kind for file in others if not file.broken)
    return Listing(folder, tuple(items), tuple(names), ignored, len(images) - len(classified), tuple(warnings))


def is_flat(folder: str) -> bool:
    """Whether no image lies in a sub-folder, so that folders cannot name classes. Raises FileNotFoundError."""
    return not any(file.folder and file.is_image for file in _files_in(folder))


def _files_in(folder: str) -> list[_File]:
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"source folder {folder} does not exist")
    return list(_walk(folder, "", set()))


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


def show_counts(kinds: "Counter[str]") -> str:
    """Such as "12 .txt, 1 .heic", the most frequent first."""
    counts = [f"{count} {printable(kind)}" for kind, count in kinds.most_common()]
    return ", ".join(counts[:5] + ["…"] * (len(counts) > 5))


def _warn_of_broken_links(others: Sequence[_File]) -> list[str]:
    broken = [file.path for file in others if file.broken]
    return [f"{len(broken)} links lead nowhere, e.g. {printable(broken[0])}"] if broken else []


def _warn_of_lost_classes(folder: str, images: Sequence[_File], others: Sequence[_File]) -> list[str]:
    """Class folders that became no class."""
    folders = {entry.name for entry in os.scandir(folder) if os.path.isdir(entry.path) and entry.name[0] != "."}
    names = sorted(folders - {file.folder for file in images})
    contents: dict[str, Counter[str]] = {name: Counter() for name in names}
    for file in others:
        if file.folder in contents:
            contents[file.folder][file.kind] += 1
    lost = [f"{printable(name)} ({show_counts(kinds) or 'empty'})" for name, kinds in contents.items()]
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


def _labels_from_folders(
    folder: str, images: Sequence[_File], classes: Sequence[str]
) -> tuple[list[str], dict[str, int]]:
    """The class names and each path's label; images beside the class folders have none."""
    folders = sorted({file.folder for file in images if file.folder})
    if not folders:
        if len(classes) > 1:
            raise ValueError(f"source folder {folder} has no class folders, but there are {len(classes)} classes")
        return list(classes) or ["all"], {file.path: 0 for file in images}
    names = list(classes) or folders
    number = {name: i for i, name in enumerate(names)}
    if unknown := [name for name in folders if name not in number]:
        raise ValueError(f"source folder {folder}: {unknown[0]!r} is not one of the {len(names)} known classes")
    return names, {file.path: number[file.folder] for file in images if file.folder}


def list_arrays(folder: str, part: str, names: Sequence[str] = ()) -> Listing:
    """The pictures of IDX files or CIFAR's batches: `part` is train | test, `names` the classes in the order of their
    numbers. Raises ValueError for a label beyond the names."""
    items = []
    if not (files := array_files(folder, part)):
        raise ValueError(f"source folder {folder} holds no {part} part of a known data set of arrays")
    for name in files:
        labels = read_pictures(Path(folder, name)).labels
        digits, stem = len(str(len(labels) - 1)), name.split(".")[0]
        items += [Item(f"{stem}/{n:0{digits}d}", int(label), name, n) for n, label in enumerate(labels)]
    largest = max((item.label for item in items), default=-1)
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


def parse_holdout(holdout: str) -> tuple[int, float]:
    """(n, 0.0) of the rule `every:n`, (0, fraction) of a fraction in [0, 1). Raises ValueError for neither."""
    if holdout.startswith("every:"):
        text = holdout.removeprefix("every:")
        if not text.isdigit() or int(text) < 2:
            raise ValueError(f"holdout={holdout}: every:n needs a whole n of at least 2")
        return int(text), 0.0
    try:
        fraction = float(holdout or 0)
    except ValueError:
        raise ValueError(f"holdout={holdout} is neither a fraction, every:n nor a folder that exists") from None
    if not 0 <= fraction < 1:
        raise ValueError(f"holdout={holdout}: a fraction lies in [0, 1)")
    return 0, fraction


def shuffled(items: Sequence[Item], seed: int) -> list[Item]:
    """The order in which samples are stored: by hash, so that every shard holds a mixture of the classes."""
    return sorted(items, key=lambda item: (mix(seed, _ORDER, key_of(item.key)), item.key))
