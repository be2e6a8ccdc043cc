"""`vqscale <stage> <config.yaml> [key=value …]`: words -> one stage's `main(config)` -> an exit code.

Exit codes of the bare program: 0 done, 1 error (one line on stderr), 75 saved and has more to do.
"""

import argparse
import difflib
import importlib
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

from vqscale import __version__, config, fields, runtime, streams, topology
from vqscale.stopping import EXIT_UNFINISHED
from vqscale.text import one_line, redact_url

# Each stage module holds `Config` and `main`; the words are its line in the help.
STAGES = {
    "pack": "a folder of images -> image shards",
    "index": "WebDataset tars that others wrote -> an indexed data set",
    "train_vqvae": "image shards -> a VQ-VAE-2",
    "extract_codes": "image shards + VQ-VAE-2 -> code shards",
    "train_prior": "code shards -> a class-conditional prior of one level",
    "sample": "VQ-VAE-2 + priors -> sample shards",
    "tune_sampling": "VQ-VAE-2 + priors + images -> the sampling options that come nearest, as a sample.yaml",
    "train_classifier": "images, samples or reconstructions -> a classifier, for CAS and rejection sampling",
    "evaluate": "samples, reconstructions, codes -> scores.json and report.html",
}
# Commands that make no run: each module holds `USAGE`, `Config`, `load(words) -> request` and `main(request)`.
TOOLS = {
    "new": "configs, launch files and Slurm scripts of this version -> a folder to work in",
    "run": "a folder of configs -> its whole chain on this machine, resumable, in the minutes that there are",
    "status": "a folder of runs -> how each stage stands",
    "plan": "a trainer's config -> memory, communication and time at any number of ranks; a folder of configs -> cost",
    "export": "a run -> a folder to share: model.safetensors, config.json and a model card",
    "import-checkpoint": "a checkpoint of rosinality/vq-vae-2-pytorch -> such a folder",
    "compare": "runs, or experiments -> one page that puts them side by side",
    "doctor": "this machine -> a page to paste into an issue: versions, devices, limits, storage, Slurm",
    "completion": "bash or zsh -> a script by which it completes commands, keys and paths",
    "watch": "a run -> its curves in the terminal, or as a PNG",
}
_ALIASES = {
    "world": "plan",
    "strategy": "plan",
    "from": "plan",
    "png": "watch",
    "push": "export",
}  # --world N for world=N
EXIT_INTERRUPTED = 130  # by Ctrl-C before there was anything to save
HEAD_START = 3.0  # seconds that the first rank has to report an error before the others do


def _listed(commands: Mapping[str, str]) -> str:
    return "\n".join(f"  {name:<16} {line}" for name, line in commands.items())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vqscale",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Distributed, large-scale training of VQ-VAE-2 and its PixelCNN priors.",
        epilog=f"stages:\n{_listed(STAGES)}\n\n`vqscale STAGE --help` lists a stage's keys. Every stage resumes by "
        f"running the same command again.\n\ntools:\n{_listed(TOOLS)}",
    )
    parser.add_argument("stage", metavar="STAGE")
    parser.add_argument("words", nargs="*", metavar="CONFIG [key=value ...]")
    for key, tool in _ALIASES.items():
        parser.add_argument(f"--{key}", help=f"of {tool}, the same as {key}=…")
    parser.add_argument("--once", action="store_true", help="of watch, the same as once=true")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved config, sizes and steps, then stop")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.add_argument("--version", action="version", version=f"vqscale {__version__}")
    return parser


def _stage_help(stage: str) -> str:
    module = stage_module(stage)
    keys = "\n".join(fields.help_lines(module.Config))
    usage = getattr(module, "USAGE", "CONFIG [key=value ...]")
    return f"vqscale {stage} {usage}\n\n{(STAGES | TOOLS)[stage]}\n\nkeys and defaults:\n{keys}"


def stage_module(stage: str):
    if stage not in STAGES | TOOLS:
        near = "".join(f"; did you mean {name}?" for name in difflib.get_close_matches(stage, STAGES | TOOLS, n=1))
        raise ValueError(
            f"there is no stage {stage!r}{near}; the stages are {', '.join(STAGES)}; the tools {', '.join(TOOLS)}"
        )
    return importlib.import_module(f"vqscale.stages.{stage.replace('-', '_')}")


def _flags(arguments: argparse.Namespace) -> list[str]:
    given = [f"{key}={value}" for key in _ALIASES if (value := getattr(arguments, key)) is not None]
    return given + ["once=true"] * arguments.once


def main(argv: Sequence[str]) -> int:
    """Run one command; returns the exit code. `--key=value`, as sweeps pass it, is the same as `key=value`."""
    argv = [re.sub(r"^--([\w.]+=)", r"\1", word) for word in argv]
    if len(argv) > 1 and argv[0] in STAGES | TOOLS and argv[1] in ("-h", "--help"):
        print(_stage_help(argv[0]))
        return 0
    arguments = _parser().parse_intermixed_args(argv)
    try:
        stage = stage_module(arguments.stage)
        words = [*arguments.words, *_flags(arguments)]
        if arguments.stage in TOOLS:
            stage.main(stage.load(words))
            return 0
        if not arguments.words:
            raise ValueError(f"{arguments.stage} needs a config file: vqscale {arguments.stage} CONFIG [key=value ...]")
        stage_config = _load(arguments.stage, words[0], words[1:])
        if arguments.dry_run:
            print(redact_url(config.to_yaml(stage_config) + stage.plan(stage_config)))
        else:
            stage.main(stage_config)
    except runtime.Stopped as stopped:
        if topology.is_first_rank():
            print(f"vqscale: stopped: {one_line(stopped)}; run the same command again to go on", file=sys.stderr)
        return 0 if topology.under_launcher() else EXIT_UNFINISHED
    except KeyboardInterrupt:
        print("vqscale: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as error:
        _report(error, arguments.debug)
        return 1
    return 0


def _load(stage: str, path: str, overrides: Sequence[str]) -> config.StageConfig:
    try:
        return config.load(stage_module(stage).Config, path, overrides)
    except ValueError:
        owner = stage_of(path)
        if owner in ("", stage):
            raise
        raise ValueError(f"{path} is a config of {owner}, not of {stage}: vqscale {owner} {path}") from None


def stage_of(path: str) -> str:
    """The stage whose name the file's begins with, or ""."""
    name = Path(path).stem
    return max((stage for stage in STAGES if name == stage or name.startswith(f"{stage}_")), key=len, default="")


def _report(error: Exception, debug: bool) -> None:
    expected = isinstance(error, (ValueError, OSError))
    if debug:
        traceback.print_exc()
    where = ""
    if not topology.is_first_rank():
        where = f" on rank {os.environ['RANK']}"
        time.sleep(HEAD_START)  # an error of all ranks is told once: the launcher ends this one meanwhile
    kind = "" if expected else f"{type(error).__name__}: "
    hint = "" if debug or expected else " (again with --debug for the traceback)"
    print(f"vqscale: error{where}: {kind}{one_line(error)}{hint}", file=sys.stderr)


def entry() -> None:
    """The `vqscale` command."""
    streams.install()
    if parent := os.environ.pop(topology.PARENT, ""):
        topology.die_with_parent(int(parent), signal.SIGTERM)  # saves, and leaves the folder to the next start
    runtime.leave(main(sys.argv[1:]))
