"""A private Slurm on this machine: a controller and a few "nodes", each a slurmd of its own.

It listens on 127.0.0.1 only, needs neither root nor munge nor systemd, and is gone when its `with` block ends.
"""

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

DAEMONS = ("slurmctld", "slurmd", "sbatch", "srun")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "BOOT_FAIL")
PATIENCE = 600.0  # seconds; a busy machine is slow, and a test that hangs is ended all the same
CONFIG = """\
ClusterName=vqscale
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
PluginDir={plugins}
PlugStackConfig={folder}/plugstack.conf
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
SrunPortRange={first_srun_port}-{last_srun_port}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=100
GresTypes=gpu
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0,sched_min_interval=100000
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
JobRequeue=1
ReturnToService=1
SlurmdTimeout=10
InactiveLimit=0
KillWait=5
MinJobAge=3600
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=60
PartitionName=high Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=64 Boards=1 SocketsPerBoard=1 "
NODE += "CoresPerSocket=64 ThreadsPerCore=1 RealMemory=16000 Gres=gpu:8\n"


def is_installed() -> bool:
    return all(shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin") for name in DAEMONS)


class Cluster:
    """Slurm's commands against one private cluster of node1, node2, …"""

    def __init__(self, folder: Path, nodes: int):
        self.folder, self.nodes = folder, [f"node{i + 1}" for i in range(nodes)]
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        self.environment["PATH"] += ":/usr/sbin"
        for name in ("state", "log", "run", "dev", "jobs", *(f"spool/{node}" for node in self.nodes)):
            (folder / name).mkdir(parents=True)
        self._configure()

    def _configure(self) -> None:
        port, host = _free_ports(len(self.nodes) + 1), socket.gethostname().split(".")[0]
        plugins = next(Path("/usr").glob("lib*/**/slurm*/auth_none.so")).parent
        text = CONFIG.format(
            folder=self.folder,
            host=host,
            user=subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip(),
            port=port,
            plugins=plugins,
            first_srun_port=port + 100,
            last_srun_port=port + 199,
        )
        lines = [NODE.format(name=name, host=host, port=port + 1 + i) for i, name in enumerate(self.nodes)]
        (self.folder / "slurm.conf").write_text(text.replace("PartitionName", "".join(lines) + "PartitionName", 1))
        (self.folder / "plugstack.conf").write_text("")
        for i in range(8):  # counted, never opened
            (self.folder / f"dev/nvidia{i}").symlink_to("/dev/null")
        (self.folder / "gres.conf").write_text(f"AutoDetect=off\nName=gpu File={self.folder}/dev/nvidia[0-7]\n")

    # --- daemons ----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        self.run("slurmctld", "-c")
        for node in self.nodes:
            self._start_node(node)
        self.until(lambda: all(self.state_of(node) == "idle" for node in self.nodes), "all nodes are idle")

    def _start_node(self, node: str) -> None:
        stepd = shutil.which("slurmstepd", path=self.environment["PATH"])
        assert stepd is not None
        self.run("slurmd", "-N", node, "-d", stepd)

    def state_of(self, node: str) -> str:
        return self.run("sinfo", "-h", "-N", "-p", "low", "-n", node, "-o", "%T").strip()

    def revive(self, node: str) -> None:
        """After `kill_node`, or after it was set down."""
        if not self._daemon(node):
            self._start_node(node)
        self.until(lambda: self.state_of(node) != "down*", f"{node} answers")
        if self.state_of(node).startswith("down"):
            self.run("scontrol", "update", f"nodename={node}", "state=resume")
        self.until(lambda: self.state_of(node) in ("idle", "mixed"), f"{node} is up again")

    def _daemon(self, node: str) -> list[int]:
        mine = f"SLURM_CONF={self.folder}/slurm.conf"
        wanted = ["slurmd", "-N", node]
        return [p for p in _processes() if _command(p)[:3] == wanted and mine in _environment(p)]

    def stop(self) -> None:
        with contextlib.suppress(subprocess.CalledProcessError, AssertionError):
            self.run("scancel", "--user", self.run("id", "-un").strip())
            self.until(lambda: not self.run("squeue", "-h"), "no job left", 30)
        for process in _processes():
            if f"SLURM_CONF={self.folder}/slurm.conf" in _environment(process):  # the daemons and what they started
                _kill(process)

    def kill_node(self, node: str) -> None:
        """As if its power were cut: the daemon, its step managers and the tasks, all at once."""
        mine = {f"SLURMD_NODENAME={node}", f"SLURM_CONF={self.folder}/slurm.conf"}
        tasks = [p for p in _processes() if mine <= set(_environment(p))]
        managers = {p for task in tasks for p in _parents(task) if "slurmstepd" in _command(p)[0]}
        for process in (*self._daemon(node), *managers, *tasks):
            _kill(process)

    # --- commands ---------------------------------------------------------------------------------------------------

    def run(self, *words: str, cwd: Path | None = None, **variables: str) -> str:
        """Standard output of a command that succeeds."""
        done = subprocess.run(
            words, cwd=cwd, env={**self.environment, **variables}, capture_output=True, text=True, timeout=PATIENCE
        )
        assert done.returncode == 0, f"{' '.join(words)}: {done.stdout}{done.stderr}"
        return done.stdout

    def sbatch(self, *words: str, cwd: Path, **variables: str) -> str:
        """The id of a new job."""
        return self.run("sbatch", "--parsable", *words, cwd=cwd, **variables).strip()

    def show(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says."""
        words = self.run("scontrol", "show", "job", job, "--oneliner").split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def log(self, job: str) -> str:
        path = Path(self.show(job)["StdOut"])
        return path.read_text() if path.is_file() else ""

    def until(self, condition: Callable[[], object], what: str, patience: float = PATIENCE) -> None:
        limit = time.monotonic() + patience
        while not condition():
            assert time.monotonic() < limit, f"waited {patience:.0f} s in vain: {what}"
            time.sleep(0.2)

    def ended(self, job: str, patience: float = PATIENCE) -> str:
        """The state that the job ends in."""
        self.until(lambda: self.show(job)["JobState"] in ENDED, f"{job} ends; so far:\n{self.log(job)}", patience)
        return self.show(job)["JobState"]

    def script_of(self, job: str) -> int:
        """The process of a job's batch script."""
        mine = {f"SLURM_JOB_ID={job}", f"SLURM_CONF={self.folder}/slurm.conf"}
        found = [
            p for p in _processes() if mine <= set(_environment(p)) and "slurm_script" in " ".join(_command(p)[:2])
        ]
        return min(found)  # the others are its sub-shells


@contextlib.contextmanager
def started(folder: Path, nodes: int) -> Iterator[Cluster]:
    cluster = Cluster(folder, nodes)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def _free_ports(count: int) -> int:
    """The first of `count` ports in a row that nobody listens at, with 200 below the system's own range behind it."""
    while True:
        first = random.SystemRandom().randrange(20_000, 32_000)
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + count):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first


def _processes() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit() and int(path.name) != os.getpid()]


def _read(process: int, name: str) -> str:
    try:
        return Path(f"/proc/{process}/{name}").read_text(errors="replace")
    except OSError:
        return ""


def _environment(process: int) -> list[str]:
    return _read(process, "environ").split("\0")


def _command(process: int) -> list[str]:
    return _read(process, "cmdline").split("\0")


def _parents(process: int) -> Iterator[int]:
    while fields := _read(process, "stat").rpartition(")")[2].split():
        process = int(fields[1])
        yield process


def _kill(process: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)
