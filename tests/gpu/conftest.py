"""What libraries read once, before the first of these tests starts CUDA."""

import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for `deterministic=true` in a process that lives on
os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")  # one rank needs no network
