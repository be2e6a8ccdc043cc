"""The counter of file-system calls counts each kind, in threads and forked children, and only where it should."""

import os
import threading
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file
from support.file_calls import counted


def test_each_kind_of_call_is_counted(tmp_path: Path) -> None:
    with counted(tmp_path) as calls:
        path = tmp_path / "a"
        path.write_bytes(b"12345")
        assert path.is_file() and os.path.exists(path) and path.stat().st_size == 5
        assert os.listdir(tmp_path) == ["a"] and list(tmp_path.iterdir()) == [path]
        descriptor = os.open(path, os.O_RDONLY)
        assert os.pread(descriptor, 3, 1) == b"234"
        os.close(descriptor)
        os.replace(path, tmp_path / "b")
    assert calls.by_kind() == {"open": 2, "stat": 3, "list": 2, "read": 1, "change": 1} and calls.total == 9
    assert calls.bytes_written >= 5 and calls.seconds > 0
    (tmp_path / "b").stat()
    assert calls.of("stat") == 3  # the block has ended


def test_only_the_folders_asked_for_are_counted_and_blocks_nest(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    with counted(inside) as one, counted() as every:
        inside.mkdir()
        outside.mkdir()
    assert (one.total, every.of("change")) == (1, 2)


def test_threads_children_and_native_opens_count(tmp_path: Path) -> None:
    save_file({"a": np.zeros(3)}, tmp_path / "x.safetensors")
    with counted(tmp_path) as calls:
        thread = threading.Thread(target=os.listdir, args=(tmp_path,))
        thread.start()
        thread.join()
        if not (child := os.fork()):
            os.stat(tmp_path)
            os._exit(0)
        os.waitpid(child, 0)
        with safe_open(tmp_path / "x.safetensors", "np") as file:
            file.keys()
    assert calls.by_kind() == {"open": 1, "stat": 1, "list": 1}
