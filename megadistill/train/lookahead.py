"""Room `train`: the stream for two readers, of which the teacher is ahead. It knows no models."""

import time
from collections import deque
from collections.abc import Iterator

from megadistill import timeline
from megadistill.types import Cursor, TokenBatch


class Lookahead:
    """The batches of a run, each handed to the student step by step and to the teacher as micro-batches.

    The teacher may read any number of batches ahead; what it has read waits here for the student.
    """

    def __init__(self, batches: Iterator[tuple[TokenBatch, Cursor]], *, micro_batch: int) -> None:
        self._batches = batches
        self._micro_batch = micro_batch
        self._for_student: deque[tuple[TokenBatch, Cursor]] = deque()
        self._for_teacher: deque[TokenBatch] = deque()
        self.waited = 0.0
        """Seconds that reading has taken."""

    def step(self) -> tuple[TokenBatch, Cursor]:
        """The next batch of the student, and the position behind it. Raises StopIteration: there is none."""
        if not self._for_student:
            self._read()
        return self._for_student.popleft()

    def micro_batches(self) -> Iterator[TokenBatch]:
        """Those of every batch, in order, until there are no more."""
        while self._for_teacher or self._read():
            yield self._for_teacher.popleft()

    def _read(self) -> bool:
        began = time.perf_counter()
        with timeline.span(timeline.DATA, "read tokens"):
            pair = next(self._batches, None)
        self.waited += time.perf_counter() - began
        if pair is None:
            return False
        self._for_student.append(pair)
        self._for_teacher.extend(pair[0].micro_batches(self._micro_batch))
        return True
