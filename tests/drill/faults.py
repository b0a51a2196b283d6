"""Faults inside a rank, made by replacing functions of the package before the rank runs.

A fault is `NAME` or `NAME:NUMBER`, the number being a step (or a slot). `slow:MS` may stand beside others. What must
happen at a place of the run happens there by the step, not by a clock: machines differ in speed by a factor of ten.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from megadistill.train.checkpoint.folders import checkpoint_name
from megadistill.train.lookahead import StepBatch
from megadistill.train.teacher.targets import TargetedBatch

STEP = 0
"""Current step of this rank."""
SLOTS: tuple[int, ...] = ()
"""Slots of the current micro-batch of this rank."""

CRAWL_SECONDS = 2.0
"""More for each step from that of `crawl:STEP` on: time to do something to a run there. Below the steps' time limit."""

SAVE_SECONDS = 5.0
"""More for the save of the step of `slow_save:STEP`: time to do something to a rank in it."""

TAKEN_SECONDS = 1.0
"""Time in which other replicas, which have the sum, take their step."""

BLOCKED = "blocked"
"""File that a rank creates in the folder DRILL_SIGNS when it waits to be killed."""


def inject(faults: list[str]) -> None:
    """Replaces functions of this process so that it has the faults."""
    if not faults:
        return
    import megadistill.train.loop

    loop: Any = megadistill.train.loop
    real_step = loop.train_step

    def train_step(student: Any, batch: StepBatch, **keys: Any) -> Any:
        global STEP
        STEP = keys["step"]
        for fault in _at_step(faults):
            fault()
        return real_step(student, replace(batch, micro_batches=_watched(batch.micro_batches)), **keys)

    loop.train_step = train_step
    for fault in faults:
        name, _, number = fault.partition(":")
        if name in _PATCHES:
            _PATCHES[name](int(number or 0))


def _watched(micro_batches: Iterator[TargetedBatch]) -> Iterator[TargetedBatch]:
    global SLOTS
    for targeted in micro_batches:
        SLOTS = tuple(targeted.batch.slots.tolist())
        yield targeted


def _at_step(faults: list[str]) -> Iterator[Callable[[], None]]:
    for fault in faults:
        name, _, number = fault.partition(":")
        if name == "slow":
            yield partial(time.sleep, int(number) / 1000)
        elif name == "gated":
            yield _at_gate
        elif name == "stuck" and int(number) == STEP:
            yield _stuck
        elif name == "crawl" and int(number) <= STEP:
            yield partial(time.sleep, CRAWL_SECONDS)
        elif name == "blocked" and int(number) == STEP:
            yield block
        elif name == "frozen" and int(number) == STEP:
            yield partial(os.kill, os.getpid(), signal.SIGSTOP)
        elif name == "late" and int(number) == STEP:
            yield _hours_pass


def _at_gate() -> None:
    """Waits until the file DRILL_GATE has the number of this step, or a higher one."""
    while int(Path(os.environ["DRILL_GATE"]).read_text(encoding="ascii")) < STEP:
        time.sleep(0.01)


def _stuck() -> None:
    while True:
        pass


def _hours_pass() -> None:
    """The clock of the run's time limit is a day further on."""
    import megadistill.train.resilience.preemption

    module: Any = megadistill.train.resilience.preemption
    module.time = SimpleNamespace(monotonic=lambda: time.monotonic() + 86_400)


def block() -> None:
    """Waits here to be killed."""
    (Path(os.environ["DRILL_SIGNS"]) / BLOCKED).touch()
    time.sleep(600)


def _die_in_backward(step: int) -> None:
    """SIGKILL in the middle of a step: the forward pass is done, the peers are in the reduction of gradients."""
    from megadistill.student.engine import StudentEngine

    real = StudentEngine.backward

    def backward(self: Any, loss: Tensor) -> None:
        if step == STEP:
            os.kill(os.getpid(), signal.SIGKILL)
        real(self, loss)

    StudentEngine.backward = backward  # type: ignore[method-assign]


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _die_before(owner: Callable[[], Any], name: str) -> Callable[[int], None]:
    """SIGKILL where the function `name` of `owner` is called in a step."""

    def patch(step: int) -> None:
        place = owner()
        real = getattr(place, name)

        def killed(*arguments: Any, **keys: Any) -> Any:
            if step == STEP:
                _kill()
            return real(*arguments, **keys)

        setattr(place, name, killed)

    return patch


def _flat_step() -> Any:
    import megadistill.student.flat_step

    return megadistill.student.flat_step


def _writer() -> Any:
    import megadistill.train.checkpoint.writer

    return megadistill.train.checkpoint.writer


def _engine() -> Any:
    from megadistill.student.engine import StudentEngine

    return StudentEngine


def _stage() -> Any:
    from megadistill.teacher.stage import TeacherStage

    return TeacherStage


def _before_write(step: int, act: Callable[[], None]) -> None:
    """`act` in the thread that writes the checkpoint of a step, which the run has gone on from."""
    writer = _writer()
    real = writer.write_rank

    def write_rank(folder: Path, *arguments: Any, **keys: Any) -> Any:
        if checkpoint_name(step) in folder.name:
            act()
        return real(folder, *arguments, **keys)

    writer.write_rank = write_rank


def _sum_lost(step: int) -> None:
    """This rank has the sum of all replicas, takes it for lost, and says so when the others have taken the step."""
    from megadistill.distributed.groups.guard import ReplicasChanged

    module = _flat_step()
    real, done = module.add_across, list[int]()

    def add_across(flat: Tensor, group: Any) -> None:
        real(flat, group)
        if step == STEP and not done:
            done.append(step)
            time.sleep(TAKEN_SECONDS)
            group.guard.break_off("a fault of the drill")
            raise ReplicasChanged

    module.add_across = add_across


def _silence(seconds: int) -> None:
    """Heartbeats of replicas may be so many seconds old."""
    import megadistill.distributed.members

    members: Any = megadistill.distributed.members
    members.SILENCE_SECONDS = float(seconds)


def _block_before_rename(step: int) -> None:
    """All bytes of a checkpoint are written, and it has no name yet."""
    import megadistill.train.checkpoint.writer

    saver: Any = megadistill.train.checkpoint.writer
    real = saver.commit

    def commit(temporary: Path, target: Path, manifest: Any) -> None:
        if manifest.step == step:
            paths: Any = Path
            paths.rename = lambda self, target: block()
        real(temporary, target, manifest)

    saver.commit = commit


def _hidden(changed: Callable[[Tensor], Tensor | None]) -> None:
    from megadistill.student.engine import StudentEngine

    real = StudentEngine.routed_hidden

    def hidden(self: Any, *arguments: Any, **options: Any) -> Any:
        states, sums = real(self, *arguments, **options)
        other = changed(states)
        return (states if other is None else other), sums

    StudentEngine.routed_hidden = hidden  # type: ignore[method-assign]


def _nan(step: int) -> None:
    _hidden(lambda states: states * torch.nan if step == STEP else None)


def _nan_from(step: int) -> None:
    _hidden(lambda states: states * torch.nan if step <= STEP else None)


def _spike(slot: int) -> None:
    """Whoever reads this slot computes nonsense: the loss is high on it, whenever it is read."""
    _hidden(lambda states: states * -30.0 if slot in SLOTS else None)


def _teacher_nan(step: int) -> None:
    from megadistill.teacher.stage import TeacherStage

    real = TeacherStage.forward

    def forward(self: Any, *inputs: Any, **keys: Any) -> Any:
        return real(self, *inputs, **keys) * (torch.nan if step <= STEP else 1.0)

    TeacherStage.forward = forward  # type: ignore[method-assign]


def _own_node(number: int) -> None:
    """This rank is a node of its own: it has a folder of local saves that no other rank sees."""
    import megadistill.train.resilience.recovery

    recovery: Any = megadistill.train.resilience.recovery
    real = recovery.LocalTier
    recovery.LocalTier = lambda folder, *arguments, **keys: real(folder / f"node-{number}", *arguments, **keys)


_PATCHES: dict[str, Callable[[int], None]] = {
    "die": _die_in_backward,
    "die_forward": _die_before(_engine, "routed_hidden"),
    "die_teacher": _die_before(_stage, "forward"),
    "die_across": _die_before(_flat_step, "add_across"),
    "die_step": _die_before(lambda: _flat_step().FlatStep, "_update"),
    "die_save": partial(_before_write, act=_kill),
    "slow_save": partial(_before_write, act=partial(time.sleep, SAVE_SECONDS)),
    "die_folder": _die_before(lambda: _writer().Saver, "_make_folder"),
    "sum_lost": _sum_lost,
    "silence": _silence,
    "before_rename": _block_before_rename,
    "node": _own_node,
    "nan": _nan,
    "nan_from": _nan_from,
    "spike": _spike,
    "teacher_nan": _teacher_nan,
}
