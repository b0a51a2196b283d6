"""Point-to-point links between neighbouring stages of a pipeline group."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import count

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, Work

from megadistill import timeline

WAITS_FOR_RANKS = True
"""The hang detector takes a frame of this module for a wait."""


@dataclass(frozen=True)
class Arrival:
    """Parcel `number` on its way; `wait()` returns it once it is there, or once its buffer may be written again."""

    buffer: Tensor
    work: Work
    source: int
    to: int
    number: int
    is_sent: bool

    def wait(self) -> Tensor:
        with self._span():
            self.work.wait()
        return self.buffer

    def _span(self) -> AbstractContextManager[None]:
        if self.is_sent:
            return timeline.span(timeline.SEND, "flush")
        return timeline.message_span(timeline.WAIT, "wait for", "parcel", self.source, self.to, self.number)


@dataclass(frozen=True)
class StageLink:
    """The links of one stage of a pipeline to the stage before it and the stage after it."""

    group: ProcessGroup | None
    stage: int
    stages: int
    _sends: Iterator[int] = field(default_factory=count)
    _receives: Iterator[int] = field(default_factory=count)

    @property
    def is_first(self) -> bool:
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        return self.stage == self.stages - 1

    def expect(self, buffer: Tensor) -> Arrival:
        """Posts the receive of `buffer` from the stage before; the shape is known, so nothing else travels."""
        work = dist.irecv(buffer, group=self.group, group_src=self.stage - 1)
        assert work is not None
        ranks = self._rank(self.stage - 1), self._rank(self.stage)
        return Arrival(buffer, work, *ranks, next(self._receives), is_sent=False)

    def send(self, hidden: Tensor) -> Arrival:
        """Starts sending `hidden` to the stage after; the caller keeps the handle until it has waited for it."""
        ranks, number = (self._rank(self.stage), self._rank(self.stage + 1)), next(self._sends)
        with timeline.message_span(timeline.SEND, "send", "parcel", *ranks, number):
            work = dist.isend(hidden, group=self.group, group_dst=self.stage + 1)
        assert work is not None
        return Arrival(hidden, work, *ranks, number, is_sent=True)

    def _rank(self, stage: int) -> int:
        assert self.group is not None
        return dist.get_global_rank(self.group, stage)
