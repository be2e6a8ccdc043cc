"""`vqscale new DIR`: what it copies, and what it leaves alone."""

from pathlib import Path

import pytest

from vqscale import cli
from vqscale.stages import new

ROOT = Path(__file__).parents[2]


def test_a_folder_to_work_in(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "deep" / "work"
    assert cli.main(["new", str(target)]) == 0
    assert capsys.readouterr().out.endswith(f"next: cd {target}; vqscale run configs/demo\n")
    assert sorted(path.name for path in target.iterdir()) == ["configs", "launch", "slurm"]
    for name in ("configs/debug/pack.yaml", "launch/fsdp.yaml", "slurm/pipeline.sh"):
        assert (target / name).read_bytes() == (ROOT / name).read_bytes()
        assert (target / name).stat().st_mode == (ROOT / name).stat().st_mode


def test_what_is_there_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "launch").mkdir()
    assert cli.main(["new", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith(
        f"vqscale: error: {tmp_path / 'launch'} exists already: name a new folder"
    )
    assert [path.name for path in tmp_path.rglob("*")] == ["launch"]


def test_an_installation_without_configs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(new, "__file__", str(tmp_path / "vqscale" / "stages" / "new.py"))
    monkeypatch.setattr(new.metadata, "files", lambda name: None)
    assert cli.main(["new", str(tmp_path / "work")]) == 1
    assert "no configs: install its wheel by pip" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
