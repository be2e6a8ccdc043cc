"""A folder of configs -> the whole chain of its stages on this machine, one after the other, each in its own program.

In: an experiment's folder, a folder of pictures, minutes.  Out: `runs/<experiment>/<stage>/`, as the stages make it;
`run.yaml` there keeps what was chosen for the time there is. Run again, it goes on where it was.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml

from vqscale import config as configs
from vqscale.config import RUNS, Request, StageConfig, changes, read_request
from vqscale.fields import Choice, Name, NonNegativeFloat, PathText, read_text
from vqscale.files import write_atomically
from vqscale.rundir import damage_of, holds_outputs, read_status
from vqscale.stages import evaluate, extract_codes, pack, sample, sizing
from vqscale.stopping import EXIT_UNFINISHED, Stopped, handling
from vqscale.topology import PARENT

USAGE = "CONFIG_FOLDER [source=DIR] [experiment=NAME] [minutes=N] [device=cpu]"
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_MODULES: dict[str, Any] = {
    **{"pack": pack, "extract_codes": extract_codes, "sample": sample, "evaluate": evaluate},
    **sizing.TRAINERS,
}


@dataclass(frozen=True)
class Step:
    """A config of the chain: its stage, the configs that it reads from, and its share of the time."""

    name: str
    stage: str
    reads: tuple[str, ...]
    weight: float


_PRIORS = ("train_prior_top", "train_prior_middle", "train_prior_bottom")
_CLASSIFIERS = ("train_classifier_real", "train_classifier_reconstructions", "train_classifier_samples")
_CHAIN = (
    Step("pack", "pack", (), 2),
    Step("train_vqvae", "train_vqvae", ("pack",), 25),
    Step("extract_codes", "extract_codes", ("train_vqvae",), 3),
    Step("train_prior_top", "train_prior", ("extract_codes",), 20),
    Step("train_prior_middle", "train_prior", ("extract_codes",), 22),
    Step("train_prior_bottom", "train_prior", ("extract_codes",), 29),
    Step("train_classifier_real", "train_classifier", ("pack",), 2),
    Step("train_classifier_reconstructions", "train_classifier", ("train_vqvae",), 2),
    Step("sample", "sample", (*_PRIORS, "train_classifier_real"), 7),
    Step("train_classifier_samples", "train_classifier", ("sample",), 2),
    Step("evaluate", "evaluate", ("sample", *_CLASSIFIERS), 9),
)


@dataclass(frozen=True)
class RunConfig:
    """What to make of which pictures, and how long it may take."""

    source: PathText = ""  # a folder of pictures, as of `vqscale pack`; "" = what pack.yaml says
    experiment: Name = ""  # the runs are runs/<experiment>/<stage>; default the name of the folder of configs
    minutes: NonNegativeFloat = 0.0  # sizes models, training and sampling to this time; 0 = the configs as they are
    device: Annotated[str, Choice(*configs.DEVICES)] = "auto"  # auto: cuda if there is one; mps: Apple's GPU


Config = RunConfig


def load(words: Sequence[str]) -> Request[RunConfig]:
    """From `CONFIG_FOLDER key=value …`; see `read_request`."""
    return read_request(RunConfig, words, f"run {USAGE}", paths=1)


class Chain:
    """The steps that a folder has configs for, and what is known of them."""

    def __init__(self, folder: Path, config: RunConfig):
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: there is no such folder of configs")
        self.folder, self.config = folder, config
        self.steps = [step for step in _CHAIN if self.path(step).is_file()]
        if not self.steps:
            raise ValueError(f"{folder}: holds no config of a chain, such as pack.yaml or train_vqvae.yaml")
        self.name = config.experiment or folder.resolve().name
        self.root = RUNS / self.name
        self.choices = Choices.load(self.root / "run.yaml", config)
        self.started: set[str] = set()

    def path(self, step: Step) -> Path:
        return self.folder / f"{step.name}.yaml"

    def words(self, step: Step) -> list[str]:
        """Of the command line of a step."""
        words = [f"experiment={self.name}", f"device={self.config.device}"]
        if step.name == "pack" and self.choices.source:
            words.append(f"source={self.choices.source}")
        return [*words, *self.choices.words.get(step.name, [])]

    def config_of(self, step: Step) -> StageConfig:
        return configs.load(_MODULES[step.stage].Config, self.path(step), self.words(step))

    def status_of(self, step: Step) -> dict[str, Any]:
        return read_status(Path(self.config_of(step).run_dir))

    def awaits_size(self, step: Step) -> bool:
        """Whether its size is still to be chosen for the time there is."""
        return bool(self.choices.minutes) and step.stage in _SIZED and step.name not in self.choices.words

    def is_current(self, step: Step) -> bool:
        """Whether the step is done, with this config, after everything that it reads from."""
        config = self.config_of(step)
        run_dir = Path(config.run_dir)
        status = read_status(run_dir)
        if self.awaits_size(step) or status.get("state") != "done":
            return False
        if damage_of(run_dir) or not holds_outputs(run_dir) or any(changes(config, run_dir / "config.yaml").values()):
            return False
        ended = [self.status_of(other).get("time", 0.0) for other in self.steps if other.name in step.reads]
        return not self.started & {*step.reads} and all(end <= status.get("time", 0.0) for end in ended)


@dataclass
class Choices:
    """`run.yaml`: what was asked for, and the words that were chosen for each step.

    in_full: minutes that a step would take as its config is.
    """

    path: Path
    source: str
    minutes: float
    words: dict[str, list[str]]
    in_full: dict[str, float]

    @classmethod
    def load(cls, path: Path, config: RunConfig) -> "Choices":
        """Raises ValueError where the runs were begun with other pictures or for another time."""
        if not path.is_file():
            return cls(path, config.source, config.minutes, {}, {})
        try:
            kept: dict[str, Any] = read_text(path.read_text(encoding="utf-8"))
            in_full = {name: float(minutes) for name, minutes in kept.get("minutes_in_full", {}).items()}
            earlier = cls(path, str(kept["source"]), float(kept["minutes"]), dict(kept["steps"]), in_full)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path}: was damaged ({error}); remove it to choose anew") from None
        for key in ("source", "minutes"):
            was, now = getattr(earlier, key), getattr(config, key)
            if now and now != was:
                raise ValueError(
                    f"{key}={now}: {path.parent} was begun with {key}={was}; "
                    f"leave it out to go on, or choose another experiment=NAME"
                )
        return earlier

    def add(self, name: str, size: sizing.Size) -> None:
        self.words[name] = size.words
        self.in_full[name] = round(size.in_full / 60, 1)
        self.save()

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = {"source": self.source, "minutes": self.minutes, "steps": self.words, "minutes_in_full": self.in_full}
        header = "# What `vqscale run` chose; the same command goes on with it.\n"
        write_atomically(self.path, header + yaml.safe_dump(kept, sort_keys=False, allow_unicode=True))


_ENOUGH = 1.2  # times the time there is: a training that needs no more than this has learned something
_SIZED = (*sizing.TRAINERS, "sample", "evaluate")


def main(request: Request[RunConfig]) -> None:
    """Run the chain. Raises Stopped when asked to stop, ValueError when a step fails."""
    begun = time.monotonic()
    chain = Chain(request.paths[0], request.config)
    for step in chain.steps:
        chain.config_of(step)  # a mistake in the last is told before anything is written
    chain.choices.save()
    limit = f", {chain.choices.minutes:g} minutes" if chain.choices.minutes else ""
    _say(f"{chain.folder} -> {chain.root}: {len(chain.steps)} stages{limit}")
    if others := sorted({path.name for path in chain.folder.glob("*.yaml")} - {f"{step.name}.yaml" for step in _CHAIN}):
        _say(f"not part of the chain: {', '.join(others)}")
    clock, needed, programs = Clock(chain, begun), list[float](), Programs()
    heard = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]  # nohup ignores HUP
    with handling(heard, programs.on_signal):
        for number, step in enumerate(chain.steps, 1):
            head = f"[{number}/{len(chain.steps)}] {step.name}"
            if chain.is_current(step):
                _say(f"{head}: done")
                continue
            _say(f"{head}: {_expected(chain, step, clock, needed)}")
            chain.started.add(step.name)
            programs.run(step, [str(chain.path(step)), *chain.words(step)])
            clock.done.add(step.name)
    _tell_results(chain, needed)


def _say(line: str) -> None:
    print(line, flush=True)


class Clock:
    """How the time there is is shared among the steps that are left."""

    def __init__(self, chain: Chain, begun: float):
        self._chain, self._begun = chain, begun
        self.done = {step.name for step in chain.steps if chain.status_of(step).get("state") == "done"}
        self._before = self._weight(self.done) / self._weight({step.name for step in chain.steps})

    def _weight(self, names: set[str]) -> float:
        return sum(step.weight for step in self._chain.steps if step.name in names)

    def seconds(self, step: Step) -> float:
        """For this step: its share of what is left."""
        total = 60 * self._chain.choices.minutes
        left = total * (1 - self._before) - (time.monotonic() - self._begun)
        waiting = {other.name for other in self._chain.steps} - self.done
        return max(0.0, left) * step.weight / self._weight(waiting)


def _expected(chain: Chain, step: Step, clock: Clock, needed: list[float]) -> str:
    """How long the step will take, in words; with a time limit, its size is chosen first."""
    if not chain.awaits_size(step):
        return _estimate(chain, step)
    words, path, seconds = chain.words(step), chain.path(step), clock.seconds(step)
    if step.stage == "sample":
        size = sizing.size_samples(path, words, seconds)
    elif step.stage == "evaluate":
        size = sizing.size_evaluation(path, words)
    else:
        size = sizing.size_trainer(step.stage, path, words, seconds)
    if size.share < 1:
        needed.append(chain.choices.minutes / size.share)
    chain.choices.add(step.name, size)
    shown = " ".join(word for word in size.words if word.startswith(("model.", "total_", "global_", "samples_per")))
    return f"about {max(size.seconds or seconds, 60) / 60:.0f} min; {shown}".rstrip("; ")


def _estimate(chain: Chain, step: Step) -> str:
    if step.stage not in sizing.TRAINERS:
        return "begins"
    config: Any = chain.config_of(step)
    left = config.total_images - int(chain.status_of(step).get("images_seen", 0))
    seconds = left * sizing.seconds_per_image(step.stage, chain.path(step), chain.words(step))
    return f"about {max(seconds, 60) / 60:.0f} min"


class Programs:
    """Runs stages as programs of their own, and passes stop requests on to them."""

    def __init__(self) -> None:
        self._asked = ""
        self._running: subprocess.Popen[bytes] | None = None

    def on_signal(self, number: int, _frame: Any) -> None:
        """Ask the stage that runs to stop."""
        self._asked = signal.Signals(number).name
        if self._running is not None:
            self._running.send_signal(signal.SIGTERM)

    def run(self, step: Step, words: Sequence[str]) -> None:
        """Raises Stopped if the stage was stopped, ValueError if it failed."""
        if self._asked:
            raise Stopped(self._asked)
        started_here = os.environ | {PARENT: str(os.getpid())}
        self._running = subprocess.Popen([sys.executable, "-m", "vqscale", step.stage, *words], env=started_here)
        code = self._running.wait()
        self._running = None
        if code == EXIT_UNFINISHED or (code and self._asked):
            raise Stopped(self._asked or f"{step.name} was stopped")
        if code:
            raise ValueError(f"{step.name} ended with exit code {code}: its own words are above, and in its log")


def _tell_results(chain: Chain, needed: Sequence[float]) -> None:
    """Name the picture, the report and the next command."""
    _say("")
    for step in chain.steps:
        if step.name == "evaluate":
            config: Any = chain.config_of(step)
            _say(f"picture: {config.picture or Path(config.run_dir) / 'samples.png'}")
            _say(f"report:  {Path(config.run_dir) / 'report.html'}")
    if max(needed, default=0.0) > _ENOUGH * chain.choices.minutes:
        _say(f"note:    these models have hardly learned; minutes={max(needed):.0f} would give them a short training")
    in_full = sum(chain.choices.in_full.values())
    if in_full > chain.choices.minutes:
        _say(f"note:    a first look: as the configs are, without minutes=, training takes about {in_full:.0f} minutes")
    _say(f"next: vqscale export {shlex.quote(str(chain.root))} {shlex.quote(str(Path('out') / chain.name))}")
