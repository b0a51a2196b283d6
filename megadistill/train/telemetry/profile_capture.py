"""Profiles of some steps by torch.profiler, with the run's spans as ranges, and snapshots of an accelerator's memory.

`RUN/profile/rank-00000.json.gz` is the trace of a rank, for ui.perfetto.dev or chrome://tracing, and `-parts.json` has
FLOPs, seconds and MFU of its parts of a step. `-memory.pickle` is a snapshot of the allocator, `-out-of-memory.pickle`
that of a rank that ran out of memory: both for pytorch.org/memory_viz, and never read by this package.
"""

import logging
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.profiler import profile, record_function, supported_activities

from megadistill import timeline
from megadistill.distributed.topology import Topology
from megadistill.io import write_json
from megadistill.timeline.stopwatch import StepSeconds
from megadistill.train.setup.setup import Setup
from megadistill.train.setup.step_shape import StepShape
from megadistill.train.setup.telemetry_checks import records_memory_history
from megadistill.train.telemetry.metrics import peak_flops
from megadistill.train.telemetry.rank_flops import RankFlops

MAX_ALLOCATIONS = 200_000
"""Allocations in the history of a memory snapshot, with their stacks: some hundred megabytes."""

logger = logging.getLogger(__name__)


@dataclass
class _Part:
    """Sums of a part of a step over the profiled steps."""

    flops: int = 0
    seconds: float = 0.0


class ProfileCapture(AbstractContextManager["ProfileCapture"]):
    """The profile of one rank. Its methods wait for no other rank. An error of the disk does not end the run."""

    has_recorded: ClassVar[bool] = False
    """Whether this process has recorded a profile: `cli.main` ends it without the interpreter's shutdown then."""

    def __init__(self, setup: Setup, topology: Topology) -> None:
        self._setup, self._topology = setup, topology
        section = setup.recipe.profile
        records = section is not None and topology.rank in section.ranks
        self._steps = range(section.steps[0], section.steps[1] + 1) if section is not None and records else range(0)
        self._takes_snapshot = section is not None and section.memory_snapshot
        self._path = setup.folder / "profile" / f"rank-{topology.rank:05d}"
        self._open: ExitStack | None = None
        self._step: AbstractContextManager[Any] | None = None
        self._profile: profile | None = None
        self._parts: dict[str, _Part] = {}
        self._recorded: list[int] = []

    def before_step(self, number: int) -> None:
        """Step `number` begins."""
        if number not in self._steps:
            self.finish()
        elif self._open is None:
            self._start()
        if self._open is not None:
            self._step = _range_of(f"step {number}")
            self._step.__enter__()

    def after_step(self, number: int, parts: StepSeconds, shape: StepShape) -> None:
        """The step has ended, and its times are read."""
        if self._open is None:
            return
        self._end_range()
        self._recorded.append(number)
        flops = RankFlops.of(self._setup, self._topology, shape)
        for name, (count, seconds) in flops.by_part(parts).items():
            part = self._parts.setdefault(name, _Part())
            part.flops, part.seconds = part.flops + count, part.seconds + seconds
        if number == self._steps[-1]:
            self.finish()

    def finish(self) -> None:
        """Ends a profile that is under way, and stores it."""
        if self._open is None:
            return
        assert self._profile is not None
        self._end_range()
        memory = self._memory_module()
        try:
            self._path.parent.mkdir(exist_ok=True)
            if memory is not None:
                _dump(memory, self._path.with_name(f"{self._path.name}-memory.pickle"))
            self._stop()
            _export(self._profile, self._path.with_name(f"{self._path.name}.json.gz"))
            rows = self._rows()
            write_json(self._path.with_name(f"{self._path.name}-parts.json"), {"steps": self._recorded, "parts": rows})
            logger.info("profile of steps %s: %s", _span(self._recorded), "; ".join(map(_line, rows)))
            logger.info("profile written: %s.json.gz, for ui.perfetto.dev or chrome://tracing", self._path)
        except (OSError, RuntimeError) as error:
            logger.warning("profile not stored: %s", error)
        finally:
            self._stop()
            self._profile, self._parts, self._recorded = None, {}, []  # its events take host memory

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        if error is None:
            self.finish()
            return
        if isinstance(error, torch.OutOfMemoryError) and records_memory_history():
            self._dump_out_of_memory()  # while the history is recorded
        with suppress(Exception):  # the device may be gone: the run ends by `error`, and by nothing else
            self._end_range()
            self._stop()

    def _start(self) -> None:
        ProfileCapture.has_recorded = True
        self._open = ExitStack()
        memory = self._memory_module()
        if memory is not None:
            memory._record_memory_history(max_entries=MAX_ALLOCATIONS)
            self._open.callback(memory._record_memory_history, enabled=None)
        activities = supported_activities()  # type: ignore[no-untyped-call]
        self._profile = profile(activities=activities, record_shapes=True, profile_memory=True)
        self._open.enter_context(self._profile)
        self._open.enter_context(timeline.annotated(_range_of))

    def _stop(self) -> None:
        if self._open is not None:
            opened, self._open = self._open, None
            opened.close()

    def _end_range(self) -> None:
        if self._step is not None:
            self._step.__exit__(None, None, None)
            self._step = None

    def _memory_module(self) -> Any | None:
        return torch.get_device_module(self._topology.device).memory if self._takes_snapshot else None

    def _dump_out_of_memory(self) -> None:
        path = self._path.with_name(f"{self._path.name}-out-of-memory.pickle")
        try:
            path.parent.mkdir(exist_ok=True)
            _dump(torch.get_device_module(self._topology.device).memory, path)
        except Exception as error:  # the run ends by the lack of memory
            logger.warning("memory snapshot not stored: %s", error)
        else:
            logger.error("out of memory: %s shows what held it, at pytorch.org/memory_viz", path)

    def _rows(self) -> list[dict[str, Any]]:
        peak = peak_flops(self._topology.device, self._setup.recipe.train.precision)
        return [
            {
                "part": name,
                "flops": part.flops,
                "seconds": part.seconds,
                "flops_per_second": part.flops / part.seconds if part.seconds > 0 else None,
                "mfu": part.flops / part.seconds / peak if peak and part.seconds > 0 else None,
            }
            for name, part in self._parts.items()
            if part.flops
        ]


def _range_of(name: str) -> AbstractContextManager[Any]:
    return record_function(name)


def _export(recorded: profile, path: Path) -> None:
    temporary = path.with_name(f".{path.name.removesuffix('.json.gz')}.tmp.json.gz")
    recorded.export_chrome_trace(str(temporary))
    temporary.replace(path)


def _dump(memory: Any, path: Path) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    memory._dump_snapshot(str(temporary))
    temporary.replace(path)


def _span(steps: list[int]) -> str:
    return f"{steps[0]} to {steps[-1]}" if steps else "(none whole)"


def _line(row: dict[str, Any]) -> str:
    mfu = f", MFU {row['mfu']:.1%}" if row["mfu"] is not None else ""
    rate = f" ({row['flops_per_second'] / 1e12:.3g} TFLOP/s{mfu})" if row["flops_per_second"] else ""
    return f"{row['part']} {row['flops'] / 1e12:.3g} TFLOP in {row['seconds']:.3g} s{rate}"
