"""Advice on how often to save, by the faults that a run had; and one failure where ranks lost a peer."""

from pathlib import Path

import pytest

from megadistill.report.run_record import RunRecord, read_run
from megadistill.report.save_interval import measured_saves
from tests.unit.report.written_run import WrittenRun, step_line

HOUR = 3600.0


def _run(folder: Path, *, ends: list[str]) -> RunRecord:
    """Attempts of an hour that end so, each with 180 s until the next one takes steps."""
    run = WrittenRun(folder)
    for number, end in enumerate(ends, 1):
        begin = (number - 1) * HOUR
        run.event("attempt_started", 0, attempt=number, time=begin + 60)
        run.event("resumed", 10 * number - 10, attempt=number, time=begin + 180, startup_seconds=120.0)
        saved = {"stall_seconds": 0.5, "write_seconds": 9.5}
        run.event("checkpoint_saved", 10 * number, attempt=number, time=begin + HOUR - 1, **saved)
        run.lines.append({"time": begin + HOUR - 1, **step_line(10 * number, 3.0)})
        run.event(end, 10 * number, attempt=number, time=begin + HOUR)
    return read_run(run.write(), "run")


def test_a_run_with_faults_is_advised_by_its_own_costs(tmp_path: Path) -> None:
    measured = measured_saves(_run(tmp_path / "run", ends=["attempt_failed"] * 4))
    assert measured is not None
    assert measured.faults == 3
    wall = 4 * HOUR - 60
    costs = measured.advice.costs
    assert [costs.stall, costs.write, costs.restart] == pytest.approx([0.5, 9.5, 180.0])
    assert costs.between_faults == pytest.approx(wall / 3)
    assert "3 faults" in str(measured)


def test_a_pause_is_no_fault(tmp_path: Path) -> None:
    measured = measured_saves(_run(tmp_path / "run", ends=["stopped", "attempt_failed", "completed"]))
    assert measured is not None
    assert measured.faults == 1
    assert measured.advice.costs.between_faults == pytest.approx(3 * HOUR - 120)
    assert measured_saves(_run(tmp_path / "none", ends=["stopped", "completed"])) is None


def test_a_fault_of_all_ranks_has_its_cause_in_the_report(tmp_path: Path) -> None:
    run = WrittenRun(tmp_path / "run")
    for attempt, lost in ((1, True), (1, False), (2, True)):
        values = {"lost_peer": True} if lost else {}
        run.event("attempt_failed", 3, attempt=attempt, rank=int(lost), reason="it broke", exit_code=3, **values)
    events = read_run(run.write(), "run").events
    assert [(event.attempt, bool(event.values.get("lost_peer"))) for event in events] == [(1, False), (2, True)]
