"""Point-to-point links between neighbouring stages of a pipeline group."""

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, Work


@dataclass(frozen=True)
class Arrival:
    """A tensor on its way: `wait()` returns it once it is there."""

    buffer: Tensor
    work: Work

    def wait(self) -> Tensor:
        self.work.wait()
        return self.buffer


@dataclass(frozen=True)
class StageLink:
    """The links of one stage of a pipeline to the stage before it and the stage after it."""

    group: ProcessGroup | None
    stage: int
    stages: int

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
        return Arrival(buffer, work)

    def send(self, hidden: Tensor) -> Arrival:
        """Starts sending `hidden` to the stage after; the caller keeps the handle until it has waited for it."""
        work = dist.isend(hidden, group=self.group, group_dst=self.stage + 1)
        assert work is not None
        return Arrival(hidden, work)
