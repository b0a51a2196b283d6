"""Lines in events.jsonl and metrics.jsonl that another program wrote, or that are damaged, stop nothing: they are left
out, counted in one warning, and no number changes."""

import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import yaml

from megadistill.events import (
    JsonLines,
    events_from_end,
    goodput,
    last_step,
    metrics_from_end,
    read_events,
    read_metrics,
    reading,
)
from megadistill.report.run_record import read_run
from megadistill.train.checkpoint.heartbeat import refuse_running
from megadistill.train.setup.next_start import how_to_resume
from megadistill.train.telemetry.metrics import drop_after

TABLE: list[dict[str, Any]] = yaml.safe_load(Path(__file__).with_name("alien_lines.yaml").read_text())
EVENTS = [
    {"time": 1000.0, "attempt": 1, "event": "attempt_started", "step": 0},
    {"time": 1010.0, "attempt": 1, "event": "resumed", "step": 0, "startup_seconds": 10.0, "lost_seconds": 0.0},
    {"time": 1030.0, "attempt": 1, "event": "checkpoint_saved", "step": 2, "stall_seconds": 1.0},
    {"time": 1050.0, "attempt": 1, "event": "completed", "step": 3},
]
STEPS = [{"step": step, "tokens": 8 * step, "loss": 4.0 - step, "seconds": 3.0} for step in (1, 2, 3)]


def line_of(row: dict[str, Any]) -> bytes:
    if "hex" in row:
        return bytes.fromhex(row["hex"])
    return f"{row['text']}{row.get('more', '') * row.get('times', 0)}{row.get('end', '')}".encode()


def written(folder: Path, alien: list[bytes]) -> Path:
    """A run folder with an alien line behind each of its own, and the others at the end; the last has no newline."""
    folder.mkdir()
    for name, own in (("events.jsonl", EVENTS), ("metrics.jsonl", STEPS)):
        rest = list(alien)
        for values in own:
            JsonLines(folder / name).append(values)
            with open(folder / name, "ab") as file:
                file.writelines(line + b"\n" for line in rest[:1])
            rest = rest[1:]
        with open(folder / name, "ab") as file:
            file.writelines(line + b"\n" for line in rest)
    return folder


@pytest.fixture(autouse=True)
def _no_warning_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_WARNED", set())


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row["name"])
def test_an_alien_line_changes_nothing(row: dict[str, Any], tmp_path: Path) -> None:
    plain, mixed = written(tmp_path / "plain", []), written(tmp_path / "mixed", [line_of(row)])
    assert list(read_events(mixed)) == list(read_events(plain)) == EVENTS
    assert [values for _, values in read_metrics(mixed)] == STEPS
    assert last_step(mixed) == 3
    assert goodput(mixed) == goodput(plain)
    assert refuse_running(mixed) == 0
    assert "ended after step 3" in how_to_resume(mixed)
    drop_after(mixed / "metrics.jsonl", 2)
    drop_after(plain / "metrics.jsonl", 2)
    assert [values for _, values in read_metrics(mixed)] == [values for _, values in read_metrics(plain)] == STEPS[:2]


def test_one_warning_counts_the_lines_and_names_the_first(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = written(tmp_path / "run", [line_of(row) for row in TABLE])
    for _ in range(2):
        assert list(read_events(folder)) == EVENTS
        assert len(list(read_metrics(folder))) == 3
    assert [record.getMessage() for record in caplog.records] == [
        f"{folder / name}: {len(TABLE)} lines that this program has not written, left out; the first is line 2"
        for name in ("events.jsonl", "metrics.jsonl")
    ]
    with (folder / "events.jsonl").open("ab") as file:
        file.write(b'{"time": 2000.0, "att')  # of a kill: no reason for a warning
    list(read_events(folder))
    assert len(caplog.records) == 2


def test_a_reader_from_the_end_names_the_last(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = written(tmp_path / "run", [line_of(TABLE[0])])
    at = (folder / "metrics.jsonl").read_bytes().index(line_of(TABLE[0]))
    assert [values["step"] for _, values in metrics_from_end(folder)] == [3, 2, 1]
    assert [record.getMessage() for record in caplog.records] == [
        f"{folder / 'metrics.jsonl'}: 1 line that this program has not written, left out; the last of them begins at "
        f"byte {at}"
    ]


def test_a_report_counts_them_too(tmp_path: Path) -> None:
    record = read_run(written(tmp_path / "run", [line_of(row) for row in TABLE]), "run")
    assert len(record) == 3
    assert [event.kind for event in record.events] == [values["event"] for values in EVENTS]
    assert len([note for note in record.notes if "left out" in note]) == 2


def test_a_line_without_an_end_is_not_held_in_memory(tmp_path: Path) -> None:
    folder = written(tmp_path / "run", [])
    with (folder / "events.jsonl").open("ab") as file:
        file.truncate(200 << 20)  # zeros, without a newline
    tracemalloc.start()
    try:
        assert list(read_events(folder)) == EVENTS
        assert list(events_from_end(folder)) == EVENTS[::-1]
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()
