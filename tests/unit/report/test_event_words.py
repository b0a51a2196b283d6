"""Events of a run, as sentences that need no knowledge of their keys."""

from collections.abc import Callable
from pathlib import Path

import pytest

from megadistill.events import EVENTS
from megadistill.report.event_words import sentences
from megadistill.report.run_record import read_run
from tests.unit.report.written_run import WrittenRun, run_with_faults

Happened = Callable[[WrittenRun], None]


def _words(run: WrittenRun) -> list[str]:
    return [each.text for each in sentences(read_run(run.write(), "run"))]


def test_a_run_with_faults_is_told_in_order(tmp_path: Path) -> None:
    assert _words(run_with_faults(tmp_path / "run")) == [
        "attempt 1 started on 2 processes",
        "training began (3 s to start)",
        "2 checkpoints, steps 5 to 10 (1 kB a rank, 500 ms to write, training waited 500 ms)",
        "attempt 1 failed at step 14 on rank 1: rank 1 is gone (exit code 3)",
        "attempt 2 started on 2 processes",
        "resumed from step 10 after a pause of 60 s (4 s to start, 4 steps to take again)",
        "checkpoint at step 20 (1 kB a rank, 500 ms to write, training waited 250 ms)",
        "loss spike at step 25: 9, where the steps before had 1 (50 standard deviations)",
        "rolled back from step 25 to step 20; slots 160 to 199 are left out from now on",
        "continued from step 20 after the rollback (1.5 s to start, 5 steps to take again)",
        "step 31 skipped: loss is nan",
        "checkpoint at step 40 (1 kB a rank, 500 ms to write, training waited 250 ms)",
        "completed at step 40",
    ]


def test_a_pause_after_a_stop_is_from_the_last_sign_to_the_next_start(tmp_path: Path) -> None:
    run = WrittenRun(tmp_path / "run")
    run.begin()
    run.steps(1, 200)
    run.save(200)
    run.event("stopped", 200, reason="SIGUSR2")
    run.now += 180
    run.begin(step=200, seconds=2.0)
    assert _words(run)[-3:] == [
        "stopped after step 200: SIGUSR2",
        "attempt 2 started on 2 processes",
        "resumed from step 200 after a pause of 3 min (2 s to start)",
    ]


def _skipped(run: WrittenRun) -> None:
    for step in range(1, 13):
        run.event("step_skipped", step, reason="loss is nan")


@pytest.mark.parametrize(
    ("happened", "sentence"),
    [
        (_skipped, "steps 1, 2, 3, 4, 5, 6, 7, 8 and 4 more skipped: loss is nan"),
        (
            lambda run: run.event("checkpoint_failed", 7, reason="no space left", stall_seconds=0.1),
            "checkpoint at step 7 not written: no space left",
        ),
        (
            lambda run: run.event("checkpoint_quarantined", 7, path="step-7.bad", reason="a digest differs"),
            "checkpoint of step 7 quarantined as step-7.bad: a digest differs",
        ),
        (
            lambda run: run.event("teacher_drift", 9, teacher_ce=5.25, median=3.0, zscore=22.3, slots=[64, 71]),
            "teacher's cross-entropy at step 9: 5.25, where the steps before had 3 (22 standard deviations); "
            "slots 64 to 71",
        ),
        (
            lambda run: run.event(
                "experts_starved", 200, count=9, steps=100, experts=[{"layer": 1, "expert": 3, "load": 0.01}, 7]
            ),
            "9 experts starved at step 200: expert 3 of layer 1",
        ),
        (lambda run: run.event("experts_starved", 200, experts="all"), "experts starved at step 200"),
        (
            lambda run: run.event("samples_masked", 9, slots=[64, 1071]),
            "2 corrupt samples masked at step 9: slots 64, 1,071",
        ),
        (
            lambda run: run.event("validated", 9, seconds=75.0, cross_entropy=2.5),
            "validated at step 9 (cross-entropy 2.5, 75 s)",
        ),
        (
            lambda run: [run.event("validated", step, seconds=20.0, cross_entropy=9.0 - step) for step in (3, 6)],
            "validated 2 times, steps 3 to 6 (cross-entropy 3, 40 s)",
        ),
        (
            lambda run: run.event("validation_plateau", 9, best=2.5, best_step=6, validations=3, cross_entropy=2.75),
            "the held-out cross-entropy has not fallen at step 9 since 2.5 at step 6",
        ),
        (
            lambda run: run.event("held_out_masked", 9, splits={"web": 2, "code": 1}),
            "corrupt held-out sequences left out at step 9: web 2, code 1",
        ),
        (
            lambda run: run.event("straggler", 9, message="straggler: rank 1 (n7) computes at 0.76 of the median"),
            "slow rank at step 9: rank 1 (n7) computes at 0.76 of the median",
        ),
        (
            lambda run: run.event(
                "curriculum_entry", 9, entry=3, sequence_length=32768, global_batch=64, rope={"rope_theta": 5e6}
            ),
            "curriculum entry 3 from step 9 on (sequences of 32,768 tokens, global batch 64, rope "
            '{"rope_theta": 5000000.0})',
        ),
        (
            lambda run: run.event("teacher_above_uniform", 0, teacher_ce=9.25, uniform_ce=7.625),
            "the teacher does not know this text at step 0: cross-entropy 9.25, a uniform guess has 7.62",
        ),
        (
            lambda run: run.event("float8_teacher", 0, kl=0.0012, native_ce=3.25, float8_ce=3.26),
            "teacher in float8: KL 0.0012 to the native one, cross-entropy 3.26 instead of 3.25",
        ),
        (
            lambda run: run.event("student_diverged", 9, student_ce=1884.0, limit=8.1, first_ce=7.6),
            "the student diverged at step 9: cross-entropy 1,884, 7.6 at the first step",
        ),
        (lambda run: run.event("stop_requested", 9, reason="SIGTERM"), "stop requested at step 9: SIGTERM"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_sentence(happened: Happened, sentence: str, tmp_path: Path) -> None:
    run = WrittenRun(tmp_path / "run")
    happened(run)
    assert _words(run) == [sentence]


@pytest.mark.parametrize("kind", EVENTS)
@pytest.mark.parametrize("value", [None, "text", [1], {"a": 1}, float("nan"), 10**400], ids=repr)
def test_damaged_values_make_no_odd_words(kind: str, value: object, tmp_path: Path) -> None:
    names = ["world_size", "startup_seconds", "lost_steps", "bytes", "reason", "path", "loss", "median", "zscore"]
    names += ["to_step", "skipped_slots", "slots", "message", "rank", "exit_code", "stall_seconds", "write_seconds"]
    names += ["run", "changes", "student_ce", "first_ce", "teacher_ce", "uniform_ce"]
    names += ["seconds", "cross_entropy", "best", "best_step", "splits"]
    run = WrittenRun(tmp_path / "run")
    run.event(kind, 3, **dict.fromkeys(names, value))
    (sentence,) = _words(run)
    assert "{" not in sentence.replace('{"a": 1}', "")
    assert "None" not in sentence
    assert "nan" not in sentence
