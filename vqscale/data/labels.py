"""Class names, and files that give a class to each image.

In: a file of lines `filename class`.  Out: class names and a label per path, or a refusal that names file and line.
"""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from vqscale.text import printable

_MAX_CLASSES = 100_000  # a larger number in a labels file is no class number


def check_class_names(names: Sequence[str], where: str) -> None:
    """Raises ValueError for names that later stages could not write or show, or not tell apart."""
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{where}: the class name {os.fsencode(name)!r} is not UTF-8; rename it") from None
        if printable(name) != name or not name.strip():
            raise ValueError(f"{where}: the class name '{printable(name)}' has invisible characters; rename it")
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"{where}: two classes have the name '{twice[0]}'; rename one")


def read_labels(labels: str, paths: Sequence[str], classes: Sequence[str] = ()) -> tuple[list[str], dict[str, int]]:
    """Read lines `filename class` (or tab-separated), the class by name or number.

    Returns the class names and each path's label. Without `classes`, the names are those in the file, sorted;
    or the numbers up to the largest if all are numbers. Raises FileNotFoundError or ValueError naming file and line.
    """
    entries = _entries(labels, _by_path_and_name(paths))
    if missing := [path for path in paths if path not in entries]:
        more = f" and {len(missing) - 1} more" * (len(missing) > 1)
        raise ValueError(f"{labels}: no class for {missing[0]!r}{more}")
    lines = {name: line for name, line in reversed(entries.values())}  # the first line of each class
    names = list(classes) or _names_in(lines, labels)
    number_of = _numbers(names, lines, labels)
    return names, {path: number_of[name] for path, (name, _) in entries.items()}


def _entries(labels: str, by_name: Mapping[str, str]) -> dict[str, tuple[str, int]]:
    """path -> (class, line)."""
    if not os.path.isfile(labels):
        raise FileNotFoundError(f"labels file {labels} does not exist")
    entries: dict[str, tuple[str, int]] = {}
    for number, data in enumerate(Path(labels).read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines(), 1):
        where = f"{labels}, line {number}"
        try:
            line = data.decode().strip()
        except UnicodeDecodeError:
            raise ValueError(f"{where}: not UTF-8") from None
        if not line:
            continue
        fields = line.split("\t") if "\t" in line else line.rsplit(None, 1)
        if len(fields) != 2:
            raise ValueError(f"{where}: expected `filename class`, found {line!r}")
        path = by_name.get(fields[0].strip().removeprefix("./"))
        if path is None:
            raise ValueError(f"{where}: there is no image {fields[0]!r}")
        if path in entries and entries[path][0] != fields[1].strip():
            raise ValueError(f"{where}: {fields[0]!r} has another class in line {entries[path][1]}")
        entries[path] = fields[1].strip(), number
    return entries


def _by_path_and_name(paths: Sequence[str]) -> Mapping[str, str]:
    """Paths under their own name and, where it is the only one, under the bare file name."""
    bare: dict[str, list[str]] = {}
    for path in paths:
        bare.setdefault(path.rpartition("/")[2], []).append(path)
    return {**{name: same[0] for name, same in bare.items() if len(same) == 1}, **{path: path for path in paths}}


def _is_number(word: str) -> bool:
    return word.isascii() and word.isdigit()


def _names_in(lines: Mapping[str, int], labels: str) -> list[str]:
    """lines: where each class comes first."""
    if not all(map(_is_number, lines)):
        return sorted(lines)
    largest = max(lines, key=lambda word: (len(word.lstrip("0")), word.lstrip("0")))
    if len(largest.lstrip("0")) > len(str(_MAX_CLASSES)) or int(largest) >= _MAX_CLASSES:
        raise ValueError(
            f"{labels}, line {lines[largest]}: {largest} is too large for a class number (below {_MAX_CLASSES}); "
            "if it is a name, put a letter before the numbers"
        )
    return [str(number) for number in range(int(largest) + 1)]


def _numbers(names: Sequence[str], lines: Mapping[str, int], labels: str) -> dict[str, int]:
    """The number of each class in the file, which is its name or its place in `names`; never a mixture of both for
    names that are numbers themselves."""
    number_of = {name: number for number, name in enumerate(names)}
    by_place = [word for word in lines if word not in number_of]
    for word in by_place:
        if not _is_number(word) or len(word) > len(str(len(names))) or int(word) >= len(names):
            raise ValueError(
                f"{labels}, line {lines[word]}: {word!r} is not one of the {len(names)} classes "
                f"(a name, or 0 to {len(names) - 1})"
            )
    for word in lines if by_place else ():
        if _is_number(word) and number_of.get(word, int(word)) != int(word):
            other = by_place[0]
            raise ValueError(
                f"{labels}, line {lines[word]}: {word!r} is the name of class number {number_of[word]}, but {other!r} "
                f"in line {lines[other]} is no name, only a number; use names alone, or rename the classes"
            )
    return number_of | {word: int(word) for word in by_place}
