"""Configs: a frozen dataclass per stage, filled from YAML and dotted overrides.

In: a dataclass type, a YAML file, `key=value` words.  Out: a frozen instance, or one ValueError line that names the
file, the key and what was expected. Types with ranges and choices are those of `fields`.
"""

import dataclasses
import difflib
import hashlib
import json
import os
import re
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Generic, NamedTuple, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vqscale.fields import (
    Choice,
    Name,
    NonNegativeInt,
    PathText,
    PositiveFloat,
    PositiveInt,
    convert,
    field_names,
    hints_of,
    is_config,
    keys_of,
    read_text,
    shown,
    takes_yaml,
    to_int,
)
from vqscale.text import error_prefix

RUNS = Path("runs")
DEVICES = ("auto", "cpu", "cuda", "mps")
STRATEGIES = ("single", "ddp", "fsdp", "hsdp", "zero1", "zero2", "zero3")
_COMMAND_LINE = "command line"
_LEFT_TO_YOU = "???"

# Fields that a resumed run may change besides every `…_every` and the inputs, which are held by their fingerprints:
# they say how the run is done, not what it learns.
_FREE_ON_RESUME = {
    *("total_images", "micro_batch", "strategy", "device", "workers", "threads", "run_dir", "trackers"),
    *("max_bad_fraction", "verify", "cache_dir", "cache_gigabytes", "allow_pipe", "max_pixels", "experiment"),
    *("watchdog_seconds", "fresh", "keep_checkpoints", "save_minutes", "max_skipped_steps"),
    *("evaluate_fd", "fd_extractor", "fd_weights", "fd_samples", "allow_unverified_weights"),
    *("evaluate_images", "grid_images", "grid_columns", "images", "profile_at", "peak_tflops", "graphs"),
}


def run_of(stage: str) -> Any:
    """An input field that defaults to another run of the same experiment: `runs/<experiment>/<stage>`."""
    return field(default="", metadata={"run_of": stage})


@dataclass(frozen=True)
class StageConfig:
    """What every stage has."""

    recomputes: ClassVar[bool] = False  # whether a rerun with another config replaces the results, not refuses
    knobs: ClassVar[frozenset[str]] = frozenset()  # fields that a resumed run may change, with a warning
    outputs: ClassVar[tuple[str, ...]] = ()  # glob patterns: what the stage makes in its run directory
    needs_float64: ClassVar[bool] = False  # on its device
    batch_key: ClassVar[str] = ""  # the field that says how many images are in memory at a time

    run_dir: PathText = ""  # where this stage writes; default runs/<experiment>/<config file's stem>
    experiment: Name = ""  # names the default run directories and inputs; default the name of the config's folder
    seed: NonNegativeInt = 0  # addresses all randomness of the stage
    device: Annotated[str, Choice(*DEVICES)] = "auto"  # auto: cuda if there is one; mps: Apple's GPU
    strategy: Annotated[str, Choice("", *STRATEGIES)] = ""  # "" = what the launcher says
    threads: NonNegativeInt = 0  # CPU threads per rank; 0 = the machine's cores shared by its ranks
    fresh: bool = False  # start over: what an earlier run of this stage made in run_dir is removed first
    watchdog_seconds: NonNegativeInt = 3_600  # a run without progress for so long ends, stacks in its log; 0 = never


@dataclass(frozen=True)
class ReadsShards(StageConfig):
    """What a stage has that reads data sets, whose shards may be remote."""

    cache_dir: PathText = ""  # this node's folder for remote shards, and indexes; "" = one in $TMPDIR, for remote data
    cache_gigabytes: PositiveFloat = 100.0  # what it may hold; two windows of shards must fit
    allow_pipe: bool = False  # let shards named `pipe:COMMAND` run the command
    max_pixels: PositiveInt = 150_000_000  # of one image; a larger one counts as bad


T = TypeVar("T")
C = TypeVar("C", bound=StageConfig)


# --- from what was written --------------------------------------------------------------------------------------------


def load(cls: type[C], path: str | Path, overrides: Sequence[str] = ()) -> C:
    """The stage's config from a YAML file and dotted overrides such as `model.hidden=64`.

    Raises ValueError for an unknown key (naming the nearest known one), a wrong type, a value out of range or a
    malformed override, and FileNotFoundError for a missing file.
    """
    path = Path(path)
    in_file = read_yaml(path)
    _refuse_values_for_keys(cls, in_file, path)
    written = _merged(in_file, _read_words(cls, overrides))
    texts = _resolved(as_dict(cls), {"experiment": _folder_name(path)} | written, str(path))
    config = _made(cls, texts, lambda key: _COMMAND_LINE if _is_given(key, overrides) else str(path))
    experiment = config.experiment or _folder_name(path)
    stages = {"run_dir": path.stem} | {key.name: key.run_of for key in keys_of(cls) if key.run_of}
    runs: dict[str, Any] = {
        key: str(RUNS / experiment / stage) for key, stage in stages.items() if not getattr(config, key)
    }
    return dataclasses.replace(config, experiment=experiment, **runs)


def from_dict(cls: type[Any], values: Mapping[str, Any], where: str) -> Any:
    """A (nested) config dataclass back from `as_dict`; nothing in it is resolved. Raises ValueError as `load` does."""
    return _made(cls, values, lambda _: where)


def from_words(cls: type[T], words: Sequence[str]) -> T:
    """A config dataclass from `key=value` words alone. Raises ValueError as `load` does."""
    return _made(cls, _read_words(cls, words), lambda _: _COMMAND_LINE)


class Peeked(NamedTuple):
    """What can be asked of a config whose stage is not known."""

    run_dir: str
    total_images: int


def peek(path: str | Path, overrides: Sequence[str] = ()) -> Peeked:
    """Raises ValueError and FileNotFoundError as `load` does, but knows no keys."""
    path = Path(path)
    given = {"experiment": _folder_name(path), **read_yaml(path), **dict(map(_split_word, overrides))}
    given = _resolved({}, given, str(path))
    run_dir = os.path.expanduser(str(given.get("run_dir") or RUNS / given["experiment"] / path.stem))
    total_images = given.get("total_images", 0)
    with error_prefix(f"{path}: total_images={shown(total_images)}"):
        return Peeked(run_dir, to_int(total_images))


def read_yaml(path: Path) -> dict[str, Any]:
    """The keys of a config file as they are written, values as text. Raises FileNotFoundError, or ValueError."""
    if not path.is_file():
        raise FileNotFoundError(f"config file {path} does not exist")
    with error_prefix(path):
        written = read_text(path.read_text(encoding="utf-8-sig")) or {}
        if not isinstance(written, dict):
            raise ValueError(f"expected keys and values, not {type(written).__name__}")
    return written


def _refuse_values_for_keys(cls: Any, tree: Mapping[str, Any], path: Path, prefix: str = "") -> None:
    """Raises ValueError for a value where a file must have keys: a word for one of the keys would replace the value."""
    for key, hint in hints_of(cls).items():
        name, value = f"{prefix}{key}", tree.get(key) or {}
        if typing.get_origin(hint) is dict and not isinstance(value, dict):
            raise ValueError(f"{path}: {name}={shown(value)}: takes keys with values")
        if is_config(hint) and not isinstance(value, dict):
            raise ValueError(f"{path}: {name} holds keys of its own, not {shown(value)}")
        if is_config(hint):
            _refuse_values_for_keys(hint, value, path, f"{name}.")


def _split_word(word: str) -> tuple[str, str]:
    key, equals, value = word.partition("=")
    if not equals or not re.fullmatch(r"[\w.]+", key):
        raise ValueError(f"override {word!r} is not of the form key=value")
    return key, value


def _is_given(key: str, overrides: Sequence[str]) -> bool:
    """Whether a word of the command line is about this key, or a part of it."""
    return any(word.startswith((f"{key}=", f"{key}.")) for word in overrides)


def _read_words(cls: Any, words: Sequence[str]) -> dict[str, Any]:
    """`model.hidden=64` as {"model": {"hidden": "64"}}; only lists and mappings are read as YAML."""
    given: dict[str, Any] = {}
    for key, text in map(_split_word, words):
        with error_prefix(f"{_COMMAND_LINE}: {key}={shown(text)}"):
            value = read_text(text) if takes_yaml(_hint_of(cls, key), text) else text
        given = _merged(given, _nested(key.split("."), value))
    return given


def _nested(parts: Sequence[str], value: Any) -> dict[str, Any]:
    return {parts[0]: _nested(parts[1:], value) if parts[1:] else value}


def _hint_of(cls: Any, dotted: str) -> Any:
    """The type of a field, or of a mapping's values; None for a key that does not exist."""
    hint: Any = cls
    for part in dotted.split("."):
        inside = hints_of(hint) if is_config(hint) else {}
        hint = typing.get_args(hint)[1] if typing.get_origin(hint) is dict else inside.get(part)
    return hint


def _merged(base: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Mappings are merged, everything else is replaced."""
    merged = dict(base)
    for key, value in new.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def _resolved(defaults: dict[str, Any], texts: dict[str, Any], where: str) -> dict[str, Any]:
    """With `${key}` and `${oc.env:NAME}` replaced. Only for what the user wrote for this very run."""
    if not any("${" in text for _, value in flatten(texts) for text in (value if isinstance(value, list) else [value])):
        return texts
    try:
        everything = OmegaConf.create(_merged(defaults, texts))
        resolved: Any = OmegaConf.to_container(everything, resolve=True)
    except OmegaConfBaseException as error:
        raise ValueError(f"{where}: {str(error).splitlines()[0]}") from None
    return _chosen(resolved, texts)


def _chosen(resolved: Mapping[str, Any], texts: Mapping[str, Any]) -> dict[str, Any]:
    """Of the resolved values those that were written, as text."""
    return {
        key: _chosen(resolved[key], value) if isinstance(value, dict) else _as_text(resolved[key])
        for key, value in texts.items()
    }


def _as_text(value: Any) -> Any:
    return [_as_text(one) for one in value] if isinstance(value, list) else str(value)


def _made(cls: Any, tree: Mapping[str, Any], where: Callable[[str], str], prefix: str = "") -> Any:
    """The config of a tree of what was written; `where` says who wrote a key."""
    names, values = field_names(cls), dict[str, Any]()
    for key in tree:
        if key not in names:
            near = difflib.get_close_matches(key, names, n=1, cutoff=0.0)[0]
            source = where(f"{prefix}{key}")
            raise ValueError(f"{source}: unknown key {prefix}{shown(key)}; did you mean {prefix}{near}?")
    for key, value in tree.items():
        hint, name = hints_of(cls)[key], f"{prefix}{key}"
        if str(value) == _LEFT_TO_YOU:
            raise ValueError(f"{where(name)}: {name} is left to you: add {name}=… to the command")
        if is_config(hint):
            if not isinstance(value, dict):
                raise ValueError(f"{where(name)}: {name} holds keys of its own, not {shown(value)}")
            values[key] = _made(hint, value, where, f"{name}.")
        else:
            with error_prefix(f"{where(name)}: {name}={shown(value)}"):
                values[key] = convert(hint, value)
    with error_prefix(where("")):  # of the dataclass's own __post_init__
        return cls(**values)


def _folder_name(path: Path) -> str:
    """Of the path as it was given: a link does not lead to another experiment."""
    return os.path.basename(os.path.dirname(os.path.abspath(path)))


# --- the words of a tool ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request(Generic[T]):
    """What a tool was asked: the paths, its own config, and the `key=value` words that are another config's."""

    paths: list[Path]
    config: T
    others: list[str]


def read_request(
    cls: type[T], words: Sequence[str], usage: str, *, paths: int, takes_others: bool = False
) -> Request[T]:
    """From `PATH … key=value …`. Raises ValueError, showing the usage if paths are missing, and as `load` does."""
    given, rest = list(words[:paths]), words[paths:]
    if len(given) < paths or any(re.match(r"^[\w.]+=", path) for path in given):
        raise ValueError(f"usage: vqscale {usage}")
    others = [word for word in rest if takes_others and word.partition("=")[0] not in field_names(cls)]
    own = [word for word in rest if word not in others]
    return Request([Path(path) for path in given], from_words(cls, own), others)


# --- what is kept, and compared on resume -----------------------------------------------------------------------------


def save(config: Any, path: Path) -> None:
    """Write the resolved config as YAML."""
    path.write_text(to_yaml(config), encoding="utf-8")


def to_yaml(config: Any) -> str:
    """The resolved config as YAML."""
    return yaml.safe_dump(as_dict(config), sort_keys=False, allow_unicode=True)


def as_dict(config: Any) -> dict[str, Any]:
    """The config, or the defaults of its class, as plain JSON types."""
    return dataclasses.asdict(config() if isinstance(config, type) else config)


def fingerprint(config: Any) -> str:
    """sha256 over the fields that a resumed run may not change."""
    fixed = {key: value for key, value in flatten(as_dict(config)) if not _free(type(config), key)}
    return "sha256:" + hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Dotted keys and leaf values."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _free(cls: Any, key: str) -> bool:
    inputs = {f.name for f in dataclasses.fields(cls) if "run_of" in f.metadata}
    return key in _FREE_ON_RESUME or key in inputs or key.endswith("_every")


def changes(config: StageConfig, path: Path) -> dict[str, list[str]]:
    """What differs between `config` and the one saved at `path`, as readable lines under `refused` (a resumed run may
    not have that), `warned` (it learns something else from here on) and `allowed`.

    A key that the saved config does not know yet was at its default then.
    """
    saved = {key: _as_saved(type(config), key, text) for key, text in flatten(read_yaml(path))}
    now, defaults = dict(flatten(as_dict(config))), dict(flatten(as_dict(type(config))))
    saved = {key: defaults.get(key) for key in now} | saved
    differing: dict[str, list[str]] = {"refused": [], "warned": [], "allowed": []}
    for key in sorted((saved.keys() | now.keys()) - {"experiment"}):  # it only names the default folders
        if saved.get(key) != now.get(key):
            differing[_on_resume(config, key)].append(f"{key}: was {saved.get(key)!r}, now {now.get(key)!r}")
    return differing


def _as_saved(cls: Any, key: str, text: Any) -> Any:
    hint = _hint_of(cls, key)
    try:
        return text if hint is None else convert(hint, text)
    except ValueError:  # its range was another then
        return text


def _on_resume(config: StageConfig, key: str) -> str:
    if config.recomputes or _free(type(config), key):
        return "allowed"
    return "warned" if key in config.knobs else "refused"


def level_names(levels: int) -> list[str]:
    """Names of the code levels, top first. Raises ValueError outside 1 … 3."""
    names = {1: ["top"], 2: ["top", "bottom"], 3: ["top", "middle", "bottom"]}
    if levels not in names:
        raise ValueError(f"a model has 1, 2 or 3 levels, not {levels}")
    return names[levels]


def local_batching(global_batch: int, world_size: int, micro_batch: int) -> tuple[int, int, int]:
    """(images per rank and step, images per micro-batch, micro-batches per step) of a global batch.

    `micro_batch` is the most a rank may hold at once; 0 = no limit. Raises ValueError when the ranks cannot share
    `global_batch` evenly.
    """
    if global_batch < 1 or global_batch % world_size:
        below, above = global_batch // world_size * world_size, -(-global_batch // world_size) * world_size
        fit = " or ".join(str(n) for n in dict.fromkeys((below, above)) if n > 0)
        raise ValueError(
            f"global_batch={global_batch} is not divisible by {world_size} ranks; {fit or world_size} would fit"
        )
    local = global_batch // world_size
    limit = min(micro_batch, local) if micro_batch > 0 else local
    micro = next(size for size in range(limit, 0, -1) if local % size == 0)
    assert micro * (local // micro) * world_size == global_batch
    return local, micro, local // micro
