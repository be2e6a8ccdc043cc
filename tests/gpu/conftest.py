"""What libraries read once, before the first of these tests starts CUDA, and true fp32 unless a test says otherwise."""

import os

import pytest

from vqscale.topology import set_arithmetic

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for `deterministic=true` in a process that lives on
os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")  # one rank needs no network


@pytest.fixture(autouse=True)
def true_fp32() -> None:
    """As every stage sets it; torch's own default is TF32 for convolutions."""
    set_arithmetic("", deterministic=False)
