"""A double of a device for tests of clocks: a stream that works through a queue, and a host that is ahead of it."""

from typing import Any

import pytest
import torch


class SimulatedDevice:
    """Times are seconds of one clock, which stands still but for the work that is queued and waited for."""

    def __init__(self) -> None:
        self.host = 0.0
        """The time of the host, which queues work at no cost."""
        self.stream = 0.0
        """The time at which the stream has done what is queued."""
        self.waits = 0
        """Number of times that the host waited for the stream."""

    def queue(self, seconds: float) -> None:
        """Work of the stream, which begins when it has done what is queued before."""
        self.stream = max(self.stream, self.host) + seconds

    def host_works(self, seconds: float) -> None:
        self.host += seconds

    def synchronize(self, *_: Any) -> None:
        """The host waits until the queue is empty, as where it reads a number of the device."""
        self.waits += 1
        self.host = max(self.host, self.stream)

    def patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Makes torch's events those of this stream, and the host's clocks those of this host."""
        device = self

        class Event:
            def __init__(self, _: torch.device, *, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = max(device.stream, device.host)

            def synchronize(self) -> None:
                if self.at > device.host:  # else the stream has passed it, and the call returns at once
                    device.waits += 1
                    device.host = self.at

            def elapsed_time(self, later: "Event") -> float:
                assert later.at <= device.host, "the stream has not passed it yet"
                return 1000 * (later.at - self.at)

        monkeypatch.setattr(torch, "Event", Event)
        monkeypatch.setattr(torch.accelerator, "synchronize", self.synchronize)
        for clock in ("monotonic", "perf_counter"):
            monkeypatch.setattr(f"time.{clock}", lambda: device.host)
