"""A rank's state in host memory that is kept from save to save, where a thread writes it to the disk.

On an accelerator the memory is pinned and the copies are queued on a stream of their own: the host goes on at once, and
the device's stream waits for them, so that no later work of the run changes what is copied. The run pays for the copies
at the speed of the link. Without one, and for tensors that are on the host (an offloaded optimizer), they are plain.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BUFFER_BYTES = 256 << 20
"""Size of a buffer. torch rounds pinned memory up to a power of two: one for all tensors might take twice the bytes."""
ALIGNMENT = 64
"""Bytes: a tensor begins at a multiple."""


@dataclass(frozen=True)
class HostState:
    """The copies of one save."""

    tensors: dict[str, Tensor]
    done: Any = None
    """The event behind the copies; None: they are done."""

    def wait(self) -> dict[str, Tensor]:
        """The tensors, when the copies are done. For the thread that reads them."""
        if self.done is not None:
            self.done.synchronize()
        return self.tensors


class HostCopies:
    """Memory for the copies, allocated by the first save: some more than the bytes of the state.

    One save has it at a time: start the next one when the last one is written.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pinned = device.type != "cpu"
        self._stream = torch.Stream(device) if self._pinned else None
        self._buffers: list[Tensor] = []

    def start(self, state: Mapping[str, Tensor]) -> HostState:
        """Starts to copy the tensors, which the run may change by work that it queues from here on."""
        copies = self._places(state)
        near = {key: tensor for key, tensor in state.items() if tensor.device.type == "cpu"}
        far = {key: tensor for key, tensor in state.items() if key not in near}
        for key, tensor in near.items():
            copies[key].copy_(tensor)
        if not far:
            return HostState(copies)
        assert self._stream is not None, f"tensors on {next(iter(far.values())).device} of a run on {self._device}"
        current = torch.accelerator.current_stream(self._device)
        self._stream.wait_stream(current)
        with self._stream:
            for key, tensor in far.items():
                copies[key].copy_(tensor, non_blocking=True)
        done = self._stream.record_event()
        current.wait_event(done)
        return HostState(copies, done)

    def _places(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Memory for each tensor, in the order of the state: the same places in every save of the same shapes."""
        places, number, used = {}, 0, 0
        for key, tensor in state.items():
            size = tensor.numel() * tensor.element_size()
            if number < len(self._buffers) and used + size > self._buffers[number].numel():
                number, used = number + 1, 0
            if number == len(self._buffers):
                bytes_ = max(size, min(BUFFER_BYTES, _bytes_from(key, state)))
                self._buffers.append(torch.empty(bytes_, dtype=torch.uint8, pin_memory=self._pinned))
            elif self._buffers[number].numel() < size:  # of a state with other shapes
                self._buffers[number] = torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned)
            place = self._buffers[number][used : used + size]
            places[key] = place.view(tensor.dtype).view(tensor.shape)
            used += math.ceil(size / ALIGNMENT) * ALIGNMENT
        return places


def _bytes_from(first: str, state: Mapping[str, Tensor]) -> int:
    """Bytes of the tensors from this one on."""
    keys = list(state)
    left = (state[key] for key in keys[keys.index(first) :])
    return sum(math.ceil(tensor.numel() * tensor.element_size() / ALIGNMENT) * ALIGNMENT for tensor in left)
