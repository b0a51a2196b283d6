"""Jobs: what is done stays, what fails is reported, and a stop reaches every command."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import jobs
from benchmarks.jobs import Ended, Job, Pace, Step, run


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "POLL_SECONDS", 0.01)


def shell(script: str, product: Path) -> Step:
    return Step(("sh", "-c", script), product)


def job(folder: Path, name: str, *steps: Step, weight: float = 1.0, fraction: Callable[[], float] = lambda: 0.0) -> Job:
    return Job(name, steps, folder / f"logs/{name}.log", weight, fraction)


def ended(*all_jobs: Job, side_by_side: int = 2) -> dict[str, Ended]:
    return {event.job.name: event for event in run(all_jobs, side_by_side=side_by_side) if event is not None}


def test_what_is_there_is_not_made_again_and_the_rest_is_made_in_order(tmp_path: Path) -> None:
    first, second, third = (tmp_path / name for name in "abc")
    first.write_text("as it was")
    one = job(
        tmp_path,
        "one",
        shell(f"echo new > {first}", first),
        shell(f"cp {first} {second}", second),
        shell(f"cat {first} {second} > {third}", third),
    )
    assert not one.done
    assert ended(one)["one"].failure is None
    assert third.read_text() == "as it wasas it was"
    assert one.done
    assert ended(one) == {}, "a job that is done is not begun"


def test_a_failure_says_what_and_where_and_stops_no_other(tmp_path: Path) -> None:
    bad = job(tmp_path, "bad", shell("echo so far so good; echo out of luck >&2; exit 3", tmp_path / "x"))
    good = job(tmp_path, "good", shell(f"touch {tmp_path / 'y'}", tmp_path / "y"))
    events = ended(bad, good, side_by_side=1)
    assert events["good"].failure is None
    failure = events["bad"].failure
    assert failure is not None
    assert "exit code 3" in failure
    assert "out of luck" in failure
    assert str(bad.log) in failure
    assert "\n" not in failure


def test_a_failed_step_ends_its_job(tmp_path: Path) -> None:
    after = tmp_path / "after"
    failure = ended(job(tmp_path, "one", shell("exit 1", tmp_path / "x"), shell(f"touch {after}", after)))[
        "one"
    ].failure
    assert failure is not None
    assert not after.exists()


def test_a_command_that_leaves_nothing_has_failed(tmp_path: Path) -> None:
    failure = ended(job(tmp_path, "one", shell("true", tmp_path / "x")))["one"].failure
    assert failure is not None
    assert f"it left no {tmp_path / 'x'}" in failure


def test_no_more_jobs_run_than_side_by_side_allows(tmp_path: Path) -> None:
    (tmp_path / "now").mkdir()
    script = "touch now/$0; ls now | wc -l >> counts; sleep 0.1; rm now/$0; touch $0"
    several = [
        job(tmp_path, f"j{i}", Step(("sh", "-c", f"cd {tmp_path}; {script}", f"j{i}"), tmp_path / f"j{i}"))
        for i in range(5)
    ]
    assert all(event.failure is None for event in ended(*several, side_by_side=2).values())
    counts = [int(count) for count in (tmp_path / "counts").read_text().split()]
    assert len(counts) == 5
    assert max(counts) == 2


def test_a_stop_is_one_signal_to_each_command_and_waits_for_it(tmp_path: Path) -> None:
    started, saved = tmp_path / "started", tmp_path / "saved"
    script = f"trap 'echo saved >> {saved}; exit 3' TERM; touch {started}; while :; do sleep 0.02; done"
    events = run([job(tmp_path, "long", shell(script, tmp_path / "x"))], side_by_side=1)
    for _ in events:
        if started.exists():
            break
    events.close()
    assert saved.read_text() == "saved\n"


def test_the_time_left_is_reckoned_from_what_was_done_since(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    far = {"second": 0.5}
    (tmp_path / "x").touch()
    jobs_of_the_day = [
        job(tmp_path, "first", shell("true", tmp_path / "x"), weight=100.0),
        job(tmp_path, "second", shell("true", tmp_path / "y"), weight=40.0, fraction=lambda: far["second"]),
        job(tmp_path, "third", shell("true", tmp_path / "z"), weight=20.0),
    ]
    clock = {"now": 1000.0}
    monkeypatch.setattr(time, "monotonic", lambda: clock["now"])
    pace = Pace(jobs_of_the_day, began=1000.0)
    assert pace.left() == "", "nothing was done yet: no pace"
    clock["now"], far["second"] = 1030.0, 0.75
    # 10 of the 40 in 30 seconds; 10 and 20 are left
    assert pace.done == 130.0
    assert pace.left() == "about 0:01:30 left"
