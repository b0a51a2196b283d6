"""The batches of a run's steps, each with its micro-batches and their targets; the teacher reads ahead of the steps."""

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megadistill import timeline
from megadistill.train.teacher.protocol import Teacher
from megadistill.train.teacher.targets import TargetedBatch
from megadistill.types import Cursor, SequencePart, SignalMismatch, TokenBatch


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
        micro_batch: int,
        part: SequencePart = SequencePart(),
    ) -> None:
        """`part`: the tokens of each sequence that this rank trains on."""
        self._batches = batches
        self._part = part
        self._micro_batch = micro_batch
        self._steps: deque[tuple[TokenBatch, Cursor]] = deque()
        self._entering: deque[TokenBatch] = deque()
        self._targets = teacher.teacher_targets(self._for_teacher())
        self.waited = 0.0
        """Seconds spent waiting for data so far."""

    def __iter__(self) -> "StepBatches":
        return self

    def __next__(self) -> StepBatch:
        if not self._steps and not self._read():
            raise StopIteration
        batch, cursor = self._steps.popleft()
        return StepBatch(batch, cursor, self._of_step(batch), len(batch) // self._micro_batch)

    def close(self) -> None:
        """Ends the teacher's work on micro-batches that no step takes."""
        self._targets.close()

    def _of_step(self, batch: TokenBatch) -> Iterator[TargetedBatch]:
        """
        Raises:
            SignalMismatch: the teacher's next target is not of the step's next micro-batch.
        """
        for slots in torch.split(batch.slots, self._micro_batch):
            targeted = next(self._targets)
            if not torch.equal(targeted.batch.slots, slots):
                raise SignalMismatch(
                    f"the next target is of slots {targeted.batch.slots.tolist()}, the step is at {slots.tolist()}"
                )
            yield targeted

    def _for_teacher(self) -> Iterator[TokenBatch]:
        while self._entering or self._read():
            yield self._entering.popleft()

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
        self._entering.extend(batch.micro_batches(self._micro_batch))
        return True
