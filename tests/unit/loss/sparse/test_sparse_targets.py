"""Sparse targets in one process against the dense definition in float64, and what their docstring promises."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megadistill.loss import Head, VocabSlice, buffers, reference
from megadistill.loss.sparse import Sampled, SampledDistinct, Selection, Threshold, TopK, TopP, sparse_targets
from megadistill.types import LogitTransform, SparseTargets, Tail
from tests.unit.loss.problems import TOLERANCE, LargeStorages, problem
from tests.unit.loss.sparse.cases import (
    CASES,
    DISTINCT,
    MOST_LIKELY,
    TAILS,
    targets_of,
    targets_of_logits,
    uniforms_for,
)


def _assert_equal(found: SparseTargets, expected: SparseTargets, tolerance: float) -> None:
    assert torch.equal(found.ids, expected.ids)
    torch.testing.assert_close(found.probs.double(), expected.probs, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found.log_tail.double(), expected.log_tail, rtol=tolerance, atol=10 * tolerance)
    assert (found.tail, found.temperature) == (expected.tail, expected.temperature)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(("selection", "tail"), CASES)
def test_targets_are_the_references(selection: Selection, tail: Tail, temperature: float, dtype: torch.dtype) -> None:
    p, uniforms = problem(1), uniforms_for(13, selection)
    more: dict[str, Any] = {"temperature": temperature, "uniforms": uniforms}
    expected = reference.sparse_targets(p.teacher, selection=selection, tail=tail, vocab_size=p.size, **more)
    found = targets_of(p.cast(dtype).teacher, selection, tail, size=p.size, **more)
    assert found.probs.dtype == found.log_tail.dtype == dtype
    assert not found.probs.requires_grad
    _assert_equal(found, expected, TOLERANCE[dtype])


@settings(max_examples=120)
@given(
    seed=st.integers(0, 10_000),
    tokens=st.integers(0, 9),
    width=st.integers(1, 6),
    size=st.integers(1, 17),
    padding=st.integers(0, 3),
    room=st.integers(1, 12),
    scale=st.sampled_from([1e-4, 1.0, 30.0]),
    temperature=st.sampled_from([0.5, 1.0, 3.0]),
    transform=st.sampled_from([LogitTransform(), LogitTransform(softcap=3.0), LogitTransform(softcap=30.0, scale=0.5)]),
    unknown=st.sampled_from([None, 0.0, 0.3]),
    case=st.sampled_from(CASES),
    block=st.sampled_from([1, 20, 1 << 18]),
)
def test_any_shape_chunk_and_magnitude(
    seed: int,
    tokens: int,
    width: int,
    size: int,
    padding: int,
    room: int,
    scale: float,
    temperature: float,
    transform: LogitTransform,
    unknown: float | None,
    case: tuple[Selection, Tail],
    block: int,
) -> None:
    """`room` is the tokens of a chunk; `unknown` the share of ids with a bias of -inf (one id at least is known)."""
    # A softcap that is saturated makes logits equal but for rounding, and no two products of one order.
    assume(scale <= 1 or transform.softcap != 3.0)
    selection, tail = case
    p = problem(seed, tokens=tokens, E=width, rows=size + padding, size=size, scale=scale)
    bias = None
    if unknown is not None:
        bias = torch.randn(size + padding, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        bias[1:][torch.rand(size + padding - 1, generator=torch.Generator().manual_seed(seed)) < unknown] = -math.inf
    more: dict[str, Any] = {
        "temperature": temperature,
        "uniforms": uniforms_for(tokens, selection, seed),
    }
    teacher = replace(
        p.teacher, bias=bias, transform=transform if unknown in (None, 0.0) else replace(transform, softcap=None)
    )
    expected = reference.sparse_targets(teacher, selection=selection, tail=tail, vocab_size=size, **more)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(buffers, "BLOCK_ELEMENTS", block)
        found = targets_of(teacher, selection, tail, size=size, logit_memory=room * size * 8, **more)
    _assert_equal(found, expected, 1e-12 * max(1.0, scale))


@pytest.mark.parametrize("tail", TAILS)
def test_an_id_that_the_teacher_does_not_know_is_never_selected(tail: Tail) -> None:
    bias = torch.full((6,), -math.inf)
    bias[[1, 4]] = torch.tensor([0.0, 1.0])
    logits = torch.zeros(2, 6)
    for selection in (TopK(5), TopP(0.999, 5), Threshold(1e-9)):
        found = targets_of_logits(logits, selection, tail, bias=bias)
        assert found.ids.tolist() == [[4, 1]] * 2
        assert found.log_tail.tolist() == [-math.inf] * 2
        assert found.probs.sum(dim=1).tolist() == pytest.approx([1.0, 1.0])
    ends = torch.tensor([[0.0, 1 - 2**-53], [0.2, 0.3]], dtype=torch.float64)
    assert targets_of_logits(logits, Sampled(2), uniforms=ends, bias=bias).ids.tolist() == [[1, 4], [1, 4]]


def test_padding_rows_are_never_read() -> None:
    p = problem(2)
    poisoned = p.teacher_weight.clone()
    poisoned[p.size :] = math.nan
    for selection, tail in CASES:
        uniforms = uniforms_for(13, selection)
        clean = targets_of(p.teacher, selection, tail, size=p.size, uniforms=uniforms)
        found = targets_of(replace(p.teacher, weight=poisoned), selection, tail, size=p.size, uniforms=uniforms)
        assert torch.equal(found.ids, clean.ids)
        assert torch.equal(found.probs, clean.probs)


def test_bfloat16_products_accumulate_in_float32() -> None:
    p = problem(3, tokens=20, E=64).cast(torch.bfloat16)
    found = targets_of(p.teacher, TopK(5), Tail.OTHER, size=p.size)
    p = p.cast(torch.float64)
    expected = reference.sparse_targets(p.teacher, selection=TopK(5), tail=Tail.OTHER, vocab_size=p.size)
    assert found.probs.dtype == torch.float32
    # Logits of ±30 in float32 are good to 2e-6.
    torch.testing.assert_close(found.probs.double(), expected.probs, rtol=1e-5, atol=1e-6)
    assert torch.equal(found.ids, expected.ids)


@pytest.mark.parametrize(
    ("selection", "tail"), [*MOST_LIKELY[3:6], *MOST_LIKELY[9:15], *MOST_LIKELY[15:18], DISTINCT[1], CASES[-1]]
)
def test_memory_is_one_chunk_of_logits(selection: Selection, tail: Tail, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but the buffer is as large as a chunk's logits, though blocks are float64.

    100 tokens, of which 32 fit, are four chunks of 25.
    """
    size, memory = 400, 25 * 400 * 4
    monkeypatch.setattr(buffers, "BLOCK_ELEMENTS", 2 * size)
    p = problem(8, tokens=100, rows=size, size=size).cast(torch.float32)
    with LargeStorages(memory) as large:
        targets_of(
            p.teacher,
            selection,
            tail,
            uniforms=uniforms_for(100, selection),
            logit_memory=32 * size * 4,
        )
    assert [storage.nbytes() for storage in large.kept.values()] == [memory]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher_hidden": torch.zeros(13, 6).double()}, r"hidden states \[13, 6\] and head \[24, 7\].*24 rows"),
        ({"teacher_weight": torch.zeros(20, 7).double()}, r"head \[20, 7\].*24 rows"),
        ({"teacher_weight": torch.zeros(24, 7)}, "cast both"),
        ({"teacher_bias": torch.zeros(21)}, r"teacher bias \[21\] does not fit its head \[24, 7\]"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"logit_memory": 0}, "logit_memory is 0"),
        ({"vocab": VocabSlice.contiguous(0, 24, 25)}, "do not add up to a vocabulary of 25"),
        ({"uniforms": torch.zeros(13, 3).double()}, r"TopK\(k=3\) draws nothing"),
        ({"selection": Sampled(3)}, r"needs uniforms \[13, 3\] torch.float64, got none"),
        ({"selection": Sampled(3), "uniforms": torch.zeros(13, 2).double()}, r"got \[13, 2\] torch.float64"),
        ({"selection": Sampled(3), "uniforms": torch.zeros(13, 3)}, r"got \[13, 3\] torch.float32"),
        ({"selection": Sampled(3), "uniforms": torch.ones(13, 3).double()}, r"\[39\] uniforms .* not in \[0, 1\)"),
        ({"selection": Sampled(3), "tail": Tail.OTHER}, "tail is other, but targets of sampled ids"),
        ({"selection": Sampled(3), "tail": Tail.DROPPED}, "tail is dropped, but targets of sampled ids"),
        ({"selection": SampledDistinct(3)}, r"needs uniforms \[13, 1\] torch.float64, got none"),
        ({"selection": SampledDistinct(3), "tail": Tail.OTHER}, "tail is other, but targets of sampled ids"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    p = problem(9)
    arguments: dict[str, Any] = {
        "teacher_hidden": p.teacher_hidden,
        "teacher_weight": p.teacher_weight,
        "selection": TopK(3),
        "tail": Tail.RENORMALISED,
        "vocab": VocabSlice.contiguous(0, 24, 21),
    } | change
    teacher = Head(*(arguments.pop(name, None) for name in ("teacher_hidden", "teacher_weight", "teacher_bias")))
    with pytest.raises(ValueError, match=message):
        sparse_targets(teacher, **arguments)
