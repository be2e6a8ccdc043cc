"""A run directory: stale inputs, a clean start, and entries that lead elsewhere."""

import contextlib
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
from support.distributed import run_ranks

from vqscale import runtime
from vqscale.config import StageConfig
from vqscale.rundir import process_exists, read_status, stale_inputs

INPUTS = {"vqvae": "sha256:1", "data": "sha256:2"}


@dataclass(frozen=True)
class MakesTars(StageConfig):
    outputs: ClassVar[tuple[str, ...]] = ("train", "[0-9]*.tar")
    device: str = "cpu"
    threads: int = 1
    size: int = 3


@pytest.fixture
def config(tmp_path: Path) -> MakesTars:
    return MakesTars(run_dir=str(tmp_path / "run"))


def make(config: MakesTars, inputs: dict[str, str] = INPUTS, ending: str = "done", stage: str = "tars") -> bool:
    """A run that makes one tar; whether it began anew."""
    with runtime.run(config, stage) as run:
        run.check_inputs(inputs)
        anew = not run.resumed
        if not run.was_done:
            (run.run_dir / "train").mkdir(exist_ok=True)
            (run.run_dir / "train" / "0.tar").write_text(str(inputs))
        if ending == "stopped":
            run.stop("asked to")
    return anew


def interrupt(config: MakesTars, inputs: dict[str, str] = INPUTS) -> None:
    with pytest.raises(runtime.Stopped):
        make(config, inputs, ending="stopped")


def test_stale_inputs_are_named_and_nothing_is_lost(config: MakesTars) -> None:
    make(config)
    make(config)
    with pytest.raises(
        ValueError, match=r"vqvae was sha256:1 and is sha256:9 now; fresh=true removes .* another run_dir"
    ):
        make(config, INPUTS | {"vqvae": "sha256:9"})
    with pytest.raises(ValueError, match="data was sha256:2 and is not given now"):
        make(config, {"vqvae": "sha256:1"})
    assert read_status(Path(config.run_dir))["state"] == "done"
    assert json.loads((Path(config.run_dir) / "inputs.json").read_text()) == INPUTS


def test_fresh_remakes_what_is_stale_and_keeps_what_is_not_ours(config: MakesTars) -> None:
    make(config)
    folder = Path(config.run_dir)
    (folder / "notes.txt").write_text("mine")
    (folder / "1.tar").write_text("stale")
    assert make(replace(config, fresh=True), INPUTS | {"vqvae": "sha256:9"})
    assert (folder / "notes.txt").read_text() == "mine" and not (folder / "1.tar").exists()
    assert "sha256:9" in (folder / "train" / "0.tar").read_text()
    command = json.loads((folder / "command.json").read_text())
    assert (command["restarts"], command["fresh"]) == (0, True)
    assert not make(config, INPUTS | {"vqvae": "sha256:9"})


def test_fresh_takes_another_config(config: MakesTars) -> None:
    make(config)
    with pytest.raises(ValueError, match="size: was 3, now 4.*or fresh=true"):
        make(replace(config, size=4))
    assert make(replace(config, size=4, fresh=True))


def test_an_interrupted_fresh_run_is_resumed_by_the_same_command(
    config: MakesTars, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = replace(config, fresh=True)
    make(config)
    interrupt(fresh)
    assert not make(fresh)
    assert make(fresh)  # done: now it is asked for once more
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert not make(fresh)  # but Slurm asks for nothing
    interrupt(fresh, INPUTS | {"data": "sha256:8"})
    assert json.loads((Path(config.run_dir) / "inputs.json").read_text())["data"] == "sha256:8"


def test_other_inputs_are_fine_before_anything_was_made(config: MakesTars) -> None:
    with pytest.raises(runtime.Stopped), runtime.run(config, "tars") as run:
        run.check_inputs(INPUTS)
        run.stop("asked to")
    assert not make(config, INPUTS | {"vqvae": "sha256:9"})


def test_an_older_run_is_taken_as_it_is_and_recorded(config: MakesTars) -> None:
    make(config)
    (Path(config.run_dir) / "inputs.json").unlink()
    make(config, {"vqvae": "sha256:7"})
    assert stale_inputs(Path(config.run_dir), {"vqvae": "sha256:6"}) == ["vqvae was sha256:7 and is sha256:6 now"]


def test_fresh_removes_nothing_of_another_stage_or_of_a_folder_without_a_run(config: MakesTars) -> None:
    kept = Path(config.run_dir) / "train" / "mine.tar"
    kept.parent.mkdir(parents=True)
    kept.write_text("mine")
    make(replace(config, fresh=True))
    assert kept.exists()
    with pytest.raises(ValueError, match="fresh=true: .* is a run of tars, not of others; nothing was removed"):
        make(replace(config, fresh=True), stage="others")
    assert kept.exists()


def _check(run_dir: str, fresh: bool, inputs: dict[str, str]) -> str:
    try:
        with runtime.run(MakesTars(run_dir=run_dir, fresh=fresh), "tars") as run:
            run.check_inputs(inputs)
            return f"{run.resumed} {run.was_done}"
    except ValueError as error:
        return str(error)


def test_all_ranks_know(config: MakesTars) -> None:
    make(config)
    one, other = run_ranks(_check, 2, config.run_dir, False, {"vqvae": "x"})
    assert one == other and "vqvae was sha256:1 and is x now" in one
    assert run_ranks(_check, 2, config.run_dir, True, {"vqvae": "x"}) == ["False False"] * 2


@pytest.mark.parametrize(
    "name",
    ["train", ".lock", "log", "log/0.log", "status.json", "inputs.json", "metrics.jsonl", "tensorboard", "7.tar"],
)
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_nothing_is_written_through_links_or_pipes(config: MakesTars, tmp_path: Path, name: str, kind: str) -> None:
    path = Path(config.run_dir) / name
    path.parent.mkdir(parents=True)
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "file").write_text("mine")
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(tmp_path / "target" / ("file" if "." in name else ""))
    with pytest.raises(ValueError, match=f"{path} is {'a link' if kind == 'link' else 'neither a file nor a folder'}"):
        make(replace(config, fresh=True))
    assert [p.name for p in (tmp_path / "target").iterdir()] == ["file"]
    assert (tmp_path / "target" / "file").read_text() == "mine"


def test_the_run_directory_itself_may_be_a_link(config: MakesTars, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    Path(config.run_dir).symlink_to(tmp_path / "disk")
    make(config)
    assert (tmp_path / "disk" / "train" / "0.tar").exists()


@pytest.mark.parametrize(
    ("pid", "there"),
    [(os.getpid(), True), (2**22 + 1, False), (2**70, False), ("x", True)],
    ids=["own", "none", "too large", "no number"],
)
def test_processes(pid: object, there: bool) -> None:
    assert process_exists(pid) is there


def test_a_process_of_another_user_exists(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(pid: int, number: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "kill", refuse)
    (tmp_path / "status.json").write_text(json.dumps({"state": "running", "host": os.uname().nodename, "pid": 1}))
    assert read_status(tmp_path)["state"] == "running"


@pytest.mark.parametrize(("ending", "state"), [("done", "done"), ("stopped", "failed")])
def test_a_finished_run_whose_data_are_away_stays_done_and_no_count_is_lost(
    config: MakesTars, ending: str, state: str
) -> None:
    with contextlib.suppress(runtime.Stopped), runtime.run(config, "tars") as run:
        run.images_seen = 640
        if ending == "stopped":
            run.stop("asked to")
    with pytest.raises(FileNotFoundError), runtime.run(config, "tars") as run:
        assert (run.previous_status["state"], run.previous_status["images_seen"]) == (ending, 640)
        assert json.loads((run.run_dir / "status.json").read_text())["images_seen"] == 640
        raise FileNotFoundError("no data")
    status = read_status(Path(config.run_dir))
    assert (status["state"], status["images_seen"]) == (state, 640)
