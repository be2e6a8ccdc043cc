import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import pytest

from vqscale import cli, config
from vqscale.config import StageConfig, run_of

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
    data: str = run_of("pack")
    names: list[str] = field(default_factory=list)
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
        ("names: 3", [], ["names"]),
        ("- 1\n- 2", [], ["expected keys and values"]),
        ("a: [", [], ["not valid YAML"]),
        ("total_images: -1", [], ["total_images=-1 is below 0"]),
        ("learning_rate: ???", [], ["train_tiny.yaml", "learning_rate is left to you: add learning_rate="]),
        ("seed: 1", ["sed=2"], ["command line", "sed", "did you mean seed"]),
        ("seed: 1", ["seed"], ["'seed'", "key=value"]),
        ("seed: 1", ["--seed=1"], ["'--seed=1'", "key=value"]),
        ("seed: 1", ["seed=x"], ["command line", "seed", "x"]),
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
    lines = config.help_lines(OuterConfig)
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


def stage_of(path: Path) -> str:
    """A config file's name begins with its stage's."""
    fitting = [stage for stage in cli.STAGES if path.stem == stage or path.stem.startswith(f"{stage}_")]
    assert fitting, f"{path}: no stage begins like this"
    return max(fitting, key=len)


def test_every_config_of_the_repository_loads_with_its_stage() -> None:
    files = sorted((ROOT / "configs").glob("*/*.yaml"))
    assert {path.parent.name for path in files} >= {"debug", "demo", "clipart64"}
    for path in files:
        given = [f"{key}=given" for key in re.findall(r"^(\w+): \?\?\?", path.read_text(), re.MULTILINE)]
        loaded = config.load(cli.stage_module(stage_of(path)).Config, path, given)
        assert loaded.run_dir == f"runs/{path.parent.name}/{path.stem}"


def test_configs_are_short_and_say_what_they_are() -> None:
    for path in sorted((ROOT / "configs").glob("*/*.yaml")):
        lines = path.read_text().splitlines()
        assert len(lines) <= 60, path
        assert lines[0].startswith("# "), f"{path}: the first line says what it is for"
