"""Jobs on a private Slurm: the chain, several nodes, and mistakes that must be loud."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support import cluster
from support.jobs import ROOT, SCRIPTS, Site
from support.stages import CHAIN

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1800)]  # the whole chain is a fixture

JOB_SCRIPTS = ("pack", "train_vqvae2", "extract_codes", "train_prior", "sample", "train_classifier", "evaluate")
VQVAE, PRIOR = "configs/debug/train_vqvae.yaml", "configs/debug/train_prior_top.yaml"
TWO = ("--nodes=2",)


def test_the_chain_runs_once(chain: Site) -> None:
    runs = chain.folder / "runs" / "debug"
    assert json.loads((runs / "evaluate" / "scores.json").read_text())
    assert (runs / "sample" / "dataset.json").is_file() and (runs / "evaluate" / "report.html").is_file()
    said = chain.pipeline("configs/debug").splitlines()
    assert sorted(said[:-1]) == sorted(f"{name}: done" for _, name in CHAIN)
    assert chain.slurm.run("squeue", "-h") == ""


def test_the_table_shows_the_chain(chain: Site) -> None:
    lines = chain.status("runs").splitlines()
    assert len(lines) == 1 + len(CHAIN) and all(" done " in line for line in lines[1:])
    vqvae = next(line.split() for line in lines if "train_vqvae" in line)
    assert vqvae[:4] == ["debug/train_vqvae", "done", "640", "640"] and float(vqvae[4]) > 0
    assert vqvae[-1] == (chain.folder / "runs/debug/train_vqvae/log/job").read_text().strip()


def test_two_nodes_warned_on_their_way_end_where_torchrun_does(chain: Site) -> None:
    job = chain.submit("train_vqvae2.sh", VQVAE, "run_dir=nodes", flags=TWO)
    with chain.held("nodes"):
        chain.warn(job)
    torchrun = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc-per-node", "2", "-m", "vqscale"]
    chain.run_alone(*torchrun, "train_vqvae", VQVAE, "run_dir=ranks")
    log, command = chain.completed(job), chain.read("nodes", "command.json")
    assert (command["world_size"], command["nodes"], command["strategy"]) == (2, 2, "ddp")
    assert command["restarts"] == 1 and 0 < command["resumed_from"] < 640
    assert "commit " in log and "2 ranks on node[" in log and "640/640" in log and f"train_vqvae {VQVAE}" in log
    assert [path.name for path in chain.folder.glob(f"*{job}*")] == [f"train_vqvae-{job}.log"]
    assert chain.differing("nodes", "ranks") == []


@pytest.mark.parametrize("strategy", ["fsdp", "zero2"])
def test_two_nodes_train_a_prior(chain: Site, strategy: str) -> None:
    job = chain.submit("train_prior.sh", PRIOR, f"run_dir={strategy}", flags=TWO, STRATEGY=strategy)
    chain.completed(job)
    command = chain.read(strategy, "command.json")
    assert (command["world_size"], command["nodes"], command["strategy"]) == (2, 2, strategy)
    assert chain.read(strategy, "status.json")["state"] == "done"
    losses = (chain.losses(run_dir) for run_dir in ("runs/debug/train_prior_top", strategy))
    assert next(losses) == pytest.approx(next(losses), rel=1e-5)


def test_two_nodes_of_which_the_program_sees_one_process_are_an_error(site: Site) -> None:
    job = site.submit("train_vqvae2.sh", VQVAE, "run_dir=one", flags=TWO, STRATEGY="single")
    assert site.slurm.ended(job) == "FAILED"
    assert "the Slurm job has 2 nodes, but this program sees 1 process" in site.slurm.log(job)
    assert not (site.folder / "one" / "status.json").exists()


def test_a_stage_that_fails_takes_its_dependants_with_it_and_names_the_log(site: Site) -> None:
    site.write_config("broken", "train_vqvae", data="nowhere")
    site.write_config("broken", "extract_codes")
    site.pipeline("configs/broken")
    job, dependant = (
        (site.folder / "runs/broken" / stage / "log/job").read_text().strip()
        for stage in ("train_vqvae", "extract_codes")
    )
    assert site.slurm.ended(job) == "FAILED" and site.slurm.show(job)["Restarts"] == "0"
    assert site.slurm.ended(dependant) == "CANCELLED"
    log = "runs/broken/train_vqvae/log/0.log"
    assert f"read {log}" in site.slurm.log(job) and "nowhere" in (site.folder / log).read_text()
    assert f"read {log}" in site.status("runs/broken").splitlines()[-1]


def test_a_node_that_fails_its_health_check_is_left_out(site: Site) -> None:
    check = 'test "$SLURMD_NODENAME" != node1'
    words = ["configs/debug/pack.yaml", "run_dir=healthy", "num_drawn=32"]
    job = site.submit("pack.sh", *words, flags=("--exclude=node4",), HEALTH_CHECK=check)
    assert "node1 failed the health check" in site.completed(job)
    about = site.slurm.show(job)
    assert about["NodeList"] in ("node2", "node3") and about["Restarts"] == "1"
    assert sorted(about["ExcNodeList"].split(",")) == ["node1", "node4"]


def test_a_run_without_progress_is_given_up(site: Site) -> None:
    log = site.folder / "stuck" / "log"
    log.mkdir(parents=True)
    (log / "launches").write_text("0 1\n0 2\n")  # two starts that came to nothing; the third is asked to stop at once
    (log.parent / "STOP").touch()
    one_long_shard = ["num_drawn=32000", "samples_per_shard=32000"]
    job = site.submit("pack.sh", "configs/debug/pack.yaml", "run_dir=stuck", *one_long_shard)
    assert site.slurm.ended(job) == "FAILED" and site.slurm.show(job)["Restarts"] == "0"
    assert "3 starts without progress beyond 0" in site.slurm.log(job)


def test_a_finished_job_never_runs_twice(chain: Site) -> None:
    job = (chain.folder / "runs/debug/pack/log/job").read_text().strip()
    before = chain.read("runs/debug/pack", "status.json")
    chain.slurm.run("scontrol", "requeue", job)
    chain.slurm.until(lambda: "runs/debug/pack is done already" in chain.slurm.log(job), "the job looks again")
    chain.completed(job)
    assert chain.read("runs/debug/pack", "status.json") == before


def test_every_script_would_run_on_16_nodes_with_8_gpus(tmp_path: Path) -> None:
    if not cluster.is_installed():
        pytest.skip("Slurm is not installed")
    with cluster.started(tmp_path, nodes=16) as slurm:
        for script in JOB_SCRIPTS:
            words = ["--test-only", "--gpus-per-node=8", str(SCRIPTS / f"{script}.sh"), "config.yaml"]
            slurm.run("sbatch", "--nodes=16", *words)
            for wrong in ("--nodes=17", "--gpus-per-node=9", "--partition=none"):
                refused = subprocess.run(
                    ["sbatch", *words[:1], wrong, *words[2:]], env=slurm.environment, capture_output=True
                )
                assert refused.returncode, wrong


def test_all_scripts_are_tested_here() -> None:
    others = {"common", "guard", "pipeline", "site.example"}
    assert {path.stem for path in (ROOT / "slurm").glob("*.sh")} == {*JOB_SCRIPTS, *others}
