import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, get_args, get_origin

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from vqscale import cli, config
from vqscale.config import StageConfig, run_of
from vqscale.engine.loop import FitConfig
from vqscale.fields import Choice, NonNegativeInt, PathText, Range, convert, help_lines, keys_of, split

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class InnerConfig:
    hidden: int = 128  # channels
    rates: list[float] = field(default_factory=lambda: [0.5])


@dataclass(frozen=True)
class OuterConfig(StageConfig):
    knobs: ClassVar[frozenset[str]] = frozenset({"learning_rate"})

    total_images: int = 100
    learning_rate: float = 0.1
    save_every: int = 10
    data: PathText = run_of("pack")
    names: list[str] = field(default_factory=list)
    label: str = ""
    share: Annotated[float, Range(ge=0, lt=1)] = 0.0  # of all
    order: Annotated[str, Choice("up", "down")] = "up"
    by_level: dict[str, NonNegativeInt] = field(default_factory=dict)
    chosen: str | list[str] = "all"
    flag: bool = False
    model: InnerConfig = field(default_factory=InnerConfig)

    def __post_init__(self) -> None:
        if self.total_images < 0:
            raise ValueError(f"total_images={self.total_images} is below 0")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    folder = tmp_path / "mine"
    folder.mkdir()
    file = folder / "train_tiny.yaml"
    file.write_text("total_images: 50\nmodel:\n  hidden: 32\n")
    return file


def test_file_then_overrides_then_defaults(path: Path) -> None:
    loaded = config.load(OuterConfig, path, ["model.hidden=64", "learning_rate=1", "names=[a,b]"])
    assert loaded == OuterConfig(
        run_dir="runs/mine/train_tiny",
        experiment="mine",
        data="runs/mine/pack",
        total_images=50,
        learning_rate=1.0,
        names=["a", "b"],
        model=InnerConfig(hidden=64, rates=[0.5]),
    )


def test_paths_that_are_given_are_kept(path: Path) -> None:
    loaded = config.load(OuterConfig, path, ["run_dir=/elsewhere", "data=/shards"])
    assert (loaded.run_dir, loaded.data) == ("/elsewhere", "/shards")


@pytest.mark.parametrize(
    ("text", "overrides", "words"),
    [
        ("totl_images: 5", [], ["train_tiny.yaml", "totl_images", "did you mean total_images"]),
        ("model: {hiden: 5}", [], ["model.hiden", "did you mean model.hidden"]),
        ("total_images: many", [], ["train_tiny.yaml", "total_images", "many"]),
        ("total_images: 1.5", [], ["total_images", "1.5"]),
        ("model: 3", [], ["model holds keys of its own", "3"]),
        ("model: 3", ["model.hidden=4"], ["train_tiny.yaml", "model holds keys of its own, not 3"]),
        ("by_level: 3", ["by_level.top=1"], ["train_tiny.yaml", "by_level=3: takes keys with values"]),
        ("seed: 1", ["model=3"], ["command line", "model holds keys of its own, not 3"]),
        ("names: 3", [], ["names"]),
        ("- 1\n- 2", [], ["expected keys and values"]),
        ("a: [", [], ["not valid YAML"]),
        ("total_images: -1", [], ["total_images=-1 is below 0"]),
        ("learning_rate: ???", [], ["train_tiny.yaml", "learning_rate is left to you: add learning_rate="]),
        ("seed: 1", ["sed=2"], ["command line", "sed", "did you mean seed"]),
        ("seed: 1", ["seed"], ["'seed'", "key=value"]),
        ("seed: 1", ["--seed=1"], ["'--seed=1'", "key=value"]),
        ("seed: 1", ["seed=x"], ["command line", "seed=x", "takes an integer"]),
        ("seed: 1:30:00", [], ["train_tiny.yaml", "seed=1:30:00: takes an integer"]),
        ("seed: 1\nseed: 2", [], ["the key seed stands twice"]),
        ("share: 1", [], ["train_tiny.yaml", "share=1: must be at least 0 and below 1"]),
        ("share: .nan", [], ["share=.nan: must be at least 0"]),
        ("share: 0", ["share=-1"], ["command line", "share=-1: must be at least 0"]),
        ("share: 0", ["learning_rate=1e400"], ["learning_rate=1e400: takes a finite number"]),
        ("share: true", [], ["share=true: takes a number"]),
        ("order: sideways", [], ["order=sideways: choose from up, down"]),
        ("flag: 2", [], ["flag=2: takes true or false"]),
        ("by_level: 3", [], ["by_level=3: takes keys with values"]),
        ("by_level: {top: -1}", [], ["by_level={'top': '-1'}: must be at least 0"]),
        ("seed: 1", ["by_level.top=x"], ["command line", "takes an integer"]),
        ("seed: 1", ["names=[a"], ["command line", "names=[a", "not valid YAML"]),
        ("seed: 1", ["model.hidden.deep=1"], ["command line", "model.hidden=", "takes an integer"]),
        ("label: [a]", [], ["label=['a']: takes text"]),
        ("label: ${oc.env:NO_SUCH_VARIABLE}", [], ["train_tiny.yaml", "NO_SUCH_VARIABLE"]),
        ("seed: 99999999999999999999", [], ["takes an integer of at most 64 bits"]),
        ("seed: 1e999999999", [], ["takes an integer"]),
        ("experiment: a/b", [], ["experiment=a/b: takes a name, not a path"]),
    ],
)
def test_mistakes_are_one_line_that_names_them(path: Path, text: str, overrides: list[str], words: list[str]) -> None:
    path.write_text(text)
    with pytest.raises(ValueError) as caught:
        config.load(OuterConfig, path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    assert [word for word in words if word not in message] == []


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere.yaml does not exist"):
        config.load(OuterConfig, tmp_path / "nowhere.yaml")


def test_saved_config_loads_as_itself(path: Path, tmp_path: Path) -> None:
    first = config.load(OuterConfig, path, ["names=[x]"])
    config.save(first, tmp_path / "saved.yaml")
    assert config.load(OuterConfig, tmp_path / "saved.yaml") == first
    assert config.from_dict(OuterConfig, config.as_dict(first), "there") == first
    with pytest.raises(ValueError, match="there: unknown key model.odd; did you mean"):
        config.from_dict(OuterConfig, {"model": {"odd": 1}}, "there")


AS_TYPED = ["2024_11_26", "007", "1:30:00", "on", "null", "1e3", "~", "a: b", "[x", "#1", "0x10"]


@pytest.mark.parametrize("text", AS_TYPED)
def test_text_is_taken_as_typed(path: Path, text: str) -> None:
    assert config.load(OuterConfig, path, [f"label={text}"]).label == text
    if text not in ("a: b", "[x", "#1"):
        path.write_text(f"label: {text}\nnames: [{text}]\n")
        loaded = config.load(OuterConfig, path)
        assert (loaded.label, loaded.names) == (text, [text])
    again = path.with_name("again.yaml")
    config.save(OuterConfig(label=text, names=[text]), again)
    assert config.load(OuterConfig, again).label == text
    assert config.changes(OuterConfig(label=text, names=[text]), again)["refused"] == []


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("total_images=1e6", 1_000_000),
        ("total_images=1_000_000", 1_000_000),
        ("total_images=1.5e3", 1_500),
        ("total_images=2.0", 2),
        ("learning_rate=3", 3.0),
        ("learning_rate=1e-4", 1e-4),
        ("names=[001, on]", ["001", "on"]),
        ("chosen=[001]", ["001"]),
        ("chosen=001", "001"),
        ("by_level={top: 3}", {"top": 3}),
        ("by_level.top=3", {"top": 3}),
        ("flag=yes", True),
        ("flag=off", False),
    ],
)
def test_words_become_values(path: Path, word: str, value: Any) -> None:
    loaded = getattr(config.load(OuterConfig, path, [word]), word.partition("=")[0].partition(".")[0])
    assert (loaded, type(loaded)) == (value, type(value))


def test_a_path_begins_at_home(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    loaded = config.load(OuterConfig, path, ["data=~/shards", "run_dir=~/run", "label=~/x"])
    assert (loaded.data, loaded.run_dir, loaded.label) == ("/home/me/shards", "/home/me/run", "~/x")
    assert config.peek(path, ["run_dir=~/run"]) == ("/home/me/run", 50)


def test_references_are_for_what_the_user_wrote(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "17")
    path.write_text("label: ${oc.env:SECRET}\nnames: ['${label}', b]\nseed: ${oc.env:SECRET}\n")
    loaded = config.load(OuterConfig, path, ["data=runs/${experiment}/x"])
    assert (loaded.label, loaded.names, loaded.seed, loaded.data) == ("17", ["17", "b"], 17, "runs/mine/x")
    assert config.from_dict(OuterConfig, {"label": "${oc.env:SECRET}"}, "there").label == "${oc.env:SECRET}"
    path.write_text("run_dir: runs/${experiment}/${oc.env:SECRET}\ntotal_images: 5\n")
    assert config.peek(path, ["experiment=x"]) == ("runs/x/17", 5)


def test_an_experiment_has_runs_of_its_own(path: Path) -> None:
    loaded = config.load(OuterConfig, path, ["experiment=holiday"])
    assert (loaded.run_dir, loaded.data) == ("runs/holiday/train_tiny", "runs/holiday/pack")
    assert config.peek(path, ["experiment=holiday"]).run_dir == "runs/holiday/train_tiny"
    saved = path.with_name("saved.yaml")
    config.save(loaded, saved)
    assert config.changes(replace(loaded, experiment="other"), saved) == {"refused": [], "warned": [], "allowed": []}


def test_a_link_to_a_config_belongs_to_the_folder_that_it_is_in(path: Path) -> None:
    link = path.parent.parent / "linked" / "train_tiny.yaml"
    link.parent.mkdir()
    link.symlink_to(path)
    assert config.load(OuterConfig, link).run_dir == "runs/linked/train_tiny"


@pytest.mark.timeout(20)
def test_aliases_that_repeat_each_other_are_refused(path: Path) -> None:
    lines = ["a0: &a0 [x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10))]
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match="more than 100,000 values"):
        config.load(OuterConfig, path)


def test_what_a_resumed_run_may_change(tmp_path: Path) -> None:
    saved = tmp_path / "config.yaml"
    first = OuterConfig(run_dir="a", data="old")
    config.save(first, saved)
    assert config.changes(first, saved) == {"refused": [], "warned": [], "allowed": []}
    free = {"total_images": 200, "save_every": 1, "device": "cpu", "strategy": "ddp", "threads": 2, "data": "new"}
    allowed = replace(first, **free)
    found = config.changes(allowed, saved)
    assert (found["refused"], found["warned"]) == ([], [])
    assert [line.partition(":")[0] for line in found["allowed"]] == sorted(free)
    assert "total_images: was 100, now 200" in found["allowed"]
    assert config.fingerprint(allowed) == config.fingerprint(first)
    other = replace(first, learning_rate=0.2, seed=7, model=InnerConfig(hidden=64))
    assert config.changes(other, saved) == {
        "refused": ["model.hidden: was 128, now 64", "seed: was 0, now 7"],
        "warned": ["learning_rate: was 0.1, now 0.2"],
        "allowed": [],
    }
    assert config.fingerprint(other) != config.fingerprint(first)
    saved.write_text("".join(line for line in saved.read_text().splitlines(True) if "learning_rate" not in line))
    assert config.changes(first, saved)["warned"] == [], "a key that came later was at its default"
    assert config.changes(other, saved)["warned"] == [f"learning_rate: was {first.learning_rate}, now 0.2"]


def test_help_has_every_key_with_its_comment() -> None:
    lines = help_lines(OuterConfig)
    assert any(line.split() == ["model.hidden=128", "channels"] for line in lines)
    assert any("data=runs/<experiment>/pack" in line for line in lines)
    assert len(lines) == len(list(config.flatten(config.as_dict(OuterConfig()))))


@pytest.mark.parametrize(
    ("world", "micro", "expected"),
    [(1, 0, (48, 48, 1)), (2, 0, (24, 24, 1)), (2, 10, (24, 8, 3)), (3, 16, (16, 16, 1)), (1, 7, (48, 6, 8))],
)
def test_local_batching_splits_48(world: int, micro: int, expected: tuple[int, int, int]) -> None:
    assert config.local_batching(48, world, micro) == expected


def test_a_batch_that_ranks_cannot_share_names_what_fits() -> None:
    with pytest.raises(ValueError, match="global_batch=10 is not divisible by 4 ranks; 8 or 12 would fit"):
        config.local_batching(10, 4, 0)
    with pytest.raises(ValueError, match="global_batch=3 is not divisible by 4 ranks; 4 would fit"):
        config.local_batching(3, 4, 0)


def test_level_names() -> None:
    assert [config.level_names(n) for n in (1, 2, 3)] == [["top"], ["top", "bottom"], ["top", "middle", "bottom"]]
    with pytest.raises(ValueError, match="not 4"):
        config.level_names(4)


def test_every_config_of_the_repository_loads_with_its_stage() -> None:
    files = sorted((ROOT / "configs").glob("*/*.yaml"))
    assert {path.parent.name for path in files} >= {"debug", "demo", "clipart64"}
    for path in files:
        given = [f"{key}=given" for key in re.findall(r"^(\w+): \?\?\?", path.read_text(), re.MULTILINE)]
        loaded = config.load(cli.stage_module(cli.stage_of(str(path))).Config, path, given)
        assert loaded.run_dir == f"runs/{path.parent.name}/{path.stem}"


def test_configs_are_short_and_say_what_they_are() -> None:
    for path in sorted((ROOT / "configs").glob("*/*.yaml")):
        lines = path.read_text().splitlines()
        assert len(lines) <= 60, path
        assert lines[0].startswith("# "), f"{path}: the first line says what it is for"


def one_value(hint: Any, text: str) -> tuple[Any, tuple[Any, ...], str]:
    """(type, marks) of a field or of its elements, and a word that puts `text` there."""
    kind, marks = split(hint)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (list, dict):
        kind, marks, text = one_value(arguments[-1], text)
        text = f"[{text}]" if origin is list else f"{{top: {text}}}"
    return kind, marks, text


def outside(limits: Range) -> list[str]:
    edges = {limits.ge: -1, limits.gt: 0, limits.le: 1, limits.lt: 0}
    beyond = [f"{edge + step:g}" for edge, step in edges.items() if edge is not None]
    return [*beyond, "nan", "inf", "-inf", "1e400", "true", "x", "null"]


@pytest.mark.parametrize("name", [*cli.STAGES, *cli.TOOLS])
def test_every_number_has_a_range_and_every_choice_is_checked(name: str) -> None:
    cls = cli.stage_module(name).Config
    for key in keys_of(cls):
        kind, marks, _ = one_value(key.hint, "")
        refused = []
        if kind in (int, float):
            ranges = [mark for mark in marks if isinstance(mark, Range)]
            assert len(ranges) == 1, f"{name}: {key.name} is a number without a range"
            refused = outside(ranges[0])
        elif kind is str and any(isinstance(mark, Choice) for mark in marks):
            refused = ["no-such-word"]
        for text in refused:
            word = f"{key.name}={one_value(key.hint, text)[2]}"
            with pytest.raises(ValueError, match=re.escape(key.name)) as caught:
                config.from_words(cls, [word])
            assert "\n" not in str(caught.value), word
        assert convert(key.hint, key.default) == key.default, f"{name}: the default of {key.name} is not allowed"


def test_trackers_are_those_of_accelerate() -> None:
    (hint,) = (key.hint for key in keys_of(FitConfig) if key.name == "trackers")
    (choice,) = split(get_args(hint)[0])[1]
    assert set(choice.words) <= LOGGER_TYPE_TO_CLASS.keys()
