"""Ranks that share sequences against one dense float64 process: loss, every gradient, gradient norm, three steps."""

from dataclasses import replace

import pytest

from megadistill.models.experts import RouterCoefs
from tests.ranks.harness import run_ranks
from tests.ranks.student.test_student import assert_matches
from tests.ranks.student_cases import Case, dense_truth, three_steps

GEMMA = Case(
    model_type="gemma2",
    tied=True,
    attention="flex",
    keys=(
        ("head_dim", 16),
        ("query_pre_attn_scalar", 16),
        ("sliding_window", 5),
        ("attn_logit_softcapping", 2.0),
        ("final_logit_softcapping", 5.0),
    ),
)
"""Softcaps, a tied head, and windows on every other layer."""

WINDOW_AND_DOCUMENTS = Case(
    model_type="mistral", document_mask=True, activation_checkpointing="full", keys=(("sliding_window", 5),)
)

CASES = {
    "plain": Case(accumulation=2),
    "softcap, windows, tied": GEMMA,
    "windows, documents, checkpointed, offloaded": replace(WINDOW_AND_DOCUMENTS, activation_offload=True),
    "sinks, experts": Case(
        model_type="gpt_oss",
        attention="flex",
        keys=(("sliding_window", 5),),
        router_coefs=RouterCoefs(aux=0.02, z=0.01),
        accumulation=2,
    ),
}

# (world, vocab group, ranks that share sequences): key heads are split by two ranks, and copied for four
LAYOUTS = {
    "plain": [(2, 1, 2), (4, 1, 4), (4, 2, 2)],
    "softcap, windows, tied": [(4, 1, 4), (4, 2, 2)],
    "windows, documents, checkpointed, offloaded": [(2, 1, 2), (4, 1, 4)],
    "sinks, experts": [(2, 1, 2)],
}


@pytest.mark.parametrize(
    "name",
    [
        "plain",
        "windows, documents, checkpointed, offloaded",
        pytest.param("softcap, windows, tied", marks=pytest.mark.thorough),
        pytest.param("sinks, experts", marks=pytest.mark.thorough),
    ],
)
def test_ranks_that_share_sequences_equal_the_dense_truth(name: str) -> None:
    case = CASES[name]
    truth = dense_truth(replace(case, accumulation=1))
    for world, p, sequence in LAYOUTS[name]:
        for result in run_ranks(world, three_steps, case, vocab_group=p, sequence=sequence):
            assert_matches(result, truth, case=case)


def test_ranks_that_share_sequences_have_surplus_rows_too() -> None:
    """8 sequences in 3 micro-batches of 3."""
    case = CASES["windows, documents, checkpointed, offloaded"]
    truth = dense_truth(replace(case, accumulation=1))
    case = replace(case, accumulation=3)
    for result in run_ranks(2, three_steps, case, vocab_group=1, sequence=2):
        assert_matches(result, truth, case=case)
