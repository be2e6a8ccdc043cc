"""Imports go one way, and every third-party library with a door has one."""

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "vqscale"
BASE = {
    "fields",
    "files",
    "text",
    "batch",
    "rundir",
    "streams",
    "progress",
    "stopping",
    "config",
    "seeding",
    "topology",
    "lock",
    "memory",
    "rollcall",
    "waiting",
    "watchdog",
    "versions",
    "trackers",
    "runtime",
}
MAY_IMPORT = {part: BASE | {part} for part in ("data", "models", "engine")}
MAY_IMPORT["sources"] = BASE | {"data", "models", "engine"}
MAY_IMPORT["evaluation"] = MAY_IMPORT["sources"] | {"sources", "evaluation"}
MAY_IMPORT["training"] = MAY_IMPORT["evaluation"] - {"evaluation"}
MAY_IMPORT["hub"] = BASE | {"models"}
MAY_IMPORT["stages"] = MAY_IMPORT["evaluation"] | {"training", "hub"}
MAY_IMPORT["stages/run"] = MAY_IMPORT["stages/sizing"] = MAY_IMPORT["stages"] | {"stages"}  # they run and size stages
MAY_IMPORT["stages/plan"] = MAY_IMPORT["stages"] | {"stages"}  # it reads the trainers' configs
MAY_IMPORT["stages/completion"] = MAY_IMPORT["stages"] | {"stages"}  # it reads all Configs
MAY_IMPORT["stages/tune_sampling"] = MAY_IMPORT["stages"] | {"stages"}  # it samples as the stage does
MAY_IMPORT["api"] = MAY_IMPORT["stages"] | {"stages"}  # it samples as the stage does
MAY_IMPORT |= {
    "files": set(),
    "text": set(),
    "batch": set(),
    "rundir": {"files", "config"},
    "streams": set(),
    "progress": set(),
    "stopping": {"topology"},
    "fields": {"text"},
    "config": {"fields", "text"},
    "seeding": set(),
    "topology": {"config", "text"},
    "memory": {"config", "topology"},
    "lock": {"files", "text", "rundir"},
    "versions": set(),
    "waiting": {"topology"},
    "rollcall": {"topology"},
    "watchdog": {"topology", "files", "rollcall"},
}
MAY_IMPORT["trackers"] = {"config", "files", "rundir", "text", "topology"}
MAY_IMPORT |= {"runtime": BASE - {"seeding"}}
MAY_IMPORT |= {"cli": BASE | {"stages"}, "__main__": {"cli"}, "__init__": {"api"}}
DOORS = {
    "accelerate": "trackers.py",
    "deepspeed": "engine/zero.py",
    "webdataset": "data/",
    "fsspec": "data/remote.py",
    "torch_fidelity": "evaluation/",
    "lpips": "evaluation/features.py",
    "huggingface_hub": "hub.py",
}


def modules() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE).as_posix(), ast.parse(path.read_text())


def imports(tree: ast.AST) -> set[str]:
    """Dotted names of imported modules; `from vqscale import config` counts as vqscale.config."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            found |= {f"vqscale.{a.name}" for a in node.names} if node.module == "vqscale" else {node.module or ""}
    return found - {"vqscale.__version__"}


def test_imports_go_one_way() -> None:
    wrong = []
    for path, tree in modules():
        whole = path.removesuffix(".py")
        part = whole if whole in MAY_IMPORT else whole.split("/")[0]
        for name in sorted(name for name in imports(tree) if name.startswith("vqscale.")):
            if name.split(".")[1] not in MAY_IMPORT[part]:
                wrong.append(f"{path} imports {name}")
    assert wrong == []


def test_every_library_comes_in_through_its_door() -> None:
    wrong = [
        f"{path} imports {name}"
        for path, tree in modules()
        for name in imports(tree)
        if not path.startswith(DOORS.get(name.split(".")[0], path))
    ]
    assert wrong == []


def test_no_function_imports_the_package() -> None:
    wrong = [
        f"{path}, {node.name}: {name}"
        for path, tree in modules()
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        for name in imports(node)
        if name.startswith("vqscale")
    ]
    assert wrong == []


def imported_modules(tree: ast.Module, known: set[str]) -> set[str]:
    """The package's own modules that a module imports: `from vqscale.data import shards` is vqscale.data.shards."""
    names = imports(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names & known


def test_no_circle_of_imports() -> None:
    """Modules that import nothing but what is settled are settled, until none is left."""
    trees = {"vqscale." + path.removesuffix(".py").replace("/", "."): tree for path, tree in modules()}
    waiting = {name: imported_modules(tree, trees.keys()) - {name} for name, tree in trees.items()}
    while settled := {name for name, needs in waiting.items() if not needs & waiting.keys()}:
        waiting = {name: needs for name, needs in waiting.items() if name not in settled}
    assert waiting == {}
