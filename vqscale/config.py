"""Configs: a frozen dataclass per stage, filled from YAML and dotted overrides.

In: a dataclass type, a YAML file, `key=value` words.  Out: a frozen instance, or one ValueError line that names the
file, the key and what was expected.
"""

import dataclasses
import difflib
import hashlib
import inspect
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

RUNS = Path("runs")

# Fields that a resumed run may change besides every `…_every` and the inputs, which are held by their fingerprints:
# they say how the run is done, not what it learns.
_FREE_ON_RESUME = {
    *("total_images", "micro_batch", "strategy", "device", "workers", "threads", "run_dir", "trackers"),
    *("max_bad_fraction", "verify", "cache_dir", "cache_gigabytes", "allow_pipe"),
    *("watchdog_seconds", "fresh", "keep_checkpoints", "max_skipped_steps"),
    *("evaluate_images", "grid_images"),
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

    run_dir: str = ""  # where this stage writes; default runs/<experiment>/<config file's stem>
    seed: int = 0  # addresses all randomness of the stage
    device: str = "auto"  # auto (cuda if there is one) | cpu | cuda
    strategy: str = ""  # single | ddp | fsdp | hsdp | zero1 | zero2 | zero3; "" = what the launcher says
    threads: int = 0  # CPU threads per rank; 0 = the machine's cores shared by its ranks
    fresh: bool = False  # start over: what an earlier run of this stage made in run_dir is removed first
    watchdog_seconds: int = 3_600  # without progress for so long, the run ends with its stacks in the log; 0 = never


@dataclass(frozen=True)
class ReadsShards(StageConfig):
    """What a stage has that reads data sets, whose shards may be remote."""

    cache_dir: str = ""  # this node's folder for remote shards, on a disk of its own; "" = one in $TMPDIR
    cache_gigabytes: float = 100.0  # what it may hold; two windows of shards must fit
    allow_pipe: bool = False  # let shards named `pipe:COMMAND` run the command


C = TypeVar("C", bound=StageConfig)


def load(cls: type[C], path: str | Path, overrides: Sequence[str] = ()) -> C:
    """The stage's config from a YAML file and dotted overrides such as `model.hidden=64`.

    Raises ValueError for an unknown key (naming the nearest known one), a wrong type or a malformed override, and
    FileNotFoundError for a missing file.
    """
    path = Path(path)
    written = _read_yaml(path)
    dotted = _parse_overrides(overrides)
    _check_keys(cls, written, str(path))
    _check_keys(cls, dotted, "command line")
    _check_given(written, dotted, path)
    merged = _merge(_merge(OmegaConf.structured(cls), written, str(path)), dotted, "command line")
    _fill_paths(merged, cls, path)
    try:
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ValueError(f"{path}: {_first_line(error)}") from None
    except ValueError as error:  # a dataclass's own __post_init__
        raise ValueError(f"{path}: {error}") from None
    assert isinstance(config, cls)
    return config


def _read_yaml(path: Path) -> DictConfig:
    if not path.is_file():
        raise FileNotFoundError(f"config file {path} does not exist")
    try:
        written = OmegaConf.load(path)
    except Exception as error:  # PyYAML's errors share no public base with OmegaConf's
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(written, DictConfig):
        raise ValueError(f"{path}: expected keys and values, found a {type(written).__name__}")
    return written


def _parse_overrides(overrides: Sequence[str]) -> DictConfig:
    for word in overrides:
        if not re.match(r"^[\w.]+=", word):
            raise ValueError(f"override {word!r} is not of the form key=value")
    try:
        return OmegaConf.from_dotlist(list(overrides))
    except Exception as error:
        raise ValueError(f"overrides {list(overrides)}: {_first_line(error)}") from None


def _merge(base: Any, new: DictConfig, where: str) -> Any:
    try:
        return OmegaConf.merge(base, new)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None)
        raise ValueError(f"{where}: {key + ': ' if key else ''}{_first_line(error)}") from None


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _check_keys(cls: Any, node: DictConfig, where: str, prefix: str = "") -> None:
    known = {f.name: f for f in dataclasses.fields(cls)}
    for key in node:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)[0]
            raise ValueError(f"{where}: unknown key {prefix}{key!s}; did you mean {prefix}{near}?")
        child = known[key].type
        if dataclasses.is_dataclass(child):
            value = node._get_node(key)
            if not isinstance(value, DictConfig):
                raise ValueError(f"{where}: {prefix}{key} holds keys of its own, found {node[key]!r}")
            _check_keys(child, value, where, f"{prefix}{key}.")


def _check_given(written: DictConfig, dotted: DictConfig, path: Path) -> None:
    given = OmegaConf.to_container(dotted)
    assert isinstance(given, dict)
    for key in sorted(OmegaConf.missing_keys(written) - dict(flatten(given)).keys()):  # type: ignore[arg-type]
        raise ValueError(f"{path}: {key} is left to you: add {key}=… to the command")


def _fill_paths(merged: DictConfig, cls: Any, path: Path) -> None:
    OmegaConf.set_readonly(merged, False)  # frozen dataclasses make it so
    if not merged.run_dir:
        merged.run_dir = str(_default_run(path, path.stem))
    for f in dataclasses.fields(cls):
        if "run_of" in f.metadata and merged[f.name] == "":
            merged[f.name] = str(_default_run(path, f.metadata["run_of"]))


def _default_run(path: Path, stage: str) -> Path:
    return RUNS / path.resolve().parent.name / stage


def peek(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """A stage's values as they are given, `run_dir` filled in, for who does not need to know the stage.

    Raises ValueError and FileNotFoundError as `load` does, but knows no keys.
    """
    path = Path(path)
    given: dict[str, Any] = OmegaConf.to_container(OmegaConf.merge(_read_yaml(path), _parse_overrides(overrides)))  # type: ignore[assignment]
    return {**given, "run_dir": given.get("run_dir") or str(_default_run(path, path.stem))}


def save(config: Any, path: Path) -> None:
    """Write the resolved config as YAML."""
    path.write_text(to_yaml(config))


def to_yaml(config: Any) -> str:
    """The resolved config as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def as_dict(config: Any) -> dict[str, Any]:
    """The config as plain JSON types."""
    return OmegaConf.to_container(OmegaConf.structured(config))  # type: ignore[return-value]


def from_dict(cls: type[Any], values: dict[str, Any], where: str) -> Any:
    """A (nested) config dataclass back from `as_dict`. Raises ValueError for unknown keys or wrong types."""
    node = OmegaConf.create(values)
    _check_keys(cls, node, where)
    return OmegaConf.to_object(_merge(OmegaConf.structured(cls), node, where))


def from_words(cls: type[Any], words: Sequence[str]) -> Any:
    """A config dataclass from `key=value` words alone. Raises ValueError as `load` does."""
    given = _parse_overrides(words)
    _check_keys(cls, given, "command line")
    return OmegaConf.to_object(_merge(OmegaConf.structured(cls), given, "command line"))


def split_paths(words: Sequence[str], usage: str, count: int) -> tuple[list[str], list[str]]:
    """(the first `count` words, which are paths; the `key=value` rest). Raises ValueError showing the usage."""
    paths, rest = list(words[:count]), list(words[count:])
    if len(paths) < count or any(re.match(r"^[\w.]+=", path) for path in paths):
        raise ValueError(f"usage: vqscale {usage}")
    return paths, rest


def field_names(cls: Any) -> set[str]:
    return {f.name for f in dataclasses.fields(cls)}


def fingerprint(config: Any) -> str:
    """sha256 over the fields that a resumed run may not change."""
    fixed = {key: value for key, value in flatten(as_dict(config)) if not _free(type(config), key)}
    return "sha256:" + hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()


def flatten(values: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
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
    saved = dict(flatten(OmegaConf.to_container(OmegaConf.load(path))))  # type: ignore[arg-type]
    now, defaults = dict(flatten(as_dict(config))), dict(flatten(as_dict(type(config))))
    saved = {key: defaults.get(key) for key in now} | saved
    found: dict[str, list[str]] = {"refused": [], "warned": [], "allowed": []}
    for key in sorted(saved.keys() | now.keys()):
        if saved.get(key) != now.get(key):
            found[_on_resume(config, key)].append(f"{key}: was {saved.get(key)!r}, now {now.get(key)!r}")
    return found


def _on_resume(config: StageConfig, key: str) -> str:
    if config.recomputes or _free(type(config), key):
        return "allowed"
    return "warned" if key in config.knobs else "refused"


def help_lines(cls: Any, prefix: str = "") -> list[str]:
    """One line per field: dotted key, default, and the comment beside it in the source."""
    comments = _comments(cls)
    lines: list[str] = []
    for f in dataclasses.fields(cls):
        if dataclasses.is_dataclass(f.type):
            lines += help_lines(f.type, f"{prefix}{f.name}.")
            continue
        default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default  # type: ignore
        shown = f"runs/<experiment>/{f.metadata['run_of']}" if "run_of" in f.metadata else f"{default!r}"
        lines.append(f"  {prefix + f.name + '=' + shown:<44} {comments.get(f.name, '')}".rstrip())
    return lines


def _comments(cls: type[Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            source = inspect.getsource(base)  # type: ignore[arg-type]  # dataclasses are classes
            found.update(re.findall(r"^    (\w+): [^#\n]*#\s*(.+)$", source, re.MULTILINE))
    return found


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
