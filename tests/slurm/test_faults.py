"""Every way in which a job is interrupted: it comes again by itself and ends at the same bits."""

import os
import queue
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from support.jobs import Site

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1800)]  # two at a time, so that each waits for others

VQVAE = "configs/debug/train_vqvae.yaml"


def preempted(site: Site, job: str, node: str) -> None:
    """By a job of a higher partition that wants the whole node."""
    flags = ["--partition=high", "--exclusive", f"--nodelist={node}", "--output=/dev/null", "--wrap=true"]
    urgent = site.slurm.sbatch(*flags, cwd=site.folder)
    site.slurm.until(lambda: "warned" in site.slurm.log(job), f"{job} is preempted by {urgent}")


def requeued(site: Site, job: str, node: str) -> None:
    site.slurm.run("scontrol", "requeue", job)


def node_down(site: Site, job: str, node: str) -> None:
    site.slurm.run("scontrol", "update", f"nodename={node}", "state=down", "reason=test")


def node_lost(site: Site, job: str, node: str) -> None:
    site.slurm.kill_node(node)


def script_killed(site: Site, job: str, node: str) -> None:
    """No trap sees it, and Slurm takes it for a failure."""
    os.kill(site.slurm.script_of(job), signal.SIGKILL)


Fault = Callable[[Site, str, str], None]
FAULTS: list[Fault] = [preempted, requeued, node_down, node_lost, script_killed]


def interrupted(site: Site, fault: Fault, others: str) -> None:
    """A run that suffers `fault` on its way, on nodes that are not `others`."""
    run_dir = fault.__name__
    job = site.submit("train_vqvae2.sh", VQVAE, f"run_dir={run_dir}", flags=(f"--exclude={others}",))
    with site.held(run_dir):
        node = site.slurm.show(job)["NodeList"]
        fault(site, job, node)
        site.slurm.until(lambda: site.slurm.show(job)["Restarts"] == "1", f"{job} is queued again")
    log = site.completed(job)
    command = site.read(run_dir, "command.json")
    assert command["restarts"] == 1 and 0 < command["resumed_from"] < 640, log[-3000:]
    if fault in (node_down, node_lost):
        assert site.slurm.show(job)["NodeList"] != node
        site.slurm.revive(node)


@pytest.fixture(scope="module")
def stories(chain: Site, request: pytest.FixtureRequest) -> Iterator[dict[Fault, Future[None]]]:
    """The faults of the tests that were asked for, two at a time, each on two nodes of its own."""
    asked = [item.callspec.params["fault"] for item in request.session.items if "stories" in item.fixturenames]  # type: ignore[attr-defined]
    lanes: queue.SimpleQueue[str] = queue.SimpleQueue()
    for others in ("node3,node4", "node1,node2"):
        lanes.put(others)

    def tell(fault: Fault) -> None:
        others = lanes.get()
        try:
            interrupted(chain, fault, others)
        finally:
            lanes.put(others)

    with ThreadPoolExecutor(2) as pool:
        yield {fault: pool.submit(tell, fault) for fault in asked}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_interrupted_job_comes_again_and_ends_at_the_same_bits(
    chain: Site, stories: dict[Fault, Future[None]], fault: Fault
) -> None:
    stories[fault].result()
    assert chain.differing(fault.__name__, "runs/debug/train_vqvae") == []
