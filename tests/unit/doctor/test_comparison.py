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
from megadistill.doctor.rank_report import RankReport, Status

GB = 10**9


def _ranks(**facts: list[Any]) -> list[RankReport]:
    """Two ranks a node: a0, a1, b2, b3; a fact is a list with a value for each rank."""
    count = len(next(iter(facts.values())))
    return [
        RankReport(rank, "ab"[rank // 2], facts={name: values[rank] for name, values in facts.items()})
        for rank in range(count)
    ]


def test_versions_name_only_what_differs() -> None:
    same = {"torch": "2.13", "numpy": "2.4"}
    row = versions_row(_ranks(versions=[same, same, same, {**same, "torch": "2.12"}]))
    assert (row.status, row.detail) == (Status.FAIL, "b: torch 2.12; elsewhere torch 2.13")
    assert row.nodes == ()  # the other rank of b is well: the node is not at fault
    assert versions_row(_ranks(versions=[same, same])).detail == "torch 2.13, numpy 2.4"


def test_a_version_that_was_not_tried_is_a_warning() -> None:
    row = versions_row(_ranks(versions=[{"torch": "2.10.0", "numpy": "2.4.6"}] * 2))
    assert row.status is Status.WARN
    assert row.detail.startswith("torch 2.10.0 was not tried (")


def test_what_is_read_must_be_one_thing() -> None:
    one, other = {"recipe": "1", "data": "2"}, {"recipe": "1", "data": "3"}
    row = contents_row(_ranks(content=[one, one, other, other]))
    assert row is not None
    assert (row.status, row.nodes) == (Status.FAIL, ("b",))
    assert contents_row([RankReport(0, "a")]) is None


def test_unlike_devices_are_doubtful() -> None:
    row = devices_row(_ranks(device=["H100", "H100", "H100", "A100"]))
    assert (row.status, row.nodes) == (Status.WARN, ())


def test_memory_is_the_worst_ranks() -> None:
    needs = {"device": {"states": 30 * GB, "stage": 20 * GB}, "host": {"copy": 6 * GB}}
    common: dict[str, list[Any]] = {"needs": [needs] * 4, "on_cpu": [False] * 4, "local_world": [2] * 4}
    device, host = memory_rows(_ranks(**common, free=[79 * GB] * 3 + [40 * GB], host_free=[100 * GB] * 4))
    assert (device.status, device.nodes, host.status) == (Status.FAIL, ("b",), Status.OK)
    assert device.detail == "rank 3 needs 50 GB of the 40 GB that are free (states 30 GB, stage 20 GB)"
    device, host = memory_rows(_ranks(**common, free=[52 * GB] * 4, host_free=[11 * GB] * 4))
    assert (device.status, host.status, host.nodes) == (Status.WARN, Status.FAIL, ())  # all of them: no node's fault
    (both,) = memory_rows(_ranks(**{**common, "on_cpu": [True] * 4}, free=[0] * 4, host_free=[200 * GB] * 4))
    assert both.detail.startswith("rank 0 needs 56 GB of the 100 GB")
    assert memory_rows([RankReport(0, "a")]) == []


def test_space_is_for_two_checkpoints() -> None:
    checkpoint = 12_000_000
    assert space_row(4 * checkpoint, checkpoint, [1e9], final=1).status is Status.OK
    assert space_row(2 * checkpoint, checkpoint, [], final=1).status is Status.FAIL  # to the last byte is too little


def test_space_that_later_checkpoints_will_fill_is_a_warning() -> None:
    row = space_row(400_000_000, 100_000_000, [], final=13)
    assert row.status is Status.WARN
    assert row.detail == (
        "14 checkpoints at a time need 1.47 GB, 400 MB are free: free space, or keep fewer (checkpoint.keep_last, "
        "checkpoint.keep_every)"
    )


def test_a_clock_that_is_off_is_named() -> None:
    assert clock_row([0.0, 0.004], ["a", "b"]).detail == "within 4 ms of rank 0's"
    off = clock_row([0.0, -7.0], ["a", "b"])
    assert (off.status, off.nodes) == (Status.WARN, ())
    assert "b -7.0 s" in off.detail
    assert clock_row([0.0, 7.0, 3600.0], ["a", "b", "c"]).nodes == ("c",)


def test_a_slow_rank_is_named_and_on_a_cpu_only_doubted() -> None:
    ranks = _ranks(product=[0.010, 0.010, 0.010, 0.020], on_cpu=[False] * 4)
    row = products_row(ranks)
    assert (row.status, row.detail, row.nodes) == (Status.FAIL, "rank 3 (b) computes at 0.50 of the median", ("b",))
    for each in ranks:
        each.facts["on_cpu"] = True
    assert products_row(ranks).status is Status.WARN
    well = products_row(_ranks(product=[0.010, 0.012], on_cpu=[False] * 2))
    assert (well.status, well.detail) == (Status.OK, "every rank within 1.3 of the median: 10 ms")
    assert products_row(_ranks(product=[0.010], on_cpu=[False])).detail == "10 ms", "a rank alone has no median"


def test_a_slow_link_within_a_node_is_that_nodes() -> None:
    hosts = ["a", "a", "b", "b", "c", "c"]
    rates = {(0, 1): 300e9, (2, 3): 300e9, (4, 5): 20e9}
    row = pairs_row(rates, hosts, on_cpu=False)
    assert (row.status, row.nodes) == (Status.FAIL, ("c",))
    assert "ranks 4 (c) and 5 (c) 20" in row.detail
    assert pairs_row(rates, hosts, on_cpu=True).status is Status.WARN


def test_a_node_that_is_slow_with_two_others_is_bad_and_of_two_nobody_can_tell() -> None:
    ring = {(0, 1): 5.0, (1, 2): 5.0, (2, 3): 50.0, (3, 4): 50.0, (0, 4): 50.0}
    row = pairs_row(ring, ["a", "b", "c", "d", "e"], on_cpu=False)
    assert row.nodes == ("b",)  # a and c are slow with b alone
    one = pairs_row({**ring, (1, 2): 50.0}, ["a", "b", "c", "d", "e"], on_cpu=False)
    assert (one.status, one.nodes) == (Status.FAIL, ())
    # a link within a node is not held against one between nodes
    mixed = pairs_row({(0, 1): 300e9, (2, 3): 300e9, (1, 2): 20e9}, ["a", "a", "b", "b"], on_cpu=False)
    assert mixed.status is Status.OK
