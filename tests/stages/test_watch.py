"""`vqscale watch`: what it shows of a run that goes on, of one that ended, and as a picture."""

import io
import json
import os
import socket
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from vqscale import cli
from vqscale.files import write_json
from vqscale.stages import watch


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run of its own: half of 1,000 images seen, at 50 images per second, on this very process."""
    folder = tmp_path / "run"
    (folder / "samples").mkdir(parents=True)
    for name in ("000000000100.png", "000000000500.png"):
        (folder / "samples" / name).write_bytes(b"")
    os.utime(folder / "samples" / "000000000100.png", (1, 1))
    (folder / "config.yaml").write_text("total_images: 1000\n")
    write_json(folder / "command.json", {"strategy": "ddp", "world_size": 2, "device": "cpu"})
    lines = [
        {"images_seen": 100, "loss": 4.0, "images_per_second": 40.0, "nll/top": 4.0},
        {"images_seen": 500, "held_out/nll/top": 2.5, "loss": None},
        {"images_seen": 500, "loss": 2.0, "images_per_second": 50.0, "nll/top": 2.0},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"torn')
    stand(folder, "running", 500)
    return folder


def stand(folder: Path, state: str, images_seen: int, reason: str = "") -> None:
    status = {"state": state, "images_seen": images_seen, "reason": reason}
    write_json(folder / "status.json", status | {"host": socket.gethostname(), "pid": os.getpid()})


def shown(run_dir: Path, *words: str, sleep=None) -> str:
    console = Console(file=io.StringIO(), width=100)
    watch.main(watch.load([str(run_dir), *words]), console=console, sleep=sleep or pytest.fail)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_run_at_a_glance(run_dir: Path) -> None:
    text = shown(run_dir, "once=true")
    assert "running" in text and "500 of 1,000 images (50%)" in text and "ddp, 2 x cpu" in text
    assert "50 images/s" in text and "0:00:10 to go" in text
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.strip()}
    assert rows["loss"] == ["█▁", "2", "4", "2"] and rows["held_out/nll/top"] == ["▁", "2.5", "2.5", "2.5"]
    assert list(rows).index("nll/top") < list(rows).index("held_out/nll/top") < list(rows).index("images_per_second")
    assert str(run_dir / "samples" / "000000000500.png") in text and "100.png" not in text


def test_it_follows_the_run_to_its_end(run_dir: Path) -> None:
    looks = iter([("running", 700), ("stopped", 800), ("running", 900), ("done", 1000)])
    text = shown(run_dir, sleep=lambda seconds: stand(run_dir, *next(looks)))
    assert "1,000 of 1,000 images (100%)" in text and "done" in text
    assert next(looks, None) is None


def test_a_run_that_has_failed_says_why_and_ends(run_dir: Path) -> None:
    stand(run_dir, "failed", 500, "ValueError: the disk is full")
    assert "the disk is full" in shown(run_dir)


def test_a_run_that_has_only_begun(run_dir: Path) -> None:
    (run_dir / "metrics.jsonl").unlink()
    (run_dir / "config.yaml").unlink()
    stand(run_dir, "running", 0)
    assert "0 images" in shown(run_dir, "once=true")
    with pytest.raises(ValueError, match="no metrics to draw yet"):
        shown(run_dir, "png=x.png")


def test_curves_as_a_picture(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "curves.png"
    assert cli.main(["watch", str(run_dir), "--png", str(picture)]) == 0
    assert "4 curves of" in capsys.readouterr().out
    with Image.open(picture) as image:
        assert image.format == "PNG" and image.width > 900
        assert len(image.convert("L").getcolors() or []) > 10


def test_the_command_line(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["watch", str(run_dir), "--once"]) == 0
    assert "500 of 1,000 images" in capsys.readouterr().out
    assert cli.main(["watch", str(tmp_path / "none"), "--once"]) == 1
    assert "none: no run there (no status.json)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "expected"),
    [([1, 1], "▁▁"), ([0, 7], "▁█"), (list(range(8)), "▁▂▃▄▅▆▇█"), ([0] * 50 + [1] * 50, "▁" * 12 + "█" * 12)],
)
def test_sparklines(values: list[float], expected: str) -> None:
    assert watch.sparkline(values) == expected


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("status.json", "{", "unreadable"),
        ("status.json", '{"images_seen": "many"}', "unreadable"),
        ("config.yaml", "total_images: [", "not valid YAML"),
        ("metrics.jsonl", '{"images_seen": 5, "loss": NaN}\n{"images_seen": 9, "loss": 2}\n', "×▁"),
        ("metrics.jsonl", '{"images_seen": 5, "loss": NaN}\n{"images_seen": 5, "[/x]\\u001b": 2}\n', "[/x]\\x1b"),
        ("metrics.jsonl", '{"images_seen": 5, "images_per_second": "x"}\n{"images_seen": "x", "loss": 2}\n', "running"),
    ],
)
def test_a_damaged_file_is_shown_as_what_it_is(run_dir: Path, name: str, text: str, words: str) -> None:
    (run_dir / name).write_text(text)
    assert words in " ".join(shown(run_dir, "once=true").split())  # a long path of the folder breaks lines elsewhere
