"""When steps were taken and where the time went, against a run that kept its own clock."""

from pathlib import Path

import numpy as np
import pytest

from megadistill.events import goodput
from megadistill.report.run_record import RunRecord, read_run
from megadistill.report.wall_clock import clock_of, goodput_of, state_of
from tests.unit.report.written_run import WrittenRun, run_with_faults

NEVER = 0.0
"""A `now` that is no later than anything."""


def _read(run: WrittenRun) -> RunRecord:
    return read_run(run.write(), "run")


def test_each_step_ends_when_it_did(tmp_path: Path) -> None:
    """Over a kill, a pause, a rollback, steps that were taken again, and a skipped step."""
    run = run_with_faults(tmp_path / "run")
    record = _read(run)
    clock = clock_of(record)
    steps = record.series["step"].astype(int).tolist()
    truth = np.array([run.ended[step] for step in steps]) - 1_700_000_000.0
    np.testing.assert_allclose(clock.ends, truth, atol=1e-6)
    assert clock.start.tolist() == [0] * 10 + [1] * 10 + [2] * 19


def test_goodput_is_that_of_the_run_itself(tmp_path: Path) -> None:
    record = _read(run_with_faults(tmp_path / "run"))
    mine, truth = goodput_of(record, clock_of(record)), goodput(tmp_path / "run")
    for part in ("useful", "startup", "saving", "repeated", "wall", "paused", "lost"):
        assert getattr(mine, part) == pytest.approx(getattr(truth, part)), part


def test_a_run_that_goes_on_is_measured_up_to_its_last_step(tmp_path: Path) -> None:
    run = WrittenRun(tmp_path / "run")
    run.begin(seconds=2.0)
    run.steps(1, 10, seconds=1.0)
    measured = goodput_of(_read(run), clock_of(_read(run)))
    assert measured.wall == pytest.approx(12.0)
    assert measured.ratio == pytest.approx(10 / 12)


def test_a_run_without_events_has_its_steps_alone(tmp_path: Path) -> None:
    run = WrittenRun(tmp_path / "run")
    run.steps(1, 4, seconds=0.5)
    record = _read(run)
    assert clock_of(record).ends.tolist() == [0.5, 1.0, 1.5, 2.0]
    assert clock_of(record).wall == 2.0
    assert goodput_of(record, clock_of(record)).wall == 0


def test_steps_without_a_time_have_no_place_on_the_clock(tmp_path: Path) -> None:
    run = WrittenRun(tmp_path / "run")
    run.begin(seconds=2.0)
    run.steps(1, 4, time=None)
    clock = clock_of(_read(run))
    assert np.isnan(clock.ends).all()
    assert clock.wall == 2.0


@pytest.mark.parametrize(
    ("event", "state"),
    [
        ("completed", "completed"),
        ("stopped", "stopped"),
        ("attempt_failed", "ended by a fault"),
        ("stop_requested", "running, 18 s left"),
    ],
)
def test_the_state_of_a_run_is_its_last_event(event: str, state: str, tmp_path: Path) -> None:
    run = WrittenRun(tmp_path / "run")
    run.begin()
    run.steps(1, 3)
    run.event(event, 3)
    run.save(3)
    assert state_of(_read(run), now=NEVER) == state


def test_a_run_that_writes_nothing_any_more_is_silent(tmp_path: Path) -> None:
    run = WrittenRun(tmp_path / "run")
    run.begin()
    run.steps(1, 3, seconds=100.0)
    record = _read(run)
    assert state_of(record, now=record.modified + 1900).startswith("running"), "20 of its steps may take so long"
    assert state_of(record, now=record.modified + 2100).startswith("silent since 20")


def test_a_running_run_says_how_long_it_still_takes(tmp_path: Path) -> None:
    """By the pace since it was resumed: a pause of hours before says nothing."""
    run = WrittenRun(tmp_path / "run")
    run.begin()
    run.steps(1, 10, seconds=9.0)
    run.now += 7200
    run.begin(step=10)
    record = _read(run)
    assert state_of(record, now=record.modified) == "running", "no step yet"
    run.steps(11, 20, seconds=30.0)
    record = _read(run)
    assert state_of(record, now=record.modified) == "running, 10 min left"


def test_an_older_run_without_events_is_done_by_its_steps(tmp_path: Path) -> None:
    run = WrittenRun(tmp_path / "run")
    run.steps(1, 40)
    assert state_of(_read(run), now=NEVER) == "completed"
