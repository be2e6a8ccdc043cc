"""`vqscale status`: what it makes of a run's files and of Slurm's queue."""

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from vqscale import cli
from vqscale.stages import status

COLUMNS = "name,state,images_seen,total_images,images_per_second,eta,restarts,loss,job"


@pytest.fixture(autouse=True)
def no_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(status.shutil, "which", lambda name: None)


@pytest.fixture
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Slurm's queue is what this file says, `ID STATE` a line."""
    program, jobs = tmp_path / "bin" / "squeue", tmp_path / "jobs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ncat {jobs}\n")
    program.chmod(0o755)
    jobs.write_text("")
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    return jobs


def make_run(name: str = "train_vqvae", job: str = "", **written: Any) -> Path:
    run_dir = Path("runs/tiny") / name
    (run_dir / "log").mkdir(parents=True)
    if written:
        here = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "reason": "",
            "job_id": job,
            "images_seen": 0,
            "time": 10.0,
        }
        (run_dir / "status.json").write_text(json.dumps(here | written))
        (run_dir / "config.yaml").write_text("total_images: 1920\n")
    if job:
        (run_dir / "log" / "job").write_text(job + "\n")
    return run_dir


def ask(show: str, *words: str, capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    assert cli.main(["status", *words, f"show={show}"]) == 0
    return [line.split("\t") for line in capsys.readouterr().out.splitlines()]


def test_a_run_in_progress(capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = make_run(state="running", images_seen=640, job="7")
    (run_dir / "command.json").write_text('{"restarts": 2}')
    lines = [{"images_seen": 320, "loss": 2.0, "images_per_second": 5.0}, {"images_seen": 640, "loss": 0.5}]
    lines += [{"images_seen": 640, "images_per_second": 10.0}, {"images_seen": 640, "reconstruction_mse": 1.0}]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"torn')
    expected = ["train_vqvae", "running", "640", "1920", "10.0", "0:02:08", "2", "0.5000", "7"]
    assert ask(COLUMNS, capsys=capsys) == [expected]


def test_the_table_has_every_stage_and_says_which_log_to_read(capsys: pytest.CaptureFixture[str]) -> None:
    make_run("pack", state="done")
    make_run("train_vqvae", state="failed", reason="ValueError: 2 is not 3")
    assert cli.main(["status"]) == 0
    head, pack, vqvae, log = capsys.readouterr().out.splitlines()
    assert head.split()[:2] == ["run", "state"] and pack.split() == ["tiny/pack", "done", "0", "1920"]
    assert vqvae.split()[:2] == ["tiny/train_vqvae", "failed"]
    assert log == "runs/tiny/train_vqvae failed: ValueError: 2 is not 3; read runs/tiny/train_vqvae/log/0.log"


def test_a_config_or_a_folder_of_them_stands_for_their_runs(capsys: pytest.CaptureFixture[str]) -> None:
    Path("configs/tiny").mkdir(parents=True)
    for name in ("train_vqvae", "sample"):
        Path(f"configs/tiny/{name}.yaml").write_text("total_images: 1920\n")
    make_run(state="done", images_seen=1920)
    assert ask("name,state", "configs/tiny", capsys=capsys) == [["train_vqvae", "done"], ["sample", "-"]]
    config = "configs/tiny/train_vqvae.yaml"
    assert ask("state", config, capsys=capsys) == [["done"]]
    assert ask("state", config, "total_images=4000", capsys=capsys) == [["stopped"]]
    assert ask("run_dir,state", config, "run_dir=elsewhere", capsys=capsys) == [["elsewhere", "-"]]


@pytest.mark.parametrize(
    ("written", "job", "expected"),
    [
        ({"state": "running"}, "RUNNING", "running"),
        ({"state": "running"}, "PENDING", "queued"),
        ({"state": "running"}, "", "stopped"),
        ({"state": "stopped"}, "RUNNING", "starting"),
        ({"state": "stopped"}, "", "stopped"),
        ({"state": "done"}, "PENDING", "done"),
        ({}, "PENDING", "queued"),
        ({}, "", "-"),
    ],
)
def test_the_queue_has_a_say(
    queue: Path, capsys: pytest.CaptureFixture[str], written: dict[str, str], job: str, expected: str
) -> None:
    make_run(job="7", **({"pid": 1, "host": "elsewhere"} | written if written else {}))
    queue.write_text(f"7 {job}\n8 RUNNING\n" if job else "8 RUNNING\n")
    assert ask("state,job", capsys=capsys) == [[expected, "7"]]


@pytest.mark.parametrize(
    ("written", "launches", "expected"),
    [
        ({"state": "done"}, "0", "done"),
        ({"state": "stopped"}, "0", "again"),
        ({"state": "running"}, "0", "again"),
        ({"state": "failed", "reason": "RuntimeError: a peer is gone"}, "0", "again"),
        ({"state": "failed", "reason": "ValueError: 2 is not 3"}, "0", "failed"),
        ({"state": "stopped"}, "640 640", "again"),
        ({"state": "stopped"}, "640 640 640", "failed"),
        ({"state": "stopped"}, "640 640 0 640", "again"),
        ({"state": "stopped"}, "0 0 0", "again"),
        ({"state": "done"}, "640 640 640", "done"),
        ({}, "0", "absent"),
    ],
)
def test_what_to_do_about_a_run_whose_job_ended(
    capsys: pytest.CaptureFixture[str], written: dict[str, str], launches: str, expected: str
) -> None:
    run_dir = make_run(job="7", **written)
    (run_dir / "checkpoints" / "000000000640").mkdir(parents=True)
    (run_dir / "log" / "launches").write_text("".join(f"{found} 5\n" for found in launches.split()))
    assert ask("verdict", "runs/tiny/train_vqvae", capsys=capsys) == [[expected]]


def test_a_start_that_wrote_no_status_is_not_taken_for_the_one_before(capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = make_run(state="done")
    (run_dir / "log" / "launches").write_text("0 20\n")
    assert ask("verdict,why", capsys=capsys) == [["absent", "the program did not begin"]]


def test_a_start_that_wrote_no_status_has_failed_once_its_job_is_gone(
    queue: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = make_run(job="7", state="done")
    (run_dir / "log" / "launches").write_text("0 20\n")
    (run_dir / "log" / "job-7.log").touch()
    expected = ["failed", "the program did not begin", "runs/tiny/train_vqvae/log/job-7.log"]
    assert ask("state,reason,log", capsys=capsys) == [expected]
    queue.write_text("7 RUNNING\n")
    assert ask("state", capsys=capsys) == [["done"]]


def test_shards_count_as_progress_where_there_are_no_checkpoints(capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = make_run("extract_codes", state="stopped")
    (run_dir / "train").mkdir()
    for name in ("train/000000.tar", "train/000001.tar", "000002.tar"):
        (run_dir / name).touch()
    (run_dir / "log" / "launches").write_text("0 1\n3 2\n3 3\n")
    assert ask("progress,stalled", capsys=capsys) == [["3", "2"]]


def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    make_run(state="done")
    assert cli.main(["status", "runs", "show=stat"]) == 1
    assert "show=stat: there is no such column; choose from name, run_dir, state" in capsys.readouterr().err
    assert cli.main(["status", "runs", "total_images=5"]) == 1
    assert "total_images=5: runs has no configs" in capsys.readouterr().err
    assert cli.main(["status", "nowhere"]) == 1
    assert "there is no folder nowhere" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("status.json", '{"state": "do', "status.json cannot be read"),
        ("status.json", "[]", "status.json is no JSON object"),
        ("status.json", '{"state": "done", "images_seen": "many"}', "many"),
        ("status.json", '{"state": "done", "images_seen": null}', "NoneType"),
        ("command.json", "\x00", "command.json cannot be read"),
        ("config.yaml", "total_images: [", "not valid YAML"),
        ("config.yaml", "total_images: many", "total_images=many: takes an integer"),
    ],
)
def test_a_run_that_cannot_be_read_leaves_the_others_alone(
    name: str, text: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run("pack", state="done")
    (make_run("train_vqvae", state="done") / name).write_text(text)
    rows = ask("name,state,reason", capsys=capsys)
    assert rows[0] == ["pack", "done", "-"] and rows[1][:2] == ["train_vqvae", "unreadable"] and reason in rows[1][2]
    assert cli.main(["status"]) == 0
    assert "runs/tiny/train_vqvae unreadable: " in capsys.readouterr().out


@pytest.mark.parametrize("line", ['{"loss": NaN, "images_per_second": NaN}', '{"loss": "x"}', '{"loss": [1]}', "\x00"])
def test_odd_metrics_are_no_obstacle(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    (make_run(state="running", images_seen=640) / "metrics.jsonl").write_text(line + "\n")
    assert ask("state,eta", capsys=capsys) == [["running", "-"]]
    assert cli.main(["status"]) == 0


def test_names_do_not_act_on_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    make_run("x]\x1b[2Jevil", state="failed", reason="first\nsecond\x1b[31m").parent.rename("runs/[")
    assert cli.main(["status"]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and "[/x]\\x1b[2Jevil" in out and "first\\nsecond" in out
