"""What a loader yields.

In: nothing.  Out: `Batch`, the one type of a batch, made by `data.loader.TarDataset`.
Letters: b samples, R resolution, h and w a level's code grid.
"""

from collections.abc import Callable, Mapping
from typing import TypedDict, cast

import torch
from jaxtyping import Float, Float64, Int, UInt8
from torch import Tensor

WITHOUT_FLOAT64 = ("mps",)  # kinds of devices; it is Apple's


class Batch(TypedDict, total=False):
    """Images or codes of b samples. Training batches have no `weight`; one level has no `middle` and no `bottom`."""

    image: UInt8[Tensor, "b 3 R R"]
    top: Int[Tensor, "b h w"]
    middle: Int[Tensor, "b h w"]
    bottom: Int[Tensor, "b h w"]
    label: Int[Tensor, "b"]
    position: Int[Tensor, "b"]  # in the stream, over epochs
    bad: UInt8[Tensor, "b"]  # 0, or why the sample was replaced: 1 + its index in `data.parts.BAD_KINDS`
    weight: Float[Tensor, "b"]  # 1 for a sample that counts, 0 for padding and for one that was replaced
    errors: list[tuple[int, int, str]]  # (position, bad, reason); the loader takes it out and writes it to bad.jsonl


def codes_of(batch: Batch, level: str) -> Int[Tensor, "b h w"]:
    """The codes of the level with this name."""
    return batch[level]  # type: ignore[literal-required]


def to_device(batch: Batch, device: torch.device, non_blocking: bool = False) -> Batch:
    """The batch on `device`, without `errors`; `bad` stays on the CPU, where it is counted."""
    moved = {
        name: value if name == "bad" else value.to(device, non_blocking=non_blocking)
        for name, value in batch.items()
        if isinstance(value, Tensor)
    }
    return cast(Batch, moved)


def float64_device(device: torch.device) -> torch.device:
    """Where float64 numbers of this device are kept: on it, or on the CPU if it has none."""
    return torch.device("cpu") if device.type in WITHOUT_FLOAT64 else device


def as_float64(tensor: Tensor) -> Float64[Tensor, "..."]:
    """In float64, on `float64_device` of its device."""
    return tensor.to(float64_device(tensor.device)).double()


def to_host(tensors: Mapping[str, Tensor]) -> Callable[[], dict[str, Tensor]]:
    """Begin to copy a GPU's tensors to pinned memory, once they are computed; a CPU's stay where they are.

    The function that is returned waits for the copies, in any thread, and returns them in the layout of the tensors.
    """
    if not any(tensor.is_cuda for tensor in tensors.values()):
        return lambda: dict(tensors)
    copies = {name: torch.empty_like(tensor, device="cpu", pin_memory=True) for name, tensor in tensors.items()}
    for name, copy in copies.items():
        copy.copy_(tensors[name], non_blocking=True)
    copied = torch.cuda.current_stream().record_event()

    def arrived() -> dict[str, Tensor]:
        copied.synchronize()
        return copies

    return arrived
