"""Facts of the ranks beside each other: who is slow, who is short of memory, whose clock is wrong, by hand."""

from typing import Any

from megadistill.doctor.comparison import (
    clock_row,
    contents_row,
    devices_row,
    memory_rows,
    pairs_row,
    products_row,
    space_row,
    versions_row,
)
from megadistill.doctor.findings import Examined, Mark

GB = 10**9


def _ranks(**facts: list[Any]) -> list[Examined]:
    """Two ranks a node: a0, a1, b2, b3; a fact is a list with a value for each rank."""
    count = len(next(iter(facts.values())))
    return [
        Examined(rank, "ab"[rank // 2], facts={name: values[rank] for name, values in facts.items()})
        for rank in range(count)
    ]


def test_versions_name_only_what_differs() -> None:
    same = {"torch": "2.13", "numpy": "2.4"}
    row = versions_row(_ranks(versions=[same, same, same, {**same, "torch": "2.12"}]))
    assert (row.mark, row.said) == (Mark.BAD, "b: torch 2.12; elsewhere torch 2.13")
    assert row.nodes == ()  # the other rank of b is well: the node is not told apart
    assert versions_row(_ranks(versions=[same, same])).said == "torch 2.13, numpy 2.4"


def test_what_is_read_must_be_one_thing() -> None:
    one, other = {"recipe": "1", "data": "2"}, {"recipe": "1", "data": "3"}
    row = contents_row(_ranks(content=[one, one, other, other]))
    assert row is not None
    assert (row.mark, row.nodes) == (Mark.BAD, ("b",))
    assert contents_row([Examined(0, "a")]) is None


def test_unlike_devices_are_doubtful() -> None:
    row = devices_row(_ranks(device=["H100", "H100", "H100", "A100"]))
    assert (row.mark, row.nodes) == (Mark.DOUBTFUL, ())


def test_memory_is_the_worst_ranks() -> None:
    needs = {"device": {"states": 30 * GB, "stage": 20 * GB}, "host": {"copy": 6 * GB}}
    common: dict[str, list[Any]] = {"needs": [needs] * 4, "on_cpu": [False] * 4, "local_world": [2] * 4}
    device, host = memory_rows(_ranks(**common, free=[79 * GB] * 3 + [40 * GB], host_free=[100 * GB] * 4))
    assert (device.mark, device.nodes, host.mark) == (Mark.BAD, ("b",), Mark.GOOD)
    assert device.said == "rank 3 needs 50 GB of the 40 GB that are free (states 30 GB, stage 20 GB)"
    device, host = memory_rows(_ranks(**common, free=[52 * GB] * 4, host_free=[11 * GB] * 4))
    assert (device.mark, host.mark, host.nodes) == (Mark.DOUBTFUL, Mark.BAD, ())  # all of them: no node's fault
    (both,) = memory_rows(_ranks(**{**common, "on_cpu": [True] * 4}, free=[0] * 4, host_free=[200 * GB] * 4))
    assert both.said.startswith("rank 0 needs 56 GB of the 100 GB")
    assert memory_rows([Examined(0, "a")]) == []


def test_space_is_for_two_checkpoints() -> None:
    needed = 2 * 12 * 1_000_000
    assert space_row(2 * needed, 1_000_000, [1e9]).mark is Mark.GOOD
    assert space_row(needed, 1_000_000, []).mark is Mark.BAD  # to the last byte is too little


def test_a_clock_that_is_off_is_named() -> None:
    assert clock_row([0.0, 0.004], ["a", "b"]).said == "within 4 ms of rank 0's"
    off = clock_row([0.0, -7.0], ["a", "b"])
    assert (off.mark, off.nodes) == (Mark.DOUBTFUL, ())
    assert "b -7.0 s" in off.said
    assert clock_row([0.0, 7.0, 3600.0], ["a", "b", "c"]).nodes == ("c",)


def test_a_slow_rank_is_named_and_on_a_cpu_only_doubted() -> None:
    ranks = _ranks(product=[0.010, 0.010, 0.010, 0.020], on_cpu=[False] * 4)
    row = products_row(ranks)
    assert (row.mark, row.said, row.nodes) == (Mark.BAD, "rank 3 (b) computes at 0.50 of the median", ("b",))
    for each in ranks:
        each.facts["on_cpu"] = True
    assert products_row(ranks).mark is Mark.DOUBTFUL
    assert products_row(_ranks(product=[0.010, 0.012], on_cpu=[False] * 2)).mark is Mark.GOOD


def test_a_slow_link_within_a_node_is_that_nodes() -> None:
    hosts = ["a", "a", "b", "b", "c", "c"]
    rates = {(0, 1): 300e9, (2, 3): 300e9, (4, 5): 20e9}
    row = pairs_row(rates, hosts, on_cpu=False)
    assert (row.mark, row.nodes) == (Mark.BAD, ("c",))
    assert "ranks 4 (c) and 5 (c) 20" in row.said
    assert pairs_row(rates, hosts, on_cpu=True).mark is Mark.DOUBTFUL


def test_a_node_that_is_slow_with_two_others_is_bad_and_of_two_nobody_can_tell() -> None:
    ring = {(0, 1): 5.0, (1, 2): 5.0, (2, 3): 50.0, (3, 4): 50.0, (0, 4): 50.0}
    row = pairs_row(ring, ["a", "b", "c", "d", "e"], on_cpu=False)
    assert row.nodes == ("b",)  # a and c are slow with b alone
    one = pairs_row({**ring, (1, 2): 50.0}, ["a", "b", "c", "d", "e"], on_cpu=False)
    assert (one.mark, one.nodes) == (Mark.BAD, ())
    # a link within a node is not held against one between nodes
    mixed = pairs_row({(0, 1): 300e9, (2, 3): 300e9, (1, 2): 20e9}, ["a", "a", "b", "b"], on_cpu=False)
    assert mixed.mark is Mark.GOOD
