"""Files that each rank sends to the same place on the next node, and from any rank to one that lacks its own.

They travel in host memory, over gloo connections of two ranks each. A thread beside the training loop sends them, which
NCCL does not allow on a communicator that the loop uses, and the files are on the host anyway: nothing of the device is
touched, neither its memory nor the order of its collectives. Each rank has two connections, whatever the world's size.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from io import FileIO
from itertools import count
from pathlib import Path
from typing import Any, cast

import torch
from torch.distributed import ProcessGroup, ProcessGroupGloo
from torch.distributed.distributed_c10d import PrefixStore, Store, _get_default_store

from megadistill.distributed.p2p import HostChannel

WAITS_FOR_RANKS = True
"""A thread with a frame of this module waits for other ranks (see `watchdog.stack_probe`)."""

CHUNK_BYTES = 16 << 20
"""Bytes of a message: what a receiver holds in memory."""
NO_FILE = -1


@dataclass(frozen=True)
class NodeRing:
    """The nodes of a world in a ring: each rank's files are copied to one rank of the node after its own."""

    nodes: tuple[tuple[int, ...], ...]
    """Ranks of each node, the nodes by their first rank."""

    @classmethod
    def of(cls, ids: Sequence[int]) -> "NodeRing":
        """The ring of ranks whose nodes have these ids, by rank."""
        nodes: dict[int, list[int]] = defaultdict(list)
        for rank, node in enumerate(ids):
            nodes[node].append(rank)
        return cls(tuple(map(tuple, nodes.values())))

    def node_of(self, rank: int) -> tuple[int, ...]:
        """The ranks of this rank's node."""
        return next(ranks for ranks in self.nodes if rank in ranks)

    def target(self, rank: int) -> int | None:
        """The rank that gets the copy of this rank's file; None in a world of one node."""
        return dict(self.links()).get(rank)

    def sources(self, rank: int) -> list[int]:
        """The ranks whose copies this rank gets: one where all nodes are alike."""
        return [source for source, target in self.links() if target == rank]

    def links(self) -> list[tuple[int, int]]:
        """(source, target) of every copy, in an order in which all ranks can connect, half of the nodes at a time."""
        if len(self.nodes) == 1:
            return []
        pairs = [(node, self.nodes[(place + 1) % len(self.nodes)]) for place, node in enumerate(self.nodes)]
        return [
            (rank, after[place % len(after)])
            for node, after in (*pairs[::2], *pairs[1::2])
            for place, rank in enumerate(node)
        ]


class HostChannels:
    """Connections of this rank to others of its world, made when they are first needed.

    `connect` blocks until the other rank calls it too: all ranks follow one list of links, in its order. Collective:
    the ranks make as many objects, since the number of each is in the keys by which two ranks find each other.
    """

    _made = count()

    def __init__(self, rank: int, timeout: timedelta | None, store: Store | None = None) -> None:
        self._rank, self._timeout, self._store = rank, timeout or timedelta(minutes=30), store
        self._groups: dict[int, ProcessGroup] = {}
        self._number = next(self._made)

    def connect(self, links: Sequence[tuple[int, int]]) -> None:
        """Makes those connections of `links`, pairs of ranks, that have an end here."""
        for link in links:
            if self._rank in link:
                self.to(link[0] if link[1] == self._rank else link[1])

    def to(self, peer: int) -> HostChannel:
        """The connection to this rank, for messages in both directions."""
        if peer not in self._groups:
            low, high = sorted((self._rank, peer))
            store = PrefixStore(f"host_channel_{self._number}_{low}_{high}", self._store or _get_default_store())
            gloo: Any = ProcessGroupGloo(store, int(self._rank == high), 2, self._timeout)
            self._groups[peer] = cast(ProcessGroup, gloo)
        return HostChannel(self._groups[peer], peer=int(peer > self._rank))

    def close(self) -> None:
        """Ends the connections. No message may be under way."""
        for group in self._groups.values():
            group.shutdown()
        self._groups.clear()


def transfer(
    sent: Sequence[tuple[HostChannel, Sequence[Path]]], received: Sequence[tuple[HostChannel, Sequence[Path]]]
) -> list[bool]:
    """Sends files and receives as many as the other ends send, all at the same time.

    A file that does not exist is sent as none. Returns for each entry of `received` whether all of its files came.

    Raises:
        OSError: a file cannot be read or written here; the other files have been transferred nonetheless.
    """
    complete = [True] * len(received)
    problems: list[OSError] = []

    def missing(place: int) -> Callable[[], None]:
        def mark() -> None:
            complete[place] = False

        return mark

    streams = [_send(channel, paths, problems) for channel, paths in sent]
    streams += [_receive(channel, paths, problems, missing(i)) for i, (channel, paths) in enumerate(received)]
    while streams:
        under_way = [(stream, work) for stream in streams if (work := next(stream, None)) is not None]
        for _, work in under_way:
            work.wait()
        streams = [stream for stream, _ in under_way]
    if problems:
        raise problems[0]
    return complete


def _send(channel: HostChannel, paths: Sequence[Path], problems: list[OSError]) -> Iterator[Any]:
    """Starts one message at a time; its caller waits for each before the next one."""
    for path in paths:
        size, content = NO_FILE, torch.empty(0, dtype=torch.uint8)
        try:
            size = path.stat().st_size
            content = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)  # mapped, not read
        except FileNotFoundError:
            size = NO_FILE
        except (OSError, RuntimeError) as error:
            problems.append(error if isinstance(error, OSError) else OSError(str(error).splitlines()[0]))
            size = NO_FILE
        yield channel.send(torch.tensor([size]))
        for start in range(0, size, CHUNK_BYTES):
            yield channel.send(content[start : start + CHUNK_BYTES])


def _receive(
    channel: HostChannel, paths: Sequence[Path], problems: list[OSError], missing: Callable[[], None]
) -> Iterator[Any]:
    header, buffer = torch.zeros(1, dtype=torch.int64), torch.empty(0, dtype=torch.uint8)
    for path in paths:
        yield channel.recv(header)
        left = int(header.item())
        if left == NO_FILE:
            missing()
            continue
        file: FileIO | None = None
        try:
            file = FileIO(path, "wb")
        except OSError as error:
            problems.append(error)
        if buffer.numel() < min(left, CHUNK_BYTES):
            buffer = torch.empty(min(left, CHUNK_BYTES), dtype=torch.uint8)
        while left > 0:
            part = buffer[: min(left, CHUNK_BYTES)]
            yield channel.recv(part)
            left -= part.numel()
            try:
                if file is not None:
                    _write_whole(file, part.numpy().data)
            except OSError as error:  # the sender sends on, and is listened to
                problems.append(error)
                file = None
        if file is not None:
            file.close()


def _write_whole(file: FileIO, content: memoryview) -> None:
    while content:
        content = content[file.write(content) :]
