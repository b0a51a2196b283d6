"""A start that reads the ends of a run's records learns what one that reads all of them does."""

import math
import random
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megadistill.distributed.launch import Launch
from megadistill.errors import Superseded
from megadistill.events import JsonLines, goodput, json_lines
from megadistill.train.checkpoint.folders import checkpoint_folders
from megadistill.train.resilience.recovery import Recovery
from megadistill.train.resilience.run_history import RunHistory, read_run_history
from megadistill.train.setup.setup import Setup, prepare
from megadistill.train.telemetry.metrics import drop_after
from megadistill.types import Cursor
from tests.unit.train.cases import SEQUENCE, VOCAB, cursor_of, described_data, recipe, topology

WINDOW = 8
STUDENT: Any = SimpleNamespace(
    state=SimpleNamespace(local=lambda: {"master/w": torch.zeros(3)}, shapes={"w": (3,)}, load=lambda read: None)
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Setup]:
    """The set-up of a run of labels in a folder."""
    data = described_data(tmp_path_factory.mktemp("data"))

    def make(folder: Path) -> Setup:
        sections: dict[str, Any] = {
            "resilience": {"spike_window": WINDOW},
            "checkpoint": {"keep_last": 99, "asynchronous": False},
        }
        steps = {"steps": 1000, "global_batch": 8, "micro_batch": 2, "optimizer": {"learning_rate": 1e-3}}
        return prepare(
            recipe(data, folder, train=steps, **sections), Launch(rank=0, world=1, local_rank=0, local_world=1)
        )

    return make


class Attempt:
    """An attempt at a run by the real `Recovery`, whose steps only write their lines."""

    def __init__(self, setup: Setup, chance: random.Random) -> None:
        self.setup, self.chance = setup, chance
        self.lines = JsonLines(setup.folder / "metrics.jsonl")
        self.recovery = Recovery(setup, topology())
        checkpoint = self.recovery.find_checkpoint()
        self.start(0 if checkpoint is None else checkpoint.manifest.step)
        if checkpoint is not None:
            checkpoint.release()

    def start(self, step: int) -> None:
        self.step = step
        _, self.student = self.recovery.monitors(step)
        drop_after(self.lines.path, step)
        self.recovery.mark_resumed(step)

    def take(self, *, diverges: bool) -> None:
        self.step += 1
        if self.chance.random() < 0.1:
            return  # a skipped step has no line
        seconds, ce = self.chance.uniform(0.5, 2.0), 9.0 if diverges else self.chance.uniform(3.0, 4.0)
        self.recovery.step_done(seconds)
        self.lines.append({"step": self.step, "loss": ce, "student_ce": ce, "seconds": seconds})
        anomaly = self.student.update(self.step, ce)
        if anomaly is not None:
            self.recovery.events.write(anomaly.event, step=self.step, **anomaly.values)

    def save(self) -> None:
        self.recovery.tokens = 8 * SEQUENCE * self.step
        self.recovery.save(STUDENT, self.step, Cursor.from_state(cursor_of(8 * self.step)), last=True)

    def roll_back(self) -> None:
        earlier = [step for step in checkpoint_folders(self.recovery.checkpoints) if step <= self.step]
        if earlier:
            to_step = self.chance.choice(earlier)
            self.recovery.events.write("rollback", step=self.step, to_step=to_step, skipped_slots=[0, 1])
            self.start(to_step)

    def end(self) -> None:
        how = self.chance.choice(["killed", "half a line", "fault", "stopped", "damaged checkpoint"])
        if how == "half a line":
            with open(self.lines.path, "ab") as file:
                file.write(b'{"step": 17, "lo')
        elif how == "fault":
            self.recovery.ended("it broke", rank=0, exit_code=3)
        elif how == "stopped":
            self.recovery.events.write("stopped", step=self.step, reason="SIGUSR2")
        folders = checkpoint_folders(self.recovery.checkpoints)
        if how == "damaged checkpoint" and len(folders) > 1:
            next(folders[max(folders)].glob("*.safetensors")).write_bytes(b"damage")
        self.recovery.close()


def of_an_earlier_release(folder: Path, copy: Path) -> Path:
    """The run's records without the sums in its events."""
    copy.mkdir()
    if (folder / "metrics.jsonl").exists():
        shutil.copy(folder / "metrics.jsonl", copy)
    for line in json_lines(folder / "events.jsonl"):
        assert line is not None
        JsonLines(copy / "events.jsonl").append({name: value for name, value in line.items() if name != "totals"})
    return copy


def comparable(history: RunHistory) -> dict[str, Any]:
    assert history.totals is not None
    return {
        "losses": history.losses,
        "lost": history.lost_steps,
        "lost_seconds": pytest.approx(history.lost_seconds, abs=0.05),
        "reported": history.student.reported,
        "first": history.student._first_ce,
        "above": len(history.student._above) if not history.student.reported else None,
        "began": history.totals.began,
    }


@pytest.mark.parametrize("seed", range(6))
def test_the_ends_of_the_records_tell_a_start_all_of_them(
    tmp_path: Path, made: Callable[[Path], Setup], seed: int
) -> None:
    chance, setup = random.Random(seed), made(tmp_path / "run")
    diverges_from = chance.choice([20, 30, 10**9])
    for number in range(6):
        attempt = Attempt(setup, chance)
        for _ in range(chance.randrange(12)):
            attempt.take(diverges=attempt.step + 1 >= diverges_from)
            if chance.random() < 0.3:
                attempt.save()
            if chance.random() < 0.05:
                attempt.roll_back()
        attempt.end()
        whole = of_an_earlier_release(setup.folder, tmp_path / f"whole-{number}")
        mine, truth = goodput(setup.folder), goodput(whole)
        assert asdict(mine) == pytest.approx(asdict(truth), abs=0.05)
        for step in (0, *checkpoint_folders(setup.folder / "checkpoints")):
            by_end = read_run_history(setup.folder, step, window=WINDOW, vocab_size=VOCAB)
            by_all = read_run_history(whole, step, window=WINDOW, vocab_size=VOCAB)
            assert comparable(by_end) == comparable(by_all)
            assert by_end.totals is not None
            assert by_all.totals is not None
            for name in ("useful", "startup", "saving", "repeated", "paused"):
                assert getattr(by_end.totals, name) == pytest.approx(getattr(by_all.totals, name), abs=0.05), name
    assert not math.isnan(goodput(setup.folder).ratio)


def test_an_attempt_that_was_replaced_while_it_started_cuts_no_line_of_the_next(
    tmp_path: Path, made: Callable[[Path], Setup]
) -> None:
    """As one that hung in its start, and continues when the next one has taken steps."""
    setup = made(tmp_path / "run")
    replaced = Recovery(setup, topology())
    attempt = Attempt(setup, random.Random(0))
    for _ in range(5):
        attempt.take(diverges=False)
    names = ("metrics.jsonl", "events.jsonl")
    before = [(setup.folder / name).read_bytes() for name in names]
    with pytest.raises(Superseded):
        replaced.monitors(0)
    assert [(setup.folder / name).read_bytes() for name in names] == before
    replaced.close()
    attempt.recovery.close()
