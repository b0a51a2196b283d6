"""A step whose loss or gradient is not finite on one rank moves nothing on any, and leaves nothing behind."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from megadistill.distributed.topology import Topology
from megadistill.student.routers import RouterSums
from megadistill.train import step as step_module
from megadistill.train.resilience.anomalies import finite
from megadistill.train.step import StepOutcome, train_step
from megadistill.types import LossTerms
from tests.ranks.harness import run_ranks
from tests.ranks.student_cases import (
    RATE,
    SEED,
    Case,
    SmallChunks,
    WatchedStudent,
    build,
    global_batch,
    rows_of,
    step_batch,
    teacher_of,
)

CASES = [
    (1, Case()),
    (1, Case(accumulation=2, precision="bfloat16")),
    (2, Case(persistence=10_000, tied=True)),
    (2, Case(accumulation=2)),
    (2, Case(accumulation=2, offload_optimizer=True)),
]
BAD = ("hidden", "number", "gradient")


def _step(student: WatchedStudent, case: Case, topology: Topology, step: int) -> StepOutcome:
    """Each rank tells the others its rank and a one."""
    dtype = torch.bfloat16 if case.precision == "bfloat16" else torch.float32
    teacher, batch = teacher_of(student.head.vocab, dtype), rows_of(global_batch(step), topology)
    return train_step(
        student,
        step_batch(batch, teacher, accumulation=case.accumulation),
        step=step,
        learning_rate=RATE,
        objective=SmallChunks(case.loss, length=3, seed=SEED),
        topology=topology,
        flags=lambda: {"rank": float(topology.rank), "one": 1.0},
    )


@contextmanager
def _spoiled(student: Any, what: str, here: bool) -> Iterator[None]:
    """Spoils the first micro-batch on this rank: a NaN in the hidden states; or in a number of the loss that no
    gradient shows; or an infinity in a gradient that no number of the loss shows."""
    hidden, numbers, spoilt = student.routed_hidden, step_module._numbers, here

    def spoil(values: Tensor, by: float) -> Tensor:
        nonlocal spoilt
        if not spoilt:
            return values
        spoilt = False
        mask = torch.zeros_like(values)
        mask.view(-1)[-1] = by  # of a token that has a label
        return values + mask

    def bad_hidden(*arguments: Any, **options: Any) -> tuple[Tensor, RouterSums | None]:
        taken, sums = hidden(*arguments, **options)
        if what == "hidden":
            taken = spoil(taken, torch.nan)
        elif what == "gradient" and spoilt:
            taken.register_hook(lambda gradient: spoil(gradient, torch.inf))
        return taken, sums

    def bad_numbers(terms: LossTerms, sums: RouterSums | None = None) -> Tensor:
        return spoil(numbers(terms, sums), torch.nan) if what == "number" else numbers(terms, sums)

    student.routed_hidden, step_module._numbers = bad_hidden, bad_numbers
    yield
    student.routed_hidden, step_module._numbers = hidden, numbers
    assert not spoilt, "it was spoilt"


@dataclass(frozen=True)
class Run:
    outcomes: list[StepOutcome]
    states: list[dict[str, Tensor]]
    """This rank's, after each of the outcomes."""


def _steps(topology: Topology, case: Case, bad: bool) -> Run:
    """Steps 0 and 4, and between them, if `bad`, three that the last rank spoils."""
    student = build(case, topology)
    taken = Run([_step(student, case, topology, 0)], [student.state.snapshot()])
    if bad:
        for step, what in enumerate(BAD, start=1):
            with _spoiled(student, what, here=topology.rank == topology.world - 1):
                taken.outcomes.append(_step(student, case, topology, step))
            taken.states.append(student.state.snapshot())
    taken.outcomes.append(_step(student, case, topology, 4))
    taken.states.append(student.state.snapshot())
    return taken


def _differ(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name, value in one.items() if not torch.equal(value, other[name])]


@pytest.mark.parametrize(
    ("world", "case"), CASES, ids=["one", "bfloat16, accumulated", "gathered", "accumulated", "offloaded"]
)
def test_a_step_that_is_not_finite_leaves_no_trace(world: int, case: Case) -> None:
    clean_ranks = run_ranks(world, _steps, case, False)
    for clean, taken in zip(clean_ranks, run_ranks(world, _steps, case, True), strict=True):
        assert [outcome.skipped for outcome in taken.outcomes] == [False, True, True, True, False], (
            "on every rank alike"
        )
        all_finite = [finite(outcome.metrics) for outcome in taken.outcomes]
        assert all_finite == [True, False, False, True, True], "either is enough, and all ranks know of it"
        before, *after_bad, after = taken.states
        assert len(before) == 1 + 3 * sum(name.startswith("master/") for name in before), "moments, and the step count"
        for state in after_bad:
            assert _differ(state, before) == []
        assert "optimizer_step" in _differ(after, before)
        assert _differ(after, clean.states[-1]) == []
        assert taken.outcomes[-1].metrics == clean.outcomes[-1].metrics
        assert taken.outcomes[-1].grad_norm == clean.outcomes[-1].grad_norm
        for outcome in (*taken.outcomes, *clean.outcomes):
            assert outcome.flags == {"rank": world * (world - 1) / 2, "one": float(world)}, "summed on any step"


def _a_bad_first_step(topology: Topology) -> tuple[bool, list[str], int]:
    student = build(Case(), topology)
    with _spoiled(student, "hidden", here=True):
        skipped = _step(student, Case(), topology, 0).skipped
    state = student.state.snapshot()
    _step(student, Case(), topology, 1)
    moved = student.state.snapshot()
    student.state.load(lambda key, start, stop: state[key])
    return skipped, _differ(student.state.snapshot(), state), len(_differ(moved, state))


def test_the_very_first_step_may_be_skipped_and_saved() -> None:
    ((skipped, differing, moved),) = run_ranks(1, _a_bad_first_step)
    assert skipped
    assert differing == []
    assert moved > 10
