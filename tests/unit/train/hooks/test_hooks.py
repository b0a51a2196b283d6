"""Hooks of a step: what each asks the loop for, and what it hands on to the parts that it calls."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megadistill.errors import OperatorFault
from megadistill.timeline.stopwatch import StepSeconds
from megadistill.train.hooks.checkpoints import Checkpoints
from megadistill.train.hooks.diverged_student import DivergedStudentCheck
from megadistill.train.hooks.hook import Request, StepEvent
from megadistill.train.hooks.loss_anomalies import LossAnomalies
from megadistill.train.hooks.non_finite import NonFiniteGuard
from megadistill.train.hooks.stop import StopOnRequest
from megadistill.train.hooks.straggler_check import StragglerCheck
from megadistill.train.hooks.unlabelled import UnlabelledGuard
from megadistill.train.resilience.anomalies import Anomaly, DivergedStudentMonitor
from megadistill.train.resilience.preemption import REASONS
from megadistill.train.step import StepOutcome
from megadistill.types import Cursor
from tests.unit.train.cases import recipe, step_shape, topology

BATCH = 10


class Recorder:
    """Records calls, as events, monitor, recovery and weights."""

    def __init__(self, *, spike_at: int = 0, drift_at: int = 0, rolls_back: bool = True) -> None:
        self.calls: list[Any] = []
        self.events = self
        self.spike_at, self.drift_at, self.rolls_back = spike_at, drift_at, rolls_back

    def write(self, event: str, *, step: int, **values: Any) -> None:
        self.calls.append((event, step, values))

    def warn(self, event: str, line: str, /, *, step: int, **values: Any) -> None:
        self.calls += [(event, step, values), line]

    def begin_entry(self, entry: int) -> None:
        assert entry == 1

    def spike(self, step: int, loss: float) -> Anomaly | None:
        return Anomaly("loss_spike", "high", {"loss": loss}) if step == self.spike_at else None

    def teacher_drift(self, step: int, teacher_ce: float, slots: tuple[int, int]) -> Anomaly | None:
        return Anomaly("teacher_drift", "moved", {"slots": slots}) if step == self.drift_at else None

    def roll_back(self, spike: Anomaly, step: int, **slots: Any) -> bool:
        self.calls.append((spike.event, step, slots))
        return self.rolls_back

    def require_newest(self, reduced: dict[str, float]) -> None:
        self.calls.append("newest")

    def poll(self, reduced: dict[str, float]) -> None:
        self.calls.append("poll")

    def require_unchanged(self, topology: Any) -> None:
        self.calls.append("compared")


def event(step: int, *, loss: float = 1.0, skipped: bool = False, flags: dict[str, float] | None = None) -> StepEvent:
    metrics = {"loss": loss, "teacher_ce": 2.0, "student_ce": loss}
    outcome = StepOutcome(metrics, math.nan if skipped else 0.5, flags or {})
    shape = step_shape(sequence_length=64, global_batch=1)
    timing: dict[str, Any] = {"seconds": 1.0, "data_seconds": 0.0, "parts": StepSeconds()}
    return StepEvent(step, outcome, 1e-3, Cursor("", step * BATCH), shape=shape, progress=step, **timing)


def test_checkpoints() -> None:
    recorder: Any = Recorder()
    checkpoints = Checkpoints(recorder, every=3)
    assert [checkpoints.after_step(event(step)) for step in (2, 3, 4, 6)] == [None, Request.SAVE, None, Request.SAVE]
    assert recorder.calls == 4 * ["newest", "poll"], "fenced before the save is advanced"


def test_the_last_step_before_a_decay_has_a_checkpoint() -> None:
    recorder: Any = Recorder()
    checkpoints = Checkpoints(recorder, every=3, stable_steps=4)
    saves = [step for step in range(1, 8) if checkpoints.after_step(event(step)) is Request.SAVE]
    assert saves == [3, 4, 6]


def test_a_local_save_that_falls_due_during_another_save_follows_it() -> None:
    recorder: Any = Recorder()
    checkpoints = Checkpoints(recorder, every=10, local_every=2)
    busy = {2, 3, 8, 9, 18, 19, 20}
    requests = {}
    for step in range(1, 25):
        recorder.saving = step in busy
        requests[step] = checkpoints.after_step(event(step))
    local = [step for step, request in requests.items() if request is Request.SAVE_LOCAL]
    assert local == [4, 6, 12, 14, 16, 22, 24], "not during 2 and 8, nor with the checkpoint of step 10 or 20"
    assert [step for step, request in requests.items() if request is Request.SAVE] == [10, 20]
    recorder.saving, busy = True, {2}
    checkpoints = Checkpoints(recorder, every=10, local_every=2)
    assert checkpoints.after_step(event(2)) is None
    recorder.saving = False
    assert checkpoints.after_step(event(3)) is Request.SAVE_LOCAL
    assert checkpoints.after_step(event(5)) is None


def test_stop_on_request() -> None:
    events: Any = Recorder()
    stop = StopOnRequest(events)
    none = dict.fromkeys(REASONS, 0.0)
    assert stop.after_step(event(1, flags=none)) is None
    assert events.calls == []
    assert stop.after_step(event(2, flags={**none, "SIGTERM": 2.0})) is Request.STOP
    assert events.calls == [("stop_requested", 2, {"reason": "SIGTERM"})]


def test_non_finite_guard() -> None:
    recorder: Any = Recorder()
    guard = NonFiniteGuard(recorder, max_skipped_steps=1)
    guard.after_step(event(1))
    assert recorder.calls == []
    guard.after_step(event(2, loss=math.nan, skipped=True))
    reason = "loss is nan"
    assert recorder.calls == [("step_skipped", 2, {"reason": reason}), f"step 2 skipped: {reason}"]
    guard.after_step(event(3))
    guard.after_step(event(4, skipped=True))
    with pytest.raises(OperatorFault, match="2 consecutive steps were skipped"):
        guard.after_step(event(5, skipped=True))


def test_a_few_consecutive_skipped_steps_are_allowed_and_one_more_is_not() -> None:
    recorder: Any = Recorder()
    guard = NonFiniteGuard(recorder, max_skipped_steps=2)
    for step, skipped in enumerate([True, True, False, True, True, False, False, True, True], start=1):
        guard.after_step(event(step, skipped=skipped))
    with pytest.raises(OperatorFault, match=r"^step 10: loss is nan, and 3 consecutive steps were skipped .* is 2\)"):
        guard.after_step(event(10, loss=math.nan, skipped=True))


def test_where_none_is_allowed_the_first_skipped_step_fails() -> None:
    recorder: Any = Recorder()
    guard = NonFiniteGuard(recorder, max_skipped_steps=0)
    guard.after_step(event(1))
    with pytest.raises(OperatorFault, match=r"^step 2: grad_norm is \w+, and 1 consecutive steps"):
        guard.after_step(event(2, skipped=True))


def test_straggler_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """The data seconds of the steps since the last comparison are added up."""
    recorder: Any = Recorder()
    check = StragglerCheck(recorder, topology(), every=2)
    monkeypatch.setattr(check._stragglers, "check", lambda seconds: [f"rank 0 waited {seconds} s"])
    for step in (1, 2, 3, 4):
        check.after_step(replace(event(step), data_seconds=step))
    line = "rank 0 waited 7.0 s"
    assert recorder.calls[-2:] == [("straggler", 4, {"message": line}), f"step 4: {line}"]
    assert len(recorder.calls) == 4


def anomalies(recorder: Any, *, teacher_ce: bool = False) -> LossAnomalies:
    teacher = Path("teacher") if teacher_ce else None
    given = recipe(Path("manifest.json"), Path("run"), teacher=teacher, resilience={"rollback_steps": 2})
    return LossAnomalies(given, recorder, recorder, topology(), first_slot=BATCH, frozen=recorder)


def test_a_spike_rolls_back_with_the_slots_of_the_last_steps() -> None:
    """A step that was skipped has its slots too, and is not looked at."""
    recorder = Recorder(spike_at=4)
    hook = anomalies(recorder)
    assert [hook.after_step(event(step, skipped=step == 3)) for step in (2, 3, 4)] == [None, None, Request.ROLL_BACK]
    slots = {"slots_before": {3: 2 * BATCH, 4: 3 * BATCH}, "slots_end": 4 * BATCH}
    assert recorder.calls == [
        ("loss_spike", 4, {"loss": 1.0}),
        "high",
        ("loss_spike", 4, slots),
    ]
    assert anomalies(Recorder(spike_at=2, rolls_back=False)).after_step(event(2)) is None


def test_a_student_that_diverges_is_reported_once() -> None:
    recorder: Any = Recorder()
    check = DivergedStudentCheck(recorder, DivergedStudentMonitor(100, first_steps=8))
    for step in range(1, 12):
        check.after_step(event(step, loss=4.6 if step == 1 else 50.0, skipped=step == 3))
    ((name, step, values), line) = recorder.calls
    assert (name, step, values["student_ce"]) == ("student_diverged", 7, 50.0)
    assert line.startswith("step 7: the student diverges")


def test_a_teacher_that_drifts_has_its_weights_compared() -> None:
    recorder = Recorder(drift_at=2)
    assert anomalies(recorder, teacher_ce=True).after_step(event(2)) is None
    assert recorder.calls[:3] == [("teacher_drift", 2, {"slots": (BATCH, 2 * BATCH - 1)}), "moved", "compared"]
    unlogged = Recorder(drift_at=2)
    assert anomalies(unlogged, teacher_ce=False).after_step(event(2)) is None
    assert unlogged.calls == []


class Unlabelled:
    """A setup, as far as the guard reads it."""

    recipe = recipe(Path("manifest.json"), Path("run"))


def _labelled(step: int, labels: int) -> StepEvent:
    plain = event(step)
    return replace(plain, outcome=replace(plain.outcome, labels=labels))


def test_a_run_that_begins_without_a_label_ends(caplog: pytest.LogCaptureFixture) -> None:
    """Its loss is 0, and it would end as done."""
    guard = UnlabelledGuard(Unlabelled(), max_in_a_row=2)  # type: ignore[arg-type]
    with pytest.raises(OperatorFault, match="step 7: none of its 64 tokens has a label, so the student learns nothing"):
        guard.after_step(_labelled(7, 0))


def test_steps_without_a_label_are_warned_of_and_many_in_a_row_end_the_run(caplog: pytest.LogCaptureFixture) -> None:
    guard = UnlabelledGuard(Unlabelled(), max_in_a_row=2)  # type: ignore[arg-type]
    for step, labels in ((1, 5), (2, 0), (3, 0), (4, 1), (5, 0), (6, 0)):
        guard.after_step(_labelled(step, labels))
    assert [record.getMessage()[:7] for record in caplog.records] == ["step 2:", "step 3:", "step 5:", "step 6:"]
    with pytest.raises(OperatorFault, match="step 7: none of its 64 tokens has a label"):
        guard.after_step(_labelled(7, 0))
