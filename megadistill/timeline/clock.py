"""The clock of the device that does a process's work: moments that are recorded now and read later.

On an accelerator the host only queues work, so its clock does not show when the work is done. There a moment is an
event in the device's stream, and becomes a time once the device has passed it.
"""

import time
from typing import Any

import torch


class HostClock:
    """The clock of a host that does the work itself. Times are seconds of its monotonic clock, which is the node's."""

    def moment(self) -> Any:
        """Marks the end of the work that is queued so far. Waits for nothing."""
        return time.monotonic()

    def between(self, begin: Any, end: Any) -> float:
        """Seconds from one moment to another. Waits for the device to have passed both."""
        return float(end - begin)

    def seconds(self, moment: Any) -> float:
        """The time of a moment, by the last `anchor`. Waits for the device to have passed it."""
        return float(moment)

    def anchor(self) -> None:
        """Compares the device's clock with the host's: the nearer to the moments, the better. Waits for the device."""


class DeviceClock(HostClock):
    """Events in the current stream of an accelerator. They count milliseconds in float32: 0.1 ms of half an hour."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def moment(self) -> torch.Event:
        event = torch.Event(self._device, enable_timing=True)
        event.record()
        return event

    def between(self, begin: torch.Event, end: torch.Event) -> float:
        end.synchronize()  # the stream has passed `begin` before it
        return float(begin.elapsed_time(end)) / 1000

    def seconds(self, moment: torch.Event) -> float:
        moment.synchronize()
        return self._anchor_seconds + float(self._anchor.elapsed_time(moment)) / 1000

    def anchor(self) -> None:
        torch.accelerator.synchronize(self._device)
        self._anchor = self.moment()
        self._anchor.synchronize()
        self._anchor_seconds = time.monotonic()


def clock_for(device: torch.device) -> HostClock:
    """The host's clock for a CPU, else the device's."""
    return HostClock() if device.type == "cpu" else DeviceClock(device)
