from pathlib import Path

import numpy as np
import pytest
import torch

from vqscale.data.codes import CodeReader, pack_codes
from vqscale.data.loader import build_loader
from vqscale.data.parts import DecodeError
from vqscale.data.shards import encode_npy

LEVELS = {"top": (2, 2), "bottom": (4, 4)}
PARTS = pack_codes({"top": np.arange(8, dtype=np.uint16).reshape(2, 2, 2), "bottom": np.zeros((2, 4, 4), np.uint16)})


def test_numpy_reads_the_parts(tmp_path: Path) -> None:
    (tmp_path / "top.npy").write_bytes(PARTS["top.npy"])
    read = np.load(tmp_path / "top.npy", allow_pickle=False)
    assert read.dtype == np.uint16 and np.array_equal(read, np.arange(8).reshape(2, 2, 2))


def test_one_sample() -> None:
    sample = CodeReader(LEVELS, views=2)(PARTS, 0, 0)
    assert list(sample) == ["top", "bottom"]
    assert sample["top"].dtype == torch.int32 and sample["top"].tolist() == [[0, 1], [2, 3]]


def test_the_view_is_drawn_by_position() -> None:
    reader, other = CodeReader(LEVELS, views=2, flip=True, seed=3), CodeReader(LEVELS, views=2, flip=True, seed=4)
    views = reader.views(np.arange(1000, dtype=np.uint64))
    assert 400 < views.sum() < 600 and not np.array_equal(views, other.views(np.arange(1000, dtype=np.uint64)))
    for position in range(20):
        assert reader(PARTS, 0, position)["top"][0, 0] == 4 * views[position]


def test_batches_hold_the_right_samples(codes: Path) -> None:
    reader = CodeReader(LEVELS, views=2, flip=True, seed=3, num_codes=4096)
    loader = build_loader(codes, read=reader, global_batch=12, shuffle_window=2, seed=1)
    batches = iter(loader)
    seen = []
    for _ in range(2):
        batch = next(batches)
        assert batch["top"].shape == (12, 2, 2) and batch["bottom"].shape == (12, 4, 4)
        views = torch.from_numpy(reader.views(batch["position"].numpy().astype(np.uint64)))
        assert torch.equal(batch["bottom"][:, 0, 0] - 10, batch["top"][:, 1, 1])
        seen += (batch["top"][:, 0, 0] - views).tolist()
    assert sorted(seen) == [100 * i for i in range(24)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top.npy": encode_npy(np.zeros((1, 2, 2), np.uint16))}, r"<u2 \[1, 2, 2\]"),
        ({"top.npy": encode_npy(np.zeros((2, 2, 2), np.int64))}, "<i8"),
        ({"top.npy": PARTS["top.npy"][:-1]}, "bytes long"),
        ({"top.npy": b"\x93NUMPY"}, "not an .npy file"),
        ({"top.npy": b""}, "not an .npy file"),
        ({"top.npy": PARTS["top.npy"].replace(b"'descr'", b"exit(1)")}, "not an .npy header"),
    ],
)
def test_wrong_parts_do_not_decode(change: dict[str, bytes], message: str) -> None:
    with pytest.raises(DecodeError, match=message):
        CodeReader(LEVELS, views=2)({**PARTS, **change}, 0, 0)


def test_a_missing_level_and_a_code_outside_the_codebook() -> None:
    with pytest.raises(DecodeError, match="no bottom.npy"):
        CodeReader(LEVELS, views=2)({"top.npy": PARTS["top.npy"]}, 0, 0)
    with pytest.raises(DecodeError, match="contains code 3, the codebook has 3"):
        CodeReader(LEVELS, views=2, num_codes=3)(PARTS, 0, 0)


def test_one_bad_sample_of_a_batch_is_the_only_one_replaced() -> None:
    reader = CodeReader(LEVELS, views=2)
    with pytest.raises(DecodeError, match="another header"):
        reader.batch([PARTS, {**PARTS, "top.npy": PARTS["top.npy"].replace(b"False", b"True ")}], [0, 0], [0, 1])
