"""Losses of a student's routers against one dense process, where they are transformers', and its experts' load."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from megadistill.config.recipe import LossSection
from megadistill.distributed.topology import Topology
from megadistill.models.experts import RouterCoefs
from megadistill.train.objective import Objective
from megadistill.train.router_losses import ExpertLoad
from megadistill.train.step import train_step
from megadistill.train.teacher.protocol import NoTeacher
from tests.ranks.harness import run_ranks
from tests.ranks.student.test_student import _steps_with_a_restart, assert_matches
from tests.ranks.student_cases import (
    Case,
    RunResult,
    build,
    dense_truth,
    global_batch,
    rows_of,
    step_batch,
    three_steps,
)

# Large weights, so that a gradient without these losses, or with those of a part of the batch, would be far off.
COEFS = RouterCoefs(aux=0.5, z=0.01)
MIXTRAL = Case(model_type="mixtral", router_coefs=COEFS)
QWEN = Case(model_type="qwen3_moe", router_coefs=COEFS, tied=True)


@cache
def truth(case: Case) -> RunResult:
    return dense_truth(case)


@pytest.mark.parametrize(
    ("case", "world", "accumulation"),
    [(MIXTRAL, 1, 1), (MIXTRAL, 1, 4), (MIXTRAL, 2, 2), (QWEN, 2, 1), (QWEN, 2, 4), (QWEN, 1, 2), (QWEN, 2, 3)],
    ids=lambda value: value.model_type if isinstance(value, Case) else None,
)
def test_losses_and_gradients_equal_the_dense_truth(case: Case, world: int, accumulation: int) -> None:
    for result in run_ranks(world, three_steps, replace(case, accumulation=accumulation)):
        assert_matches(result, truth(case), case=case)


def _three_steps_of_each(topology: Topology, cases: list[Case]) -> list[RunResult]:
    return [three_steps(topology, case) for case in cases]


@pytest.mark.thorough
def test_every_family_with_experts_equals_the_dense_truth() -> None:
    """Routers with biases and of other names, shared experts with a gate, and experts with biases, recomputed too."""
    families = ("gpt_oss", "granitemoe", "olmoe", "qwen2_moe")
    cases = [Case(model_type=name, router_coefs=COEFS, accumulation=2) for name in families]
    cases.append(replace(cases[0], activation_checkpointing="selective"))
    for results in run_ranks(2, _three_steps_of_each, cases):
        for case, result in zip(cases, results, strict=True):
            assert_matches(result, truth(Case(model_type=case.model_type, router_coefs=COEFS)), case=case)


@pytest.mark.parametrize(
    "change",
    [
        {"activation_checkpointing": "selective"},
        {"persistence": 10_000, "document_mask": True},
        {"objective": "labels"},
    ],
    ids=["activation checkpointing", "documents masked, small parameters stay gathered", "labels"],
)
def test_variants_equal_the_dense_truth(change: Any) -> None:
    case = replace(QWEN, accumulation=2, **change)
    for result in run_ranks(2, three_steps, case):
        assert_matches(result, truth(replace(case, accumulation=1)), case=case)


@pytest.mark.parametrize("case", [MIXTRAL, replace(QWEN, tied=False)], ids=["mixtral", "qwen3_moe"])
def test_without_weights_the_losses_are_only_reported(case: Case) -> None:
    case = replace(case, router_coefs=RouterCoefs())
    true = truth(case)
    assert true.steps[0]["router_aux_loss"] > 1.0
    for result in run_ranks(2, three_steps, replace(case, accumulation=2)):
        assert_matches(result, true, case=case)


def _tokens_of_experts(topology: Topology, case: Case) -> list[ExpertLoad]:
    """Load of the experts in a step without weights, and with them, from the same state."""
    loads = []
    for coefs in (RouterCoefs(), COEFS):
        student = build(case, topology)
        batch = rows_of(global_batch(0), topology)
        outcome = train_step(
            student,
            step_batch(batch, NoTeacher(), accumulation=case.accumulation),
            step=1,
            learning_rate=1e-3,
            objective=Objective(LossSection(), length=1, seed=1, router_coefs=coefs),
            topology=topology,
            recompute=True,
        )
        assert outcome.experts is not None
        loads.append(outcome.experts)
    return loads


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_token_with_a_label_counts_once_for_each_of_its_experts(checkpointing: bool) -> None:
    """Neither the pass that counts first, nor a layer or a micro-batch that is computed twice, counts again."""
    case = replace(
        QWEN, objective="labels", accumulation=2, activation_checkpointing="full" if checkpointing else "none"
    )
    loads = [load for of_rank in run_ranks(2, _tokens_of_experts, case) for load in of_rank]
    assert all(load == loads[0] for load in loads[1:])
    assert loads[0].layers == (0, 2)
    valid = global_batch(0).valid_tokens
    assert [sum(layer) for layer in loads[0].tokens] == [3 * valid] * 2, "three experts a token"
    assert loads[0].tokens[0] != loads[0].tokens[1]


def test_a_resume_is_bitwise(tmp_path: Path) -> None:
    case, folder = replace(QWEN, accumulation=2), str(tmp_path)
    whole = run_ranks(2, three_steps, case)[0]
    run_ranks(2, _steps_with_a_restart, case, folder, 0, 2)
    resumed = run_ranks(2, _steps_with_a_restart, case, folder, 2, 3)[0]
    assert resumed.steps[0] == whole.steps[2]
    assert all(torch.equal(resumed.parameters[name], value) for name, value in whole.parameters.items())
