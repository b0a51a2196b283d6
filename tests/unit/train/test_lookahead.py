"""The batches of steps: each has its own micro-batches and targets, however far the teacher reads ahead."""

from collections import deque
from collections.abc import Generator, Iterator
from itertools import count, islice

import pytest
import torch
from typing_extensions import override

from megadistill.train.lookahead import StepBatches
from megadistill.train.teacher.protocol import NoTeacher, Teacher
from megadistill.train.teacher.targets import LabelTarget, TargetedBatch
from megadistill.train.validation.held_out_batches import HeldOutBatch, Validations
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

    def __init__(self, ahead: int, loses: int | None = None, *, answers: bool = False) -> None:
        self.ahead, self.loses, self.answers = ahead, loses, answers
        self.closed = False

    @property
    @override
    def answers_any_tokens(self) -> bool:
        return self.answers

    def teacher_targets(self, batches: Iterator[TokenBatch]) -> Generator[TargetedBatch, None, None]:
        waiting = deque(islice(batches, self.ahead))
        try:
            for number in count():
                waiting.extend(islice(batches, 1))
                if not waiting:
                    return
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


class _HeldOut:
    """Two held-out micro-batches, with slots that the training stream has too."""

    def __iter__(self) -> Iterator[HeldOutBatch]:
        for split in range(2):
            slots = torch.arange(MICRO)
            tokens = torch.full((MICRO, 4), 1000 + split)
            starts = torch.zeros_like(tokens, dtype=torch.bool)
            yield HeldOutBatch(TokenBatch(tokens, tokens, slots, token_digest(tokens), starts), split)

    def __len__(self) -> int:
        return 2


def _validations(*, at_first: bool = True) -> Validations:
    return Validations(_HeldOut(), first_step=0, at_first=at_first, every=2, last=STEPS)  # type: ignore[arg-type]


def _step(steps: StepBatches) -> list[int]:
    return [slot for targeted in next(steps).micro_batches for slot in targeted.batch.slots.tolist()]


@pytest.mark.parametrize("ahead", [0, 1, 3, 99])
@pytest.mark.parametrize("answers", [True, False])
def test_validations_are_between_the_steps_however_far_the_teacher_reads_ahead(ahead: int, answers: bool) -> None:
    steps = StepBatches(
        batches([0]), AheadTeacher(ahead, answers=answers), micro_batch=MICRO, validations=_validations()
    )
    for step in range(STEPS + 1):
        if step:
            assert _step(steps) == list(range((step - 1) * ROWS, step * ROWS))
        if step in (0, 2, 3):
            taken = list(steps.validation())
            assert [each.split for each, _ in taken] == [0, 1]
            assert [each.batch.tokens[0, 0].item() for each, _ in taken] == [1000, 1001]
            assert [isinstance(target, LabelTarget) for _, target in taken] == [answers] * 2
    assert list(steps) == []


def test_a_validation_that_is_left_out_is_detected_by_the_next_step() -> None:
    """Its slots are those of training micro-batches, but not where the step is."""
    steps = StepBatches(
        batches([0]), AheadTeacher(1, answers=True), micro_batch=MICRO, validations=_validations(at_first=False)
    )
    _step(steps)
    _step(steps)
    with pytest.raises(SignalMismatch, match=r"of slots \[0, 1\], the step is at \[12, 13\]"):
        _step(steps)


def test_targets_of_other_tokens_than_the_held_out_ones_are_detected() -> None:
    """The teacher loses the first held-out micro-batch, whose slots are those of the second."""
    steps = StepBatches(
        batches([0]), AheadTeacher(0, loses=0, answers=True), micro_batch=MICRO, validations=_validations()
    )
    with pytest.raises(SignalMismatch, match="the validation is at"):
        list(steps.validation())
