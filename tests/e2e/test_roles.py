"""A teacher with ranks of its own, as commands: a clean end, and what either side says when the other dies or hangs."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.drill.launch import Ranks, launch, until
from tests.e2e.commands import settings
from tests.e2e.conftest import Place

WORLD, TEACHER = 3, 2
ROLES = settings(teacher__placement="disaggregated", teacher__ranks=1, teacher__queue=2)


@contextmanager
def _launched(place: Place, name: str, *changes: str, steps: int, world: int = WORLD) -> Iterator[Ranks]:
    """A process for each rank, and no launcher that would end the others."""
    arguments = place.distill(name, steps=steps, checkpoint_every=steps)
    ranks = launch(
        [*arguments, *changes], world=world, faults={}, folder=place.folder / f"{name}-output", environment={}
    )
    try:
        yield ranks
    finally:
        ranks.send(signal.SIGKILL)
        for process in ranks.processes:
            process.join()


@contextmanager
def _training(place: Place, name: str) -> Iterator[Ranks]:
    """Ranks of the student and one of the teacher, which have taken three steps of very many."""
    limit = settings(distributed__timeout_minutes=0.3)
    with _launched(place, name, *ROLES, *limit, steps=10_000) as ranks:
        log = place.folder / name / "metrics.jsonl"
        until(
            lambda: not ranks.alive or (log.exists() and len(log.read_text().splitlines()) >= 3),
            120.0,
            f"{name} did not come to step 3",
        )
        assert all(process.exitcode is None for process in ranks.processes), ranks.output
        yield ranks


def test_one_launch_starts_both_roles_and_ends_them(place: Place) -> None:
    with _launched(place, "apart", *ROLES, steps=4) as ranks:
        assert ranks.wait(150) == [0, 0, 0], ranks.output
        output = [log.read_text() for log in ranks.logs]
    assert "teacher ranks 1 (1 x 1 stages)" in output[0]
    assert "step 4 of 4, done" in output[0]
    assert "step" not in output[TEACHER]
    with _launched(place, "colocated", steps=4, world=2) as ranks:
        assert ranks.wait(150) == [0, 0], ranks.output
    apart, together = place.metrics("apart"), place.metrics("colocated")
    assert [line["loss"] for line in apart] == pytest.approx([line["loss"] for line in together], rel=2e-5)


@pytest.mark.parametrize("dies", [TEACHER, 1])
def test_when_one_dies_the_others_say_so_and_end(place: Place, dies: int) -> None:
    with _training(place, f"killed-{dies}") as ranks:
        ranks.send(signal.SIGKILL, rank=dies)
        codes = ranks.wait(60)
        for rank, code in enumerate(codes):
            if rank != dies:
                output = ranks.logs[rank].read_text()
                assert code == 3, output
                assert f"lost another rank in a collective: rank {dies} (" in output
                assert "no heartbeat" in output
                assert "Traceback" not in output


@pytest.mark.parametrize("hangs", [TEACHER, 0])
def test_when_one_hangs_it_is_named_and_the_others_end(place: Place, hangs: int) -> None:
    with _training(place, f"stopped-{hangs}") as ranks:
        ranks.send(signal.SIGSTOP, rank=hangs)
        others = [rank for rank in range(WORLD) if rank != hangs]
        for rank in others:
            ranks.processes[rank].join(60)
        assert [ranks.processes[rank].exitcode for rank in others] == [3, 3], ranks.output
        assert f"no heartbeat from rank {hangs} for " in ranks.logs[others[0]].read_text()
