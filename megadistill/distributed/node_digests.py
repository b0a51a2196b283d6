"""A check of files by the first rank of each node, before the process groups: its outcome is that of every rank.

The nodes compare digests, so that a node with another content is known before anything is loaded from it.
"""

import json
import socket
from collections.abc import Callable, Mapping
from datetime import timedelta

from torch.distributed.distributed_c10d import Store

from megadistill.distributed.launch import Launch
from megadistill.distributed.rendezvous import store_barrier
from megadistill.errors import RestartFault, UserError
from megadistill.io import parse_json

WAITS_FOR_RANKS = True
"""A thread with a frame of this module waits for other ranks (see `watchdog.stack_probe`)."""

NodeCheck = Callable[[], Mapping[str, str]]
"""A check of this node's files: name of a content -> its digest, which must be the same on every node that has it."""

_PROBLEM = "node_check_problem"


def check_nodes(
    store: Store, launch: Launch, digests: Mapping[str, str], problem: Exception | None, timeout: timedelta
) -> None:
    """Compares what the first rank of each node found; collective over the launch. Four messages to the store a rank.

    Args:
        digests: digests of this node; read on its first rank.
        problem: what its check raised.

    Raises:
        UserError, RestartFault: on every rank, where the check of one node has failed, or two nodes differ.
    """
    if launch.world == 1:  # its store may outlive this start, and has the digests of none to compare with
        if problem is not None:
            raise problem
        return
    if launch.local_rank == 0:
        if problem is None:
            problem = _difference(store, digests)
        if problem is not None:
            where = f" (on {socket.gethostname()})" if launch.world > launch.local_world else ""
            kind = "restart" if isinstance(problem, RestartFault) else "input"
            store.compare_set(_PROBLEM, "", json.dumps([kind, f"{problem}{where}"]))
    store_barrier(store, "node_check", launch.rank, launch.world, timeout)
    if not store.check([_PROBLEM]):
        return
    kind, message = parse_json(store.get(_PROBLEM))
    store_barrier(store, "node_check_read", launch.rank, launch.world, timeout)  # rank 0, with the store, leaves last
    raise RestartFault(message) if kind == "restart" else UserError(message)


def _difference(store: Store, digests: Mapping[str, str]) -> UserError | None:
    """The first difference of this node from the one that came first with the same content."""
    for name, digest in digests.items():
        own = json.dumps([socket.gethostname(), digest])
        host, first = parse_json(store.compare_set(f"node_check {name}", "", own))
        if first != digest:
            return UserError(
                f"{name} is not the same on every node: its digest is {digest[:12]} here and {first[:12]} on {host}: "
                "copy the folder again, or name one on a file system that all nodes share"
            )
    return None
