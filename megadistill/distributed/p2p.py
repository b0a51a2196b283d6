"""Point-to-point messages: the one module that creates sends and receives."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, Work

from megadistill import timeline

WAITS_FOR_RANKS = True
"""A thread with a frame of this module waits for other ranks (see `watchdog.stack_probe`)."""

Link = tuple[int, int]
"""Places in a group: the one that sends, and the one that receives."""


def chain(places: Sequence[int]) -> list[Link]:
    """The links from each place to the next one, in an order in which half of them can be connected at a time."""
    links = list(pairwise(places))
    return links[::2] + links[1::2]


@dataclass(frozen=True)
class Message:
    """A send or a receive under way."""

    buffer: Tensor
    work: Work
    label: str
    id: timeline.MessageId
    is_sent: bool

    def wait(self) -> Tensor:
        """The buffer, once it has arrived, or may be written again."""
        if self.is_sent:
            span = timeline.span(timeline.SEND, "flush")
        else:
            span = timeline.span(timeline.WAIT, f"wait for {self.label}", message=self.id)
        with span:
            self.work.wait()
        return self.buffer


class Endpoint:
    """Sends and receives of one rank in a process group. Messages from one rank to another arrive in order.

    `rank` is this process's place in the group, `ranks` are the ranks of its world by place. Without a group (a
    single process) nothing can be sent.
    """

    def __init__(self, group: ProcessGroup | None, *, rank: int, ranks: Sequence[int]) -> None:
        self._group, self._own, self._ranks = group, rank, ranks
        self._sent, self._received = Counter[int](), Counter[int]()

    def connect(self, links: Sequence[Link], device: torch.device) -> None:
        """Makes the connections that messages on the device will take, with a byte over each link of this rank.

        Without it a connection is made at its first message; with NCCL that takes memory and a rendezvous of the two
        ranks, in which both hosts are blocked. Collective: all ranks pass all `links` of the group in one order, so
        that they cannot wait for each other in a circle.
        """
        byte = torch.zeros(1, dtype=torch.uint8, device=device)
        for source, to in links:
            if self._own in (source, to):
                assert self._group is not None
                is_sent = self._own == source
                work = self._group.send([byte], to, 0) if is_sent else self._group.recv([byte], source, 0)
                work.wait()

    def send(self, message: Tensor, to: int, *, label: str) -> Message:
        """Starts to send `message`, which must not be written to until the handle was waited for.

        `to` is a place in the group, `label` the message's name in a timeline.
        """
        assert self._group is not None
        message_id = timeline.MessageId(self._ranks[self._own], self._ranks[to], self._sent[to])
        self._sent[to] += 1
        with timeline.span(timeline.SEND, f"send {label}", message=message_id):
            work = self._group.send([message], to, 0)
        return Message(message, work, label, message_id, is_sent=True)

    def post_recv(self, buffer: Tensor, source: int, *, label: str) -> Message:
        """Posts the receive of the next message from place `source` of the group, whose shape is that of `buffer`."""
        assert self._group is not None
        message_id = timeline.MessageId(self._ranks[source], self._ranks[self._own], self._received[source])
        self._received[source] += 1
        work = self._group.recv([buffer], source, 0)
        return Message(buffer, work, label, message_id, is_sent=False)


class HostChannel:
    """Messages in host memory to and from one peer, for a thread beside the one that trains: a timeline has the spans
    of the latter alone. `peer` is its place in the group."""

    def __init__(self, group: ProcessGroup, *, peer: int) -> None:
        self._group, self._peer = group, peer

    def send(self, message: Tensor) -> Work:
        """Starts to send `message`, which must not be written to until the result was waited for."""
        return self._group.send([message], self._peer, 0)

    def recv(self, buffer: Tensor) -> Work:
        """Starts to receive the peer's next message, which has the shape of `buffer`."""
        return self._group.recv([buffer], self._peer, 0)


def exchange(sent: Tensor, received: Tensor, partner: int, group: ProcessGroup | None) -> None:
    """Sends a buffer to a partner in the group and receives its buffer at the same time."""
    operations = [
        dist.P2POp(dist.isend, sent, group=group, group_peer=partner),
        dist.P2POp(dist.irecv, received, group=group, group_peer=partner),
    ]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
