"""Tensors on their way from a GPU, which stands in for one here."""

from typing import Any

import pytest
import torch

from vqscale.batch import to_host


class OnGpu(torch.Tensor):
    """A CPU's tensor that says it is a GPU's."""

    is_cuda = property(lambda self: True)  # type: ignore[assignment]


class Stream:
    """The current stream of a GPU: it records whether its event was waited for."""

    waits = 0

    def record_event(self) -> "Stream":
        return self

    def synchronize(self) -> None:
        self.waits += 1


def test_tensors_of_a_cpu_are_not_copied() -> None:
    tensor = torch.arange(3)
    assert to_host({"image": tensor})()["image"] is tensor


def test_tensors_of_a_gpu_are_copied_to_pinned_memory_and_waited_for_only_when_needed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stream, pinned, empty_like = Stream(), list[Any](), torch.empty_like

    def pinned_like(tensor: torch.Tensor, device: str, pin_memory: bool) -> torch.Tensor:
        assert (device, pin_memory) == ("cpu", True)
        pinned.append(empty_like(tensor.as_subclass(torch.Tensor)))  # type: ignore[arg-type]
        return pinned[-1]

    monkeypatch.setattr(torch, "empty_like", pinned_like)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    image = torch.arange(48, dtype=torch.uint8).view(2, 2, 3, 4).permute(0, 3, 1, 2)  # rows of pixels
    arrived = to_host({"image": image.as_subclass(OnGpu)})
    assert stream.waits == 0
    copy = arrived()["image"]
    assert stream.waits == 1 and copy is pinned[0]
    assert torch.equal(copy, image) and copy.stride() == image.stride()
