"""One private Slurm for all tests, and the debug experiment, smaller still, run on it by slurm/pipeline.sh."""

import os
import sys
from collections.abc import Iterator

import pytest
from support import cluster
from support.jobs import Site
from support.stages import CHAIN

SMALLER: dict[str, dict[str, object]] = {
    "pack": {"num_drawn": 320},
    "train_vqvae": {"total_images": 640, "save_every": 32, "evaluate_every": 640},
    "train_prior_top": {"total_images": 320, "evaluate_every": 320},
    "train_prior_bottom": {"total_images": 320, "evaluate_every": 320},
    "sample": {"samples_per_class": 1},
    "train_classifier_real": {"total_images": 320, "evaluate_every": 320},
    "train_classifier_reconstructions": {"total_images": 320, "evaluate_every": 320},
    "train_classifier_samples": {"total_images": 320, "evaluate_every": 320},
}


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    if not cluster.is_installed():
        pytest.skip("Slurm is not installed")
    root = tmp_path_factory.mktemp("slurm")
    with cluster.started(root / "cluster", nodes=4) as slurm:
        slurm.environment |= {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "VQSCALE_SITE": os.devnull}
        here = Site(slurm, root / "work")
        for _, name in CHAIN:
            here.write_config("debug", name, **SMALLER.get(name, {}))
        yield here


@pytest.fixture(scope="session")
def chain(site: Site) -> Site:
    """The site after the whole chain, with its data and models in runs/debug."""
    said = site.pipeline("configs/debug")
    site.slurm.until(lambda: not site.slurm.run("squeue", "-h"), "the chain ends")
    states = site.status("configs/debug", "show=state").split()
    logs = [f"{path}: {path.read_text()[-1000:]}" for path in sorted((site.folder / "runs").rglob("log/*-*.log"))]
    assert states == ["done"] * len(CHAIN), "\n".join([said, *logs])
    return site
