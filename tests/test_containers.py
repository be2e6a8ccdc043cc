"""Dockerfile and apptainer.def: the same steps in both, and what they name is there."""

import re
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = (ROOT / "pyproject.toml").read_text()  # tomllib is younger than Python 3.10


def instructions() -> dict[str, list[str]]:
    """Instruction of the Dockerfile -> its arguments, continued lines joined."""
    found = defaultdict(list)
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    for line in re.sub(r" *\\\n *", " ", text).splitlines():
        if line:
            name, _, arguments = line.partition(" ")
            found[name].append(arguments)
    return found


def sections() -> dict[str, list[str]]:
    """Section of the definition -> its lines; the header is ""."""
    found: dict[str, list[str]] = {"": []}
    name = ""
    for line in (ROOT / "apptainer.def").read_text().splitlines():
        if line.startswith("%"):
            name = line[1:]
            found[name] = []
        elif line and not line.startswith("#"):
            found[name].append(line.strip())
    return found


DOCKER, APPTAINER = instructions(), sections()


def copies() -> list[tuple[str, str]]:
    """(source, target) of every file and folder that the Dockerfile copies."""
    pairs = []
    for words in map(str.split, DOCKER["COPY"]):
        *sources, target = words
        pairs += [(source, target + source * target.endswith("/")) for source in sources]
    return pairs


def declared(key: str) -> str:
    value = re.search(rf'^{key} = "(.*)"$', PROJECT, re.MULTILINE)
    assert value, key
    return value[1]


def version(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(".")))


def test_the_base_is_pinned_the_same_and_new_enough() -> None:
    (base,) = DOCKER["FROM"]
    assert APPTAINER[""] == ["Bootstrap: docker", f"From: {base}"]
    python = re.fullmatch(r"python:(\d+\.\d+)-slim-[a-z]+", base)
    assert python and version(python[1]) >= version(declared("requires-python").removeprefix(">="))


def test_both_take_the_same_steps() -> None:
    *steps, user = DOCKER["RUN"]  # under Apptainer the user is the caller
    assert user.startswith("useradd ")
    assert [re.sub(r"\{\{ (\w+) \}\}", r"$\1", line) for line in APPTAINER["post"]] == steps
    assert APPTAINER["arguments"] == DOCKER["ARG"]
    assert APPTAINER["files"] == [f"{source} {target}" for source, target in copies()]
    labels = re.findall(r'(\S+)="([^"]*)"', DOCKER["LABEL"][0])
    assert [tuple(line.split(maxsplit=1)) for line in APPTAINER["labels"]] == labels


def test_what_is_copied_exists_and_is_not_ignored() -> None:
    sources = [source for source, _ in copies()]
    assert [source for source in sources if not (ROOT / source).exists()] == []
    ignored, *allowed = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line[0] != "#"]
    assert ignored == "*" and [line[1:] for line in allowed if line[0] == "!"] == sources


def test_the_copy_is_all_that_the_wheel_is_made_of() -> None:
    folders = set(re.findall(r'^"share/vqscale/(\w+)', PROJECT, re.MULTILINE))
    given = {*folders, "vqscale", "pyproject.toml", "MANIFEST.in", declared("readme"), "LICENSE"}
    sources = {source for source, _ in copies()}
    assert given <= sources
    needed = set(re.findall(r"^include (\S+)", (ROOT / "MANIFEST.in").read_text(), re.MULTILINE))
    assert sources == given | needed


def test_the_image_is_the_program_run_by_nobody_in_particular() -> None:
    assert DOCKER["ENTRYPOINT"] == ['["vqscale"]'] and DOCKER["USER"] == ["vqscale"]
    assert APPTAINER["runscript"] == ['exec vqscale "$@"']
    assert re.search(r'^vqscale = "vqscale\.cli:entry"', PROJECT, re.MULTILINE)
    extras = re.search(r"/opt/vqscale\[([\w,]+)\]", DOCKER["RUN"][2])
    assert extras and all(re.search(rf"^{name} = \[", PROJECT, re.MULTILINE) for name in extras[1].split(","))


def test_the_labels_say_what_the_project_says() -> None:
    labels = dict(re.findall(r'\.(\w+)="([^"]*)"', DOCKER["LABEL"][0]))
    assert labels == {
        "title": declared("name"),
        "description": declared("description"),
        "licenses": declared("license"),
    }
