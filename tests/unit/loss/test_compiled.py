"""The compiled arithmetic against its eager twin: the same values and gradients, for what a run may ask for."""

import os
import shutil
from functools import partial
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from megadistill.loss import Divergence, DivergenceKind, Elementwise, VocabSlice
from megadistill.types import Tail
from tests.unit.loss.problems import assert_same, assert_terms, assert_within_bf16, problem, run, sparse, truth

pytestmark = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler: install g++, or set CXX"
)

VOCAB = VocabSlice.contiguous(0, 24, 21)
LOGIT_MEMORY = 5 * 2 * 21 * 4  # chunks of 5, 5 and 3 tokens


@pytest.mark.parametrize(
    "divergence",
    [
        Divergence(),
        Divergence(temperature=2.0, ce_weight=0.3, z_loss=0.01, label_fraction=0.3),
        Divergence(DivergenceKind.JSD, parameter=0.3, ce_weight=0.3),
        Divergence(DivergenceKind.REVERSE_KL),
        Divergence(DivergenceKind.SKEW_KL),
        Divergence(DivergenceKind.TVD),
    ],
    ids=lambda d: d.kind.value,
)
def test_compiled_is_the_reference_too(divergence: Divergence) -> None:
    p = problem(1)
    options: dict[str, Any] = {"logit_memory": LOGIT_MEMORY, "elementwise": Elementwise.COMPILED, "diagnostics": True}
    found = run(p.cast(torch.float32), divergence, vocab=VOCAB, **options)
    assert_same(found, truth(p, divergence, diagnostics=True), 1e-6)


def test_bent_logits_and_sparse_targets_and_labels() -> None:
    p = problem(1).bent()
    options: dict[str, Any] = {"logit_memory": LOGIT_MEMORY, "elementwise": Elementwise.COMPILED}
    targets = sparse(p, Tail.OTHER, kept=5)
    assert_same(run(p.cast(torch.float32), Divergence(), vocab=VOCAB, **options), truth(p, Divergence()), 1e-6)
    found = run(p.cast(torch.float32), Divergence(), vocab=VOCAB, targets=targets, **options)
    assert_same(found, truth(p, Divergence(), targets=targets), 1e-6)
    assert_same(run(p.cast(torch.float32), None, vocab=VOCAB, **options), truth(p, None), 1e-6)


@pytest.mark.parametrize("kind", [DivergenceKind.FORWARD_KL, DivergenceKind.JSD])
def test_a_call_makes_no_matrix_of_logits_beside_its_buffer(kind: DivergenceKind) -> None:
    """dlogits overwrites the logits: a kernel that gets their memory as two tensors copies it, and the teacher's."""
    p = problem(1, tokens=48, rows=2048, size=2047).cast(torch.float32)
    chunk = 16 * 2047 * 4
    call = partial(
        run,
        p,
        Divergence(kind, ce_weight=0.3),
        vocab=VocabSlice.contiguous(0, 2048, 2047),
        logit_memory=2 * chunk,
        elementwise=Elementwise.COMPILED,
    )
    call()  # compiles, and makes the buffer that calls share
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    sizes = [event.nbytes() for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert 0 < max(sizes) < chunk, sorted(sizes)[-5:]


def _in_bf16(divergence: Divergence, tail: Tail | None = None) -> None:
    p = problem(1).bent().cast(torch.bfloat16)
    options: dict[str, Any] = {"logit_memory": LOGIT_MEMORY, "elementwise": Elementwise.COMPILED}
    targets = None if tail is None else sparse(p, tail, kept=5)
    expected = truth(p, divergence, targets=targets)
    result = run(p, divergence, vocab=VOCAB, targets=targets, **options)
    assert_terms(result.terms, expected.terms, 1e-6)
    assert_within_bf16(p, result, expected, divergence, targets)


def test_dlogits_leaves_the_fused_kernel_in_bf16() -> None:
    _in_bf16(Divergence(ce_weight=0.3))


@pytest.mark.thorough
def test_dlogits_leaves_every_other_fused_kernel_in_bf16() -> None:
    _in_bf16(Divergence(temperature=2.0, ce_weight=0.3, z_loss=0.01, label_fraction=0.3))
    _in_bf16(Divergence(DivergenceKind.JSD, parameter=0.3, ce_weight=0.3))
    _in_bf16(Divergence(), Tail.OTHER)
