"""The debug experiment: its stages in order, and how tests run one of them."""

from pathlib import Path

from vqscale import cli

CONFIGS = Path(__file__).parents[2] / "configs" / "debug"
CHAIN = (
    ("pack", "pack"),
    ("train_vqvae", "train_vqvae"),
    ("extract_codes", "extract_codes"),
    ("train_prior", "train_prior_top"),
    ("train_prior", "train_prior_bottom"),
    ("sample", "sample"),
    ("train_classifier", "train_classifier_real"),
    ("train_classifier", "train_classifier_reconstructions"),
    ("train_classifier", "train_classifier_samples"),
    ("evaluate", "evaluate"),
)


def run_stage(stage: str, name: str, *overrides: str) -> int:
    """The exit code of `vqscale STAGE configs/debug/NAME.yaml …` on one thread, run in this process."""
    return cli.main([stage, str(CONFIGS / f"{name}.yaml"), "device=cpu", "threads=1", *overrides])
