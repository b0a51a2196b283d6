"""Replicas of the student under a real Slurm: a node loses its power in a save, and the others go on."""

import json
import re
import time

import pytest

from tests.slurm.cluster import Cluster, Job, until
from tests.slurm.conftest import STEPS, Gate, Work, overrides

SAVE, ROUNDING = 30, 1e-7
"""The save in which the node is lost; losses of two layouts of ranks differ by less."""

READY, LOOK_SECONDS = "rows of the head read", 0.4
"""Line of a replica that will join at the next step; a step is opened only after that time."""

SEPARATE = {"distributed.vocab_group": 1, "distributed.min_replicas": 1}


@pytest.fixture
def settings(work: Work) -> dict[str, str]:
    of_replicas = work.settings["OVERRIDES"].removesuffix(")") + f" {' '.join(overrides(SEPARATE))})"
    return {**work.settings, "OVERRIDES": of_replicas, "REPLICA_NODES": "1", "SETTLE_SECONDS": "5"}


def _losses(work: Work, name: str) -> dict[int, float]:
    """Loss of each step of a run; a step that two attempts have taken is refused."""
    lines = (work.folder / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    losses = {row["step"]: row["loss"] for row in rows}
    assert len(rows) == len(losses), "no step has been taken twice"
    return losses


def _in_a_save(job: Job) -> None:
    """Returns while files of the checkpoint are being written."""
    job.reaches(SAVE)
    folder = job.folder / "checkpoints"
    until("the save begins", lambda: any(folder.glob(f".tmp-*{SAVE:08d}*")), 60, job.transcript)


def _until_joined(job: Job, gate: Gate, step: int, *, replicas: int, ready: int) -> None:
    """Opens a step after the other, from the one after `step`, until there are so many replicas again.

    `ready`: replicas that have said that they are, before.
    """
    until("the replacement is ready", lambda: job.log.count(READY) > ready, 90, job.transcript)
    while job.events("replicas_changed")[-1]["replicas"] != replicas:
        assert step < STEPS, job.transcript()
        step += 1
        gate.open(step)
        job.reaches(step)
        time.sleep(LOOK_SECONDS)


def test_a_node_loses_its_power_in_a_save_and_the_others_go_on(
    cluster: Cluster, work: Work, settings: dict[str, str]
) -> None:
    options = ("--nodes=3", "--signal=B:USR2@60")  # the notice comes after nine minutes
    gate = work.gate("replicas", SAVE + 5)
    settings = {**gate.settings(settings, f"slow_save:{SAVE}"), "SPARES": "1"}
    job = cluster.submit("replicas", work.folder / "replicas", *options, **settings)
    job.says("start 1 on n1 n2")
    _in_a_save(job)
    ready = job.log.count(READY)
    cluster.node("crash", "n2")
    try:
        job.says("replica 1 starts again on n3")
        _until_joined(job, gate, SAVE + 5, replicas=2, ready=ready)
        gate.open(STEPS)
        job.ends(400)
    finally:
        cluster.node("start", "n2")
    assert (job.folder / "DONE").exists(), job.transcript()
    assert job.field("ExitCode") == "0:0", job.transcript()
    assert job.field("Restarts") == "0", "it never went back into the queue"
    assert "start 2" not in job.log, "replica 0 has taken all steps in one start"
    assert "the run continues without replica 1" in job.log
    changes = job.events("replicas_changed")
    assert [change["replicas"] for change in changes] == [1, 2], changes
    work.reference(2)
    losses, expected = _losses(work, "replicas"), _losses(work, "reference-2")
    assert list(losses) == list(expected) == list(range(1, STEPS + 1))
    for step, loss in losses.items():
        assert abs(loss - expected[step]) < ROUNDING, f"step {step}: {loss} against {expected[step]}"


def test_before_the_time_limit_all_replicas_save_and_the_next_job_resumes(
    cluster: Cluster, work: Work, settings: dict[str, str]
) -> None:
    chain = ("--nodes=2", "--array=1-2%1", "--no-requeue")
    slowed = {**work.slowed, **settings, "MEGADISTILL": work.slowed["MEGADISTILL"]}
    job = cluster.submit("replicas", work.folder / "replica-chain", *chain, **slowed)
    job.reaches(SAVE)
    job.notify()
    until("both jobs have ended", lambda: (job.folder / "DONE").exists(), 180, job.transcript)
    job.ends()
    stops = [int(str(event["step"])) for event in job.events("stopped")]
    assert len(stops) == 1, stops
    assert [int(str(event["step"])) for event in job.events("resumed")] == [0, stops[0]]
    assert len(re.findall(r"replica [01] ended on n[12] after \d+ s; ranks by exit code: 1 x 3", job.log)) == 2, job.log
