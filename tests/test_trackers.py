"""W&B, Trackio and MLflow as trainers use them, offline, stopped and resumed; read back from what they wrote."""

import contextlib
import importlib.util
import json
import logging
import os
import signal
import sqlite3
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.distributed import run_ranks
from support.training import TinyConfig, losses, train

from vqscale import runtime

NAMES = ["wandb", "trackio", "mlflow"]
OFFLINE = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
STEPS = [8, 16, 24, 32, 40, 48]
PIXELS = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)
PICTURE = torch.from_numpy(PIXELS).permute(2, 0, 1) / 255


def _train(config: TinyConfig, stop_at: int) -> None:
    def on_step(run: runtime.Run, seen: int) -> None:
        if seen == 8:
            run.log_image("reconstructions", PICTURE, seen)
        if seen == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    with contextlib.suppress(runtime.Stopped):
        train(config, on_step=on_step)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped and went on, with another learning rate and all trackers that are installed."""
    here = tmp_path_factory.mktemp("birds") / "birds" / "train"
    installed = [name for name in NAMES if importlib.util.find_spec(name)]
    config = TinyConfig(run_dir=str(here), trackers=installed, total_images=48, experiment="owls")
    run_ranks(_train, 1, config, 24, variables=OFFLINE)
    run_ranks(_train, 1, replace(config, learning_rate=0.02), 0, variables=OFFLINE)
    assert list(losses(here)) == STEPS
    return here


def installed(name: str) -> Any:
    return pytest.importorskip(name, reason=f"{name} is not installed")


def ids(run_dir: Path) -> dict[str, str]:
    return json.loads((run_dir / "trackers.json").read_text())


def wandb_records(path: Path) -> list[Any]:
    """The records of a .wandb file: LevelDB's log format, after a head of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, at, text, records = path.read_bytes(), 7, b"", []
    while len(data) - at >= 7:
        if (room := 32768 - at % 32768) < 7:
            at += room
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        text += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or a last part
            records.append(wandb_internal_pb2.Record.FromString(text))
            text = b""
    return records


def test_wandb_goes_on_in_one_run(run_dir: Path) -> None:
    installed("wandb")
    parts = sorted((run_dir / "wandb").glob(f"offline-run-*-{ids(run_dir)['wandb']}"))
    assert len(parts) == 2 == len(list((run_dir / "wandb").glob("*run-*-*")))
    curve: dict[int, float] = {}
    for part, rate in zip(parts, ("0.01", "0.02"), strict=True):
        records = [record for path in part.glob("*.wandb") for record in wandb_records(path)]
        (run,) = {(r.run.run_id, r.run.display_name, r.run.project) for r in records if r.HasField("run")}
        assert run == (ids(run_dir)["wandb"], "train", "owls")
        updates = [entry for r in records for entry in (*r.config.update, *r.run.config.update)]
        assert rate in {entry.value_json for entry in updates if entry.key == "learning_rate"}
        for record in records:
            values = {(e.key or "/".join(e.nested_key)): e.value_json for e in record.history.item}
            if "loss" in values:
                curve[record.history.step.num] = float(values["loss"])
    assert curve == pytest.approx(losses(run_dir))
    (picture,) = parts[0].glob("files/media/images/reconstructions_*.png")
    assert (np.asarray(Image.open(picture)) == PIXELS).all()


def test_trackio_goes_on_in_one_run(run_dir: Path) -> None:
    installed("trackio")
    with sqlite3.connect(run_dir / "trackio" / "owls.db") as base:
        rows = base.execute("select run_id, run_name, step, metrics from metrics order by id").fetchall()
        configs = [json.loads(text) for (text,) in base.execute("select config from configs")]
    assert {row[:2] for row in rows} == {(ids(run_dir)["trackio"], "train")}
    lines = [(step, json.loads(text)) for _, _, step, text in rows]
    assert {step: line["loss"] for step, line in lines if "loss" in line} == losses(run_dir)
    assert [config["learning_rate"] for config in configs] == [0.02]
    (picture,) = [line["reconstructions"]["file_path"] for _, line in lines if "reconstructions" in line]
    assert (np.asarray(Image.open(run_dir / "trackio" / "media" / picture).convert("RGB")) == PIXELS).all()


def test_mlflow_goes_on_in_one_run(run_dir: Path) -> None:
    installed("mlflow")
    (run,) = (path.parent for path in (run_dir / "mlflow").glob("*/*/meta.yaml"))
    assert run.name == ids(run_dir)["mlflow"] and "run_name: train" in (run / "meta.yaml").read_text()
    assert "name: owls" in (run.parent / "meta.yaml").read_text()
    lines = [line.split() for line in (run / "metrics" / "loss").read_text().splitlines()]
    assert {int(step): float(value) for _, value, step, *_ in lines} == losses(run_dir)
    assert (run / "params" / "learning_rate").read_text() == "0.01"  # MLflow refuses another value
    (picture,) = (run / "artifacts" / "images").glob("reconstructions*.png")
    assert (np.asarray(Image.open(picture)) == PIXELS).all()


def _track(config: TinyConfig) -> list[str]:
    """The trackers that a rank opens."""
    with runtime.run(config, "tiny") as run:
        stdin = sys.stdin
        run.start_trackers(config.trackers, 0)
        assert sys.stdin is stdin
        return [tracker.name for tracker in run.trackers.opened]


def test_wandb_without_a_login_writes_offline_on_one_rank(tmp_path: Path) -> None:
    installed("wandb")
    config = TinyConfig(run_dir=str(tmp_path / "run"), trackers=["wandb"])
    nobody = {"HOME": str(tmp_path), "WANDB_API_KEY": "", "WANDB_MODE": "online", "WANDB_SILENT": "true"}
    assert run_ranks(_track, 2, config, variables=nobody) == [["wandb"], []]
    assert len(list((tmp_path / "run" / "wandb").glob("offline-run-*"))) == 1
    assert "No API key configured" in (tmp_path / "run" / "log" / "0.log").read_text()


def test_a_tracker_that_is_not_installed_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    with runtime.run(TinyConfig(run_dir=str(tmp_path / "run")), "tiny") as run:
        logging.getLogger("vqscale").addHandler(caplog.handler)
        run.start_trackers(["trackio"], 0)({"loss": 1.0}, 8)
        logging.getLogger("vqscale").removeHandler(caplog.handler)
    assert "tracker trackio could not start and is left out" in caplog.text and "pip install trackio" in caplog.text
    assert not (tmp_path / "run" / "trackers.json").exists() and "TRACKIO_DIR" not in os.environ
