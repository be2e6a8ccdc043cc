"""What the repository says about itself is true."""

import ast
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from support.code_lines import by_folder, code_lines

from vqscale import cli, config, fields, topology
from vqscale.evaluation.inputs import LEARNED_FROM
from vqscale.models.sampling import PER_LEVEL

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()
MAX_LINES = 420  # of tests and benchmarks; the package has a budget per folder
# Code lines without blanks, comments and docstrings. A new feature finds room here, or makes it.
CODE_LINES = {".": 2_744, "data": 3_360, "engine": 1_455, "evaluation": 2_930, "models": 2_040, "stages": 3_460}


def fields_of(cls: Any) -> Iterator[tuple[str, str]]:
    """(class, field) of a config and the configs within it."""
    for f in dataclasses.fields(cls):
        yield cls.__name__, f.name
        if dataclasses.is_dataclass(f.type):
            yield from fields_of(f.type)


def names_read(tree: ast.Module) -> Iterator[str]:
    """Attributes that are read; `f"prior_{name}"` stands for those of all levels, `f"classifier_{name}"` likewise, and
    `getattr(config, option)` for the options that samples have by level."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            yield node.attr
        elif isinstance(node, ast.JoinedStr) and ast.unparse(node) == "f'prior_{name}'":
            yield from (f"prior_{level}" for level in config.level_names(3))
        elif isinstance(node, ast.JoinedStr) and ast.unparse(node) == "f'classifier_{name}'":
            yield from (f"classifier_{name}" for name in LEARNED_FROM)
        elif isinstance(node, ast.Call) and ast.unparse(node) == "getattr(config, option)":
            yield from PER_LEVEL


def test_every_config_field_is_read_somewhere() -> None:
    read = {name for path in (ROOT / "vqscale").rglob("*.py") for name in names_read(ast.parse(path.read_text()))}
    fields = {found for stage in cli.STAGES | cli.TOOLS for found in fields_of(cli.stage_module(stage).Config)}
    assert len(fields) > 40
    assert sorted(f"{cls}.{name}" for cls, name in fields if name not in read) == []


def test_every_config_field_is_explained_in_the_help() -> None:
    for stage in cli.STAGES | cli.TOOLS:
        for line in fields.help_lines(cli.stage_module(stage).Config):
            assert " " in line.strip() or "=runs/<experiment>/" in line, f"{stage}: no comment beside {line.strip()}"


def written_tree(document: str) -> dict[str, str]:
    """A document's tree: path -> description. Folders end with a slash; two blanks indent."""
    block = re.search(r"^## The tree\n.*?^```\n(.*?)^```", document, re.MULTILINE | re.DOTALL)
    assert block, "no tree under '## The tree'"
    found: dict[str, str] = {}
    parents: list[str] = []
    for line in block[1].splitlines():
        name, _, words = line.strip().partition(" ")
        depth = (len(line) - len(line.lstrip())) // 2
        parents = [*parents[:depth], name]
        found["".join(parents)] = words.strip()
    return found


def holds_files(path: Path) -> bool:
    return path.is_file() or any(inner.is_file() for inner in path.rglob("*"))


def real_tree() -> set[str]:
    """What the whole tree must hold: the package whole, the top level, one level of what users open."""
    expected = {"vqscale/"}
    for path in (ROOT / "vqscale").rglob("*"):
        if "__pycache__" not in path.parts and path.name != "__init__.py" and (path.is_dir() or path.suffix == ".py"):
            expected.add(path.relative_to(ROOT).as_posix() + "/" * path.is_dir())
    for folder in ("configs", "benchmarks", "docs", "examples"):
        inside = [path for path in (ROOT / folder).glob("*") if path.name != "__pycache__" and holds_files(path)]
        expected |= {path.relative_to(ROOT).as_posix() + "/" * path.is_dir() for path in inside}
    return expected


def top_level() -> set[str]:
    """What stands at the top of the repository, without what git ignores."""
    visible = [path for path in ROOT.iterdir() if not path.name.startswith(".") and holds_files(path)]
    ignored = set((ROOT / ".gitignore").read_text().replace("/\n", "\n").split())
    top = {path.name + "/" * path.is_dir() for path in visible}
    return {name for name in top if not any(Path(name.strip("/")).match(word.strip("/")) for word in ignored)}


def test_the_tree_is_the_real_tree() -> None:
    written = written_tree(ARCHITECTURE)
    assert sorted(path for path in written if not (ROOT / path).exists()) == []
    assert sorted(real_tree() - written.keys()) == []
    assert sorted(path for path, words in written.items() if not words) == []
    assert sorted(n for n in top_level() if n not in written and not n.endswith((".md", "LICENSE"))) == []


def test_the_tree_of_the_readme_names_the_real_folders() -> None:
    written = written_tree(README)
    assert sorted(path for path in written if not (ROOT / path).is_dir()) == []
    packages = {f"vqscale/{path.parent.name}/" for path in (ROOT / "vqscale").glob("*/__init__.py")}
    folders = {name for name in top_level() if name.endswith("/")}
    assert sorted((packages | folders) - written.keys()) == []
    assert sorted(path for path, words in written.items() if not words) == []


def test_the_readme_is_short_enough_to_be_read() -> None:
    assert len(README.split()) <= 1_800


def test_links_and_commands_of_the_documents_exist() -> None:
    for document in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        text = document.read_text()
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"
        for path in re.findall(r"\b((?:configs|launch|tests|docs|benchmarks|slurm)/[\w/]+\.(?:yaml|py|md|sh))", text):
            assert (ROOT / path).exists(), f"{document.name} names {path}"
        for target in re.findall(r"`make ([\w-]+)`", text):
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), f"make {target}"


def test_every_module_says_what_it_is_for() -> None:
    for path in (ROOT / "vqscale").rglob("*.py"):
        if path.name != "__init__.py":
            assert ast.get_docstring(ast.parse(path.read_text())), f"{path} has no docstring"


def test_no_test_and_no_benchmark_is_too_long_to_read() -> None:
    sources = [path for folder in ("tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    assert {str(path): count for path in sources if (count := len(path.read_text().splitlines())) > MAX_LINES} == {}


def test_every_folder_of_the_package_keeps_to_its_budget() -> None:
    counts = by_folder()
    assert counts.keys() == CODE_LINES.keys()
    assert {folder: count for folder, count in counts.items() if count > CODE_LINES[folder]} == {}


def test_code_lines_are_counted_without_blanks_comments_and_docstrings() -> None:
    source = (
        '"""Doc.\n\nMore."""\n\nx = 1  # one\n# nothing\ndef f() -> str:\n    """Doc."""\n    return """a\n\nb"""\n'
    )
    assert code_lines(source) == 5


def test_type_checkers_find_the_types_of_an_installed_package() -> None:
    declared = re.search(r"\[tool.setuptools.package-data\]\nvqscale = (\[.*\])", (ROOT / "pyproject.toml").read_text())
    assert declared and "py.typed" in ast.literal_eval(declared[1]) and (ROOT / "vqscale" / "py.typed").is_file()


def test_one_launch_file_per_strategy() -> None:
    files = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / "launch").iterdir()}
    assert files.keys() == set(topology.STRATEGIES)
    assert not any("use_cpu" in content or "mixed_precision" in content for content in files.values())


def test_the_test_tree_mirrors_the_package() -> None:
    """A folder of tests for each folder of the package, and no test file twice in one."""
    folders = {path.name for path in (ROOT / "vqscale").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders <= {path.name for path in (ROOT / "tests").iterdir() if list(path.glob("test_*.py"))}


def defined_names(tree: ast.Module) -> set[str]:
    """Functions and classes of a module, methods as Class.method."""
    names = set()
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return names


def test_the_walks_name_what_exists() -> None:
    walks = re.findall(r"^([\w/]+\.py) +([\w.]+) +\S", ARCHITECTURE.split("## Three walks")[1], re.MULTILINE)
    assert len(walks) > 25
    unknown = [
        f"{path} {name}"
        for path, name in walks
        if name not in defined_names(ast.parse((ROOT / "vqscale" / path).read_text()))
    ]
    assert unknown == []
