"""The script of docs/wandb.md, run against a stand-in for wandb: each step once, in order, and after a restart too."""

import json
import re
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.paths import ROOT
from tests.unit.report.written_run import RECIPE, WrittenRun

SCRIPT = re.search(r"^```python\n(.*?)^```$", (ROOT / "docs" / "wandb.md").read_text(encoding="utf-8"), re.M | re.S)


class Run:
    """What a run of wandb has: a step that only rises, kept by its id."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.logged: dict[int, dict[str, Any]] = {}
        self.axes: dict[str, str] = {}
        self.finished = False

    def define_metric(self, name: str, *, step_metric: str) -> None:
        self.axes[name] = step_metric

    def log(self, metrics: dict[str, Any], *, step: int) -> None:
        assert step >= self.step, "wandb drops earlier steps"
        self.logged[step], self.step = metrics, step + 1

    def finish(self) -> None:
        self.finished = True


class Wandb(ModuleType):
    def __init__(self) -> None:
        super().__init__("wandb")
        self.steps: dict[str, int] = {}
        self.runs: list[tuple[dict[str, Any], Run]] = []

    def init(self, **options: Any) -> Run:
        run = Run(self.runs[-1][1].step if self.runs and self.runs[-1][0]["id"] == options["id"] else 0)
        self.runs.append((options, run))
        return run


def _follow(folder: Path, monkeypatch: pytest.MonkeyPatch, wandb: Wandb) -> None:
    assert SCRIPT is not None
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(sys, "argv", ["follow.py", str(folder), "smoke-distill"])
    exec(compile(SCRIPT[1], "follow.py", "exec"), {"__name__": "__main__"})


def test_each_step_is_sent_once_until_the_run_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = WrittenRun(tmp_path / "distill")
    written.steps(1, 3)
    folder, metrics = written.write(), tmp_path / "distill" / "metrics.jsonl"
    with open(metrics, "a", encoding="utf-8") as file:
        file.write('{"step": 4, "lo')  # a line that is being written
    slept = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        written.steps(4, 5)
        written.write()
        (folder / "DONE").touch()

    monkeypatch.setattr(time, "sleep", sleep)
    wandb = Wandb()
    _follow(folder, monkeypatch, wandb)
    ((options, run),) = wandb.runs
    assert slept == [30]
    assert list(run.logged) == [1, 2, 3, 4, 5]
    assert run.logged[5] == json.loads(metrics.read_text(encoding="utf-8").splitlines()[-1])
    assert (options["name"], options["id"], options["config"]) == ("distill", "smoke-distill", RECIPE)
    assert run.axes == {"*": "tokens"}
    assert run.finished

    written.steps(6, 7)
    written.write()
    _follow(folder, monkeypatch, wandb)
    assert list(wandb.runs[1][1].logged) == [6, 7], "started again, it goes on"
