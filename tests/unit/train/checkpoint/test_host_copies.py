"""Copies of the state in memory that is kept: the same bytes, in the same place, and in the right order of events."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megadistill.train.checkpoint import host_copies
from megadistill.train.checkpoint.format import rank_file, write_rank
from megadistill.train.checkpoint.host_copies import HostCopies
from tests.device_double import DEVICE, DeviceDouble, DeviceTensor

CPU = torch.device("cpu")


def _state(seed: int, device: torch.device = CPU) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state = {
        "optimizer_step": torch.tensor([float(seed)]),
        "master/w": torch.randn(7, generator=generator),
        "master/none": torch.empty(0),
        "master/large": torch.randn(400, generator=generator),
        "rng": torch.arange(5, dtype=torch.uint8),
        "half": torch.randn(3, 3, generator=generator).bfloat16(),
    }
    return {key: tensor.to(device) for key, tensor in state.items()}


def _changes(state: dict[str, Tensor]) -> None:
    for tensor in state.values():
        tensor.zero_()


@pytest.mark.parametrize("size", [256 << 20, 128], ids=["one buffer", "a buffer for some"])
def test_what_is_written_is_the_state_at_the_call_from_the_same_memory_each_time(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_copies, "BUFFER_BYTES", size)
    copies = HostCopies(CPU)
    places = []
    for seed in (1, 2):
        state = _state(seed)
        saved = copies.start(state)
        _changes(state)
        write_rank(tmp_path, saved.wait(), rank=0, world=1)
        read = load_file(tmp_path / rank_file(0, 1))
        assert list(saved.tensors) == list(state)
        assert read.keys() == state.keys()
        assert all(torch.equal(read[key], tensor) for key, tensor in _state(seed).items())
        places.append([tensor.data_ptr() for tensor in saved.tensors.values()])
    assert places[0] == places[1], "no memory of its own"
    assert len(copies._buffers) == (1 if size > 128 else 3)


def test_a_state_that_has_grown_gets_more_memory() -> None:
    copies = HostCopies(CPU)
    for width in (4, 4000, 40):
        state = {"a": torch.full((width,), 1.0), "b": torch.full((width,), 2.0)}
        saved = copies.start(state).wait()
        assert all(torch.equal(saved[key], tensor) for key, tensor in state.items())


class _Event:
    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def synchronize(self) -> None:
        self.log.append(f"host waits for {self.name}")


class _Stream:
    """A stream that runs nothing: it records what is asked of it."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def __enter__(self) -> None:
        self.log.append(f"enter {self.name}")

    def __exit__(self, *_: Any) -> None:
        self.log.append(f"leave {self.name}")

    def wait_stream(self, other: "_Stream") -> None:
        self.log.append(f"{self.name} waits for {other.name}")

    def record_event(self) -> _Event:
        self.log.append(f"event on {self.name}")
        return _Event(f"event on {self.name}", self.log)

    def wait_event(self, event: _Event) -> None:
        self.log.append(f"{self.name} waits for {event.name}")


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What streams of the device were asked for, in order."""
    log: list[str] = []
    monkeypatch.setattr(torch, "Stream", lambda device: _Stream("side", log))
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: _Stream("main", log))
    return log


@contextmanager
def _logged_copies(log: list[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    copy: Callable[..., Tensor] = Tensor.copy_

    def logged(to: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        log.append(f"copy {source.numel()}{' queued' if non_blocking else ''}")
        return copy(to, source, non_blocking)

    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "copy_", logged)
        yield


def test_on_a_device_copies_are_queued_behind_the_step_and_before_the_next_one(
    log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with DeviceDouble() as double:
        state = {**_state(1, DEVICE), "rng": torch.arange(5, dtype=torch.uint8)}
        copies = HostCopies(DEVICE)
        double.clear()
        with _logged_copies(log, monkeypatch):
            saved = copies.start(state)
        assert double.syncs == [], "pinned memory, and nothing that the host waits for"
        assert len(double.queued) == 5
        assert log == [
            "copy 5",  # the host's own, at once
            "side waits for main",
            "enter side",
            *(f"copy {size} queued" for size in (1, 7, 0, 400, 9)),
            "leave side",
            "event on side",
            "main waits for event on side",
        ]
        _changes(state)
        read = saved.wait()
        assert log[-1] == "host waits for event on side", "before the thread reads"
        assert all(double.is_pinned(tensor) or tensor.numel() == 0 for tensor in read.values())
        assert not any(isinstance(tensor, DeviceTensor) for tensor in read.values())
    assert all(torch.equal(read[key], tensor) for key, tensor in _state(1).items())
