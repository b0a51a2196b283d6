"""bf16 operands: what an accelerator computes with them, computed on a CPU, and how far it is from the truth.

The truth is the reference in float64 on the same bf16 numbers, so all that is left is rounding. u = 2^-8 is the largest
relative error of a number that is rounded to bf16 (8 bits of mantissa, the leading one included), e = 2^-24 that of a
float32. Three things are rounded to bf16: each entry of dlogits (once), the gradient of the hidden states, and that of
the head where its parameter does not ask for float32. Everything else is float32.

Legend: as in `problems`; G dlogits [N, U] of all tokens, X hidden states, W the student's head.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from megadistill.loss import Divergence, DivergenceKind, Head, LossOptions, VocabSlice, buffers, distill_loss, heads
from megadistill.loss.gradients import Gradients
from megadistill.loss.heads import multiply
from megadistill.types import SparseTargets, Tail
from tests.unit.loss.problems import (
    BF16_ROUNDING,
    DIVERGENCES,
    TAILS,
    LargeStorages,
    Problem,
    assert_terms,
    assert_within_bf16,
    problem,
    run,
    sparse,
    truth,
)

FLOAT32_ROUNDING = 2.0**-24
ROWS, SIZE = 72, 70
VOCAB = VocabSlice.contiguous(0, ROWS, SIZE)
NO_TARGETS = {name: (None, divergence) for name, divergence in DIVERGENCES.items()}
LABELS_ALONE: dict[str, tuple[Tail | None, Divergence | None]] = {"labels alone": (None, None)}
OBJECTIVES: dict[str, tuple[Tail | None, Divergence | None]] = {**NO_TARGETS, **TAILS, **LABELS_ALONE}


def _problem(objective: str, *, bent: bool, **sizes: int) -> tuple[Problem, Divergence | None, SparseTargets | None]:
    p = problem(21, rows=ROWS, size=SIZE, **{"tokens": 24, "D": 32, "E": 48, **sizes})
    # Logits of about 1, as every weight and hidden state of a model is: their rounding errors grow with them.
    p = replace(p, student_hidden=p.student_hidden / 4, teacher_hidden=p.teacher_hidden / 4)
    p = p.bent() if bent else p
    tail, divergence = OBJECTIVES[objective]
    if (
        bent
        and divergence is not None
        and divergence.formula is DivergenceKind.REVERSE_KL
        and p.teacher_bias is not None
    ):
        p = replace(p, teacher_bias=p.teacher_bias.clamp_min(-3))  # infinite where the teacher does not know an id
    p = p.cast(torch.bfloat16)
    temperature = 1.0 if divergence is None else divergence.temperature
    return p, divergence, None if tail is None else sparse(p, tail, kept=7, temperature=temperature)


@contextmanager
def _watched_products() -> Iterator[list[tuple[Tensor, Tensor]]]:
    """dlogits and hidden states of each chunk, as the gradients' products take them."""
    seen: list[tuple[Tensor, Tensor]] = []
    add = Gradients.add

    def watched(self: Gradients, dlogits_nv: Tensor, hidden_nD: Tensor, *rest: Any) -> None:
        seen.append((dlogits_nv.clone(), hidden_nD.clone()))
        add(self, dlogits_nv, hidden_nD, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Gradients, "add", watched)
        yield seen


@pytest.mark.parametrize("add", [False, True])
def test_a_product_of_bf16_operands_is_a_float32_sum_of_exact_products(add: bool) -> None:
    """k additions of float32 are off by k·e at most of the sum of absolute values. A bf16 result is 2^-8 off."""
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.randn(*shape, generator=generator).bfloat16() for shape in ((12, 300), (300, 9)))
    start = torch.randn(12, 9, generator=generator)
    out = start.clone()
    multiply(left, right, out=out, add=add)
    exact, size = left.double() @ right.double(), left.double().abs() @ right.double().abs()
    exact, size = (exact + start, size + start.abs()) if add else (exact, size)
    assert ((out - exact).abs() <= 301 * FLOAT32_ROUNDING * size).all()
    assert torch.equal(out, torch.addmm(start, left.float(), right.float(), beta=int(add)))
    in_bf16 = torch.addmm(start.bfloat16(), left, right, beta=int(add))
    assert not ((in_bf16 - exact).abs() <= 301 * FLOAT32_ROUNDING * size).all(), "the bound sees a bf16 result"


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.dtype, torch.dtype, torch.dtype]]:
    """A device that multiplies bf16 operands into float32; the dtypes of each such product, operands and result."""
    calls: list[tuple[torch.dtype, torch.dtype, torch.dtype]] = []
    addmm = torch.addmm

    def device_addmm(
        start: Tensor, left: Tensor, right: Tensor, *, out_dtype: torch.dtype, beta: int, out: Tensor
    ) -> Tensor:
        calls.append((left.dtype, right.dtype, out_dtype))
        with _disable_current_modes():  # a device widens nothing
            return addmm(start, left.float(), right.float(), beta=beta, out=out)

    monkeypatch.setattr(heads, "multiplies_bf16_into_float32", lambda device: True)
    monkeypatch.setattr(torch, "addmm", device_addmm)
    return calls


def test_an_accelerator_gets_the_operands_as_they_are(request: pytest.FixtureRequest) -> None:
    """Each product of a call, on a device that has products of bf16 with a float32 result: nothing is converted."""
    p, divergence, _ = _problem("all", bent=True)
    expected = run(p, divergence, vocab=VOCAB)
    calls = request.getfixturevalue("accelerator")
    result = run(p, divergence, vocab=VOCAB)
    assert calls == [(torch.bfloat16, torch.bfloat16, torch.float32)] * 4
    assert torch.equal(result.weight_grad, expected.weight_grad)
    assert torch.equal(result.hidden_grad, expected.hidden_grad)


@pytest.mark.parametrize("bent", [False, True], ids=["plain", "softcap, scale, bias"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_dlogits_is_rounded_once_and_its_products_are_not(objective: str, bent: bool) -> None:
    """To the bit what these operations give: float32 logits and dlogits, one rounding, products in float32.

    The float32 run has the same logits, since the operands are the same numbers.
    """
    p, divergence, targets = _problem(objective, bent=bent)
    with _watched_products() as in_float32:
        run(p.cast(torch.float32), divergence, vocab=VOCAB, targets=targets)
    with _watched_products() as in_bf16:
        result = run(p, divergence, vocab=VOCAB, targets=targets)
    [(dlogits, hidden)], [(exact_dlogits, exact_hidden)] = in_bf16, in_float32
    assert dlogits.dtype == hidden.dtype == torch.bfloat16
    assert torch.equal(hidden.float(), exact_hidden)
    assert torch.equal(dlogits, exact_dlogits.bfloat16())
    weight = p.student_weight[:SIZE].float()
    assert torch.equal(result.weight_grad[:SIZE], (dlogits.float().T @ exact_hidden).bfloat16())
    assert torch.equal(result.hidden_grad, (dlogits.float() @ weight).bfloat16())


@pytest.mark.parametrize("bent", [False, True], ids=["plain", "softcap, scale, bias"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_values_and_gradients_are_the_references_up_to_rounding(objective: str, bent: bool) -> None:
    p, divergence, targets = _problem(objective, bent=bent)
    result = run(p, divergence, vocab=VOCAB, targets=targets, logit_memory=7 * 2 * SIZE * 4)
    expected = truth(p, divergence, targets=targets)
    assert_terms(result.terms, expected.terms, 1e-6)
    assert_within_bf16(p, result, expected, divergence, targets)


def test_the_label_of_a_sure_student_keeps_its_gradient() -> None:
    """p_s - 1 is rounded after the subtraction: p_s alone is 1 in bf16 from 0.998 on."""
    p, _, _ = _problem("ce", bent=False)
    sure = replace(p, student_weight=torch.zeros_like(p.student_weight), labels=torch.full_like(p.labels, 5))
    sure.student_hidden[:, 0], sure.student_weight[5, 0] = 1, 12  # p_s[5] is 0.9996
    with _watched_products() as seen:
        run(sure, None, vocab=VOCAB)
    [(dlogits, _)] = seen
    true = sure.token_weights * (1 / (1 + 69 * torch.tensor(-12.0).exp().double()) - 1)
    assert true.abs().max() > 0
    assert ((dlogits[:, 5] - true).abs() <= 1.01 * BF16_ROUNDING * true.abs()).all()


@pytest.mark.parametrize("grad_dtype", [None, torch.float32])
def test_the_heads_gradient_is_float32_where_the_parameter_asks_for_it(grad_dtype: torch.dtype | None) -> None:
    p, divergence, _ = _problem("all", bent=False)
    hidden, weight = p.student_hidden.clone().requires_grad_(), p.student_weight.clone().requires_grad_()
    if grad_dtype is not None:
        weight.grad_dtype = grad_dtype
    terms = distill_loss(
        Head(hidden, weight),
        p.teacher,
        p.labels,
        token_weights=p.token_weights,
        divergence=DIVERGENCES["all"],
        vocab=VOCAB,
        options=LossOptions(logit_memory=5 * 2 * SIZE * 4),  # chunks of 5 tokens, the last of 4
    )
    torch.autograd.backward(terms.loss)
    assert hidden.grad is not None
    assert weight.grad is not None
    assert (hidden.grad.dtype, weight.grad.dtype) == (torch.bfloat16, grad_dtype or torch.bfloat16)
    expected = truth(p, divergence)
    result = replace(expected, hidden_grad=hidden.grad, weight_grad=weight.grad)
    assert_within_bf16(p, result, expected, divergence)


@pytest.mark.parametrize("objective", ["kl", "all", "all with jsd", "reverse kl", "labels alone"])
@pytest.mark.usefixtures("accelerator")
def test_dlogits_is_one_bf16_matrix_beside_the_logits(objective: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No other matrix of a chunk's size exists, though 24 tokens are three chunks."""
    monkeypatch.setattr(buffers, "BLOCK_ELEMENTS", 2 * SIZE)
    monkeypatch.setattr(buffers, "_spare", [])
    p, divergence, targets = _problem(objective, bent=False, D=2, E=2)
    models = 1 if targets is not None or divergence is None else 2
    with LargeStorages(8 * SIZE * 2) as large:
        run(p, divergence, vocab=VOCAB, targets=targets, logit_memory=8 * models * SIZE * 4)
    rows_of_16_bytes = 72
    assert sorted(storage.nbytes() for storage in large.kept.values()) == sorted(
        [8 * rows_of_16_bytes * 2, models * 8 * SIZE * 4]
    )
