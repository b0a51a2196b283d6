"""Training under a real Slurm: whatever befalls the job, the run ends with the parameters of an undisturbed one."""

import time
from pathlib import Path

import pytest
import torch

from tests.slurm.cluster import Cluster, Job, until
from tests.slurm.conftest import APART, STEPS, Work

SOON = 20
"""A step that is reached soon, and after which two checkpoints lie behind a run and most steps before it."""


def _same(work: Work, job: Job, reference: list[torch.Tensor]) -> None:
    assert (job.folder / "DONE").exists(), job.transcript()
    ours = work.weights(job.folder.name)
    assert all(torch.equal(a, b) for a, b in zip(ours, reference, strict=True)), job.transcript()


def _stopped_at(job: Job, reason: str) -> list[int]:
    stops = job.events("stopped")
    assert stops, job.transcript()
    assert all(stop["reason"] == reason for stop in stops), stops
    return [int(str(stop["step"])) for stop in stops]


def _resumed_at(job: Job) -> list[int]:
    return [int(str(event["step"])) for event in job.events("resumed")]


def test_two_nodes_do_what_two_processes_do(cluster: Cluster, work: Work) -> None:
    job = cluster.submit("train", work.folder / "clean", "--nodes=2", **work.settings).ends()
    _same(work, job, work.reference(2))
    assert job.field("ExitCode") == "0:0"
    assert job.log.count(f"step {STEPS}/{STEPS} | ") == 1, "rank 0 alone is in the log"
    assert "ranks by exit code: 2 x 0" in job.log
    again = cluster.submit("train", job.folder, "--nodes=2", **work.settings).ends(20)
    assert "nothing is left to do" in again.log
    assert again.field("ExitCode") == "0:0"


def test_before_the_time_limit_a_job_saves_requeues_itself_and_goes_on(cluster: Cluster, work: Work) -> None:
    cluster.node("slow", "n1")
    job = cluster.submit("train", work.folder / "walltime", "--nodes=2", "--signal=B:USR2@60", **work.settings)
    job.says("start 1 on n1 n2")
    began = time.monotonic()
    job.reaches(1)
    # Slurm looks at limits every 30 s, and sends the notice as long before its time.
    minutes = (time.monotonic() - began) // 60 + 2
    cluster.call("scontrol", "update", f"JobId={job.number}", f"TimeLimit={minutes:.0f}")
    job.says("requeued", 120)
    until("the job waits in the queue", lambda: job.field("JobState") == "PENDING", 30, job.transcript)
    cluster.call("scontrol", "update", f"JobId={job.number}", "TimeLimit=10")
    cluster.node("quick", "n1")
    _same(work, job.ends(), work.reference(2))
    assert _resumed_at(job) == [0, *_stopped_at(job, "SIGUSR2")]
    assert f"job {job.number}.1: start 1" in job.log, "a restart appends to the same log"


def test_a_job_that_is_preempted_gives_its_nodes_and_goes_on_later(cluster: Cluster, work: Work) -> None:
    job = cluster.submit("train", work.folder / "preempted", "--nodes=2", "--partition=low", **work.slowed)
    job.reaches(SOON)
    cluster.call("srun", "--partition=main", "--nodes=3", "--exclusive", "--job-name=urgent", "sleep", "1")
    _same(work, job.ends(), work.reference(2))
    assert _resumed_at(job) == [0, *_stopped_at(job, "SIGUSR2")]
    assert job.field("Restarts") == "1"


def test_the_jobs_of_an_array_go_on_one_after_the_other(cluster: Cluster, work: Work) -> None:
    chain = ("--nodes=2", "--array=1-3%1", "--no-requeue")
    job = cluster.submit("train", work.folder / "array", *chain, **work.slowed)
    job.reaches(SOON)
    job.notify()
    _same(work, job.ends(), work.reference(2))
    assert _resumed_at(job) == [0, *_stopped_at(job, "SIGUSR2")]
    assert "the next job of the array or chain resumes" in job.log
    assert "nothing is left to do" in job.log


def test_a_second_job_on_the_folder_of_a_running_one_ends_and_the_first_goes_on(cluster: Cluster, work: Work) -> None:
    gate = work.gate("twice", SOON)
    job = cluster.submit("train", work.folder / "twice", "--nodes=2", **gate.settings(work.settings))
    job.reaches(SOON)
    second = cluster.submit("train", job.folder, "--nodes=1", **work.settings).ends(30)
    gate.open(STEPS)
    assert f"job {job.number} is running in {job.folder}: this job ends" in second.log
    assert second.field("ExitCode") == "1:0"
    _same(work, job.ends(), work.reference(2))
    assert _resumed_at(job) == [0], "it was not ended"


def test_when_a_node_is_set_down_the_job_requeues_and_takes_others(cluster: Cluster, work: Work) -> None:
    gate = work.gate("down", SOON)
    job = cluster.submit("train", work.folder / "down", "--nodes=2", **gate.settings(work.settings))
    job.says("start 1 on n1 n2")
    job.reaches(SOON)
    cluster.call("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")
    gate.open(STEPS)
    try:
        _same(work, job.ends(), work.reference(2))
    finally:
        cluster.call("scontrol", "update", "NodeName=n2", "State=RESUME")
    assert "start 1 on n1 n3" in job.log


def test_a_spare_node_stands_in_for_one_that_lost_its_power(cluster: Cluster, work: Work) -> None:
    gate = work.gate("power", SOON)
    job = cluster.submit("train", work.folder / "power", "--nodes=3", **gate.settings(work.settings), SPARES="1")
    job.reaches(SOON)
    cluster.node("crash", "n2")
    gate.open(STEPS)
    try:
        _same(work, job.ends(), work.reference(2))
    finally:
        cluster.node("start", "n2")
    assert "start 2 on n1 n3" in job.log
    assert job.field("Restarts") == "0", "it never went back into the queue"


def test_a_node_that_cannot_do_its_part_is_passed_over(cluster: Cluster, work: Work) -> None:
    folder = work.folder / "preflight"
    folder.mkdir()
    cluster.node("forbid", "n2", str(folder))
    try:
        job = cluster.submit("train", folder, "--nodes=3", **work.settings, SPARES="1", NODE_CHECK="").ends(180)
    finally:
        cluster.node("allow", "n2", str(folder))
    _same(work, job, work.reference(2))
    assert f"n2 is not used: cannot write to {folder}" in job.log
    assert "start 1 on n1 n3" in job.log


@pytest.mark.parametrize(
    ("ends", "starts", "says"),
    [
        ("kill -9 $$", 3, "3 starts without progress after the beginning"),
        ("echo megadistill: no such recipe >&2; exit 2", 1, "exit code 2: megadistill: no such recipe"),
        ("echo megadistill: a broken teacher >&2; exit 4", 1, "exit code 4: megadistill: a broken teacher"),
    ],
    ids=["a crash loop", "wrong input", "a fault for a person"],
)
def test_what_no_restart_mends_is_held_for_a_person(
    cluster: Cluster, tmp_path: Path, ends: str, starts: int, says: str
) -> None:
    settings = {"RECIPE": "none", "OVERRIDES": "()", "MEGADISTILL": f"(bash -c '{ends}')"}
    job = cluster.submit("train", tmp_path / "run", "--nodes=2", **settings).ends()
    assert says in (job.folder / "HOLD").read_text(encoding="utf-8")
    assert job.log.count("srun ended") == starts
    assert job.field("ExitCode") == "4:0"
    later = cluster.submit("train", job.folder, "--nodes=2", **settings).ends(20)
    assert "HOLD exists" in later.log
    assert later.field("ExitCode") == "4:0"


def test_a_run_that_another_job_took_over_is_left_to_it(cluster: Cluster, tmp_path: Path) -> None:
    taken = "mkdir -p $RUN/attempts; echo {} > $RUN/attempts/00002.json; exit 4"
    settings = {"RECIPE": "none", "OVERRIDES": "()", "MEGADISTILL": f"(bash -c 'RUN={tmp_path}/run; {taken}')"}
    job = cluster.submit("train", tmp_path / "run", "--nodes=1", **settings).ends()
    assert "another job has started in" in job.log
    assert not (job.folder / "HOLD").exists()


def test_the_teacher_on_nodes_of_another_kind_is_a_heterogeneous_job(cluster: Cluster, work: Work) -> None:
    kinds = ("--nodes=2", ":", "--nodes=1")
    job = cluster.submit("train-disaggregated-het", work.folder / "het", *kinds, **work.slowed)
    job.reaches(SOON)
    job.notify()
    _same(work, job.ends(180), work.reference(3, **APART))
    assert _resumed_at(job) == [0, *_stopped_at(job, "SIGUSR2")]
    assert f"job {job.number}.1: start 1 on n1 n2 n3" in job.log


def test_the_teacher_on_the_last_nodes_of_a_job(cluster: Cluster, work: Work) -> None:
    settings = {**work.settings, "TEACHER_NODES": "1"}
    job = cluster.submit("train-disaggregated", work.folder / "split", "--nodes=3", **settings).ends()
    _same(work, job, work.reference(3, **APART))
