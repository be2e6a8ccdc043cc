"""Trackers by name (TensorBoard, W&B, MLflow, ...): what a trainer shows to people while it runs.

In: a run's config, then values and pictures by images seen.  Out: what each tracker writes, into the run directory
unless the user's environment names another place, and trackers.json, by which a resumed run goes on in the same run of
each tracker.  The only importer of accelerate.
"""

import contextlib
import io
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from vqscale import config as configs
from vqscale import rundir
from vqscale.config import StageConfig
from vqscale.files import read_json, write_json
from vqscale.text import one_line, redact_url
from vqscale.topology import Topology

log = logging.getLogger("vqscale")


class Trackers:
    """accelerate's trackers, open on the main rank and nowhere else. A tracker that fails is dropped, with a warning,
    and never stops the run."""

    def __init__(self) -> None:
        self.opened: list[Any] = []
        self._variables: set[str] = set()  # of the environment, set here and not by the user

    def open(self, names: list[str], config: StageConfig, resumed_at: int, topology: Topology) -> None:
        """Collective. Raises ValueError for a name that accelerate does not know."""
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        if unknown := [name for name in names if name not in LOGGER_TYPE_TO_CLASS]:
            known = ", ".join(LOGGER_TYPE_TO_CLASS)
            raise ValueError(f"trackers: there is no tracker {unknown[0]!r}; accelerate knows {known}")
        _adopt_process_group(topology)
        if topology.is_main:
            run_dir = Path(config.run_dir).absolute()
            defaults = {
                "TRACKIO_DIR": str(run_dir / "trackio"),
                "MLFLOW_TRACKING_URI": (run_dir / "mlflow").as_uri(),
                "MLFLOW_ALLOW_FILE_STORE": "true",  # plain files: SQLite is unsafe on many network file systems
                "WANDB_FINISH_TIMEOUT": "600",  # seconds that the end of a run waits for uploads; else forever
            }
            self._variables = defaults.keys() - os.environ.keys()
            os.environ.update({name: defaults[name] for name in self._variables})
            for name in names:
                self._open(name, LOGGER_TYPE_TO_CLASS[name], config, resumed_at)

    def _open(self, name: str, kind: Any, config: StageConfig, resumed_at: int) -> None:
        path = Path(config.run_dir) / rundir.TRACKERS
        ids, stdin = read_json(path), sys.stdin
        try:
            sys.stdin = io.StringIO()  # W&B without a login would ask at the terminal, and wait
            tracker = _start(name, kind, config, resumed_at, ids.get(name))
            # Of these the one keeps a copy of each start, the other refuses changed values.
            if not (name in ("tensorboard", "mlflow") and (name in ids or resumed_at)):
                tracker.store_init_configuration(_hyperparameters(config))
            run = tracker.tracker
            write_json(path, ids | {name: run.info.run_id if name == "mlflow" else getattr(run, "id", "")})
            self.opened.append(tracker)
        except Exception as error:
            hint = f"; pip install {name}" if isinstance(error, ModuleNotFoundError) else ""
            log.warning("tracker %s could not start and is left out: %s%s", name, one_line(str(error)), hint)
        finally:
            sys.stdin = stdin

    def log(self, values: dict[str, float], images_seen: int) -> None:
        """Values by name."""
        for tracker in list(self.opened):
            try:
                tracker.log(values, step=images_seen)
            except Exception as error:
                self.opened.remove(tracker)
                log.warning("tracker %s failed and is left out from here on: %s", tracker.name, error)

    def log_image(self, name: str, image: torch.Tensor, images_seen: int) -> None:
        """A picture, float [3, h, w] in [0, 1], to the trackers that take pictures."""
        pixels = (255 * image).round().byte().permute(1, 2, 0).cpu().numpy()
        for tracker in self.opened:
            try:
                _log_pixels(tracker, name, pixels, images_seen)
            except Exception as error:
                log.warning("tracker %s did not take a picture: %s", tracker.name, one_line(str(error)))

    def finish(self) -> None:
        """Close them all; what they have not written yet is written."""
        for tracker in self.opened:
            with contextlib.suppress(Exception):  # as in `log`
                tracker.finish()
        for name in self._variables:
            os.environ.pop(name, None)


def _start(name: str, kind: Any, config: StageConfig, resumed_at: int, run_id: str | None) -> Any:
    """`run_id`: of the tracker's run that goes on, None for a new one."""
    run_dir = Path(config.run_dir)
    project = config.experiment or run_dir.absolute().parent.name
    wandb = {"dir": os.environ.get("WANDB_DIR", config.run_dir), "id": os.environ.get("WANDB_RUN_ID", run_id)}
    options: dict[str, tuple[list[Any], dict[str, Any]]] = {
        "tensorboard": (["tensorboard", run_dir], {"purge_step": resumed_at + 1}),
        "wandb": ([project], {"name": run_dir.name, "resume": "allow", **wandb}),
        "trackio": ([project], {"name": run_dir.name, "resume": "allow" if run_id else "never"}),
        "mlflow": ([project], {"run_name": run_dir.name, "run_id": run_id}),
    }
    positional, named = options.get(name, ([project], {}))
    tracker = kind(*positional, **named)
    try:
        tracker.start()
    except Exception as error:
        if name != "wandb" or isinstance(error, ModuleNotFoundError):
            raise
        tracker = kind(*positional, **named, mode="offline")
        tracker.start()
        reason = one_line(str(error))
        log.warning("tracker wandb writes to %s/wandb, for `wandb sync` later: %s", wandb["dir"], reason)
    return tracker


def _log_pixels(tracker: Any, name: str, pixels: Any, step: int) -> None:
    """pixels: uint8 [h, w, 3]. accelerate hands pictures on as they are, and each tracker wants them in its own way."""
    if tracker.name == "trackio":
        import trackio

        tracker.log({name: trackio.Image(pixels)}, step=step)
    elif tracker.name == "mlflow":
        import mlflow

        mlflow.log_image(pixels, key=name, step=step)
    elif tracker.name == "tensorboard":
        tracker.log_images({name: pixels[None]}, step=step, dataformats="NHWC")
    elif hasattr(tracker, "log_images"):
        tracker.log_images({name: pixels if tracker.name in ("aim", "clearml") else pixels[None]}, step=step)


def _hyperparameters(config: StageConfig) -> dict[str, Any]:
    """The config for trackers: dotted keys, plain values, no secrets."""
    values = configs.flatten(configs.as_dict(config))
    return {key: value if isinstance(value, (bool, int, float)) else redact_url(str(value)) for key, value in values}


def _adopt_process_group(topology: Topology) -> None:
    """Tell accelerate of the process group, because trackers ask it who is first. Where it takes a CPU's LOCAL_RANK for
    a launcher's, it would also choose a thread count and set RANK and others for whatever starts next here."""
    from accelerate import PartialState

    threads, environment = torch.get_num_threads(), dict(os.environ)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "OMP_NUM_THREADS/MKL_NUM_THREADS unset", UserWarning)
        PartialState(cpu=topology.device.type == "cpu")
    torch.set_num_threads(threads)
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)
