"""Latency of collectives: NCCL's published model, measured ones instead, the part that compute does not hide."""

from dataclasses import replace

import pytest
import yaml

from megadistill.accelerators import Accelerator, accelerator
from megadistill.doctor.comparison import latency_row
from megadistill.plan.collective_latency import CollectiveTimes, LatencyModel, StepLatency
from megadistill.plan.counts.step_collectives import ALL_GATHER, ALL_REDUCE, Collective, Hidden, StepCollectives
from megadistill.plan.throughput import StepTimes

H100 = accelerator("h100")


def _call(nbytes: int, *, kind: str = ALL_GATHER, ranks: int = 1536, nodes: int = 192) -> Collective:
    return Collective("test", kind, ranks, nodes, nbytes, Hidden.FORWARD, spans_world=True)


def test_a_small_gather_takes_a_ring_of_low_latency_hops() -> None:
    """LL: 6.6 us, 1,344 hops in nodes at the 1 us of the network's overhead, 191 between them at 2.7 us."""
    assert LatencyModel(H100, 8).seconds(_call(0)) == pytest.approx(1e-6 * (6.6 + 1344 * 1.0 + 191 * 2.7))


def test_a_layer_is_gathered_by_ll128() -> None:
    """14 us, hops of 1.9 and 4 us, and 8 % of the bandwidth; Simple would take 7.3 ms."""
    layer = _call(155_738_112)
    model = LatencyModel(H100, 8)
    lost = model.transfer(layer) * (1 / 0.92 - 1)
    assert model.seconds(layer) == pytest.approx(1e-6 * (14 + 1344 * 1.9 + 191 * 4.0) + lost)


def test_a_small_all_reduce_takes_a_tree() -> None:
    """LL: 6.8 us, and twice 7 hops in a node at 0.6 us and 7 levels of nodes at 5 us."""
    seconds = LatencyModel(H100, 8).seconds(_call(0, kind=ALL_REDUCE))
    assert seconds == pytest.approx(1e-6 * (6.8 + 2 * (7 * 0.6 + 7 * 5.0)))


def test_without_nvlink_there_is_no_ll128() -> None:
    pcie = LatencyModel(accelerator("l40s"), 8)
    large = _call(1 << 33)
    assert pcie.seconds(large) == pytest.approx(1e-6 * (8.4 + 1344 * 5.7 + 191 * 14.0))


def _measured() -> Accelerator:
    row = latency_row({"all_gather": {1536: 0.004, 8: 2e-5}, "all_reduce": {1536: 1e-4, 8: 3e-5}})
    values = yaml.safe_load(row.detail[row.detail.index("latency_us") :])
    return Accelerator.model_validate({**H100.model_dump(), **values})


def test_the_row_of_doctor_is_what_plan_reads() -> None:
    model = LatencyModel(_measured(), 8)
    assert model.seconds(_call(0)) == pytest.approx(0.004)
    assert model.seconds(_call(0, ranks=8, nodes=1)) == pytest.approx(2e-5)
    assert model.seconds(_call(0, kind=ALL_REDUCE)) == pytest.approx(1e-4)
    assert model.is_measured


def test_what_was_measured_scales_the_model_for_other_ranks_and_bytes() -> None:
    published, measured = LatencyModel(H100, 8), LatencyModel(_measured(), 8)
    factor = 0.004 / published.seconds(_call(0))
    for call in (_call(155_738_112), _call(0, ranks=2048, nodes=256)):
        assert measured.seconds(call) == pytest.approx(factor * published.seconds(call))


TIMES = StepTimes(
    students=1536, micro_steps=2, student_forward=0.05, student_backward=0.1, gather=0.0, reduce=0.0, vocabulary=0.0
)


def _latency(first: int, later: int, *, waited: int = 0) -> StepLatency:
    """Gathers of nothing in the forward pass of the first and of the second micro-step, and calls once a step."""
    once = (replace(_call(0), hidden_behind=Hidden.NOTHING),) * waited
    collectives = StepCollectives(2, (_call(0),) * first, (_call(0),) * later, once)
    return StepLatency(CollectiveTimes(collectives, LatencyModel(H100, 8)), TIMES)


ALPHA = LatencyModel(H100, 8).seconds(_call(0))


def test_latency_shows_where_a_pass_does_not_hide_it() -> None:
    assert _latency(10, 10).exposed == 0.0, "19 ms behind 50 ms"
    assert _latency(100, 0).exposed == pytest.approx((100 * ALPHA - 0.05) / 2), "the mean of two micro-steps"
    assert _latency(0, 0, waited=3).exposed == pytest.approx(3 * ALPHA / 2)
    assert _latency(10, 10).together == pytest.approx(20 * ALPHA)


def test_latency_passes_compute_at_some_number_of_ranks() -> None:
    latency = _latency(10, 10)
    ranks = latency.ranks_at_compute
    assert ranks is not None
    compute = 2 * TIMES.compute
    for nodes, passes in ((ranks // 8, True), (ranks // 8 - 1, False)):
        seconds = 20 * latency.model.seconds(_call(0, ranks=8 * nodes, nodes=nodes))
        assert (seconds > compute) == passes
    assert _latency(0, 0).ranks_at_compute is None
