"""The debug experiment, run once through the command line; tests look at its folders and go on from copies."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.stages import CHAIN, run_stage


@pytest.fixture(scope="session")
def whole_chain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """`runs/debug` after all stages."""
    root = tmp_path_factory.mktemp("chain")
    before = os.getcwd()
    os.chdir(root)
    try:
        for stage, name in CHAIN:
            assert run_stage(stage, name) == 0, name
    finally:
        os.chdir(before)
    yield root / "runs" / "debug"


@pytest.fixture
def chain(whole_chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the chain's runs that the test may change, in its current folder."""
    shutil.copytree(whole_chain, tmp_path / "runs" / "debug")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs" / "debug"


@pytest.fixture
def files() -> Callable[[Path], dict[str, bytes]]:
    """All tars, indexes and descriptions below a folder, as bytes."""

    def read(folder: Path) -> dict[str, bytes]:
        kinds = ("*.tar", "*.safetensors", "dataset.json")
        return {str(p.relative_to(folder)): p.read_bytes() for kind in kinds for p in sorted(folder.rglob(kind))}

    return read
