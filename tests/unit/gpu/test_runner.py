"""The runner of `make gpu`: no check stops another, and each leaves its figures, whatever becomes of it."""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from typing_extensions import override

from tests.gpu import __main__ as command_line
from tests.gpu import ceilings, layer, loss_numerics
from tests.gpu.checks import CHECKS, Bar, Check
from tests.gpu.device import StandIn
from tests.gpu.page import INTRODUCTION, WAITING, waiting_page
from tests.gpu.results import FAILED, NOT_RUN, PASSED, Record, Results, Row, rows_of
from tests.gpu.runner import NO_ANSWER, Place, Runner
from tests.paths import ROOT

ROW = """open({rows!r}, "a").write('{{"case": "a", "figure": "time", "value": 2.0, "unit": "ms", "note": ""}}\\n')\n"""

BEHAVIOURS = {
    "good": ROW,
    "raises": "raise ValueError('a shape that does not fit')",
    "dies": ROW + "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
    "hangs": ROW + "import time; time.sleep(600)",
    "leaves a child": ROW + "import subprocess, sys; print(subprocess.Popen(['sleep', '600']).pid, flush=True)",
    "measures nothing": "pass",
    "has no answer": f"print('needs 80 GiB, there are 16'); raise SystemExit({NO_ANSWER})",
    "slow": ROW,
}
BARS = {"slow": (Bar("time", "ms", at_most=1),)}


@dataclass(frozen=True)
class Scripts(Runner):
    """Each check is one of the scripts above."""

    written: list[list[str]] = field(default_factory=list)

    @override
    def command(self, check: Check, rows: Path) -> list[str]:
        if self.place.json.exists():
            self.written.append([outcome.name for outcome in Results.load(self.place.json).outcomes])
        return [sys.executable, "-c", BEHAVIOURS[check.name].format(rows=str(rows))]


def runner(tmp_path: Path, *, seconds: float = 60) -> Scripts:
    results = Results(stand_in=False, device={"device": "a GPU"}, commit="0", date="today")
    place = Place.of(tmp_path / "out", ROOT, tmp_path, stand_in=False)
    return Scripts(results, place, dict(os.environ), tmp_path, time.monotonic() + seconds)


def checks(*names: str) -> list[Check]:
    return [Check(name, f"Is {name} right?", 1.5 if name == "hangs" else 20, BARS.get(name, ())) for name in names]


def test_no_check_stops_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = runner(tmp_path)
    assert not run.run_all(checks(*BEHAVIOURS))
    states = {outcome.name: (outcome.state, outcome.reason) for outcome in run.results.outcomes}
    assert states == {
        "good": (PASSED, ""),
        "raises": (FAILED, "exit code 1: ValueError: a shape that does not fit"),
        "dies": (FAILED, "died of SIGSEGV; last line: it printed nothing"),
        "hangs": (FAILED, "killed at its limit of 2 s; last line: it printed nothing"),
        "leaves a child": (PASSED, ""),
        "measures nothing": (FAILED, "it measured nothing"),
        "has no answer": (NOT_RUN, "needs 80 GiB, there are 16"),
        "slow": (FAILED, "a: time is 2 ms, the bar is ≤ 1 ms"),
    }
    lines = capsys.readouterr().out.splitlines()
    assert "| ValueError: a shape that does not fit" in lines  # of its log, which may be lost with the machine
    assert sum(line.startswith("  ") for line in lines) == len(BEHAVIOURS)
    # What a killed check had measured is kept, and after each check everything is on the disk.
    assert {outcome.name for outcome in run.results.outcomes if outcome.rows} == {
        "good", "dies", "hangs", "leaves a child", "slow",
    }  # fmt: skip
    assert [len(names) for names in run.written] == list(range(1, len(BEHAVIOURS)))
    assert Results.load(run.place.json) == run.results
    child = int(run.place.log.read_text().split("===== leaves a child\n")[1].split()[0])
    for _ in range(100):
        if not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().split(")")[1]:
            return
        time.sleep(0.05)
    pytest.fail("a process that a check started is still there")


def test_the_time_of_all_checks_is_limited(tmp_path: Path) -> None:
    run = runner(tmp_path, seconds=0.5)
    assert run.run_all(checks("good", "dies"))
    assert {(each.state, each.reason) for each in run.results.outcomes} == {(NOT_RUN, "the run's time was over")}


def test_a_row_that_was_cut_off_ends_the_rows(tmp_path: Path) -> None:
    file = tmp_path / "rows"
    Record(file)("a", "time", 1.5, "ms")
    Record(file).left_out("b", "out of memory")
    with open(file, "a") as rows:
        rows.write('{"case": "c", "fig')
    assert rows_of(file) == [Row("a", "time", 1.5, "ms"), Row("b", "not measured", None, note="out of memory")]


def test_a_part_that_fails_stops_no_other_and_fails_the_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def parts(_: StandIn, record: Record) -> None:
        with record.part("first"):
            raise ValueError("a shape\nthat does not fit")
        with record.part("second"):
            record("second", "time", 1.5, "ms")

    monkeypatch.setattr(ceilings, "run", parts)
    assert command_line.run_check(CHECKS[0], tmp_path / "rows", stand_in=True) == 1
    assert rows_of(tmp_path / "rows") == [
        Row("first", "not measured", None, note="failed: ValueError: a shape"),
        Row("second", "time", 1.5, "ms"),
    ]
    assert capsys.readouterr().out.splitlines()[-1] == "first: ValueError: a shape"


@pytest.mark.parametrize(("value", "met"), [(65.9, True), (66.1, False), (float("nan"), False), (float("inf"), False)])
def test_a_bar(value: float, met: bool) -> None:
    bar = Bar("time", "ms", at_most=66, at_least=0, case="ours, *")
    assert bar.is_met(value) is met
    assert bar.covers("ours, compiled", "time")
    assert not bar.covers("theirs", "time")
    assert str(bar) == "≥ 0 and ≤ 66 ms"


def test_the_page_has_the_form_that_a_run_writes() -> None:
    """It waits for a GPU, or is of a run on one: never of a stand-in, and never written by hand."""
    page = (ROOT / "docs/results/gpu.md").read_text()
    recorded = ROOT / "benchmarks/results/gpu.json"
    if not recorded.exists():
        assert page == waiting_page()
        return
    assert WAITING not in page
    assert page.startswith(INTRODUCTION)
    assert not Results.load(recorded).stand_in


def test_without_a_gpu_one_line_says_what_is_needed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = json.dumps({"device": "none", "torch": "2.13.0+cpu"})
    monkeypatch.setattr(command_line, "FACTS", f"print({facts!r})")
    monkeypatch.setattr(sys, "argv", ["gpu"])
    assert command_line.main() == 2
    assert capsys.readouterr().err == (
        "error: torch 2.13.0+cpu sees no CUDA device here: run this on a machine with an NVIDIA GPU, or "
        "`make gpu STAND_IN=1` to run the same code on a CPU\n"
    )


def test_without_torch_one_line_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(command_line, "FACTS", "import a_torch_that_is_not_there")
    monkeypatch.setattr(sys, "argv", ["gpu"])
    assert command_line.main() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: torch cannot be imported by ")


def test_an_unknown_check_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu", "--only", "loss_speed,lost"])
    with pytest.raises(SystemExit) as error:
        command_line.main()
    assert error.value.code == 2
    assert "lost is no check; there are ceilings, loss_numerics" in capsys.readouterr().err


def test_the_limits_of_all_checks_are_about_ten_minutes() -> None:
    assert sum(check.seconds for check in CHECKS) <= 560
    assert len({check.name for check in CHECKS}) == len(CHECKS)
    assert all((ROOT / f"tests/gpu/{check.name}.py").exists() for check in CHECKS)


@pytest.mark.parametrize("run", [ceilings.run, layer.run], ids=["ceilings", "layer"])
def test_a_check_with_a_stand_in(run: Callable[[StandIn, Record], None], tmp_path: Path) -> None:
    """The other ones take longer: tests/gpu/test_gpu.py."""
    run(StandIn(), Record(tmp_path / "rows"))
    rows = rows_of(tmp_path / "rows")
    assert rows
    assert all(row.value is not None and row.value >= 0 for row in rows)


def test_the_loss_with_a_stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager alone: the bars of bf16 hold on a CPU too, since the rounding is the same."""
    monkeypatch.setattr(loss_numerics, "COMPILED", ())
    loss_numerics.errors(StandIn(), Record(tmp_path / "rows"))
    rows = rows_of(tmp_path / "rows")
    check = next(check for check in CHECKS if check.name == "loss_numerics")
    assert len(rows) == 3 * len(loss_numerics.DIVERGENCES)
    for row in rows:
        bar = check.bar(row.case, row.figure)
        assert bar is not None
        assert row.value is not None
        assert bar.is_met(row.value), row
    # bf16 gradients cannot be nearer than their own rounding.
    assert min(row.value or 0 for row in rows if row.figure == "error of dX") > 5e-4
