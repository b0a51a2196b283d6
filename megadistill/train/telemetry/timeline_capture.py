"""Recording of the timeline of the steps in `run.timeline`, on every rank.

A student's rank records from the start of the first step to the end of the last. A teacher's own rank has no step
numbers: each request has a flag whether its step is recorded, and the rank records from shortly before the first such
request to the first without the flag.
"""

import logging
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megadistill.distributed.collectives import barrier
from megadistill.distributed.topology import Topology
from megadistill.timeline.clock import clock_for
from megadistill.timeline.files import RankFile, remove_recordings, write_rank
from megadistill.timeline.recorder import Recorder
from megadistill.train.setup.setup import Setup

logger = logging.getLogger(__name__)

_BOOT = Path("/proc/sys/kernel/random/boot_id")


class TimelineCapture:
    """The recording on a rank of the student: a context that stores it, or drops it on an error.

    All of the student's ranks call the same methods.
    """

    def __init__(self, setup: Setup, topology: Topology) -> None:
        window = setup.recipe.run.timeline
        self._setup, self._topology = setup, topology
        self._steps = range(0) if window is None else range(window[0], window[1] + 1)
        self._recorder: Recorder | None = None
        self._first_barrier = 0.0

    def step(self, number: int) -> None:
        """Step `number` begins, and the one before it ends. Collective where the recording begins or ends."""
        if self._recorder is not None and number not in self._steps:
            self.finish()
        elif number in self._steps and self._recorder is None:
            self._start()
        if self._recorder is not None:
            self._recorder.step(number)

    def finish(self) -> None:
        """No further step begins: stores a recording. Collective."""
        if self._recorder is not None:
            self._recorder.step(None)
            barrier(self._topology.world_group)
            barriers, recorder = (self._first_barrier, time.monotonic()), self._recorder
            self._stop()
            _write(self._setup, self._topology, recorder, barriers)
            logger.info("timeline recorded: draw it with megadistill timeline %s", self._setup.folder)

    def __enter__(self) -> "TimelineCapture":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is None:
            self.finish()
        else:
            self._stop()  # waits neither for other ranks nor for the device

    def _stop(self) -> None:
        if self._recorder is not None:
            self._recorder.stop()
            self._recorder = None

    def _start(self) -> None:
        if self._topology.is_first:
            remove_recordings(self._setup.folder)
        recorder = Recorder(clock_for(self._topology.device))
        barrier(self._topology.world_group)
        self._first_barrier = time.monotonic()
        self._recorder = recorder
        recorder.start()


@contextmanager
def capture_teacher_server(setup: Setup, topology: Topology) -> Iterator[None]:
    """Records a rank of the teacher's own inside of the context, while the student's ranks record."""
    if setup.recipe.run.timeline is None:
        yield
        return
    recorder = Recorder(clock_for(topology.device), on_end=lambda: _write(setup, topology, recorder))
    recorder.start()
    try:
        yield
    finally:
        recorder.stop()
    if recorder.is_requested:
        recorder.end()


def _write(setup: Setup, topology: Topology, recorder: Recorder, barriers: tuple[float, float] | None = None) -> None:
    """Stores the recording of this rank. An error of the disk is logged and does not end the run."""
    bridge, window = topology.bridge, setup.recipe.run.timeline
    assert window is not None
    spans, steps = recorder.recorded()
    has_stage = topology.role == "teacher" or (
        bridge is None and (setup.teacher_config is not None or bool(setup.teachers))
    )
    recording = RankFile(
        rank=topology.rank if bridge is None else bridge.rank,
        world=topology.world if bridge is None else bridge.roles.world,
        role=topology.role,
        stage=topology.group_rank if has_stage else None,
        replica=setup.number_of_replica(topology),
        node=_node(),
        clock="host" if topology.device.type == "cpu" else "device",
        window=(window[0], window[1]),
        rendezvous=None if bridge is None else bridge.rendezvous_time,
        barriers=barriers,
        steps=list(steps),
        spans=list(spans),
    )
    try:
        write_rank(setup.folder, recording)
    except OSError as error:
        logger.warning("timeline not stored: %s", error)


def _node() -> str:
    """Host name and boot ID: processes that share both share the monotonic clock."""
    boot = _BOOT.read_text(encoding="ascii").strip()[:8] if _BOOT.exists() else ""
    return f"{socket.gethostname()[:60]} {boot}".strip()
