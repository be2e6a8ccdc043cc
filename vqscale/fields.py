"""What a key of a config may hold: types with ranges and choices, and how text becomes a value of them.

In: a field's type and what was written, as text (YAML, command line) or as plain JSON.  Out: the value, or a ValueError
that says what the key takes.

    total_images: PositiveInt = 100_000
    beta1: Annotated[float, Range(ge=0, lt=1)] = 0.9
    schedule: Annotated[str, Choice("constant", "cosine")] = "constant"
    cache_dir: PathText = ""
"""

import dataclasses
import inspect
import math
import os
import re
import reprlib
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from functools import cache
from typing import Annotated, Any, NamedTuple

import yaml

from vqscale.text import error_prefix

_LARGEST_INT = 2**63 - 1
_YES, _NO = ("true", "yes", "on", "y", "1"), ("false", "no", "off", "n", "0")


@dataclass(frozen=True)
class Range:
    """The numbers that a key takes. NaN and infinities never belong to them."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None

    def check(self, value: float) -> None:
        above = (self.ge is None or value >= self.ge) and (self.gt is None or value > self.gt)
        below = (self.le is None or value <= self.le) and (self.lt is None or value < self.lt)
        if not (above and below and math.isfinite(value)):
            raise ValueError(f"must be {self}")

    def __str__(self) -> str:
        if self.ge is not None and self.le is not None:
            return f"from {self.ge:g} to {self.le:g}"
        words = {"at least": self.ge, "above": self.gt, "at most": self.le, "below": self.lt}
        return " and ".join(f"{word} {limit:g}" for word, limit in words.items() if limit is not None) or "finite"


class Choice:
    """The words that a key takes; `""` stands for the default that the comment beside the field names."""

    def __init__(self, *words: str):
        self.words = words

    def check(self, value: str) -> None:
        if value not in self.words:
            raise ValueError(f"choose from {self}")

    def __str__(self) -> str:
        return ", ".join(word for word in self.words if word)


@dataclass(frozen=True)
class _Path:
    """Marks text that names a file or folder: a leading `~` is the home folder."""


@dataclass(frozen=True)
class _Name:
    """Marks text that becomes the name of a folder."""

    def check(self, value: str) -> None:
        if os.path.basename(value) != value or value in (".", ".."):
            raise ValueError("takes a name, not a path")


PositiveInt = Annotated[int, Range(ge=1)]
NonNegativeInt = Annotated[int, Range(ge=0)]
PositiveFloat = Annotated[float, Range(gt=0)]
NonNegativeFloat = Annotated[float, Range(ge=0)]
Fraction = Annotated[float, Range(ge=0, le=1)]
PositiveFraction = Annotated[float, Range(gt=0, le=1)]
PathText = Annotated[str, _Path()]
Name = Annotated[str, _Name()]


def split(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """(the bare type, what is declared beside it)."""
    if typing.get_origin(hint) is Annotated:
        return hint.__origin__, hint.__metadata__
    return hint, ()


def limits(hint: Any) -> str:
    """The range or the choices of a field for people, of its elements if it is a list or a mapping; "" if none."""
    kind, marks = split(hint)
    declared = [str(mark) for mark in marks if isinstance(mark, (Range, Choice))]
    inner = typing.get_args(kind)[-1:] if typing.get_origin(kind) in (list, dict) else ()
    return "; ".join([*declared, *(text for one in inner if (text := limits(one)))])


def takes_yaml(hint: Any, text: str) -> bool:
    """Whether a word on the command line is to be read as YAML; otherwise it is taken as typed."""
    kind = split(hint)[0]
    is_text = kind in (str, int, float, bool, None) or (isinstance(kind, types.UnionType) and not text.startswith("["))
    return not is_text


def convert(hint: Any, value: Any) -> Any:
    """`value`, text or plain JSON, as the field's type. Raises ValueError that says what the field takes."""
    kind, marks = split(hint)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:  # str | list[str]
        kind = next(one for one in arguments if (typing.get_origin(one) is list) == isinstance(value, list))
        return convert(kind, value)
    if origin is list:
        if not isinstance(value, list):
            raise ValueError("takes a list such as [a, b]")
        return [convert(arguments[0], one) for one in value]
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError("takes keys with values such as {a: 1}")
        return {str(key): convert(arguments[1], one) for key, one in value.items()}
    converted: Any = {bool: to_bool, int: to_int, float: to_float, str: _to_text}[kind](value)
    for mark in marks:
        if isinstance(mark, _Path):
            converted = os.path.expanduser(converted)
        else:
            mark.check(converted)
    if not marks and isinstance(converted, float) and not math.isfinite(converted):
        raise ValueError("takes a finite number")
    return converted


def check_values(config: Any) -> None:
    """Raises ValueError for a field outside its range: what `convert` finds out, for a config made in Python."""
    cls: Any = type(config)
    for name, hint in hints_of(cls).items():
        value = getattr(config, name)
        if not is_config(hint):
            with error_prefix(f"{name}={shown(value)}"):
                convert(hint, value)


def to_bool(value: Any) -> bool:
    word = str(value).lower() if isinstance(value, (bool, str)) else ""
    if word not in (*_YES, *_NO):
        raise ValueError("takes true or false")
    return word in _YES


def to_int(value: Any) -> int:
    """Also `1e6` and `1_000_000`, where they are exact."""
    text = str(value).replace("_", "").strip() if isinstance(value, (int, float, str)) else ""
    try:
        number = Decimal(text)
    except InvalidOperation:
        raise ValueError("takes an integer") from None
    if isinstance(value, bool) or not number.is_finite() or number.adjusted() > 20 or number % 1:
        raise ValueError("takes an integer")
    if abs(number) > _LARGEST_INT:
        raise ValueError("takes an integer of at most 64 bits")
    return int(number)


def to_float(value: Any) -> float:
    text = re.sub(r"^([+-]?)\.(?=nan|inf)", r"\1", str(value).lower())  # YAML writes .nan and .inf
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError("takes a number")
    try:
        return float(text)
    except ValueError:
        raise ValueError("takes a number") from None


def _to_text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("takes text")
    return value


def shown(value: Any) -> str:
    """A value as it was written, short enough for a message."""
    return value if isinstance(value, str) and len(value) < 100 else reprlib.repr(value)


class TextLoader(yaml.BaseLoader):
    """YAML whose scalars are all the text that was written: 007, on, null and 1:30:00 stay as they are."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """As PyYAML does, but a key that stands twice is an error."""
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_text(text: str) -> Any:
    """YAML -> mappings, lists and text. Raises ValueError for anything that is not YAML."""
    try:
        value = yaml.load(text, Loader=TextLoader)  # noqa: S506  # BaseLoader makes text, lists and mappings only
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"not valid YAML: {' '.join(str(error).split())}") from None
    _check_size(value)
    return value


def _check_size(value: Any, most: int = 100_000) -> None:
    """Aliases may repeat each other to no end; `most` values are enough for any config."""
    waiting = [value]
    for _ in range(most):
        if not waiting:
            return
        one = waiting.pop()
        waiting += one.values() if isinstance(one, dict) else one if isinstance(one, list) else []
    raise ValueError(f"not valid YAML: more than {most:,} values")


# --- the keys of a config ---------------------------------------------------------------------------------------------


class Key(NamedTuple):
    """A field of a config, or of one inside it: `model.hidden`."""

    name: str
    hint: Any
    default: Any
    run_of: str  # the stage whose run is the default, for an input
    comment: str


def keys_of(cls: Any, prefix: str = "") -> Iterator[Key]:
    """Every leaf field: the class's own first, then those that it inherits."""
    comments, hints = _comments(cls), hints_of(cls)
    for f in _own_fields_first(cls):
        name = f"{prefix}{f.name}"
        if is_config(f.type):
            yield from keys_of(f.type, f"{name}.")
        else:
            default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
            yield Key(name, hints[f.name], default, f.metadata.get("run_of", ""), comments.get(f.name, ""))


def _own_fields_first(cls: Any) -> list[Any]:
    bases = reversed([*enumerate(cls.__mro__)])
    by_class = {name: depth for depth, base in bases for name in inspect.get_annotations(base)}
    return sorted(dataclasses.fields(cls), key=lambda f: by_class[f.name])


def is_config(value: Any) -> bool:
    """Whether it is a config, or the type of one, with keys of its own."""
    return dataclasses.is_dataclass(value)


@cache
def hints_of(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)


def _comments(cls: type[Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            source = inspect.getsource(base)  # type: ignore[arg-type]  # dataclasses are classes
            found.update(re.findall(r"^    (\w+): [^#\n]*#\s*(.+)$", source, re.MULTILINE))
    return found


def field_names(cls: Any) -> list[str]:
    return [f.name for f in dataclasses.fields(cls)]


def help_lines(cls: Any) -> list[str]:
    """One line per field: dotted key, default, the comment beside it in the source, and what it takes."""
    lines = []
    for key in keys_of(cls):
        default = f"runs/<experiment>/{key.run_of}" if key.run_of else f"{key.default!r}"
        takes = f" ({text})" if (text := limits(key.hint)) else ""
        lines.append(f"  {f'{key.name}={default}':<44} {key.comment}{takes}".rstrip())
    return lines
