"""Recorded timelines of real ranks: whole, nested, on one clock, and the run is what it is without one."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from megadistill.config.recipe import Recipe
from megadistill.distributed.launch import Launch
from megadistill.distributed.roles import Roles
from megadistill.distributed.topology import Topology
from megadistill.timeline.files import read_timeline
from megadistill.timeline.spans import Lane, MessageId, Timeline
from megadistill.timeline.trace import write_trace
from megadistill.train.loop import run
from megadistill.train.setup.setup import prepare
from megadistill.train.teacher.placement import run_teacher_server
from megadistill.train.telemetry.timeline_capture import capture_teacher_server
from tests.ranks.harness import run_ranks
from tests.ranks.train import test_loop as loops

manifest, teacher = loops.manifest, loops.teacher  # the fixtures

STEPS, FIRST, LAST, ACCUMULATION = 4, 2, 3, 2
STUDENTS = 2


def _distill(topology: Topology, manifest: str, folder: str, teacher: dict[str, Any], window: list[int] | None) -> None:
    base = loops.recipe(Path(manifest), Path(folder)).snapshot()
    changes: dict[str, Any] = {
        "objective": "distill",
        "teacher": teacher,
        "run": {**base["run"], "timeline": window},
        "train": {**base["train"], "steps": STEPS, "checkpoint_every": LAST},
    }
    rank, world = topology.rank, topology.world
    if topology.bridge is not None:
        rank, world = topology.bridge.rank, topology.bridge.roles.world
    setup = prepare(Recipe.model_validate({**base, **changes}), Launch(rank, world, topology.local_rank, world))
    if topology.role == "teacher":
        with capture_teacher_server(setup, topology):
            run_teacher_server(setup, topology)
    else:
        run(setup, topology, stop_after=None)


def _messages(timeline: Timeline, kind: str) -> dict[MessageId, float]:
    """Time at which each message was sent, or had arrived."""
    moments: dict[MessageId, float] = {}
    for lane in timeline.lanes:
        for span in lane.spans:
            if span.message is not None and span.kind == kind:
                moments.setdefault(span.message, span.begin if kind == "send" else span.end)
    return moments


def _counted(lane: Lane) -> Counter[str]:
    begin, end = lane.steps[0].begin, lane.steps[-1].end
    return Counter(span.name for span in lane.spans if begin <= span.begin < end)


@pytest.mark.parametrize("roles", [None, Roles(4, 2, 2)])
def test_a_recorded_run(manifest: Path, teacher: Path, tmp_path: Path, roles: Roles | None) -> None:
    section: dict[str, Any] = {"path": str(teacher)}
    if roles is not None:
        section |= {"placement": "disaggregated", "ranks": roles.teachers, "stages": roles.stages, "queue": 3}
    world = STUDENTS if roles is None else roles.world
    numbers = []
    for name, window in (("plain", None), ("recorded", [FIRST, LAST])):
        run_ranks(world, _distill, str(manifest), str(tmp_path / name), section, window, roles=roles)
        numbers.append(loops._numbers(tmp_path / name))
    assert len(numbers[0]) == STEPS
    assert numbers[0] == numbers[1], "recording must not change a bit"
    assert not (tmp_path / "plain" / "timeline").exists()
    timeline = read_timeline(tmp_path / "recorded")  # which refuses spans that overlap
    assert [lane.rank for lane in timeline.lanes] == list(range(world))
    assert "one clock" in timeline.note
    for lane in timeline.lanes[:STUDENTS]:
        _assert_whole_steps(lane, colocated=roles is None)
    for lane in timeline.lanes[STUDENTS:]:  # it works ahead, so some of it before the steps, but none after their end
        worked = [span for span in lane.spans if span.name == lane.role and span.end <= timeline.window[1]]
        assert len(worked) >= (LAST - FIRST + 1) * ACCUMULATION * STUDENTS, "each request of the steps has a span"
    _assert_messages_arrive(timeline)
    write_trace(timeline, tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text(encoding="utf-8"))["traceEvents"]
    assert {event["ph"] for event in events} == {"M", "X", "s", "f"}


def _assert_whole_steps(lane: Lane, *, colocated: bool) -> None:
    assert [step.number for step in lane.steps] == list(range(FIRST, LAST + 1))
    micros = (LAST - FIRST + 1) * ACCUMULATION
    counted = _counted(lane)
    for name in ("student forward", "loss", "student backward", "wait for answer"):
        expected = 0 if name == "wait for answer" and colocated and lane.rank == STUDENTS - 1 else micros
        assert counted[name] == expected, name
    assert counted["optimizer step"] == LAST - FIRST + 1
    assert counted["save"] == 1, "step 3 is saved"
    assert counted[f"teacher stage {lane.rank}"] == (micros if colocated else 0)


def _assert_messages_arrive(timeline: Timeline) -> None:
    """Messages sent before the last step arrive after they were sent; those without a send left before the steps."""
    sent, arrived = _messages(timeline, "send"), _messages(timeline, "wait")
    begin, end = timeline.window
    inside = [message for message, moment in sent.items() if begin <= moment < timeline.steps[-1].begin]
    assert len(inside) >= ACCUMULATION
    assert all(sent[message] <= arrived[message] for message in inside)
    for message, moment in arrived.items():
        if begin <= moment < end and message not in sent:
            assert all(message.number < other.number for other in sent if other[:2] == message[:2])
