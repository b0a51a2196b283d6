"""The device of a check: the only module with calls that need CUDA, and a twin of each on a CPU.

The twin has the same results in kind (seconds, bytes, counts), so that each check runs through its own lines on a
machine without a GPU.
"""

import gc
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from typing_extensions import override

from benchmarks.measure import peak

Run = Callable[[], object]


class NotMeasurable(Exception):
    """The check has no answer on this device: one line that says why."""


class Device(ABC):
    """A device, its clock, its memory and its kernels."""

    stand_in: bool
    torch_device: torch.device
    memory_bytes: int

    @abstractmethod
    def synchronize(self) -> None:
        """Waits for all work of the device."""

    @abstractmethod
    def seconds(self, run: Run) -> float:
        """Seconds of a call on the device."""

    @abstractmethod
    def peak_bytes(self, run: Run) -> int:
        """Peak of the device's memory during a call, above what was allocated before it."""

    @abstractmethod
    def kernels(self, run: Run) -> int:
        """Kernels that a call starts, copies and fills aside. On a CPU: operators that would be kernels."""

    @abstractmethod
    @contextmanager
    def syncs_are_errors(self) -> Iterator[None]:
        """A wait of the host for the device raises RuntimeError in this context; on a CPU nothing does."""

    @abstractmethod
    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function through torch.compile; on a CPU the function itself."""

    @abstractmethod
    def compiling(self) -> AbstractContextManager[Any]:
        """In this context torch.compile compiles; on a CPU it does not."""

    def random(self, *shape: int, deviation: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(*shape, device=self.torch_device, dtype=torch.float32).mul_(deviation).to(dtype)

    def size(self, on_gpu: int, stand_in: int) -> int:
        """A size of a case, small where a CPU stands in."""
        return stand_in if self.stand_in else on_gpu

    def medians(self, runs: Mapping[str, Run], *, repeats: int, warm_up: int = 2) -> dict[str, float]:
        """Median seconds of each, in turn, so that a device that changes its clock changes it for all."""
        for run in runs.values():
            for _ in range(1 if self.stand_in else warm_up):
                run()
        times: dict[str, list[float]] = {name: [] for name in runs}
        for repeat in range(2 if self.stand_in else repeats):
            for name in list(runs) if repeat % 2 == 0 else reversed(list(runs)):
                times[name].append(self.seconds(runs[name]))
        return {name: statistics.median(values) for name, values in times.items()}

    def free(self) -> None:
        """Gives the allocator's unused memory back."""
        gc.collect()


class CudaDevice(Device):
    """The first CUDA device."""

    stand_in = False

    def __init__(self) -> None:
        self.torch_device = torch.device("cuda", 0)
        torch.cuda.set_device(self.torch_device)
        self.memory_bytes = torch.cuda.get_device_properties(self.torch_device).total_memory

    @override
    def synchronize(self) -> None:
        torch.cuda.synchronize()

    @override
    def seconds(self, run: Run) -> float:
        start, end = (torch.Event(device=self.torch_device, enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        result = run()
        end.record()
        torch.cuda.synchronize()
        del result
        return float(start.elapsed_time(end)) / 1e3

    @override
    def peak_bytes(self, run: Run) -> int:
        gc.collect()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = run()
        torch.cuda.synchronize()
        del result
        return int(torch.cuda.max_memory_allocated()) - int(before)

    @override
    def kernels(self, run: Run) -> int:
        events = _profiled(run, [ProfilerActivity.CPU, ProfilerActivity.CUDA], self.synchronize)
        on_device = [event for event in events if event.device_type.name == "CUDA"]
        names = [event.name for event in on_device if not event.is_user_annotation]  # of compiled regions
        return sum(not name.startswith(("Memcpy", "Memset")) for name in names)

    @override
    @contextmanager
    def syncs_are_errors(self) -> Iterator[None]:
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    @override
    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(function, dynamic=False)

    @override
    def compiling(self) -> AbstractContextManager[Any]:
        return nullcontext()

    @override
    def free(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()


class StandIn(Device):
    """A CPU in the device's place: wall-clock seconds, resident memory, operators in place of kernels."""

    stand_in = True
    memory_bytes = 1 << 30

    def __init__(self) -> None:
        self.torch_device = torch.device("cpu")

    @override
    def synchronize(self) -> None:
        pass

    @override
    def seconds(self, run: Run) -> float:
        start = time.perf_counter()
        result = run()
        end = time.perf_counter()
        del result
        return end - start

    @override
    def peak_bytes(self, run: Run) -> int:
        return peak(run)

    @override
    def kernels(self, run: Run) -> int:
        events = _profiled(run, [ProfilerActivity.CPU], self.synchronize)
        parents = [(event.name, event.cpu_parent.name if event.cpu_parent else "") for event in events]
        return sum(name.startswith("aten::") and not parent.startswith("aten::") for name, parent in parents)

    @override
    @contextmanager
    def syncs_are_errors(self) -> Iterator[None]:
        yield

    @override
    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return function

    @override
    def compiling(self) -> AbstractContextManager[Any]:
        stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
        return stance


def _profiled(run: Run, activities: Sequence[ProfilerActivity], synchronize: Callable[[], None]) -> list[Any]:
    """The profiler's events of a call."""
    with profile(activities=activities) as profiler:
        result = run()
        synchronize()
    del result
    return list(profiler.events() or ())


def open_device(*, stand_in: bool) -> Device:
    """
    Raises:
        NotMeasurable: there is no CUDA device.
    """
    if stand_in:
        return StandIn()
    if not torch.cuda.is_available():
        raise NotMeasurable(f"torch {torch.__version__} sees no CUDA device")
    return CudaDevice()
