"""Files are replaced whole, or not at all."""

import json
import os
from pathlib import Path

import pytest

from vqscale import files


def test_a_file_is_replaced_whole_and_durably(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, events = tmp_path / "a.txt", []
    real_fsync, real_replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (events.append("fsync"), real_fsync(descriptor)))
    monkeypatch.setattr(os, "replace", lambda *names: (events.append("replace"), real_replace(*names)))
    files.write_atomically(path, "ü")
    assert path.read_bytes() == "ü".encode()
    assert events == ["fsync", "replace", "fsync"]


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    files.write_atomically(path, b"old")
    with pytest.raises(RuntimeError), files.replacing(path) as temporary:
        temporary.write_bytes(b"ne")
        raise RuntimeError
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"a": [float("-inf")]}])
def test_json_has_no_nan(tmp_path: Path, value: object) -> None:
    with pytest.raises(ValueError):
        files.write_json(tmp_path / "a.json", value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff", b"null"])
def test_a_json_file_that_holds_no_object_reads_as_empty(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    assert files.read_json(tmp_path / "a.json") == {}
    assert files.read_json(tmp_path / "missing.json") == {}


def test_json_lines_skip_torn_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": \n\xff\n[3]\n{"a": 4}\n{"a"')
    assert [line["a"] for line in files.read_jsonl(path)] == [1, 4]
    path.write_text("".join(json.dumps({"a": n}) + "\n" for n in range(100)))
    assert [line["a"] for line in files.read_jsonl(path, last_bytes=25)] == [98, 99]
    assert list(files.read_jsonl(tmp_path / "missing.jsonl")) == []


def test_the_checksum_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert files.sha256_of(tmp_path / "a").startswith("ba7816bf8f01cfea")


def test_a_seal_tells_an_edited_file(tmp_path: Path) -> None:
    path, value = tmp_path / "a.json", {"b": [1, 2.5], "a": "é"}
    files.write_json(path, files.sealed(value))
    assert files.check_seal(path, files.read_json(path)) == value
    path.write_text(path.read_text().replace("2.5", "2.6"))
    with pytest.raises(ValueError, match="a.json: was damaged, or was edited"):
        files.check_seal(path, files.read_json(path))
    renamed = {name.replace("check", "cheek"): entry for name, entry in files.sealed(value).items()}
    with pytest.raises(ValueError, match="stands under 'cheeksum'"):
        files.check_seal(path, renamed)
    assert files.check_seal(path, value) == value  # as older files are
