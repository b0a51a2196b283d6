"""The simulated timeline of a plan: bubbles as the closed forms have them, steps as `StepTimes` counts them."""

from dataclasses import replace

import pytest

from megadistill.errors import UserError
from megadistill.plan.output.plan_timeline import simulate
from megadistill.plan.throughput import StepTimes
from megadistill.timeline.spans import Lane, Timeline, first_unnested, seconds_by_kind

TEACHING_ALONE = StepTimes(
    students=4,
    micro_steps=6,
    student_forward=0.0,
    student_backward=0.0,
    gather=0.0,
    reduce=0.0,
    vocabulary=0.0,
    stages=(1.0,) * 4,
    queue=50,
)
COLOCATED = StepTimes(
    students=8,
    micro_steps=5,
    student_forward=1.0,
    student_backward=2.0,
    gather=2.0,
    reduce=1.5,
    vocabulary=0.1,
    stages=(0.25, 0.26, 0.25, 0.24),
    packet=0.02,
    answer=0.01,
    queue=50,
)
APART = replace(COLOCATED, replicas=2)
SLOW_TEACHER = replace(APART, stages=(1.0, 1.2, 1.0, 0.9))


def _simulated(times: StepTimes, *, steps: int = 3, run_steps: int = 3) -> Timeline:
    return simulate(times, steps=steps, run_steps=run_steps, ranks_per_node=4)


def _idle(lane: Lane, timeline: Timeline) -> float:
    begin, end = timeline.window
    return 1 - seconds_by_kind(lane, begin, end)["compute"] / (end - begin)


@pytest.mark.parametrize(("replicas", "clients"), [(0, 4), (1, 2)])
def test_the_bubble_is_the_closed_form(replicas: int, clients: int) -> None:
    """(P - 1)/(m + P - 1), once a run. A tick of stages of their own is one rank's micro-batch, of colocated ones a
    round of all."""
    times = replace(TEACHING_ALONE, replicas=replicas, students=clients)
    micro_batches = 3 * times.micro_steps * (clients if replicas else 1)
    timeline = _simulated(times)
    idle = [_idle(lane, timeline) for lane in timeline.lanes if "stage" in lane.role]
    assert idle == pytest.approx([3 / (micro_batches + 3)] * 4)


def test_in_a_longer_run_no_stage_runs_dry_at_the_end() -> None:
    timeline = _simulated(TEACHING_ALONE, run_steps=100)
    assert [_idle(lane, timeline) for lane in timeline.lanes] == pytest.approx([k / (3 * 6 + 3) for k in range(4)])


@pytest.mark.parametrize("times", [COLOCATED, APART, SLOW_TEACHER])
def test_a_filled_pipeline_takes_the_plans_seconds(times: StepTimes) -> None:
    timeline = _simulated(times, steps=12, run_steps=100)
    last = timeline.steps[-1]
    assert last.end - last.begin == pytest.approx(times.step)


def test_traffic_shows_where_compute_does_not_hide_it() -> None:
    timeline = _simulated(COLOCATED)
    exposed = [span.end - span.begin for span in timeline.lanes[0].spans if span.name.startswith("ZeRO-3")]
    assert exposed == pytest.approx([0.5] * 15)
    hidden = _simulated(replace(COLOCATED, gather=1.0))
    assert not any(span.name.startswith("ZeRO-3") for lane in hidden.lanes for span in lane.spans)


@pytest.mark.parametrize("queue", [1, 2])
def test_a_late_request_is_waited_for(queue: int) -> None:
    """A rank sends a request after the micro-step `queue` before: so many micro-steps take an answer's latency and one
    micro-step. Four ranks send at once, so the last one's latency is three parts longer."""
    latency = sum(SLOW_TEACHER.stages) + 3 * max(SLOW_TEACHER.stages) + 3 * SLOW_TEACHER.packet + SLOW_TEACHER.answer
    timeline = _simulated(replace(SLOW_TEACHER, queue=queue, micro_steps=6), steps=8, run_steps=100)
    last = timeline.steps[-1].end - timeline.steps[-2].end
    period = max((latency + SLOW_TEACHER.student) / queue, SLOW_TEACHER.tick)
    assert last == pytest.approx(6 * period)


@pytest.mark.parametrize("times", [COLOCATED, APART, SLOW_TEACHER, replace(COLOCATED, stages=())])
def test_spans_lie_apart_and_messages_arrive(times: StepTimes) -> None:
    timeline = _simulated(times, run_steps=4)
    assert all(first_unnested(lane.spans) is None for lane in timeline.lanes)
    sent = {span.message: span.begin for lane in timeline.lanes for span in lane.spans if span.kind == "send"}
    there = {span.message: span.end for lane in timeline.lanes for span in lane.spans if span.kind == "wait"}
    both = [message for message in sent if message is not None and message in there]
    assert bool(both) == bool(times.stages)
    assert all(sent[message] <= there[message] for message in both)
    assert set(there) - {None} <= set(sent)


def test_the_timeline_has_one_pipeline_of_several() -> None:
    timeline = _simulated(APART)
    assert [lane.rank for lane in timeline.lanes] == [0, 1, 2, 3, 8, 9, 10, 11]
    assert [lane.node for lane in timeline.lanes] == ["node 0"] * 4 + ["node 2"] * 4
    assert "8 of 16 ranks" in timeline.note


@pytest.mark.parametrize(
    ("steps", "run_steps", "message"),
    [(0, 3, "give 1 to 3"), (4, 3, "give 1 to 3"), (10_000, 10_000, "give fewer steps")],
)
def test_steps_that_cannot_be_shown_are_refused(steps: int, run_steps: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        _simulated(COLOCATED, steps=steps, run_steps=run_steps)
