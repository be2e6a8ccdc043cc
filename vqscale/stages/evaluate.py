"""Samples, reconstructions, codes and priors -> scores.json, report.html and a table on the terminal."""

import torch

from vqscale import runtime
from vqscale.config import fingerprint
from vqscale.evaluation.cas import score_cas
from vqscale.evaluation.codes import score_codes
from vqscale.evaluation.inputs import EvaluateConfig, Inputs, find_inputs
from vqscale.evaluation.passes import Bench, open_bench
from vqscale.evaluation.reconstructions import score_reconstructions
from vqscale.evaluation.results import Content, print_table, write_results
from vqscale.evaluation.samples import check_rates, score_samples
from vqscale.evaluation.scores import Scores
from vqscale.files import read_json, write_json

Config = EvaluateConfig


def main(config: EvaluateConfig) -> None:
    """Evaluate into `config.run_dir`. Raises ValueError for inputs that do not belong together, and for a metric asked
    for by name that cannot be computed."""
    scores = Scores(config.metrics)
    check_rates(config.acceptance)
    with runtime.run(config, "evaluate") as run:
        inputs = find_inputs(config, run.topology.device)
        identity = {"config": fingerprint(config), **inputs.identity()}
        if run.was_done and read_json(run.run_dir / "inputs.json") == identity:
            runtime.log.info("nothing left to do: %s is up to date", run.run_dir / "report.html")
            return
        bench = open_bench(config, run, scores)
        content = compute(bench, inputs)
        run.images_seen = max((score.n for score in scores.by_key.values()), default=0)
        if run.topology.is_main:
            write_results(config, run, scores, inputs, content, bench.shards)
            if content.nll_by_class:
                write_json(run.run_dir / "nll_by_class.json", content.nll_by_class)
            write_json(run.run_dir / "inputs.json", identity)
            print_table(scores)
        run.topology.barrier()


def compute(bench: Bench, inputs: Inputs) -> Content:
    """All families of metrics, on all ranks."""
    samples = score_samples(bench, inputs)
    reconstructions = score_reconstructions(bench, inputs)
    codes = score_codes(bench, inputs, reconstructions.figures)
    score_cas(bench, inputs)
    return Content(
        examples=reconstructions.examples,
        usage=codes.usage,
        nll_by_class=codes.nll_by_class,
        neighbours=samples.neighbours,
        checks=samples.checks,
    )


def plan(config: EvaluateConfig) -> str:
    """Inputs that exist and those that do not, for --dry-run."""
    inputs = find_inputs(config, torch.device("cpu"))
    lines = [f"\n{name}: {value}" for name, value in inputs.identity().items()]
    return "".join(lines) + "".join(f"\nabsent: {reason}" for reason in inputs.absent.values())
