"""Measurement of time and memory.

Time is measured in rounds: each round runs every contender once, in alternating order, and a ratio is that of two times
of one round. A machine that slows down for a while slows both.
"""

import ctypes
import gc
import multiprocessing
import os
import socket
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from megadistill.distributed.launch import Launch
from megadistill.distributed.topology import Topology, process_groups

Run = Callable[[], object]

_fresh = multiprocessing.get_context("spawn")
"""Processes that share nothing with this one: no warm caches, no memory."""


@dataclass(frozen=True)
class Spread:
    """Median, minimum and maximum of measurements."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        return cls(statistics.median(values), min(values), max(values))

    @classmethod
    def of_ratios(cls, above: list[float], below: list[float]) -> "Spread":
        """The spread of the ratios of two times of each round."""
        return cls.of([a / b for a, b in zip(above, below, strict=True)])


def seconds(run: Run, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of one call, or the float that it returns; another result is dropped after the clock stops."""
    start = clock()
    result = run()
    stop = clock()
    if isinstance(result, float):
        return result
    del result
    return stop - start


def rounds(contenders: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """`repeats` times of each contender, interleaved. Contenders are warm, and return their seconds."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    gc.collect()
    gc.disable()
    try:
        for repeat in range(repeats):
            names = list(contenders)
            for name in names if repeat % 2 == 0 else reversed(names):
                times[name].append(contenders[name]())
    finally:
        gc.enable()
    return times


def available_memory() -> int:
    """Bytes of memory that are available without swapping."""
    return 1024 * _field("/proc/meminfo", "MemAvailable")


def peak(run: Run) -> int:
    """Peak of a call's resident memory in bytes, above the resident memory before it.

    Linux alone.
    """
    before = reset_high_water()
    result = run()
    highest = high_water()
    del result
    return highest - before


def reset_high_water() -> int:
    """Sets the high-water mark of resident memory back to what is resident now, and returns that, in bytes."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # or memory that the warm-up freed would be reused, and not counted
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return 1024 * _field("/proc/self/status", "VmRSS")


def high_water() -> int:
    """Bytes of resident memory at its highest since `reset_high_water`."""
    return 1024 * _field("/proc/self/status", "VmHWM")


def _field(file: str, name: str) -> int:
    """A field of a /proc file, in kB."""
    for line in Path(file).read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise OSError(f"{file} has no {name}; memory is measured on Linux alone")


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of `function(*arguments)` in a new process; `function` is at the top level of its module.

    Raises:
        RuntimeError: it failed there, with its traceback, or the process died.
    """
    ours, theirs = _fresh.Pipe()
    process = _fresh.Process(target=_answer, args=(theirs, function, arguments), daemon=True)
    process.start()
    theirs.close()
    try:
        failure, result = ours.recv()
    except EOFError:
        failure, result = "it died without an error (out of memory?)", None
    process.join()
    if failure is not None:
        raise RuntimeError(f"{function.__name__} failed in its own process:\n{failure}")
    return result


def _answer(pipe: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        pipe.send((None, function(*arguments)))
    except BaseException:
        pipe.send((traceback.format_exc(), None))


@contextmanager
def ranks(
    world: int,
    make: Callable[..., Mapping[str, Run]],
    *arguments: Any,
    vocab_group: int | None = None,
    replicas: int = 1,
) -> Iterator[Callable[[str], float]]:
    """Processes of one thread each, joined by gloo; yields `time(name)`: the slowest one's seconds for that run.

    `make(topology, *arguments)`, at the top level of its module, gives each rank its runs by name.
    `vocab_group`: ranks of a vocab group; None: all. `replicas`: of the student.
    """
    groups: dict[str, Any] = {"vocab_group": vocab_group or world, "replicas": replicas}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pipes, processes = [], []
    for rank in range(world):
        ours, theirs = _fresh.Pipe()
        process = _fresh.Process(target=_serve, args=(rank, world, port, theirs, groups, make, arguments), daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)

    def slower(name: str) -> float:
        for pipe in pipes:
            pipe.send(name)
        slowest = 0.0
        for pipe in pipes:
            answer = pipe.recv()
            if isinstance(answer, str):
                raise RuntimeError(f"a rank failed:\n{answer}")
            slowest = max(slowest, answer)
        return slowest

    try:
        yield slower
        for pipe in pipes:
            pipe.send(None)
        for process in processes:
            process.join()
    finally:
        for process in processes:
            process.kill()


def _serve(
    rank: int,
    world: int,
    port: int,
    pipe: Connection,
    groups: Mapping[str, Any],
    make: Callable[..., Mapping[str, Run]],
    arguments: tuple[Any, ...],
) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    launch = Launch(rank=rank, world=world, local_rank=rank, local_world=world)
    try:
        with process_groups(launch, **groups, timeout_minutes=10.0) as topology:
            _serve_runs(topology, pipe, make(topology, *arguments))
    except BaseException:
        pipe.send(traceback.format_exc())


def _serve_runs(topology: Topology, pipe: Connection, runs: Mapping[str, Run]) -> None:
    torch.set_num_threads(1)
    while (name := pipe.recv()) is not None:
        pipe.send(seconds(runs[name]))
