"""However the program is started, the number of looks of waiting threads is set before torch loads OpenMP."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import vqscale

ROOT = Path(__file__).parents[1]
VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
# In place of torch: says what OpenMP would read, and ends the program.
TORCH = f"import os\nprint([os.environ.get(name) for name in {VARIABLES}], flush=True)\nos._exit(0)\n"
FORKSERVER = """
import multiprocessing
if __name__ == "__main__":
    import vqscale
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([])
    process = context.Process(target=__import__, args=("torch",))
    process.start()
    process.join()
"""
COMMAND = [str(Path(sys.executable).parent / "vqscale"), "--version"]
STARTS = {
    "command": COMMAND,
    "package": [sys.executable, "-m", "vqscale", "--version"],
    "stage": [sys.executable, "-m", "vqscale.stages.train_vqvae"],
    "API": [sys.executable, "-c", "import vqscale; vqscale.sample"],
    "module": [sys.executable, "-c", "from vqscale.models.vqvae import VQVAE"],
    "child": [
        sys.executable,
        "-c",
        "import vqscale, subprocess, sys; subprocess.run([sys.executable, '-c', 'import torch'])",
    ],
    "forkserver": [sys.executable, "forkserver.py"],
}


def what_openmp_reads(folder: Path, command: list[str], **environment: str) -> str:
    (folder / "torch").mkdir()
    (folder / "torch" / "__init__.py").write_text(TORCH)
    (folder / "forkserver.py").write_text(FORKSERVER)
    clean = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    clean |= {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]), **environment}
    done = subprocess.run(command, cwd=folder, env=clean, capture_output=True, text=True, timeout=60)
    return done.stdout.strip() or done.stderr


@pytest.mark.parametrize("start", STARTS)
def test_threads_look_briefly_however_the_program_is_started(tmp_path: Path, start: str) -> None:
    assert what_openmp_reads(tmp_path, STARTS[start]) == f"[None, '{vqscale.SPINS}']"


@pytest.mark.parametrize(
    ("variable", "value", "read"),
    [("OMP_WAIT_POLICY", "active", "['active', None]"), ("GOMP_SPINCOUNT", "7", "[None, '7']")],
)
def test_what_the_user_has_set_stays(tmp_path: Path, variable: str, value: str, read: str) -> None:
    assert what_openmp_reads(tmp_path, COMMAND, **{variable: value}) == read


def test_where_torch_is_loaded_already_nothing_is_claimed() -> None:
    program = "import sys; sys.modules['torch'] = sys; import os, vqscale; print('GOMP_SPINCOUNT' in os.environ)"
    clean = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    assert subprocess.run([sys.executable, "-c", program], env=clean, capture_output=True).stdout == b"False\n"


def test_the_tests_themselves_wait_so() -> None:
    assert not {*VARIABLES}.isdisjoint(os.environ)
