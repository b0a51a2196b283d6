"""A start reads the ends of a run's records: as many bytes after a million steps as after a thousand."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megadistill.config.recipe import ResilienceSection
from megadistill.events import Totals, goodput, last_step, lines, read_events
from megadistill.export.model_card import _metrics
from megadistill.io import open_regular
from megadistill.train.checkpoint.heartbeat import refuse_running
from megadistill.train.resilience import stragglers
from megadistill.train.resilience.run_history import read_run_history
from megadistill.train.setup.next_start import how_to_resume
from megadistill.train.telemetry.metrics import drop_after

EVERY = 100
"""Steps between checkpoints."""
START_BYTES = 4 << 20
"""Bytes that a start may read of both records; the spike window alone is a hundred of metrics' lines."""
FILLER = "x" * 400
"""Makes a line as long as that of a distillation, some 600 bytes."""


class CountedFile(io.FileIO):
    """Counts the bytes that are read, over all files."""

    total = 0

    def readinto(self, buffer: Any, /) -> int | None:
        count = super().readinto(buffer) or 0
        CountedFile.total += count
        return count

    def readall(self) -> bytes:
        content = super().readall()
        CountedFile.total += len(content)
        return content


@pytest.fixture(autouse=True)
def _count_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(path: Path) -> io.BufferedReader:
        open_regular(path).close()
        return io.BufferedReader(CountedFile(path))

    monkeypatch.setattr(lines, "open_regular", opened)
    monkeypatch.setattr(CountedFile, "total", 0)


def _metric_lines(steps: int) -> Iterator[str]:
    for step in range(1, steps + 1):
        yield (
            f'{{"time": {1e9 + step:.3f}, "step": {step}, "tokens": {step * 1000}, "loss": {3 + step % 7 / 100}, '
            f'"student_ce": 3.5, "teacher_ce": 2.5, "seconds": 1.0, "x": "{FILLER}"}}\n'
        )


def _event_lines(steps: int) -> Iterator[str]:
    """A checkpoint every `EVERY` steps, and a fault and a new attempt after 50 of them."""
    for number, step in enumerate(range(0, steps, EVERY)):
        attempt, time = 1 + number // 50, 1e9 + step
        totals = Totals(began=1e9, useful=float(step), startup=10.0 * attempt).to_json()
        common = {"time": time, "attempt": attempt, "step": step}
        if number % 50 == 0:
            yield json.dumps({**common, "event": "attempt_started", "world_size": 4096}) + "\n"
            yield json.dumps({**common, "event": "resumed", "startup_seconds": 10.0, "totals": totals}) + "\n"
        else:
            yield json.dumps({**common, "event": "checkpoint_saved", "stall_seconds": 0.0, "totals": totals}) + "\n"
    failed = {"time": 1e9 + steps, "attempt": attempt, "step": steps, "event": "attempt_failed", "reason": "it broke"}
    yield json.dumps(failed) + "\n"


def _attempts(steps: int) -> int:
    return 1 + (steps // EVERY - 1) // 50


def _record(folder: Path, steps: int) -> Path:
    (folder / "attempts").mkdir()
    (folder / "attempts" / f"{_attempts(steps):05d}.json").write_text("{}")
    for name, content in (("metrics.jsonl", _metric_lines(steps)), ("events.jsonl", _event_lines(steps))):
        with open(folder / name, "w", encoding="ascii") as file:
            file.writelines(content)
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 17, "lo')  # of a kill
    return folder


@pytest.mark.parametrize("steps", [20_000, pytest.param(1_000_000, marks=pytest.mark.thorough)])
def test_a_start_reads_no_more_of_a_long_run(tmp_path: Path, steps: int) -> None:
    folder = _record(tmp_path, steps)
    size, step = (folder / "metrics.jsonl").stat().st_size, steps - EVERY
    assert size > START_BYTES
    assert refuse_running(folder) == _attempts(steps)
    assert f"ended after step {steps};" in how_to_resume(folder)
    history = read_run_history(folder, step, window=ResilienceSection().spike_window, vocab_size=32_000)
    drop_after(folder / "metrics.jsonl", step)
    start_bytes = CountedFile.total
    assert start_bytes < START_BYTES
    assert (history.lost_steps, history.lost_seconds) == (EVERY, float(EVERY))
    assert history.losses == [3 + each % 7 / 100 for each in range(step - 127, step + 1)]
    assert history.totals is not None
    assert history.totals.useful == step
    assert history.student._first_ce == 3.5
    assert last_step(folder) == step
    assert (folder / "metrics.jsonl").stat().st_size < size - EVERY * len(FILLER)
    assert goodput(folder).useful == step, "the steps that are to be taken again are none"
    assert _metrics(folder, step - 7) is not None, "a model card's"
    assert CountedFile.total < 2 * START_BYTES
    assert sum(1 for _ in read_events(folder)) == steps // EVERY + _attempts(steps) + 1


@pytest.mark.parametrize("world", [16, 512, 4096])
def test_the_slow_ranks_of_a_world_take_one_partition(monkeypatch: pytest.MonkeyPatch, world: int) -> None:
    """A sort for each rank would stall a world of thousands for seconds."""
    calls = []
    partition = np.partition

    def counted(values: np.ndarray, middle: int) -> np.ndarray:
        calls.append(len(values))
        return partition(values, middle)

    monkeypatch.setattr(np, "partition", counted)
    seconds = np.linspace(1.0, 1.2, world)
    seconds[world // 3 :: world // 4] = 2.0
    slow = set(range(world // 3, world, world // 4))
    assert stragglers.slow(seconds) == slow
    assert stragglers.starved(np.where(seconds == 2.0, 0.5, 0.01)) == slow
    assert calls == [world, world]
