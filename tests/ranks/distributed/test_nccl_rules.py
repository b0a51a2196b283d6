"""The double of NCCL's rules: it hangs where NCCL hangs, says why, and computes what gloo computes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megadistill.distributed import collectives
from megadistill.distributed.p2p import Endpoint, chain, exchange
from tests.ranks.nccl_rules import Failed, Group, Hang, HostGroup, Store, finished, run_threads


def _world(rank: int, size: int) -> Group:
    return Group("world", range(size))


def _hang(size: int, function: Callable[[int, Store], Any], **options: Any) -> str:
    """The picture of a hang in which all ranks end."""
    results = run_threads(size, function, **options)
    assert all(isinstance(result, Failed) and isinstance(result.error, Hang) for result in results), results
    (picture,) = {str(result.error) for result in results}
    return picture


def _receive_first(rank: int, store: Store) -> None:
    """Around a ring: gloo's receives only wait when they are waited for."""
    group, byte = _world(rank, 3), torch.zeros(1)
    received = group.recv([torch.zeros(1)], (rank - 1) % 3, 0)
    group.send([byte], (rank + 1) % 3, 0).wait()
    received.wait()


def test_a_message_blocks_the_host_until_its_peer_makes_the_communicator() -> None:
    picture = _hang(3, _receive_first)
    for rank, pair in enumerate(([0, 2], [0, 1], [1, 2])):
        assert f"rank {rank} in the receive from {(rank - 1) % 3} (world)" in picture
        assert f"makes the communicator of ranks {pair}" in picture


def test_communicators_made_in_one_order_do_not_hang() -> None:
    def rank_of(rank: int, store: Store) -> None:
        endpoint = Endpoint(_world(rank, 3), rank=rank, ranks=range(3))
        endpoint.connect([(0, 1), (1, 2), (2, 0)], torch.device("cpu"))
        _receive_first(rank, store)

    finished(run_threads(3, rank_of))


def _connected(rank: int, size: int) -> Endpoint:
    endpoint = Endpoint(_world(rank, size), rank=rank, ranks=range(size))
    endpoint.connect(chain(range(size)), torch.device("cpu"))
    return endpoint


@pytest.mark.parametrize("first", ["receive", "send"])
def test_two_ranks_have_one_stream_in_the_order_of_issue(first: str) -> None:
    def rank_of(rank: int, store: Store) -> None:
        endpoint = _connected(rank, 2)
        start = {
            "send": lambda: endpoint.send(torch.zeros(1), 1 - rank, label=""),
            "receive": lambda: endpoint.post_recv(torch.zeros(1), 1 - rank, label=""),
        }
        other = "send" if first == "receive" else "receive"
        for message in [start[first](), start[other]()][::-1]:
            message.wait()

    picture = _hang(2, rank_of)
    assert f"rank 0 waits for the {'send to' if first == 'receive' else 'receive from'} 1 (world)" in picture
    assert f"stands behind the {'receive from' if first == 'receive' else 'send to'} 1 (world) on its stream" in picture


def test_messages_of_a_batch_run_together_on_the_groups_communicator() -> None:
    def together(rank: int, store: Store) -> float:
        received = torch.zeros(1)
        exchange(torch.tensor([rank + 1.0]), received, 1 - rank, dist.group.WORLD)
        return float(received)

    assert finished(run_threads(2, together)) == [2.0, 1.0]

    def some(rank: int, store: Store) -> None:
        if rank < 2:
            exchange(torch.zeros(1), torch.zeros(1), 1 - rank, dist.group.WORLD)

    *pair, third = run_threads(3, some)
    assert third is None
    for result in pair:
        assert "makes the communicator of ranks [0, 1, 2], which [2] have not entered" in str(result.error)
        assert "rank 2 has ended" in str(result.error)


def _crossed(rank: int, store: Store) -> None:
    """Two communicators, used in another order on the two ranks; each exists."""
    groups = [Group(name, range(2)) for name in ("a", "b")]
    for group in groups:
        group.barrier().wait()
    for work in [group.barrier() for group in (groups if rank == 0 else groups[::-1])]:
        work.wait()


def test_communicators_have_a_stream_each_or_one_queue_together() -> None:
    finished(run_threads(2, _crossed))
    picture = _hang(2, _crossed, one_queue=True)
    assert "rank 0 waits for all-reduce of 1 (a); rank 1 runs all-reduce of 1 (b)" in picture


def test_a_send_ends_when_its_receive_runs() -> None:
    def rank_of(rank: int, store: Store) -> bool:
        endpoint = _connected(rank, 2)
        if rank == 0:
            message = endpoint.send(torch.ones(1), 1, label="")
            is_done_early = bool(message.work.is_completed())
            store.set("sent", "")
            message.wait()
            return is_done_early
        store.wait(["sent"])
        return bool(endpoint.post_recv(torch.zeros(1), 0, label="").wait())

    assert finished(run_threads(2, rank_of)) == [False, True]


def test_messages_in_host_memory_are_gloos() -> None:
    def rank_of(rank: int, store: Store) -> list[float]:
        group = HostGroup("host", range(2))
        buffers = [torch.zeros(1) for _ in range(2)]
        receives = [group.recv([buffer], 1 - rank, 0) for buffer in buffers]
        for value in (1.0, 2.0):
            group.send([torch.tensor([10 * rank + value])], 1 - rank, 0).wait()
        return [float(buffer) for receive, buffer in zip(receives, buffers, strict=True) if receive.wait()]

    assert finished(run_threads(2, rank_of)) == [[11.0, 12.0], [1.0, 2.0]]


def test_collectives_compute_what_their_names_say() -> None:
    def rank_of(rank: int, store: Store) -> list[Any]:
        world = dist.group.WORLD
        own = torch.arange(6.0) + 10 * rank
        rows = torch.stack([torch.full((2,), float(i)) for i in range(3)]).flatten() if rank == 1 else None
        return [
            collectives.all_gather_rows(own[:2], world).tolist(),
            collectives.reduce_scatter_rows(own, world).tolist(),
            collectives.all_reduce_sum(own.clone(), world).tolist(),
            collectives.scatter_rows(rows, torch.empty(2), source=1, group=world).tolist(),
            collectives.first_false(rank != 1, torch.device("cpu"), world),
            collectives.all_gather_objects({"rank": rank}, world),
            collectives.broadcast_object("x" * (rank + 1), world),
            dist.get_rank(),
        ]

    total = (3 * torch.arange(6.0) + 30).tolist()
    for rank, values in enumerate(finished(run_threads(3, rank_of))):
        assert values == [
            [0.0, 1.0, 10.0, 11.0, 20.0, 21.0],
            total[2 * rank : 2 * rank + 2],
            total,
            [float(rank)] * 2,
            1,
            [{"rank": 0}, {"rank": 1}, {"rank": 2}],
            "x",
            rank,
        ]


def test_different_collectives_of_one_communicator_do_not_meet() -> None:
    def rank_of(rank: int, store: Store) -> None:
        collectives.all_reduce_sum(torch.zeros(1 + rank), dist.group.WORLD)

    picture = _hang(2, rank_of)
    assert "different operations of one communicator" in picture
    assert "all-reduce of 2" in picture


def test_a_rank_that_fails_ends_those_that_wait_for_it() -> None:
    def rank_of(rank: int, store: Store) -> None:
        collectives.barrier(dist.group.WORLD)
        if rank == 1:
            raise ValueError("broken")
        collectives.barrier(dist.group.WORLD)

    results = run_threads(3, rank_of)
    with pytest.raises(ValueError, match="broken"):
        finished(results)
    for rank in (0, 2):
        assert "rank 1 has failed: ValueError: broken" in str(results[rank].error)
