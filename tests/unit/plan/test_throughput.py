"""Seconds of a micro-step, against the worked numbers of the design and the arithmetic written out."""

from dataclasses import replace

import pytest

from megadistill.plan.throughput import StepTimes

ALONE = StepTimes(
    students=8,
    micro_steps=4,
    student_forward=1.0,
    student_backward=2.0,
    gather=1.5,
    reduce=1.0,
    vocabulary=0.25,
)
COLOCATED = replace(ALONE, stages=(0.1, 0.1, 0.2, 0.1), packet=0.01, answer=0.005)
BESIDE = replace(ALONE, stages=(0.5, 0.5), packet=0.01, answer=0.005, replicas=2, queue=4)


def test_traffic_hides_behind_compute_and_what_is_longer_shows() -> None:
    assert ALONE.exposed == 0
    assert ALONE.micro_step == pytest.approx(3.25)
    assert replace(ALONE, gather=3.0).exposed == pytest.approx(1.0)
    assert ALONE.step == pytest.approx(4 * 3.25)
    assert ALONE.seconds(10) == pytest.approx(40 * 3.25)


def test_a_colocated_teacher_takes_its_turn_at_the_pace_of_its_largest_stage() -> None:
    assert COLOCATED.clients == 4
    assert COLOCATED.micro_step == pytest.approx(3.25 + 4 * 0.2 + 4 * 0.005)
    assert COLOCATED.seconds(1) == pytest.approx(COLOCATED.step + 3 * 0.8), "filled once"


def test_a_teacher_beside_the_student_is_as_fast_as_the_slower_side() -> None:
    assert BESIDE.clients == 4
    assert BESIDE.micro_step == pytest.approx(3.25), "2.0 s a round of four: the teacher waits"
    assert replace(BESIDE, stages=(0.5, 1.0)).micro_step == pytest.approx(4.0), "the student waits"
    assert replace(BESIDE, packet=0.9).micro_step == pytest.approx(3.6), "the link between stages is slow"
    assert BESIDE.latency == pytest.approx(0.5 + 0.5 + 3 * 0.5 + 0.01 + 0.005)
    assert replace(BESIDE, stages=(0.5, 1.0), queue=1).micro_step == pytest.approx(4.515 + 3.25), (
        "too little is requested ahead"
    )
    assert replace(BESIDE, answer=1.0).micro_step == pytest.approx(4.0), "the link back to the student is slow"


def test_a_pipeline_is_filled_once_a_run() -> None:
    """1,000 steps of one round through 4 stages: an idle share of (P - 1) / (m + P - 1) over all m rounds."""
    times = replace(COLOCATED, stages=(0.5,) * 4, micro_steps=1, student_forward=0, student_backward=0, gather=0)
    times = replace(times, reduce=0, vocabulary=0, answer=0)
    busy = 1000 * times.tick
    assert 1 - busy / times.seconds(1000) == pytest.approx(3 / 1003)
