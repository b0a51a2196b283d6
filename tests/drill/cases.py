"""The cases of the drill. Each makes a fault, resumes by the same command, and compares with an undisturbed run.

A case returns a `CaseResult`, or raises AssertionError.
"""

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megadistill.events import read_events, read_metrics
from megadistill.train.checkpoint.folders import checkpoint_folders
from megadistill.train.resilience.preemption import SAME_REQUEST_SECONDS
from tests.drill.launch import Ranks, left_over, marked, until
from tests.drill.place import EVERY, STEPS, Place
from tests.drill.record import Record, lost_steps, names
from tests.e2e.commands import DEEPSPEED_2, TORCHRUN_2, environment, settings
from tests.paths import ROOT

RESTART, PERSON = 3, 4

SLOW = "slow:200"
"""So many milliseconds more a step leave time to do something to a run in its middle, on a fast machine too."""


@dataclass(frozen=True)
class CaseResult:
    """Seconds until the run had ended by the fault, steps that it cost, and the comparison."""

    seconds: float | None
    steps: int | None
    result: str


Case = Callable[[Place], CaseResult]
CASES: dict[str, tuple[str, Case]] = {}


def case(name: str, fault: str) -> Callable[[Case], Case]:
    def named(function: Case) -> Case:
        CASES[name] = fault, function
        return function

    return named


def truth(place: Place) -> Record:
    """The undisturbed run, made once."""
    folder = place.run_folder("truth")
    if not (folder / "DONE").exists():
        assert place.attempt("truth").wait() == [0, 0]
    return Record.of(folder)


def steps_of(folder: Path) -> int:
    """The last step that is logged."""
    return max((int(line["step"]) for _, line in read_metrics(folder)), default=0)


def until_step(folder: Path, step: int, ranks: Ranks) -> None:
    until(lambda: steps_of(folder) >= step or not ranks.alive, 60.0, f"{folder} did not come to step {step}")
    assert ranks.alive, f"the run ended before step {step}\n{ranks.output}"


def since(moment: float) -> float:
    return time.monotonic() - moment


def resume_run(place: Place, name: str, *changes: str, seconds: float | None) -> CaseResult:
    """The same command ends the run, and it is the undisturbed one."""
    ranks = place.attempt(name, *changes)
    assert ranks.wait() == [0, 0], ranks.output
    folder = place.run_folder(name)
    return CaseResult(seconds, lost_steps(folder), Record.of(folder).require_same(truth(place)))


def half_way(place: Place, name: str) -> Path:
    """A run that stopped after three checkpoints, as a copy of one that did."""
    base = place.run_folder("half")
    if not base.exists():
        assert place.attempt("half", "--stop-after", str(3 * EVERY)).wait() == [0, 0]
    folder = place.run_folder(name)
    shutil.copytree(base, folder)
    return folder


def require_no_checkpoint_but(folder: Path, expected: list[int]) -> None:
    steps = list(checkpoint_folders(folder / "checkpoints"))
    assert steps == expected, f"checkpoints {steps}, not {expected}"


@case("clean", "none: two clean runs")
def clean(place: Place) -> CaseResult:
    truth(place)
    return resume_run(place, "clean", seconds=None)


@case("kill-rank", "SIGKILL to a rank in mid-step")
def kill_rank(place: Place) -> CaseResult:
    ranks = place.attempt("kill-rank", faults={1: ["die:11"]})
    ranks.processes[1].join(60)
    began = time.monotonic()
    codes = ranks.wait(30)
    assert codes == [RESTART, -signal.SIGKILL], f"{codes}\n{ranks.output}"
    return resume_run(place, "kill-rank", seconds=since(began))


LOCAL_EVERY = 2


def on_local_tier(place: Place, name: str, *, lost: list[int], tier: str) -> CaseResult:
    """A rank is killed at step 15, nodes lose their local saves (2 is the tier's, 8 the durable interval)."""
    nodes = place.folder / "nodes" / name
    changes = settings(
        train__checkpoint_every=2 * EVERY,
        checkpoint__local__every=LOCAL_EVERY,
        checkpoint__local__folder=nodes,
    )
    nodes_of = {rank: [f"node:{rank}"] for rank in range(2)}
    ranks = place.attempt(name, *changes, faults={0: [*nodes_of[0], SLOW], 1: [*nodes_of[1], SLOW, "die:15"]})
    ranks.processes[1].join(60)
    began = time.monotonic()
    codes = ranks.wait(30)
    assert codes == [RESTART, -signal.SIGKILL], f"{codes}\n{ranks.output}"
    seconds = since(began)
    for rank in lost:
        shutil.rmtree(nodes / f"node-{rank}")
    ranks = place.attempt(name, *changes, faults=nodes_of)
    assert ranks.wait() == [0, 0], ranks.output
    folder = place.run_folder(name)
    record = Record.of(folder)
    resumed = record.named("resumed")[-1]
    expected = (8,) if tier == "durable" else (12, 14)  # that of 14 may not be whole when the rank dies
    assert resumed["step"] in expected, resumed
    assert resumed.get("tier", "durable") == tier, resumed
    assert lost_steps(folder) == 14 - resumed["step"]
    assert not list(nodes.glob("node-*/[!.]*")), "local saves of a complete run"
    return CaseResult(seconds, lost_steps(folder), record.require_same(truth(place)))


@case("local-saves", "SIGKILL to a rank: on from the local saves")
def local_saves(place: Place) -> CaseResult:
    return on_local_tier(place, "local-saves", lost=[], tier="local")


@case("node-lost", "SIGKILL to a rank, and its node with it: on from the copy on the next node")
def node_lost(place: Place) -> CaseResult:
    return on_local_tier(place, "node-lost", lost=[1], tier="local")


@case("nodes-lost", "SIGKILL to a rank, and both nodes lost: on from the checkpoint")
def nodes_lost(place: Place) -> CaseResult:
    return on_local_tier(place, "nodes-lost", lost=[0, 1], tier="durable")


@case("kill-in-save", "SIGKILL to all in a save, after the bytes, before the rename")
def kill_in_save(place: Place) -> CaseResult:
    folder = place.run_folder("kill-in-save")
    ranks = place.attempt("kill-in-save", faults={0: ["before_rename:8", SLOW]})
    ranks.until_blocked()
    ranks.send(signal.SIGKILL)
    ranks.wait(10)
    require_no_checkpoint_but(folder, [4])
    assert list((folder / "checkpoints").glob(".tmp-*")), "the bytes were there"
    result = resume_run(place, "kill-in-save", seconds=0.0)
    assert not list((folder / "checkpoints").glob(".tmp-*")), "what was left over is still there"
    return result


def newest_file(folder: Path, *, back: int = 0) -> Path:
    steps = sorted(checkpoint_folders(folder / "checkpoints").items())
    return sorted(steps[-1 - back][1].glob("rank-*.safetensors"))[0]


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 100)


def flip(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


@case("truncated", "the newest checkpoint truncated")
def truncated(place: Place) -> CaseResult:
    folder = half_way(place, "truncated")
    truncate(newest_file(folder))
    result = resume_run(place, "truncated", seconds=None)
    (quarantined,) = Record.of(folder).named("checkpoint_quarantined")
    assert quarantined["step"] == 12, quarantined
    return result


@case("flipped", "a byte flipped in the newest, a file missing in the next")
def flipped(place: Place) -> CaseResult:
    folder = half_way(place, "flipped")
    flip(newest_file(folder))
    newest_file(folder, back=1).unlink()
    result = resume_run(place, "flipped", seconds=None)
    assert [each["step"] for each in Record.of(folder).named("checkpoint_quarantined")] == [12, 8]
    return result


@case("only-damaged", "the only checkpoint damaged")
def only_damaged(place: Place) -> CaseResult:
    folder = half_way(place, "only-damaged")
    for step, path in checkpoint_folders(folder / "checkpoints").items():
        if step < 3 * EVERY:
            shutil.rmtree(path)
    flip(newest_file(folder))
    began = time.monotonic()
    ranks = place.attempt("only-damaged")
    assert ranks.wait() == [PERSON, PERSON], ranks.output
    assert "does not start from scratch" in ranks.output
    (quarantined,) = (folder / "checkpoints").glob(".corrupt-*")
    flip(next(quarantined.glob("rank-00000-*.safetensors")))  # a person restores it under its name
    quarantined.rename(folder / "checkpoints" / quarantined.name[quarantined.name.index("step-") :])
    return resume_run(place, "only-damaged", seconds=since(began))


@case("full-disk", "a full disk (tmpfs), in mid-run and at the last save")
def full_disk(place: Place) -> CaseResult:
    truth(place)
    folder = place.run_folder("full-disk")
    one = sum(path.stat().st_size for path in newest_file(place.run_folder("truth")).parent.iterdir())
    folder.mkdir(parents=True)
    size = int(2.6 * one) + (400 << 10)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    try:
        began = time.monotonic()
        ranks = place.attempt("full-disk", *settings(checkpoint__keep_last=8))
        codes = ranks.wait()
        assert codes == [RESTART, RESTART], f"{codes}\n{ranks.output}"
        assert not (folder / "DONE").exists(), "a last save that failed must not look done"
        failed = [each for each in read_events(folder) if each["event"] == "checkpoint_failed"]
        assert failed, "no event says that a save failed"
        saved = list(checkpoint_folders(folder / "checkpoints"))
        assert saved == [4, 8, 12, 16, 20, 24][: len(saved)], f"checkpoints {saved}: an older one is gone"
        assert 0 < len(saved) < 6, saved
        assert steps_of(folder) == STEPS, "the run did not live on"
        seconds = since(began)
        subprocess.run(["mount", "-o", f"remount,size={64 << 20}", str(folder)], check=True)
        return resume_run(place, "full-disk", *settings(checkpoint__keep_last=8), seconds=seconds)
    finally:
        subprocess.run(["umount", str(folder)], check=False)


@case("shard", "a shard corrupted, its sequences masked; killed and resumed")
def shard(place: Place) -> CaseResult:
    data = place.folder / "data-damaged"
    shutil.copytree(place.data, data)
    tars = sorted((data / "train").glob("*.tar"))
    for tar in tars:
        with open(tar, "r+b") as file:
            for place_ in range(600, tar.stat().st_size, 40_000):
                file.seek(place_)
                byte = file.read(1)[0]
                file.seek(place_)
                file.write(bytes([byte ^ 4]))
    changes = settings(data__on_corrupt_sample="mask", data__max_masked_per_million=100_000)
    assert place.attempt("shard-truth", *changes, data=data).wait() == [0, 0]
    expected = Record.of(place.run_folder("shard-truth"))
    assert expected.cursor["masked_slots"], "the run read nothing that was damaged"
    assert expected.named("samples_masked")
    ranks = place.attempt("shard", *changes, data=data, faults={0: ["die:15"]})
    ranks.wait(60)
    ranks = place.attempt("shard", *changes, data=data)
    assert ranks.wait() == [0, 0], ranks.output
    folder = place.run_folder("shard")
    result = Record.of(folder).require_same(expected)
    return CaseResult(None, lost_steps(folder), f"{len(expected.cursor['masked_slots'])} rows masked, {result}")


def stopped(place: Place, name: str, stop: Callable[[Ranks, Path], None], *, reason: str) -> CaseResult:
    """Stopped by `stop`, all ranks save the same step, and the run resumes from there."""
    folder = place.run_folder(name)
    ranks = place.attempt(name, faults={rank: [SLOW] for rank in range(2)})
    until_step(folder, 1, ranks)
    began = time.monotonic()
    stop(ranks, folder)
    return resume_stopped(place, name, ranks, reason=reason, began=began)


def resume_stopped(place: Place, name: str, ranks: Ranks, *, reason: str, began: float) -> CaseResult:
    codes = ranks.wait()
    seconds, folder = since(began), place.run_folder(name)
    assert codes == [RESTART, RESTART], f"{codes}\n{ranks.output}"
    record = Record.of(folder)
    assert record.step == steps_of(folder) < STEPS, "the checkpoint is not of the step at which it stopped"
    (event,) = record.named("stopped")
    assert reason in event["reason"], event
    result = resume_run(place, name, seconds=seconds)
    assert result.steps == 0, "a clean stop costs no step"
    return result


@case("usr2", "SIGUSR2 to one rank")
def usr2(place: Place) -> CaseResult:
    return stopped(place, "usr2", lambda ranks, _: ranks.send(signal.SIGUSR2, rank=1), reason="SIGUSR2")


@case("term", "SIGTERM to all")
def term(place: Place) -> CaseResult:
    return stopped(place, "term", lambda ranks, _: ranks.send(signal.SIGTERM), reason="SIGTERM")


@case("stop-file", "the file STOP")
def stop_file(place: Place) -> CaseResult:
    return stopped(place, "stop-file", lambda _, folder: (folder / "STOP").touch(), reason="STOP")


@case("budget", "the time budget is spent")
def budget(place: Place) -> CaseResult:
    began = time.monotonic()
    ranks = place.attempt("budget", *settings(run__time_limit_minutes=60), faults={0: ["late:7"]})
    result = resume_stopped(place, "budget", ranks, reason="run.time_limit_minutes", began=began)
    (event,) = Record.of(place.run_folder("budget")).named("stopped")
    assert event["step"] == 7, event
    return result


@case("second-signal", "a second signal")
def second_signal(place: Place) -> CaseResult:
    folder = place.run_folder("second-signal")
    ranks = place.attempt("second-signal", faults={0: ["blocked:2"]})
    ranks.until_blocked()
    began = time.monotonic()
    ranks.send(signal.SIGTERM)
    time.sleep(SAME_REQUEST_SECONDS + 0.2)
    ranks.send(signal.SIGTERM)
    codes = ranks.wait(20)
    assert codes == [RESTART, RESTART], f"{codes}\n{ranks.output}"
    ends = [event for event in read_events(folder) if event["event"] == "attempt_failed"]
    assert [event.get("requested") for event in ends] == [True], f"one event of all ranks: {ends}\n{ranks.output}"
    assert "the same command starts from the beginning" in ranks.output
    require_no_checkpoint_but(folder, [])
    return resume_run(place, "second-signal", seconds=since(began))


@case("frozen", "SIGSTOP to one rank")
def frozen(place: Place) -> CaseResult:
    folder = place.run_folder("frozen")
    ranks = place.attempt("frozen", faults={0: [SLOW], 1: [SLOW, "frozen:7"]})
    until_step(folder, 6, ranks)
    began = time.monotonic()
    ranks.processes[0].join(60)
    seconds = since(began)
    ranks.send(signal.SIGKILL, rank=1)  # as its launcher does; a stopped process takes no other signal
    assert ranks.wait(10) == [RESTART, -signal.SIGKILL], ranks.output
    assert "no heartbeat from rank 1" in ranks.logs[0].read_text(), ranks.output
    assert "the same command resumes from the checkpoint of step 4" in ranks.logs[0].read_text(), ranks.output
    return resume_run(place, "frozen", seconds=seconds)


@case("stuck", "a rank stuck in Python")
def stuck(place: Place) -> CaseResult:
    folder = place.run_folder("stuck")
    ranks = place.attempt("stuck", faults={1: ["stuck:7"]})
    until_step(folder, 6, ranks)
    began = time.monotonic()
    codes = ranks.wait(60)
    assert codes == [RESTART, RESTART], f"{codes}\n{ranks.output}"
    assert "rank 1" in ranks.output
    assert "_stuck" in ranks.output or any("_stuck" in path.read_text() for path in folder.rglob("*rank-00001*")), (
        "no stack shows where it was stuck"
    )
    return resume_run(place, "stuck", seconds=since(began))


@case("nan", "a NaN in one rank")
def nan(place: Place) -> CaseResult:
    ranks = place.attempt("nan", faults={1: ["nan:7"]})
    assert ranks.wait() == [0, 0], ranks.output
    record = Record.of(place.run_folder("nan"))
    (skip,) = record.named("step_skipped")
    assert skip["step"] == 7
    before, clean_run = record.steps, truth(place).steps
    assert sorted(before) == [step for step in clean_run if step != 7], "another step was left out"
    assert all(before[step] == clean_run[step] for step in range(1, 7))
    return CaseResult(0.0, 1, "one step skipped, on all ranks")


@case("nan-for-good", "NaNs in one rank for good")
def nan_for_good(place: Place) -> CaseResult:
    began = time.monotonic()
    ranks = place.attempt("nan-for-good", faults={1: ["nan_from:9"]})
    codes = ranks.wait()
    assert codes == [PERSON, PERSON], f"{codes}\n{ranks.output}"
    assert "consecutive steps were skipped" in ranks.output
    return resume_run(place, "nan-for-good", seconds=since(began))


@case("teacher-nan", "a NaN in the teacher")
def teacher_nan(place: Place) -> CaseResult:
    ranks = place.attempt("teacher-nan", faults={1: ["teacher_nan:9"]})
    began = time.monotonic()
    codes = ranks.wait()
    assert PERSON in codes, f"{codes}\n{ranks.output}"
    assert set(codes) <= {PERSON, RESTART}, f"{codes}\n{ranks.output}"
    assert "teacher" in ranks.output
    assert steps_of(place.run_folder("teacher-nan")) <= 9
    return resume_run(place, "teacher-nan", seconds=since(began))


@case("wrong-teacher", "the teacher's weights exchanged under a resume")
def wrong_teacher(place: Place) -> CaseResult:
    half_way(place, "wrong-teacher")
    backup = place.folder / "teacher-backup"
    shutil.copytree(place.teacher, backup)
    began = time.monotonic()
    try:
        for path in place.teacher.glob("*.safetensors"):
            exchange(path)
        ranks = place.attempt("wrong-teacher")
        codes = ranks.wait()
    finally:
        shutil.rmtree(place.teacher)
        backup.rename(place.teacher)
    assert codes == [PERSON, PERSON], f"{codes}\n{ranks.output}"
    assert "probe" in ranks.output
    return resume_run(place, "wrong-teacher", seconds=since(began))


def exchange(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_file({name: tensor * 1.01 for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})


def spiking(place: Place, name: str, *, faults: list[str]) -> Ranks:
    rolling = settings(
        resilience__max_rollbacks=1,
        resilience__rollback_steps=2,
        resilience__spike_window=8,
        resilience__spike_zscore=8,
    )
    return place.attempt(name, *rolling, faults={rank: ["spike:140", *faults] for rank in range(2)})


@case("spike", "a loss spike: rollback, skipped; killed after it and resumed")
def spike(place: Place) -> CaseResult:
    ranks = spiking(place, "spike", faults=[])
    assert ranks.wait() == [0, 0], ranks.output
    record = Record.of(place.run_folder("spike"))
    (rollback,) = record.named("rollback")
    first, stop = rollback["skipped_slots"]
    assert first <= 140 < stop, rollback
    assert place.attempt("skipped", *settings(data__skip=f"[[{first},{stop}]]")).wait() == [0, 0]
    result = record.require_same(Record.of(place.run_folder("skipped")))
    killed = spiking(place, "spike-killed", faults=["slow:100"])
    path = place.run_folder("spike-killed") / "rollbacks.json"
    until(lambda: path.exists() or not killed.alive, 60.0, "no rollback")
    killed.send(signal.SIGKILL)
    killed.wait(10)
    ranks = spiking(place, "spike-killed", faults=[])
    assert ranks.wait() == [0, 0], ranks.output
    Record.of(place.run_folder("spike-killed")).require_same(record)
    return CaseResult(
        None, rollback["step"] - rollback["to_step"], f"as a run that skips slots {first} to {stop}: {result}"
    )


@case("zombie", "a frozen attempt thaws while a later one has finished")
def zombie(place: Place) -> CaseResult:
    folder = place.run_folder("zombie")
    ranks = place.attempt("zombie", faults={rank: [SLOW] for rank in range(2)})
    until_step(folder, 6, ranks)
    ranks.send(signal.SIGSTOP)
    later = place.attempt("zombie")
    assert later.wait() == [0, 0], later.output
    record, before = Record.of(folder), names(folder)
    began = time.monotonic()
    ranks.send(signal.SIGCONT)
    codes = ranks.wait(60)
    assert 0 not in codes, f"{codes}\n{ranks.output}"
    assert names(folder) == before, "the old attempt changed the checkpoints"
    assert Record.of(folder).steps == record.steps, "the old attempt wrote to the log"
    return CaseResult(since(began), lost_steps(folder), Record.of(folder).require_same(truth(place)))


@case("second-start", "a second start while the run is running; --take-over; a start of the finished run")
def second_start(place: Place) -> CaseResult:
    """The second one is refused and costs the first nothing; with --take-over it ends the first."""
    folder = place.run_folder("second-start")
    first = place.attempt("second-start", faults={rank: [f"crawl:{EVERY + 2}"] for rank in range(2)})
    until_step(folder, EVERY + 1, first)
    refused = place.attempt("second-start")
    refused.processes[0].join(30)
    assert refused.processes[0].exitcode == 2, refused.output
    line = refused.logs[0].read_text().strip()
    pid = first.processes[0].pid
    assert line.startswith(f"megadistill: {folder}: attempt 1 is running on"), line
    assert f"(pid {pid})" in line, line
    assert "--take-over" in line, line
    assert "\n" not in line, line
    assert refused.wait(30) == [2, 2], refused.output
    assert "running" not in refused.logs[1].read_text(), "once a node"
    assert first.alive, first.output
    assert len(list((folder / "attempts").iterdir())) == 1, "a refused start is no attempt"
    began = time.monotonic()
    later = place.attempt("second-start", "--take-over")
    codes = first.wait(60)
    seconds = since(began)
    assert codes == [PERSON, PERSON], f"{codes}\n{first.output}"
    assert "attempt 2 has started" in first.output, first.output
    assert later.wait() == [0, 0], later.output
    result = CaseResult(seconds, lost_steps(folder), Record.of(folder).require_same(truth(place)))
    before = contents(folder)
    again = place.attempt("second-start")
    assert again.wait(30) == [0, 0], again.output
    assert f"{folder}: done, step {STEPS} of {STEPS}: nothing to do" in again.logs[0].read_text(), again.output
    assert contents(folder) == before, "a start of a finished run wrote to its folder"
    return result


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@case("worlds", "other worlds: 2, then 1, then 4")
def worlds(place: Place) -> CaseResult:
    for world, stop in ((2, 7), (1, 15), (4, STEPS)):
        layout = settings(distributed__vocab_group=min(world, 2), train__micro_batch=1 if world == 4 else 2)
        ranks = place.attempt("worlds", *layout, "--stop-after", str(stop), world=world)
        assert ranks.wait() == [0] * world, ranks.output
    return CaseResult(None, 0, Record.of(place.run_folder("worlds")).require_close(truth(place)))


APART = settings(teacher__placement="disaggregated", teacher__ranks=1, distributed__vocab_group=2)


def apart(place: Place, name: str, dies: int) -> CaseResult:
    expected_folder = place.run_folder("apart")
    if not expected_folder.exists():
        ranks = place.attempt("apart", *APART, world=3)
        assert ranks.wait() == [0, 0, 0], ranks.output
    expected = Record.of(expected_folder)
    expected.require_close(truth(place))
    folder = place.run_folder(name)
    ranks = place.attempt(name, *APART, world=3, faults={rank: [SLOW] for rank in range(2)})
    until_step(folder, 6, ranks)
    ranks.send(signal.SIGKILL, rank=dies)
    began = time.monotonic()
    codes = ranks.wait(90)
    seconds = since(began)
    others = [code for rank, code in enumerate(codes) if rank != dies]
    assert others == [RESTART, RESTART], f"{codes}\n{ranks.output}"
    ranks = place.attempt(name, *APART, world=3)
    assert ranks.wait() == [0, 0, 0], ranks.output
    return CaseResult(seconds, lost_steps(folder), Record.of(folder).require_same(expected))


@case("teacher-dies", "disaggregated: SIGKILL to a rank of the teacher")
def teacher_dies(place: Place) -> CaseResult:
    return apart(place, "teacher-dies", dies=2)


@case("student-dies", "disaggregated: SIGKILL to a rank of the student")
def student_dies(place: Place) -> CaseResult:
    return apart(place, "student-dies", dies=1)


@case("jit-lock", "a JIT lock left behind")
def jit_lock(place: Place) -> CaseResult:
    extensions = place.folder / "extensions"
    lock = extensions / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (0, 0))
    began = time.monotonic()
    ranks = place.attempt("jit-lock", environment={"TORCH_EXTENSIONS_DIR": str(extensions)})
    codes = ranks.wait()
    seconds = since(began)
    assert codes == [2, 2], f"{codes}\n{ranks.output}"
    assert str(lock) in ranks.output
    return resume_run(place, "jit-lock", seconds=seconds)


def launcher_dies(place: Place, name: str, launcher: tuple[str, ...]) -> CaseResult:
    """The launcher's first process is killed, as by a person who means the run: its ranks stop by themselves."""
    folder = place.run_folder(name)
    command = [*launcher, *place.command(name, steps=4000)]
    with open(place.folder / f"{name}.log", "wb") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env={**environment(), **marked()}, stdout=log, stderr=log, start_new_session=True
        )
    until(lambda: steps_of(folder) >= 6, 90.0, f"{name} did not come to step 6")
    process.send_signal(signal.SIGKILL)
    began = time.monotonic()
    process.wait()
    until(lambda: not left_over(), 60.0, "the ranks of a killed launcher were still there")
    seconds, record = since(began), Record.of(folder)
    assert record.step == steps_of(folder), "the checkpoint is not of the step at which it stopped"
    assert "SIGTERM" in record.named("stopped")[0]["reason"]
    return CaseResult(seconds, lost_steps(folder), "no process was left, and a checkpoint of the step at hand")


@case("torchrun-dies", "SIGKILL to torchrun")
def torchrun_dies(place: Place) -> CaseResult:
    return launcher_dies(place, "torchrun-dies", TORCHRUN_2)


@case("deepspeed-dies", "SIGKILL to the deepspeed runner")
def deepspeed_dies(place: Place) -> CaseResult:
    return launcher_dies(place, "deepspeed-dies", DEEPSPEED_2)


FAULTS = 20
LONG = 150
"""Steps of the run that meets twenty faults."""


@case("twenty", f"{FAULTS} random faults in a row")
def twenty(place: Place) -> CaseResult:
    seed = int(os.environ.get("DRILL_SEED", "1"))
    draw = random.Random(seed)
    assert place.attempt("twenty-truth", steps=LONG).wait(240) == [0, 0]
    folder, done = place.run_folder("twenty"), 0
    while done < FAULTS:
        before = len(starts(folder))
        ranks = place.attempt("twenty", steps=LONG, faults={rank: ["slow:20"] for rank in range(2)})
        until_started(ranks, folder, before, steps=draw.randint(1, 8))
        fault = draw.choice(("kill-one", "kill-all", "usr2", "term", "kill-and-truncate", "kill-and-flip"))
        if fault == "usr2":
            ranks.send(signal.SIGUSR2, rank=draw.randint(0, 1))
        elif fault == "term":
            ranks.send(signal.SIGTERM)
        elif fault == "kill-one":
            ranks.send(signal.SIGKILL, rank=draw.randint(0, 1))
        else:
            ranks.send(signal.SIGKILL)
        ranks.wait(60)
        saved = list(checkpoint_folders(folder / "checkpoints"))
        if fault.startswith("kill-and") and len(saved) > 1:
            (truncate if fault.endswith("truncate") else flip)(newest_file(folder))
        done += 1
    ranks = place.attempt("twenty", steps=LONG)
    assert ranks.wait(240) == [0, 0], ranks.output
    result = Record.of(folder).require_same(Record.of(place.run_folder("twenty-truth")))
    return CaseResult(None, lost_steps(folder), f"{result} (seed {seed})")


def until_started(ranks: Ranks, folder: Path, before: int, *, steps: int) -> None:
    """Until an attempt, the one after `before` others, has taken so many steps."""
    until(lambda: len(starts(folder)) > before or not ranks.alive, 60.0, "no attempt began")
    last = starts(folder)[-1]
    until(lambda: steps_of(folder) >= min(last + steps, LONG - 2) or not ranks.alive, 60.0, "the run stood still")


def starts(folder: Path) -> list[int]:
    """The step after which each attempt went on."""
    return [int(event["step"]) for event in read_events(folder) if event["event"] == "resumed"]
