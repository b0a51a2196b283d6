"""One rank of a node checks its files: every rank of every node ends with the same line, or goes on."""

import socket
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch._C._distributed_c10d import TCPStore
from torch.distributed.distributed_c10d import PrefixStore

from megadistill.distributed.launch import Launch
from megadistill.distributed.node_digests import check_nodes
from megadistill.errors import RestartFault, UserError

TIMEOUT = timedelta(seconds=20)
Outcome = tuple[type[Exception], str] | None


def _outcomes(
    digests: Callable[[int], Mapping[str, str]],
    problems: Mapping[int, Exception] = {},
    *,
    world: int = 6,
    local: int = 2,
) -> list[Outcome]:
    """How each rank goes on. `digests`: by node; `problems`: what the check of a node raised."""
    server = TCPStore("127.0.0.1", 0, None, True, TIMEOUT, False)

    def rank_of(rank: int) -> Outcome:
        node, local_rank = divmod(rank, local)
        mine = (digests(node), problems.get(node)) if local_rank == 0 else ({}, None)
        store = TCPStore("127.0.0.1", server.port, None, False, TIMEOUT, False)
        try:
            check_nodes(PrefixStore("start", store), Launch(rank, world, local_rank, local), *mine, TIMEOUT)
        except (UserError, RestartFault) as error:
            return type(error), str(error)
        return None

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(rank_of, range(world)))


def test_equal_nodes_go_on() -> None:
    assert _outcomes(lambda node: {"the teacher": "a"} if node else {}) == [None] * 6, "not every node has everything"


def test_a_node_with_another_content_ends_all() -> None:
    ((kind, line),) = set(_outcomes(lambda node: {"the teacher": "ab"[node == 2]}))  # type: ignore[misc]
    assert kind is UserError
    assert line.startswith("the teacher is not the same on every node: its digest is ")
    assert socket.gethostname() in line


@pytest.mark.parametrize("error", [UserError("no tensor 'x'"), RestartFault("disk error")])
def test_a_check_that_fails_on_one_node_ends_all_with_its_line(error: Exception) -> None:
    outcomes = _outcomes(lambda node: {"the teacher": "a"}, {1: error})
    assert set(outcomes) == {(type(error), f"{error} (on {socket.gethostname()})")}
    alone = _outcomes(lambda node: {}, {0: error}, world=2)
    assert set(alone) == {(type(error), str(error))}, "of one node it need not be said which"


def test_a_launch_of_one_rank_leaves_nothing_in_a_store_that_outlives_it() -> None:
    """torchrun's agent has the store of a single rank: a restart after the teacher was replaced finds it again."""
    store, alone = TCPStore("127.0.0.1", 0, None, True, TIMEOUT, False), Launch(0, 1, 0, 1)
    before = store.num_keys()
    check_nodes(store, alone, {"the teacher": "a"}, None, TIMEOUT)
    with pytest.raises(UserError, match=r"^no tensor 'x'$"):
        check_nodes(store, alone, {}, UserError("no tensor 'x'"), TIMEOUT)
    check_nodes(store, alone, {"the teacher": "b"}, None, TIMEOUT)
    assert store.num_keys() == before
