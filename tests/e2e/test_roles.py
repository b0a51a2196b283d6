"""A teacher with ranks of its own, as commands: a clean end, and what either side says when the other dies or hangs."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.e2e.commands import PLAIN, TORCHRUN_2, environment, settings, succeed
from tests.e2e.conftest import Place
from tests.paths import ROOT

WORLD, TEACHER = 3, 2
ROLES = settings(teacher__placement="disaggregated", teacher__ranks=1, teacher__queue=2)


@contextmanager
def _launched(place: Place, name: str, *, steps: int) -> Iterator[list[subprocess.Popen[str]]]:
    """Two ranks of the student and one of the teacher, a process each and no launcher that would end the others."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = place.distill(name, steps=steps, checkpoint_every=steps)
    command = [*PLAIN, *arguments, *ROLES, *settings(distributed__timeout_minutes=0.3)]
    ranks = []
    for rank in range(WORLD):
        output = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD, "LOCAL_WORLD_SIZE": WORLD}
        variables = {**output, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        env = {**environment(), **{key: str(value) for key, value in variables.items()}}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        ranks.append(subprocess.Popen(command, cwd=ROOT, env=env, text=True, **pipes))  # type: ignore[call-overload]
    try:
        yield ranks
    finally:
        for process in ranks:
            process.kill()
            process.wait()


def _until_it_trains(place: Place, name: str, ranks: list[subprocess.Popen[str]]) -> None:
    log = place.folder / name / "metrics.jsonl"
    end = time.monotonic() + 120
    while not log.exists() or len(log.read_text().splitlines()) < 3:
        assert time.monotonic() < end
        assert all(process.poll() is None for process in ranks)
        time.sleep(0.2)


def test_one_launch_starts_both_roles_and_ends_them(place: Place) -> None:
    with _launched(place, "apart", steps=4) as ranks:
        output = [process.communicate(timeout=150)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0, 0], output
    assert "teacher ranks 1 (1 x 1 stages)" in output[0]
    assert "step 4 of 4, done" in output[0]
    assert "step" not in output[TEACHER]
    succeed(*TORCHRUN_2, *place.distill("colocated", steps=4, checkpoint_every=4))
    apart, together = place.metrics("apart"), place.metrics("colocated")
    assert [line["loss"] for line in apart] == pytest.approx([line["loss"] for line in together], rel=2e-5)


@pytest.mark.parametrize("dies", [TEACHER, 1])
def test_when_one_dies_the_others_say_so_and_end(place: Place, dies: int) -> None:
    with _launched(place, f"killed-{dies}", steps=10_000) as ranks:
        _until_it_trains(place, f"killed-{dies}", ranks)
        ranks[dies].kill()
        for rank, process in enumerate(ranks):
            output = process.communicate(timeout=60)[0]
            if rank != dies:
                assert process.returncode == 3, output
                assert f"lost another rank in a collective: rank {dies} (" in output
                assert "no heartbeat" in output
                assert "Traceback" not in output


@pytest.mark.parametrize("hangs", [TEACHER, 0])
def test_when_one_hangs_it_is_named_and_the_others_end(place: Place, hangs: int) -> None:
    with _launched(place, f"stopped-{hangs}", steps=10_000) as ranks:
        _until_it_trains(place, f"stopped-{hangs}", ranks)
        os.kill(ranks[hangs].pid, signal.SIGSTOP)
        ended = {rank: process.communicate(timeout=60)[0] for rank, process in enumerate(ranks) if rank != hangs}
        assert all(ranks[rank].returncode == 3 for rank in ended), ended
        assert f"no heartbeat from rank {hangs} for " in ended[min(ended)]
