"""The batches of a run's steps, each with its micro-batches and their targets; the teacher reads ahead of the steps.

A validation between two steps has its micro-batches in the same stream, between those of the two steps: the teacher
reads ahead of it too, and is neither drained for it nor asked twice.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from megadistill import timeline
from megadistill.train.teacher.protocol import Teacher
from megadistill.train.teacher.targets import Target, TargetedBatch
from megadistill.train.validation.held_out_batches import HeldOutBatch, Validations
from megadistill.types import Cursor, SequencePart, SignalMismatch, TokenBatch

WHOLE = SequencePart()
"""All tokens of each sequence."""


@dataclass(frozen=True)
class StepBatch:
    """This rank's batch of one optimizer step."""

    batch: TokenBatch
    cursor: Cursor
    """The position in the stream behind the batch."""
    micro_batches: Iterator[TargetedBatch]
    """`accumulation` micro-batches: the rows of `batch`, in order, with their targets. Taken once, by the step."""
    accumulation: int


class StepBatches:
    """Iterator over the steps' batches.

    The teacher may read any number of micro-batches ahead; what it has read waits here for its step.
    """

    def __init__(
        self,
        batches: Iterator[tuple[TokenBatch, Cursor]],
        teacher: Teacher,
        *,
        micro_batch: int | Callable[[TokenBatch], int],
        part: SequencePart = WHOLE,
        validations: Validations | None = None,
    ) -> None:
        """
        Args:
            micro_batch: rows of a micro-batch, or those of the micro-batches of a step's batch.
            part: the tokens of each sequence that this rank trains on.
            validations: those between the steps; None: there are none.
        """
        self._batches = batches
        self._part = part
        self._micro_batch = micro_batch if callable(micro_batch) else lambda batch: micro_batch
        self._steps: deque[tuple[TokenBatch, Cursor]] = deque()
        self._entering: deque[Iterator[TokenBatch]] = deque()
        self._validations, self._answers = validations, teacher.answers_any_tokens
        self._held_out: deque[HeldOutBatch] = deque()
        self._last_read = 0 if validations is None else validations.first_step  # step of the last batch that was read
        self._enter_validation()
        self._targets = teacher.teacher_targets(self._for_teacher())
        self.waited = 0.0
        """Seconds spent waiting for data so far."""

    def __iter__(self) -> "StepBatches":
        return self

    def __next__(self) -> StepBatch:
        if not self._steps and not self._read():
            raise StopIteration
        batch, cursor = self._steps.popleft()
        return StepBatch(batch, cursor, self._of_step(batch), len(batch) // self._micro_batch(batch))

    def close(self) -> None:
        """Ends the teacher's work on micro-batches that no step takes."""
        self._targets.close()

    def _of_step(self, batch: TokenBatch) -> Iterator[TargetedBatch]:
        """
        Raises:
            SignalMismatch: the teacher's next target is not of the step's next micro-batch.
        """
        for slots in torch.split(batch.slots, self._micro_batch(batch)):
            targeted = next(self._targets)
            if not torch.equal(targeted.batch.slots, slots):
                raise SignalMismatch(
                    f"the next target is of slots {targeted.batch.slots.tolist()}, the step is at {slots.tolist()}"
                )
            yield targeted

    def validation(self) -> Iterator[tuple[HeldOutBatch, Target | None]]:
        """The micro-batches of the validation that is due after the last step, each with its target; without one of a
        teacher that answers for the training stream alone. Taken as a whole, before the next step.

        Raises:
            SignalMismatch: the teacher's next target is not of the validation's next micro-batch.
        """
        assert self._validations is not None
        if not self._answers:
            yield from ((each, None) for each in self._validations.batches)
            return
        for _ in range(len(self._validations.batches)):
            targeted = next(self._targets)
            each = self._held_out.popleft()
            ours, theirs = each.batch, targeted.batch
            if not (torch.equal(ours.slots, theirs.slots) and torch.equal(ours.digests, theirs.digests)):
                raise SignalMismatch(
                    f"the next target is of slots {theirs.slots.tolist()}, the validation is at {ours.slots.tolist()}"
                )
            yield each, targeted.target

    def _for_teacher(self) -> Iterator[TokenBatch]:
        while self._entering or self._read():
            yield from self._entering.popleft()

    def _enter_validation(self) -> None:
        """Puts the validation after the last step that was read behind it, if one is due."""
        if self._answers and self._validations is not None and self._validations.due(self._last_read):
            self._entering.append(self._enter_held_out(self._validations))

    def _enter_held_out(self, validations: Validations) -> Iterator[TokenBatch]:
        for each in validations.batches:
            self._held_out.append(each)
            yield each.batch

    def _read(self) -> bool:
        began = time.perf_counter()
        with timeline.span(timeline.DATA, "read tokens"):
            pair = next(self._batches, None)
        self.waited += time.perf_counter() - began
        if pair is None:
            return False
        batch, cursor = pair
        batch = batch.of_part(self._part)
        self._steps.append((batch, cursor))
        self._entering.append(iter(batch.micro_batches(self._micro_batch(batch))))
        self._last_read += 1
        self._enter_validation()
        return True
