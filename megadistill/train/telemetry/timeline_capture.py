"""Room `train`: the steps that `run.timeline` names, recorded on every rank. It knows no step's work.

A student's rank records from the begin of the first of them to the end of the last one. A rank of the teacher's own
knows no steps: the requests say whether their step is recorded, and it keeps what it does from shortly before the first
of them to the first that is not.
"""

import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megadistill.distributed.collectives import barrier
from megadistill.distributed.topology import Topology
from megadistill.timeline.files import RankFile, StoredStep, forget_ranks, stored_spans, write_rank
from megadistill.timeline.recorder import Recorder, clock_of
from megadistill.train.setup.setup import Setup

_BOOT = Path("/proc/sys/kernel/random/boot_id")


class Recording:
    """On a rank of the student. All of them call the same methods."""

    def __init__(self, setup: Setup, topology: Topology, say: Callable[[str], None]) -> None:
        window = setup.recipe.run.timeline
        self._setup, self._topology, self._say = setup, topology, say
        self._steps = range(0) if window is None else range(window[0], window[1] + 1)
        self._recorder: Recorder | None = None
        self._began = 0.0

    def step(self, number: int) -> None:
        """Step `number` begins, and the one before it ends. Collective where the recording begins or ends."""
        if self._recorder is not None and number not in self._steps:
            self.finish()
        elif number in self._steps and self._recorder is None:
            self._begin()
        if self._recorder is not None:
            self._recorder.step(number)

    def finish(self) -> None:
        """No further step begins. Collective."""
        if self._recorder is not None:
            self._recorder.step(None)
            barrier(self._topology.world_group)
            ended, recorder = time.monotonic(), self._recorder
            self.give_up()
            _write(self._setup, self._topology, recorder, began=self._began, ended=ended)
            self._say(f"recorded a timeline: megadistill timeline {self._setup.folder}")

    def give_up(self) -> None:
        """Leaves off: other ranks may not come, nor the device."""
        if self._recorder is not None:
            self._recorder.stop()
            self._recorder = None

    def _begin(self) -> None:
        if self._topology.is_first:
            forget_ranks(self._setup.folder)
        recorder = Recorder(clock_of(self._topology.device))
        barrier(self._topology.world_group)
        self._began = time.monotonic()
        self._recorder = recorder
        recorder.start()


@contextmanager
def recorded(setup: Setup, topology: Topology, say: Callable[[str], None]) -> Iterator[Recording]:
    """A recording that ends with what is inside."""
    recording = Recording(setup, topology, say)
    try:
        yield recording
    except BaseException:
        recording.give_up()
        raise
    recording.finish()


@contextmanager
def recorded_service(setup: Setup, topology: Topology) -> Iterator[None]:
    """On a rank of the teacher's own: what is asked for while the student records is recorded inside."""
    if setup.recipe.run.timeline is None:
        yield
        return
    recorder = Recorder(clock_of(topology.device), on_end=lambda: _write(setup, topology, recorder))
    recorder.start()
    try:
        yield
    finally:
        recorder.stop()
    if recorder.asked:
        recorder.end()


def _write(
    setup: Setup, topology: Topology, recorder: Recorder, *, began: float | None = None, ended: float | None = None
) -> None:
    """A disk that refuses is no reason to end a run."""
    bridge, window = topology.bridge, setup.recipe.run.timeline
    assert window is not None
    spans, steps = recorder.recorded()
    has_stage = topology.role == "teacher" or (bridge is None and setup.teacher_config is not None)
    kept = RankFile(
        rank=topology.rank if bridge is None else bridge.rank,
        world=topology.world if bridge is None else bridge.roles.world,
        role=topology.role,
        stage=topology.group_rank if has_stage else None,
        node=_node(),
        clock="host" if topology.device.type == "cpu" else "device",
        window=window,
        met=None if bridge is None else bridge.met,
        began=began,
        ended=ended,
        steps=[StoredStep(number=step.number, begin=step.begin, end=step.end) for step in steps],
        spans=stored_spans(spans),
    )
    try:
        write_rank(setup.folder, kept)
    except OSError as error:
        print(f"megadistill: rank {topology.rank}: the timeline was not written: {error}", file=sys.stderr, flush=True)


def _node() -> str:
    """The host and its boot: processes that share them share the monotonic clock."""
    boot = _BOOT.read_text(encoding="ascii").strip()[:8] if _BOOT.exists() else ""
    return f"{socket.gethostname()[:60]} {boot}".strip()
