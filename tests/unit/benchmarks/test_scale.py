"""benchmarks.scale: lines through measurements, and the times of an attempt from its files."""

import json
from pathlib import Path

import pytest

from benchmarks.scale import Attempt, Run, fitted


def test_a_line_is_fitted_to_what_grows_a_rank() -> None:
    assert fitted([2, 4, 8, 16], [1.5 + 0.25 * world for world in (2, 4, 8, 16)]) == pytest.approx((1.5, 0.25))


def test_times_of_an_attempt() -> None:
    ends = [{"rank": 0, "code": 0, "cpu": 3.0, "time": 110.0}, {"rank": 1, "code": 0, "cpu": 1.0, "time": 110.0}]
    saved = {"event": "checkpoint_saved", "stall_seconds": 0.5}
    attempt = Attempt(100.0, ends, [{"step": 1, "time": 104.5}, {"step": 2, "time": 105.0}], [{"event": "x"}, saved])
    assert (attempt.to_first_step, attempt.cpu, attempt.save) == (4.5, 2.0, saved)


def test_a_line_that_is_being_written_is_not_read(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", tmp_path, tmp_path, world=2, forked=True)
    assert run.lines("metrics.jsonl") == []
    run.folder.mkdir()
    (run.folder / "metrics.jsonl").write_text(json.dumps({"step": 1}) + "\n" + '{"step": 2')
    assert run.lines("metrics.jsonl") == [{"step": 1}]
