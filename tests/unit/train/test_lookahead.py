"""The batches of steps: each has its own micro-batches and targets, however far the teacher reads ahead."""

from collections import deque
from collections.abc import Generator, Iterator
from itertools import islice

import pytest
import torch

from megadistill.train.lookahead import StepBatches
from megadistill.train.teacher.protocol import NoTeacher, Teacher
from megadistill.train.teacher.targets import LabelTarget, TargetedBatch
from megadistill.types import Cursor, SignalMismatch, TokenBatch, token_digest

ROWS, MICRO, STEPS = 6, 2, 3


def batches(counter: list[int]) -> Iterator[tuple[TokenBatch, Cursor]]:
    """`counter` holds the number of batches that were read."""
    for step in range(STEPS):
        counter[0] += 1
        slots = torch.arange(step * ROWS, (step + 1) * ROWS)
        tokens = slots.unsqueeze(1).expand(ROWS, 4).contiguous()
        starts = torch.zeros_like(tokens, dtype=torch.bool)
        yield TokenBatch(tokens, tokens, slots, token_digest(tokens), starts), Cursor("", (step + 1) * ROWS)


class AheadTeacher(Teacher):
    """Reads `ahead` micro-batches before it gives the first target; may lose one."""

    def __init__(self, ahead: int, loses: int | None = None) -> None:
        self.ahead, self.loses = ahead, loses
        self.closed = False

    def teacher_targets(self, batches: Iterator[TokenBatch]) -> Generator[TargetedBatch, None, None]:
        waiting = deque(islice(batches, self.ahead))
        try:
            for number in range(STEPS * ROWS // MICRO):
                waiting.extend(islice(batches, 1))
                batch = waiting.popleft()
                if number != self.loses:
                    yield TargetedBatch(batch, LabelTarget())
        finally:
            self.closed = True


@pytest.mark.parametrize(("ahead", "read"), [(0, 1), (1, 1), (3, 2), (99, STEPS)])
def test_each_step_gets_its_own_micro_batches(ahead: int, read: int) -> None:
    counter, teacher = [0], AheadTeacher(ahead)
    steps = StepBatches(batches(counter), teacher, micro_batch=MICRO)
    for number, step in enumerate(steps):
        first = number * ROWS
        assert step.batch.slots.tolist() == list(range(first, first + ROWS))
        assert step.cursor.next_slot == first + ROWS
        assert step.accumulation == ROWS // MICRO
        assert next(step.micro_batches).batch.slots.tolist() == [first, first + 1]
        if number == 0:
            assert counter == [read], "read for the step, and for what the teacher is ahead of it"
        rest = [targeted.batch.slots.tolist() for targeted in step.micro_batches]
        assert rest == [[first + 2, first + 3], [first + 4, first + 5]]
    assert number == STEPS - 1
    assert steps.waited > 0


def test_a_teacher_that_loses_a_micro_batch_is_detected() -> None:
    steps = StepBatches(batches([0]), AheadTeacher(0, loses=1), micro_batch=MICRO)
    micro_batches = next(steps).micro_batches
    next(micro_batches)
    with pytest.raises(SignalMismatch, match=r"of slots \[4, 5\], the step is at \[2, 3\]"):
        next(micro_batches)


def test_a_step_that_leaves_micro_batches_behind_is_detected() -> None:
    """The next one would learn from another step's targets."""
    steps = StepBatches(batches([0]), NoTeacher(), micro_batch=MICRO)
    next(next(steps).micro_batches)
    with pytest.raises(SignalMismatch, match=r"of slots \[2, 3\], the step is at \[6, 7\]"):
        next(next(steps).micro_batches)


def test_closing_ends_the_teachers_work() -> None:
    teacher = AheadTeacher(3)
    steps = StepBatches(batches([0]), teacher, micro_batch=MICRO)
    next(next(steps).micro_batches)
    steps.close()
    assert teacher.closed
