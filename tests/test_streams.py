"""No output stream can end the program: readers that are gone or asleep, full disks, closed descriptors."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HELP = [sys.executable, "-m", "vqscale", "--help"]
PRINTS = """
import sys
from vqscale import streams
streams.install()
if "run" in sys.argv:
    streams.lose_rather_than_wait()
for _ in range(300):
    print("x" * 1000, file=sys.stderr)
    print("x" * 1000)
open(sys.argv[1], "w").write("arrived")
"""
TRAINS = f"""
import os, sys, time
sys.path[:0] = [{str(ROOT / "tests")!r}, {str(ROOT)!r}]
from vqscale import streams
streams.install()
from vqscale import runtime
from support.training import TinyConfig, train
try:
    train(TinyConfig(run_dir=sys.argv[1], trackers=[], total_images=8_000_000, step_seconds=0.01))
except runtime.Stopped as stopped:
    print(stopped)
    sys.exit(75)
"""


def through_shell(line: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", "-c", f"set -o pipefail; {line}", "bash", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)


@pytest.mark.parametrize("sink", ["| true", "| head -n 1", "> /dev/full", ">&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_help_ends_quietly_wherever_it_goes(sink: str) -> None:
    ended = through_shell(f'"$@" {sink}', *HELP)
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize("sink", ["> /dev/full 2>&1", "2>&1 | true", ">&- 2>&-", "| true"])
def test_lines_are_lost_and_the_work_is_not(tmp_path: Path, sink: str) -> None:
    ended = through_shell(f'"$@" {sink}', sys.executable, "-c", PRINTS, str(tmp_path / "made"))
    assert ended.returncode == 0 and (tmp_path / "made").read_text() == "arrived"
    assert "Exception" not in ended.stderr


def test_a_run_does_not_wait_for_a_reader_that_sleeps(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PRINTS, str(tmp_path / "made"), "run"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=ROOT) as asleep:
        assert asleep.wait(60) == 0
    assert (tmp_path / "made").read_text() == "arrived"


def test_what_an_encoding_lacks_is_escaped() -> None:
    code = "from vqscale import streams; streams.install(); print('\\u00e4 \\u2026')"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert ended.stdout == "\\xe4 \\u2026\n"


@pytest.mark.parametrize("reader", ["gone", "asleep"])
def test_an_interrupted_run_without_a_reader_saves_and_stops(tmp_path: Path, reader: str) -> None:
    command = [sys.executable, "-c", TRAINS, str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=ROOT)
    assert process.stdout is not None
    until = time.monotonic() + 120
    while not list((tmp_path / "run" / "checkpoints").glob("0*")):
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.02)
    if reader == "gone":
        process.stdout.close()  # as `tee` does, which Ctrl-C ends too
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 75
    process.stdout.close()
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    saved = max(int(path.name) for path in (tmp_path / "run" / "checkpoints").glob("0*"))
    assert (status["state"], status["images_seen"]) == ("stopped", saved)
