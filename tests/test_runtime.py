import io
import json
import logging
import os
import signal
import sys
import time
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from support.distributed import run_ranks, started
from tqdm import tqdm

from vqscale import rundir, runtime
from vqscale.config import StageConfig
from vqscale.files import read_json, write_json


@dataclass(frozen=True)
class TinyConfig(StageConfig):
    device: str = "cpu"
    threads: int = 1
    size: int = 3


@pytest.fixture
def tiny(tmp_path: Path) -> TinyConfig:
    return TinyConfig(run_dir=str(tmp_path / "run"))


def read(tiny: TinyConfig, name: str) -> dict[str, Any]:
    return json.loads((Path(tiny.run_dir) / name).read_text())


def test_a_run_from_start_to_end(tiny: TinyConfig) -> None:
    with runtime.run(tiny, "tiny") as run:
        run.images_seen = 7
        assert read(tiny, "status.json")["state"] == "running"
        assert read(tiny, "status.json")["pid"] == os.getpid()
        assert (run.was_done, run.resumed) == (False, False)
        logging.getLogger("vqscale").info("a line for the log")
    status = read(tiny, "status.json")
    assert status.pop("checksum").startswith("sha256:")
    assert status | {"time": 0} == {
        "state": "done",
        "images_seen": 7,
        "reason": "",
        "host": os.uname().nodename,
        "pid": os.getpid(),
        "job_id": "",
        "time": 0,
    }
    assert "a line for the log" in (Path(tiny.run_dir) / "log" / "0.log").read_text()
    assert not dist.is_initialized()
    with runtime.run(tiny, "tiny") as again:
        assert (again.was_done, again.resumed) == (True, True)


def test_command_json_says_what_really_ran(tiny: TinyConfig) -> None:
    for restarts in range(3):
        with runtime.run(tiny, "tiny") as run:
            run.record_facts(precision="fp32")
            run.record_facts(resumed_from=0)
        facts = read(tiny, "command.json")
        assert facts["restarts"] == restarts
        expected = {"stage": "tiny", "strategy": "single", "engine": "torch", "world_size": 1, "nodes": 1}
        expected |= {"device": "cpu", "threads": 1, "precision": "fp32", "resumed_from": 0}
        assert {key: facts[key] for key in expected} == expected
        assert facts["versions"]["torch"] == metadata.version("torch")
        assert facts["argv"] == sys.argv


def test_an_error_is_written_down(tiny: TinyConfig) -> None:
    with pytest.raises(KeyError), runtime.run(tiny, "tiny"):
        raise KeyError("nowhere")
    status = read(tiny, "status.json")
    assert (status["state"], status["reason"]) == ("failed", "KeyError: 'nowhere'")


def test_the_stop_file_stops_and_is_taken_away(tiny: TinyConfig) -> None:
    with pytest.raises(runtime.Stopped), runtime.run(tiny, "tiny") as run:
        assert run.stop_agreed() == ""
        (run.run_dir / "STOP").touch()
        run._stop_file_checked = 0.0  # instead of waiting a second
        assert run.stop_agreed() == "STOP file"
        run.stop("asked to")
    assert not (Path(tiny.run_dir) / "STOP").exists()
    assert (read(tiny, "status.json")["state"], read(tiny, "status.json")["reason"]) == ("stopped", "asked to")
    with runtime.run(tiny, "tiny") as again:
        assert (again.was_done, again.resumed) == (False, True)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT", "SIGHUP", "SIGXCPU"])
def test_signals_ask_to_stop(tiny: TinyConfig, name: str) -> None:
    before = signal.getsignal(getattr(signal, name))
    with runtime.run(tiny, "tiny") as run:
        os.kill(os.getpid(), getattr(signal, name))
        assert run.stop_requested() == name
        if name != "SIGINT":
            os.kill(os.getpid(), signal.SIGTERM)
        assert run.stop_agreed() == name
    assert signal.getsignal(getattr(signal, name)) is before


@pytest.mark.parametrize(
    ("name", "torchrun", "stops"),
    [("SIGHUP", False, False), ("SIGHUP", True, True), ("SIGINT", False, False), ("SIGUSR1", False, True)],
)
def test_signals_that_the_program_was_started_to_ignore(
    tiny: TinyConfig, monkeypatch: pytest.MonkeyPatch, name: str, torchrun: bool, stops: bool
) -> None:
    """`nohup` hides a hang-up, but not torchrun's word; Slurm's scripts hide USR1 from the launcher alone."""
    before = signal.signal(getattr(signal, name), signal.SIG_IGN)
    if torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
        monkeypatch.setattr("vqscale.topology.die_with_parent", lambda: None)
    try:
        with runtime.run(tiny, "tiny") as run:
            os.kill(os.getpid(), getattr(signal, name))
            assert run.stop_requested() == (name if stops else "")
    finally:
        signal.signal(getattr(signal, name), before)


def test_status_follows_progress(tiny: TinyConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "STATUS_SECONDS", 0.0)
    with runtime.run(tiny, "tiny") as run:
        for run.images_seen in (8, 16):
            until = time.monotonic() + 10
            while read(tiny, "status.json")["images_seen"] != run.images_seen:
                assert time.monotonic() < until
                run.stop_requested()


def test_secrets_and_escape_codes_reach_neither_log_nor_status_nor_command(
    tiny: TinyConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    url = "https://user:hidden@host/a.tar?sig=hidden"
    others = logging.StreamHandler(io.StringIO())  # whose formatter leaves the traceback with the record
    monkeypatch.setattr(logging.getLogger("vqscale"), "handlers", [others])
    monkeypatch.setattr(sys, "argv", ["vqscale", "index", f"source={url}"])
    with pytest.raises(ValueError, match="hidden"), runtime.run(tiny, "tiny"):
        logging.getLogger("vqscale").warning("cannot read %s\n2026-01-01 forged \x1b[31mline", url)
        raise ValueError(f"cannot read {url} \x1b[31m")
    text = capsys.readouterr().err + "".join(
        (Path(tiny.run_dir) / name).read_text() for name in ("log/0.log", "status.json", "command.json")
    )
    assert "hidden" not in text and "\x1b" not in text and "\n2026-01-01 forged" not in text


def test_a_second_interrupt_from_the_keyboard_ends_at_once(tiny: TinyConfig) -> None:
    with pytest.raises(KeyboardInterrupt), runtime.run(tiny, "tiny"):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
    assert read(tiny, "status.json")["state"] == "failed"


def _share_work(run_dir: str, pieces: int) -> tuple[str, int]:
    done = 0
    try:
        with runtime.run(TinyConfig(run_dir=run_dir), "tiny") as run, run.stoppable():
            for _ in range(pieces):
                if run.topology.rank == 1 and done == 3:
                    os.kill(os.getpid(), signal.SIGUSR1)
                run.poll()
                done += 1
                time.sleep(0.05)
    except runtime.Stopped as stopped:
        return str(stopped), done
    return "", done


def test_ranks_that_work_alone_stop_together(tiny: TinyConfig) -> None:
    (first, done), (second, done_there) = run_ranks(_share_work, 2, tiny.run_dir, 400)
    assert first == second != ""
    assert done_there == 3 and done < 400
    assert read(tiny, "status.json")["state"] == "stopped"
    assert not (Path(tiny.run_dir) / "STOP").exists()


def _try_to_run(run_dir: str) -> str:
    try:
        with runtime.run(TinyConfig(run_dir=run_dir), "tiny"):
            return ""
    except ValueError as error:
        return str(error)


def _run_and_wait(run_dir: str) -> None:
    with runtime.run(TinyConfig(run_dir=run_dir), "tiny"):
        time.sleep(600)


def wait_for_status(run_dir: str, state: str) -> dict[str, Any]:
    until = time.monotonic() + 60
    while time.monotonic() < until:
        status = rundir.read_status(Path(run_dir))
        if status.get("state") == state:
            return status
        time.sleep(0.02)
    raise AssertionError(f"{run_dir} is never {state}")


def test_a_run_directory_has_one_user(tiny: TinyConfig) -> None:
    with runtime.run(tiny, "tiny"):
        (refused,) = run_ranks(_try_to_run, 1, tiny.run_dir)
        assert f"{tiny.run_dir} is in use by pid {os.getpid()}" in refused
        assert read(tiny, "status.json")["state"] == "running"
        assert run_ranks(_try_to_run, 2, tiny.run_dir)[1] == refused


def test_a_killed_run_reads_as_stopped_and_its_lock_is_taken_over(tiny: TinyConfig) -> None:
    with started(_run_and_wait, 1, tiny.run_dir) as ranks:
        assert wait_for_status(tiny.run_dir, "running")["pid"] == ranks.pids[0]
        ranks.signal(signal.SIGKILL)
        assert ranks.wait() == [-signal.SIGKILL]
    assert read(tiny, "status.json")["state"] == "running"
    assert rundir.read_status(Path(tiny.run_dir))["state"] == "stopped"
    with runtime.run(tiny, "tiny") as run:
        assert run.resumed


def test_a_status_of_another_host_is_taken_at_its_word(tmp_path: Path) -> None:
    write_json(tmp_path / "status.json", {"state": "running", "host": "elsewhere", "pid": 2**22 + 1})
    assert rundir.read_status(tmp_path)["state"] == "running"
    (tmp_path / "status.json").write_text("{")
    assert rundir.read_status(tmp_path) == {}


def test_a_mistake_before_anything_was_made_can_be_corrected_in_the_same_folder(tiny: TinyConfig) -> None:
    with pytest.raises(ValueError, match="too many"), runtime.run(tiny, "tiny"):
        raise ValueError("too many")
    with pytest.raises(ValueError, match="half way"), runtime.run(replace(tiny, size=4), "tiny") as run:
        assert not run.resumed
        (run.run_dir / "train").mkdir()
        (run.run_dir / "train" / "000.tar").write_text("made")
        raise ValueError("half way")
    with pytest.raises(ValueError, match="size: was 4, now 5"), runtime.run(replace(tiny, size=5), "tiny"):
        pass


def test_another_config_is_refused_with_both_values(tiny: TinyConfig) -> None:
    with runtime.run(tiny, "tiny"):
        pass
    with (
        pytest.raises(ValueError, match=r"size: was 3, now 4.*another run_dir"),
        runtime.run(replace(tiny, size=4), "tiny"),
    ):
        pass
    assert read(tiny, "status.json")["state"] == "done"


@pytest.mark.parametrize("place", ["file/run", "file", "/proc/run"])
def test_an_unwritable_run_directory_is_one_clear_line(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    config = TinyConfig(run_dir=str(tmp_path / place))
    with (
        pytest.raises(ValueError, match=f"run directory {config.run_dir} cannot be written: ") as caught,
        runtime.run(config, "tiny"),
    ):
        pass
    assert "\n" not in str(caught.value)
    assert not dist.is_initialized()


def test_json_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert read_json(path) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_tensorboard_gets_values_and_pictures(tiny: TinyConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    # accelerate would then choose a number of threads, and leave RANK and others behind
    monkeypatch.setattr(PartialState, "_shared_state", {})
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("LOCAL_RANK", "0")
    with runtime.run(replace(tiny, threads=1), "tiny") as run:
        track = run.start_trackers(["tensorboard"], 0)
        track({"loss": 1.5}, 8)
        run.log_image("grid", torch.rand(3, 4, 4), 8)
        assert torch.get_num_threads() == 1 and not {"RANK", "WORLD_SIZE", "MASTER_PORT"} & os.environ.keys()
    files = [p for p in (Path(tiny.run_dir) / "tensorboard").rglob("*") if p.is_file()]
    assert any("size: 3" in p.read_text() for p in files if p.name == "hparams.yml")
    assert sum(b"loss" in p.read_bytes() for p in files) == 1
    assert sum(b"grid" in p.read_bytes() for p in files) == 1


def test_a_tracker_that_fails_is_left_out_and_named(tiny: TinyConfig, caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        name = "broken"
        calls = 0

        def log(self, values: dict[str, float], step: int) -> None:
            self.calls += 1
            raise OSError("disk full")

        def finish(self) -> None:
            pass

    with runtime.run(tiny, "tiny") as run:
        logging.getLogger("vqscale").addHandler(caplog.handler)
        track = run.start_trackers([], 0)
        broken = Broken()
        run.trackers.opened.append(broken)
        track({"loss": 1.0}, 1)
        track({"loss": 1.0}, 2)
        logging.getLogger("vqscale").removeHandler(caplog.handler)
    assert broken.calls == 1
    assert "tracker broken failed" in caplog.text and "disk full" in caplog.text


def test_an_unknown_tracker_is_refused(tiny: TinyConfig) -> None:
    with pytest.raises(ValueError, match="there is no tracker 'tensorbord'"), runtime.run(tiny, "tiny") as run:
        run.start_trackers(["tensorbord"], 0)


def test_trackers_get_the_config_and_a_project_of_the_experiments_name(
    tiny: TinyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Tracker:
        name = "wandb"
        tracker = None
        started: ClassVar[list[Any]] = []

        def __init__(self, project: str, **options: Any):
            self.started += [project, options]

        def start(self) -> None:
            pass

        def store_init_configuration(self, values: dict[str, Any]) -> None:
            self.started.append(values)

        def finish(self) -> None:
            pass

    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", Tracker)
    run_dir = Path(tiny.run_dir).parent / "birds" / "train_vqvae"
    with runtime.run(replace(tiny, run_dir=str(run_dir)), "tiny") as run:
        run.start_trackers(["wandb"], 0)
    project, options, values = Tracker.started
    own = {"dir": str(run_dir), "id": None, "resume": "allow"}
    assert (project, options) == ("birds", {"name": "train_vqvae", **own})
    assert values["size"] == 3 and values["run_dir"] == str(run_dir)


@pytest.mark.parametrize("text", ["{", "[]", '{"images_seen": "x", "state": []}', "[" * 3000, "\xff"])
@pytest.mark.parametrize("name", ["status.json", "command.json", "inputs.json"])
def test_a_damaged_record_of_an_earlier_run_does_not_matter(tiny: TinyConfig, name: str, text: str) -> None:
    with runtime.run(tiny, "tiny"):
        pass
    (Path(tiny.run_dir) / name).write_bytes(text.encode("latin-1"))
    with runtime.run(tiny, "tiny") as run:
        run.check_inputs({"data": "sha256:1"})
        assert rundir.read_status(run.run_dir)["images_seen"] == 0


def test_a_warning_takes_a_line_of_its_own_beside_a_progress_bar(
    tiny: TinyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    with runtime.run(tiny, "tiny"), tqdm(total=2, desc="bar"):
        runtime.log.warning("of a disk")
    before, _, after = screen.getvalue().partition("of a disk")
    assert "bar:" in before and before.rpartition("\r")[2] == ""
    assert after.startswith("\n") and "bar:" in after
