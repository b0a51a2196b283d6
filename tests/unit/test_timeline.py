"""Recordings of ranks, the timeline that is read from their files, its trace and its picture; damaged files."""

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch
from rich.console import Console
from typing_extensions import override

from megadistill import timeline
from megadistill.cli.main import run_command
from megadistill.config.load import load_recipe
from megadistill.errors import UserError
from megadistill.timeline import picture
from megadistill.timeline.clock import DeviceClock, HostClock
from megadistill.timeline.files import RankFile, rank_path, read_timeline, write_rank
from megadistill.timeline.picture import MAX_ROWS, draw, table
from megadistill.timeline.recorder import SPANS_BEFORE, Recorder
from megadistill.timeline.spans import (
    Kind,
    Lane,
    MessageId,
    Span,
    Step,
    Timeline,
    first_unnested,
    pieces,
    seconds_by_kind,
)
from megadistill.timeline.trace import trace_events
from tests.paths import ROOT
from tests.unit.train.cases import described_data, described_teacher, recipe


class _Clock(HostClock):
    """Each moment is a second later."""

    def __init__(self) -> None:
        self.now = 0.0
        self.anchors = 0

    @override
    def moment(self) -> float:
        self.now += 1
        return self.now

    @override
    def anchor(self) -> None:
        self.anchors += 1


@pytest.fixture(name="recorder")
def started_recorder() -> Iterator[Recorder]:
    made = Recorder(_Clock())
    made.start()
    yield made
    made.stop()


def test_without_a_recorder_a_span_makes_no_object() -> None:
    assert not timeline.recording()
    off = timeline.span(timeline.COMPUTE, "loss")
    assert off is timeline.span(timeline.WAIT, "answer", 3)
    assert off is timeline.span(timeline.SEND, "send packet", message=MessageId(0, 1, 2))


def test_nested_spans_are_recorded(recorder: Recorder) -> None:
    recorder.step(7)
    outer = timeline.span(timeline.COMPUTE, "teacher stage 1", 4)
    with outer, timeline.span(timeline.WAIT, "wait for packet", message=MessageId(0, 1, 9)):
        pass
    with pytest.raises(ZeroDivisionError), timeline.span(timeline.COMPUTE, "loss"):
        raise ZeroDivisionError
    recorder.step(None)
    spans, steps = recorder.recorded()
    assert spans == (
        Span("compute", "teacher stage 1", 2.0, 5.0, 0, 4),
        Span("wait", "wait for packet", 3.0, 4.0, 1, None, MessageId(0, 1, 9)),
        Span("compute", "loss", 6.0, 7.0),
    )
    assert steps == (Step(7, 1.0, 8.0),)


def test_another_threads_spans_are_not_this_ones(recorder: Recorder) -> None:
    """Autograd's threads, which run beside it, would overlap."""

    def works() -> None:
        with timeline.span(timeline.COMPUTE, "elsewhere"):
            pass

    thread = threading.Thread(target=works)
    thread.start()
    thread.join()
    works()
    assert len(recorder.recorded()[0]) == 1


def test_a_server_records_the_requested_steps_and_a_little_before() -> None:
    recordings: list[tuple[Span, ...]] = []
    clock = _Clock()
    recorder = Recorder(clock, on_end=lambda: recordings.append(recorder.recorded()[0]))
    recorder.start()
    try:
        for number in range(SPANS_BEFORE + 5):
            with timeline.span(timeline.COMPUTE, "stage", number):
                timeline.follow(number in (SPANS_BEFORE + 2, SPANS_BEFORE + 3))
    finally:
        recorder.stop()
    (spans,) = recordings
    assert [span.number for span in spans] == list(range(2, SPANS_BEFORE + 4))
    assert clock.anchors == 2, "when it starts, and when a client begins to record"
    assert not recorder.is_requested
    assert recorder.recorded()[0] == (
        Span("compute", "stage", spans[-1].end + 1, spans[-1].end + 2, 0, SPANS_BEFORE + 4),
    )


def test_a_devices_moments_become_the_hosts_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Events of a stream that is behind the host: one is passed at the 10th, 20th … millisecond."""
    passed: list[int] = []

    class Event:
        def __init__(self, device: torch.device, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            passed.append(len(passed))
            self.at = 10.0 * len(passed)

        def synchronize(self) -> None: ...

        def elapsed_time(self, later: "Event") -> float:
            return later.at - self.at

    monkeypatch.setattr(torch, "Event", Event)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: None)
    monkeypatch.setattr("time.monotonic", lambda: 5.0)
    clock = DeviceClock(torch.device("meta"))
    clock.anchor()
    first, second = clock.moment(), clock.moment()
    assert clock.between(first, second) == pytest.approx(0.01)
    assert [clock.seconds(moment) for moment in (second, first)] == pytest.approx([5.02, 5.01])
    clock.anchor()
    assert clock.seconds(first) == pytest.approx(4.98), "before the anchor, too"


NESTED = (
    Span("compute", "outer", 1.0, 5.0),
    Span("wait", "inner", 2.0, 3.0, 1),
    Span("send", "innermost", 2.5, 2.75, 2),
    Span("data", "next", 5.0, 7.0),
)


def test_a_moment_belongs_to_the_innermost_span() -> None:
    parts = [(piece.name, piece.begin, piece.end) for piece in pieces(NESTED, 1.5, 6.0)]
    assert parts == [
        ("outer", 1.5, 2.0),
        ("inner", 2.0, 2.5),
        ("innermost", 2.5, 2.75),
        ("inner", 2.75, 3.0),
        ("outer", 3.0, 5.0),
        ("next", 5.0, 6.0),
    ]
    seconds = seconds_by_kind(Lane(0, "student", "n", NESTED), 1.5, 6.0)
    assert seconds == {"compute": 2.5, "wait": 0.75, "send": 0.25, "data": 1.0}
    assert first_unnested(NESTED) is None


@pytest.mark.parametrize(
    "spans",
    [
        (Span("compute", "a", 0, 2), Span("compute", "wrong", 1, 3)),
        (Span("compute", "a", 0, 2), Span("compute", "wrong", 1, 3, 1)),
        (Span("compute", "a", 0, 2), Span("compute", "wrong", 2, 3, 1)),
        (Span("compute", "a", 2, 3), Span("compute", "wrong", 0, 1)),
        (Span("compute", "wrong", 3, 2),),
    ],
)
def test_spans_that_overlap_are_detected(spans: tuple[Span, ...]) -> None:
    overlapping = first_unnested(spans)
    assert overlapping is not None
    assert overlapping.name == "wrong"


def _span(name: str, begin: float, end: float, *, kind: Kind = "compute", **keys: Any) -> Span:
    return Span(kind=kind, name=name, begin=begin, end=end, **keys)


def _files(*, node: str = "a", clock: float = 0.0, lag: float = 0.0) -> list[RankFile]:
    """Two students on node a, and a stage of the teacher's own on `node`, whose clock is `clock` seconds ahead and has
    drifted by `lag` seconds since the rendezvous at 50 s. Steps 3 and 4 take from 100 s to 102 s."""
    steps = [Step(number=3, begin=100.0, end=101.0), Step(number=4, begin=101.0, end=102.0)]
    files = []
    for rank in (0, 1):
        spans = [
            _span("send request", 100.0, 100.1, kind="send", message=(rank, 2, 5)),
            _span("wait for answer", 100.1, 100.9, kind="wait", message=(2, rank, 5)),
            _span("loss", 101.0, 101.5),
        ]
        keys: dict[str, Any] = {
            "steps": steps,
            "spans": spans,
            "barriers": (99.9, 102.1),
            "rendezvous": 50.0,
        }
        files.append(RankFile(rank=rank, world=3, role="student", node="a", clock="host", window=(3, 4), **keys))
    shift = clock + lag
    served = [
        _span("wait for request", 90 + shift, 100.2 + shift, kind="wait", message=(0, 2, 5)),
        _span("teacher stage 0", 100.2 + shift, 100.6 + shift, number=11),
        _span("send answer", 100.6 + shift, 100.7 + shift, kind="send", message=(2, 0, 5)),
        _span("wait for request", 100.7 + shift, 110 + shift, kind="wait", message=(1, 2, 5)),
    ]
    keys = {"steps": [], "spans": served, "rendezvous": 50.0 + clock, "stage": 0}
    return [*files, RankFile(rank=2, world=3, role="teacher", node=node, clock="host", window=(3, 4), **keys)]


def _written(folder: Path, files: list[RankFile]) -> Path:
    for file in files:
        write_rank(folder, file)
    return folder


def test_ranks_of_two_nodes_are_put_on_one_clock(tmp_path: Path) -> None:
    one = read_timeline(_written(tmp_path / "one", _files()))
    assert one.note == "host time; one node, one clock"
    assert one.title.endswith("one: steps 3 to 4")
    assert [lane.role for lane in one.lanes] == ["student", "student", "teacher stage 0"]
    two = read_timeline(_written(tmp_path / "two", _files(node="b", clock=1234.5)))
    assert "2 nodes, clocks apart by at least 0 ms" in two.note
    for ours, theirs in zip(two.lanes, one.lanes, strict=True):
        times, truth = ([(span.begin, span.end) for span in lane.spans] for lane in (ours, theirs))
        assert np.allclose(times, truth, rtol=0, atol=1e-9)
    assert one.window == pytest.approx((0.0, 2.0))


def test_a_rank_of_several_replicas_has_the_number_of_its_own(tmp_path: Path) -> None:
    first, second, teacher = _files()
    files = [first.model_copy(update={"replica": 0}), second.model_copy(update={"replica": 1, "stage": 0}), teacher]
    read = read_timeline(_written(tmp_path, files))
    roles = ["student, replica 0", "student, replica 1, stage 0", "teacher stage 0"]
    assert [lane.role for lane in read.lanes] == roles


def test_the_note_has_the_known_error_of_the_clocks(tmp_path: Path) -> None:
    """By a clock that has drifted by 0.5 s, the teacher's answer is sent after it has arrived."""
    late = read_timeline(_written(tmp_path / "late", _files(node="b", clock=-7.0, lag=0.5)))
    assert "clocks apart by at least 200 ms" in late.note
    first, second, teacher = _files()
    slow = second.model_copy(update={"node": "c", "barriers": (99.9, 102.1 + 0.25)})
    drifted = read_timeline(_written(tmp_path / "drifted", [first, slow, teacher]))
    assert "clocks apart by at least 250 ms" in drifted.note


def _damaged(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        values = json.loads(rank_path(folder, 1).read_text(encoding="utf-8"))
        change(values)
        rank_path(folder, 1).write_text(json.dumps(values), encoding="utf-8")

    return damage


def _made_a_folder(folder: Path) -> None:
    rank_path(folder, 1).unlink()
    rank_path(folder, 1).mkdir()


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut short": (lambda folder: rank_path(folder, 1).write_bytes(rank_path(folder, 1).read_bytes()[:300]), "damaged"),
    "no JSON": (lambda folder: rank_path(folder, 1).write_bytes(b"\xff\xfe\x00"), "damaged"),
    "nothing": (lambda folder: rank_path(folder, 1).write_bytes(b""), "damaged"),
    "deep": (lambda folder: rank_path(folder, 1).write_text("[" * 100_000), "damaged"),
    "a folder": (_made_a_folder, "cannot be read"),
    "missing": (lambda folder: rank_path(folder, 1).unlink(), "has not recorded"),
    "another rank's": (_damaged(lambda values: values.update(rank=0)), "is the file of rank 0"),
    "another recording's": (_damaged(lambda values: values.update(window=[8, 9])), "another recording"),
    "another kind": (_damaged(lambda values: values["spans"][0].update(kind="<b>")), "spans.0.kind"),
    "infinite": (_damaged(lambda values: values["spans"][0].update(end=float("inf"))), "damaged"),
    "overlapping": (_damaged(lambda values: values["spans"][0].update(end=101.2)), "overlaps"),
    "backwards": (_damaged(lambda values: values["steps"][0].update(end=1.0)), "ends before it begins"),
    "too many ranks": (_damaged(lambda values: values.update(world=10**9)), "world"),
    "unknown keys": (_damaged(lambda values: values.update(run="rm")), "run"),
    "a node that was never compared": (
        _damaged(lambda values: values.update(node="b", barriers=None, rendezvous=None)),
        "never compared",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_file_is_refused_in_a_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage, message = DAMAGES[name]
    folder = _written(tmp_path, _files())
    damage(folder)
    assert run_command(["timeline", str(folder)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (folder / "timeline.json").exists()


def test_a_run_without_a_timeline_is_refused_with_the_way_to_record_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"run\.timeline=\[101,103\]"):
        read_timeline(tmp_path)


HOSTILE = "</script>$\\frac{ \x1b[31m\u202e"


def _hostile(folder: Path) -> Timeline:
    files = _files(node=HOSTILE)
    files[2].spans[1] = _span(f"teacher {HOSTILE}", 100.2, 100.6)
    return read_timeline(_written(folder, files))


def test_the_trace_is_of_the_formats_events(tmp_path: Path) -> None:
    """By the Trace Event Format: times in µs, arrows whose ends lie in an event of their thread, names as metadata."""
    events = json.loads(json.dumps(list(trace_events(_hostile(tmp_path)))))
    threads: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for event in events:
        assert event["ph"] in "XMsf"
        assert isinstance(event["pid"], int) and isinstance(event["tid"], int)  # noqa: PT018
        if event["ph"] == "X":
            assert 0 <= event["ts"] <= event["ts"] + event["dur"] <= 2e6 + 1e-3, "within the steps, in µs"
            threads.setdefault((event["pid"], event["tid"]), []).append(event)
    assert sorted(threads) == [(0, 0), (0, 1), (1, 2)]
    loss = next(event for event in threads[0, 1] if event["name"] == "loss")
    assert (loss["ts"], loss["dur"], loss["cat"]) == pytest.approx((1e6, 0.5e6, "compute"))
    names = {(event["pid"], event["tid"], event["args"].get("name")) for event in events if event["ph"] == "M"}
    assert {(0, 0, "rank 0: student"), (1, 2, "rank 2: teacher stage 0"), (1, 0, f"node 1: {HOSTILE}")} <= names
    begins, ends = ({event["id"]: event for event in events if event["ph"] == ph} for ph in "sf")
    assert begins.keys() == ends.keys()
    way = {(begins[key]["tid"], ends[key]["tid"]) for key in begins}
    assert way == {(0, 2), (1, 2), (2, 0)}, "the answer to rank 1 was not seen sent"
    for event in (*begins.values(), *ends.values()):
        around = threads[event["pid"], event["tid"]]
        assert any(each["ts"] <= event["ts"] <= each["ts"] + each["dur"] for each in around if each["cat"] != "step")
    assert all(begins[key]["ts"] < ends[key]["ts"] for key in begins)


def _many(ranks: int) -> Timeline:
    spans, steps = (Span("compute", "loss", 0.0, 1.0), Span("wait", "answer", 1.0, 2.0)), (Step(1, 0.0, 2.0),)
    return Timeline("many", tuple(Lane(rank, "student", "n", spans, steps) for rank in range(ranks)), "a note")


def test_the_picture_shows_each_rank_in_its_colours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw(_hostile(tmp_path), tmp_path / "picture.png")
    pixels = matplotlib.image.imread(tmp_path / "picture.png")[..., :3]
    for colour in ("#CC79A7", "#E3E3E3", "#009E73", "#E69F00"):
        expected = np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)]) / 255
        share = (np.abs(pixels - expected).max(axis=2) < 0.01).mean()
        assert 0.005 < share < 0.5, colour
    monkeypatch.setattr(picture, "MAX_ROWS", 3)
    heights = []
    for ranks in (2, 3, 40):
        draw(_many(ranks), tmp_path / "many.png")
        heights.append(matplotlib.image.imread(tmp_path / "many.png").shape[0])
    assert heights[0] < heights[1] == heights[2]


def test_the_table_adds_up_and_fits_a_terminal(tmp_path: Path) -> None:
    for each in (_hostile(tmp_path), _many(100)):
        console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
        console.print(table(each))
        lines = console.export_text().splitlines()
        rows = [line for line in lines if "│" in line]
        assert len(rows) == min(MAX_ROWS, len(each.lanes))
        for line in rows:
            assert line.count("%") == 6
            shares = [float(cell.strip().removesuffix("%")) for cell in line.split("│")[3:-1]]
            assert sum(shares) == pytest.approx(100, abs=0.31)
        assert "\x1b" not in "".join(lines)
    assert "36 more ranks in the trace" in "".join(lines)


def test_the_command_writes_a_runs_trace_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = _written(tmp_path / "run", _files())
    assert run_command(["timeline", str(folder)]) == 0
    assert "teacher stage 0" in capsys.readouterr().out
    assert (folder / "timeline.png").stat().st_size > 5000
    trace = json.loads((folder / "timeline.json").read_text(encoding="utf-8"))
    assert trace["otherData"]["note"] == "host time; one node, one clock"


def test_the_command_draws_a_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, teacher = described_data(tmp_path / "data" / "train"), described_teacher(tmp_path / "teacher")
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(recipe(data, tmp_path / "run", teacher=teacher).snapshot()), encoding="utf-8")
    cluster = ["--nodes", "1", "--gpus-per-node", "2", "--gpu", "h100"]
    assert run_command(["timeline", str(path), *cluster, "--steps", "2", "--output", str(tmp_path / "plan")]) == 0
    assert "the first 2 steps" in capsys.readouterr().out
    trace = json.loads((tmp_path / "plan" / "timeline.json").read_text(encoding="utf-8"))
    assert {event["name"] for event in trace["traceEvents"] if event.get("cat") == "step"} == {"step 1", "step 2"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere does not exist"),
        (["RUN", "--nodes", "2"], "--nodes belongs to a plan"),
        (["RUN", "--set", "a=1"], "--set belongs to a plan"),
        (["recipes/smoke.yaml", "--gpu", "h100", "--output", "x"], "needs --nodes"),
        (["recipes/smoke.yaml", "--nodes", "2", "--gpu", "h100"], "needs --output"),
    ],
)
def test_what_does_not_go_together_is_refused(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(ROOT)
    assert run_command(["timeline", *(str(tmp_path) if each == "RUN" else each for each in arguments)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.parametrize(
    ("window", "message"),
    [
        ("[3]", "give [first, last]"),
        ("[0,2]", "give [first, last]"),
        ("[5,4]", "give [first, last]"),
        ("[1,101]", "100 steps"),
    ],
)
def test_steps_that_are_no_range_are_refused(window: str, message: str) -> None:
    with pytest.raises(UserError, match="timeline is") as refused:
        load_recipe(ROOT / "recipes" / "smoke.yaml", [f"run.timeline={window}"])
    assert message in str(refused.value)
