"""The workflow of GitHub Actions: what it calls exists, and it may only read."""

import re
import shlex
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
WORKFLOW: dict[Any, Any] = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
JOBS: dict[str, Any] = WORKFLOW["jobs"]
STEPS = [step for job in JOBS.values() for step in job["steps"]]
COMMANDS = [line for step in STEPS for line in step.get("run", "").splitlines()]


def test_it_reads_only_and_ends() -> None:
    assert WORKFLOW["permissions"] == {"contents": "read"}
    assert WORKFLOW["concurrency"]["cancel-in-progress"] is True
    assert all(job["timeout-minutes"] <= 60 and "permissions" not in job for job in JOBS.values())
    assert not any("secrets." in str(step) for step in STEPS)


def test_actions_are_pinned_by_major_version() -> None:
    used = [step["uses"] for step in STEPS if "uses" in step]
    assert used and [name for name in used if not re.fullmatch(r"actions/[\w-]+@v\d+", name)] == []


def test_the_quick_part_runs_on_every_python_from_the_oldest() -> None:
    pythons = JOBS["linux"]["strategy"]["matrix"]["python"]
    oldest = re.search(r'^requires-python = ">=(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert oldest and pythons[0] == oldest[1] and all(isinstance(python, str) for python in pythons)
    assert COMMANDS[0] == "bash .ci/run quick"


def test_what_it_calls_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    calls = [words for line in COMMANDS if (words := shlex.split(line))[0] == "make"]
    targets = [target for words in calls for target in words[1:]]
    assert targets and all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
    words = {word.replace("$GITHUB_WORKSPACE/", "") for line in COMMANDS for word in shlex.split(line)}
    paths = [word for word in words if re.match(r"(tests|configs|examples|\.ci)/", word)]
    assert len(paths) > 5 and [path for path in paths if not (ROOT / path).exists()] == []


def test_quick_is_a_prefix_of_the_whole() -> None:
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    made = [line for line in lines if line.startswith(("make ", "if [ ")) and "install_if_missing" not in line]
    assert made == [
        *("make setup", "make lint", "make test", 'if [ "${1:-}" = quick ]; then exit; fi'),
        *("make test-slow", "make test-soak", "make demo"),
    ]
