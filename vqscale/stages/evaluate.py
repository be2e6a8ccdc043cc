"""Samples, reconstructions, codes and priors -> scores.json, report.html and a table on the terminal."""

import os
from pathlib import Path

import torch

from vqscale import runtime
from vqscale.config import fingerprint
from vqscale.evaluation.cas import leave_out_cas, score_cas
from vqscale.evaluation.codes import leave_out_codes, score_codes
from vqscale.evaluation.inputs import DataSet, EvaluateConfig, Inputs, find_inputs, follow_protocol
from vqscale.evaluation.passes import Bench, open_bench
from vqscale.evaluation.reconstructions import leave_out_reconstructions, score_reconstructions
from vqscale.evaluation.results import Results, print_table, write_results
from vqscale.evaluation.samples import leave_out_samples, score_samples
from vqscale.evaluation.scores import Scores
from vqscale.files import read_json, write_json

Config = EvaluateConfig


def main(config: EvaluateConfig) -> None:
    """Evaluate into `config.run_dir`. Raises ValueError for inputs that do not belong together, and for a metric asked
    for by name that cannot be computed."""
    config = follow_protocol(config)
    scores = Scores(config.metrics)
    check_picture(config.picture)
    with runtime.run(config, "evaluate") as run:
        inputs = find_inputs(config, run.topology.device, run.topology)
        identity = {"config": fingerprint(config), **inputs.identity()}
        recorded = read_json(run.run_dir / "inputs.json")
        check_none_is_gone(config, inputs, recorded)
        if run.was_done and recorded == identity and has_outputs(config, inputs):
            runtime.log.info("nothing left to do: %s is up to date", run.run_dir / "report.html")
        else:
            bench = open_bench(config, run, scores)
            results = compute(bench, inputs)
            if run.topology.is_main:
                write_results(bench, inputs, results)
                write_json(run.run_dir / "inputs.json", identity)
                print_table(scores)
            run.topology.barrier()
        run.images_seen = max((score["n"] for score in read_json(run.run_dir / "scores.json").values()), default=0)


def check_none_is_gone(config: EvaluateConfig, inputs: Inputs, recorded: dict[str, str]) -> None:
    """Raises ValueError where an input of the last scores is gone: they must not be replaced by fewer."""
    for key, why in inputs.absent.items():
        if key in recorded and getattr(config, key) != "none":
            made = f"the scores in {config.run_dir} were computed with it"
            raise ValueError(f"{why}; {made}: bring it back, or leave it out with {key}=none")


def check_picture(path: str) -> None:
    """Raises ValueError for a picture that could not be written in the end."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"picture={path}: its folder cannot be made: {error.strerror}") from None
    if path and (Path(path).is_dir() or not os.access(Path(path).parent, os.W_OK)):
        raise ValueError(f"picture={path}: no file can be written there")


def has_outputs(config: EvaluateConfig, inputs: Inputs) -> bool:
    """Whether what a run leaves behind is still there."""
    files = [Path(config.run_dir) / "report.html"]
    reconstructs = inputs.vqvae and isinstance(inputs.reference, DataSet) and config.num_reconstructions
    if config.samples_shown and (reconstructs or (inputs.samples and config.classes_shown)):
        files += [Path(config.run_dir) / "samples.png", *map(Path, filter(None, [config.picture]))]
    return bool(read_json(Path(config.run_dir) / "scores.json")) and all(path.is_file() for path in files)


def compute(bench: Bench, inputs: Inputs) -> Results:
    """All families of metrics, on all ranks. What cannot be computed is left out, or refused, before any of them."""
    for leave_out in (leave_out_samples, leave_out_reconstructions, leave_out_codes, leave_out_cas):
        leave_out(bench, inputs)
    samples = score_samples(bench, inputs)
    reconstructions = score_reconstructions(bench, inputs)
    codes = score_codes(bench, inputs, reconstructions.figures)
    score_cas(bench, inputs)
    return Results(samples, reconstructions, codes)


def plan(config: EvaluateConfig) -> str:
    """Inputs that exist and those that do not, for --dry-run."""
    inputs = find_inputs(follow_protocol(config), torch.device("cpu"))
    lines = [f"\n{name}: {value}" for name, value in inputs.identity().items()]
    return "".join(lines) + "".join(f"\nabsent: {reason}" for reason in inputs.absent.values())
