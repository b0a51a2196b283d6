"""Diagnostics of a run from truncated targets: those of the complete distributions, which the loss never sees."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from megadistill.config.recipe import LossSection
from megadistill.distributed.topology import Topology
from megadistill.divergence import Divergence
from megadistill.loss import Head, reference
from megadistill.models.families import build_causal_lm
from megadistill.train.step import train_step
from megadistill.types import LossTerms
from tests.ranks.harness import run_ranks
from tests.ranks.student_cases import (
    RATE,
    SEED,
    VOCAB,
    Case,
    SmallChunks,
    build,
    config_of,
    global_batch,
    rows_of,
    step_batch,
    teacher_head,
    teacher_hidden,
    teacher_of,
)

STEPS = 4
TARGETS: dict[str, dict[str, Any]] = {
    "sampled": {"draws": 8},
    "top_k, other": {"select": "top_k", "k": 12, "tail": "other"},
    "top_p": {"select": "top_p", "p": 0.8, "max_ids": 20, "tail": "renormalised"},
}


@dataclass(frozen=True)
class Step:
    metrics: dict[str, float]
    diagnostics: dict[str, float] | None
    before: dict[str, Tensor]
    """The student's parameters, whole, as the step's forward pass reads them."""


def _steps(topology: Topology, case: Case) -> list[Step]:
    student = build(case, topology)
    teacher = teacher_of(student.head.vocab, torch.float32)
    steps = []
    for step in range(STEPS):
        before = student.full_parameters()
        outcome = train_step(
            student,
            step_batch(rows_of(global_batch(step), topology), teacher, accumulation=case.accumulation),
            step=step,
            learning_rate=RATE,
            objective=SmallChunks(case.loss, length=STEPS, seed=SEED),
            topology=topology,
        )
        steps.append(Step(outcome.metrics, outcome.diagnostics, before))
    return steps


def _dense(case: Case, step: int, parameters: dict[str, Tensor]) -> LossTerms:
    """One dense float64 process with these parameters, against the teacher's complete distribution."""
    model = build_causal_lm(config_of(case), vocab_size=VOCAB, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(parameters[name][: len(parameter)])
    model.double()
    batch = global_batch(step)
    labels = batch.labels.flatten()
    hidden = model.base_model(input_ids=batch.tokens, use_cache=False).last_hidden_state.flatten(0, 1)
    return reference.distill_loss(
        Head(hidden, model.get_output_embeddings().weight),
        Head(teacher_hidden(batch.slots).double(), teacher_head().double()),
        labels,
        token_weights=(labels != -100).double() / batch.valid_tokens,
        divergence=Divergence(),
        vocab_size=VOCAB,
        diagnostics=True,
    )


@cache
def _run(name: str, world: int, every: int) -> list[Step]:
    # T = 2 too: the KL is at temperature 1, whatever the loss is at.
    loss = LossSection.model_validate({"targets": TARGETS[name], "temperature": 2.0, "diagnostics_every": every})
    steps: list[Step] = run_ranks(world, _steps, Case(accumulation=2, loss=loss))[0]
    return steps


@pytest.mark.parametrize(("name", "world"), [("sampled", 1), *((name, 2) for name in TARGETS)])
def test_the_kl_of_a_diagnosed_step_is_that_of_one_dense_process(name: str, world: int) -> None:
    steps = _run(name, world, 2)
    assert [step.diagnostics is not None for step in steps] == [True, False, True, False]
    for number in (0, 2):
        step, truth = steps[number], _dense(Case(), number, steps[number].before)
        assert step.diagnostics is not None
        assert truth.diagnostics is not None
        assert step.diagnostics["forward_kl"] == pytest.approx(truth.kl.item(), rel=2e-6)
        assert step.diagnostics["jsd"] == pytest.approx(truth.diagnostics.jsd.item(), rel=2e-6)
        assert step.diagnostics["acceptance"] == pytest.approx(truth.diagnostics.acceptance.item(), rel=2e-6)
        for term in ("teacher_ce", "teacher_entropy", "agreement"):
            assert step.metrics[term] == pytest.approx(getattr(truth, term).item(), rel=2e-6), term
        assert step.metrics["divergence"] != pytest.approx(truth.kl.item(), rel=1e-2), "what is trained is another one"
    assert not all(torch.equal(steps[2].before[name], value) for name, value in steps[0].before.items())


def test_diagnosing_changes_no_number_of_a_run() -> None:
    """Loss, divergence and parameters, to the last digit."""
    name = "top_k, other"
    for diagnosed, plain in zip(_run(name, 2, 2), _run(name, 2, 0), strict=True):
        assert plain.diagnostics is None
        assert plain.metrics["kl"] == plain.metrics["agreement"] == 0, "the loss has no complete distribution"
        for term in ("loss", "divergence", "student_ce", "student_entropy", "log_z"):
            assert diagnosed.metrics[term] == plain.metrics[term], term
        assert all(torch.equal(diagnosed.before[each], plain.before[each]) for each in plain.before)
