"""Truncated targets in one process against the dense definition in float64, and what their docstring promises."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from megadistill.loss import Head, VocabSlice, buffers, reference
from megadistill.loss.sparse import Sampled, Selection, Threshold, TopK, TopP, sparse_targets
from megadistill.types import LogitTransform, SparseTargets, Tail
from tests.unit.loss.problems import TOLERANCE, LargeStorages, problem

TAILS = [Tail.OTHER, Tail.DROPPED, Tail.RENORMALISED]
MOST_LIKELY: list[tuple[Selection, Tail]] = [
    (selection, tail)
    for selection in (TopK(1), TopK(4), TopK(64), Threshold(0.05), Threshold(0.6), TopP(0.9, 5), TopP(0.5, 100))
    for tail in TAILS
]
CASES = [*MOST_LIKELY, (Sampled(7), Tail.RENORMALISED)]


def _uniforms(tokens: int, selection: Selection, seed: int = 0) -> Tensor | None:
    if not isinstance(selection, Sampled):
        return None
    return torch.rand(tokens, selection.draws, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _made(
    teacher: Head, selection: Selection, tail: Tail = Tail.RENORMALISED, *, size: int | None = None, **more: Any
) -> SparseTargets:
    vocab = VocabSlice.contiguous(0, teacher.weight.shape[0], size or teacher.weight.shape[0])
    return sparse_targets(teacher, selection=selection, tail=tail, vocab=vocab, **more)


def _of(
    logits: Tensor, selection: Selection, tail: Tail = Tail.RENORMALISED, *, bias: Tensor | None = None, **more: Any
) -> SparseTargets:
    """Targets of the logits [N, V] themselves: the head's columns are the tokens' logits."""
    return _made(Head(torch.eye(len(logits), dtype=logits.dtype), logits.T.contiguous(), bias), selection, tail, **more)


def _assert_equal(found: SparseTargets, expected: SparseTargets, tolerance: float) -> None:
    assert torch.equal(found.ids, expected.ids)
    torch.testing.assert_close(found.probs.double(), expected.probs, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found.log_tail.double(), expected.log_tail, rtol=tolerance, atol=10 * tolerance)
    assert (found.tail, found.temperature) == (expected.tail, expected.temperature)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(("selection", "tail"), CASES)
def test_targets_are_the_references(selection: Selection, tail: Tail, temperature: float, dtype: torch.dtype) -> None:
    p, uniforms = problem(1), _uniforms(13, selection)
    more: dict[str, Any] = {"temperature": temperature, "uniforms": uniforms}
    expected = reference.sparse_targets(p.teacher, selection=selection, tail=tail, vocab_size=p.size, **more)
    found = _made(p.cast(dtype).teacher, selection, tail, size=p.size, **more)
    assert found.probs.dtype == found.log_tail.dtype == dtype
    assert not found.probs.requires_grad
    _assert_equal(found, expected, TOLERANCE[dtype])


@settings(max_examples=120, deadline=None)
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
        "uniforms": _uniforms(tokens, selection, seed),
    }
    teacher = replace(
        p.teacher, bias=bias, transform=transform if unknown in (None, 0.0) else replace(transform, softcap=None)
    )
    expected = reference.sparse_targets(teacher, selection=selection, tail=tail, vocab_size=size, **more)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(buffers, "BLOCK_ELEMENTS", block)
        found = _made(teacher, selection, tail, size=size, logit_memory=room * size * 8, **more)
    _assert_equal(found, expected, 1e-12 * max(1.0, scale))


@pytest.mark.parametrize("tail", TAILS)
def test_of_equals_the_lowest_ids_are_kept(tail: Tail) -> None:
    """Two above, nine equal to the last of five: `topk` alone takes others, and an unstable sort mixes them."""
    logits = torch.zeros(3, 300)
    logits[:, 7::30] = 1.0
    logits[:, [250, 40]] = 2.0
    assert _of(logits, TopK(5), tail).ids.tolist() == [[40, 250, 7, 37, 67]] * 3
    for k in (4, 200):
        assert _of(torch.zeros(2, 300), TopK(k), tail).ids.tolist() == [list(range(k))] * 2


def test_a_threshold_that_keeps_nothing() -> None:
    """Of ten equal ids none has a probability of 0.2; of the second token one does."""
    logits = torch.zeros(2, 10, dtype=torch.float64)
    logits[1, 4] = 3.0
    for tail in (Tail.OTHER, Tail.DROPPED):
        found = _of(logits, Threshold(0.2), tail)
        assert found.ids.tolist() == [[-1], [4]]
        assert found.probs[0].tolist() == [0.0]
        assert found.log_tail[0].item() == pytest.approx(0.0, abs=1e-15)
        nothing = _of(logits[:1], Threshold(0.2), tail)
        assert nothing.ids.shape == nothing.probs.shape == (1, 0)
    renormalised = _of(logits, Threshold(0.2), Tail.RENORMALISED)
    assert renormalised.ids.tolist() == [[0], [4]]
    assert renormalised.probs.tolist() == [[1.0], [1.0]]
    assert _of(logits[:1], Threshold(0.1), Tail.OTHER).ids.tolist() == [list(range(10))]


def test_top_p_is_the_smallest_set_that_reaches_the_mass() -> None:
    p = torch.tensor([[0.1, 0.5, 0.05, 0.25, 0.1]], dtype=torch.float64)
    for mass, ids in ((0.49, [1]), (0.51, [1, 3]), (0.74, [1, 3]), (0.76, [1, 3, 0]), (0.94, [1, 3, 0, 4])):
        found = _of(p.log(), TopP(mass, 100), Tail.DROPPED)
        assert found.ids.tolist() == [ids]
        assert found.probs.sum() >= mass
        assert found.probs.sum() - found.probs[0, -1] < mass
    assert _of(p.log(), TopP(0.94, 2), Tail.DROPPED).ids.tolist() == [[1, 3]]


@pytest.mark.parametrize("selection", [TopK(4), Threshold(1e-6), TopP(0.999999, 4)])
def test_a_small_tail_keeps_its_digits_in_float32(selection: Selection) -> None:
    """A tail of 6e-7: what is left of `1 - Σ` in float32 is off by 10 % or more."""
    logits = torch.full((1, 64), -18.4)
    logits[0, [5, 17, 40, 63]] = torch.tensor([1.0, 0.25, -1.0, -0.5])
    log_p = logits.double().log_softmax(dim=1)
    tail = log_p[0, torch.isin(torch.arange(64), torch.tensor([5, 17, 40, 63]), invert=True)].exp().sum().item()
    assert 1e-7 < tail < 1e-6
    found = _of(logits, selection, Tail.OTHER)
    assert found.ids.tolist() == [[5, 17, 63, 40]]
    assert found.log_tail.dtype == torch.float32
    assert found.log_tail.exp().item() == pytest.approx(tail, rel=3e-6)
    assert abs(1 - found.probs.sum().item() - tail) > 0.03 * tail


def test_a_tail_below_the_smallest_number_is_still_told() -> None:
    logits = torch.tensor([[0.0, -2e4, -2e4, 1e4]])
    found = _of(logits, TopK(1), Tail.OTHER)
    assert found.log_tail.item() == pytest.approx(-1e4, rel=1e-7)
    found = _of(logits, TopK(2), Tail.OTHER)
    assert found.log_tail.item() == pytest.approx(-3e4 + math.log(2), rel=1e-7)
    assert _of(logits, TopK(4), Tail.OTHER).log_tail.item() == -math.inf


@pytest.mark.parametrize("tail", TAILS)
def test_an_id_that_the_teacher_does_not_know_is_never_kept(tail: Tail) -> None:
    bias = torch.full((6,), -math.inf)
    bias[[1, 4]] = torch.tensor([0.0, 1.0])
    logits = torch.zeros(2, 6)
    for selection in (TopK(5), TopP(0.999, 5), Threshold(1e-9)):
        found = _of(logits, selection, tail, bias=bias)
        assert found.ids.tolist() == [[4, 1]] * 2
        assert found.log_tail.tolist() == [-math.inf] * 2
        assert found.probs.sum(dim=1).tolist() == pytest.approx([1.0, 1.0])
    ends = torch.tensor([[0.0, 1 - 2**-53], [0.2, 0.3]], dtype=torch.float64)
    assert _of(logits, Sampled(2), uniforms=ends, bias=bias).ids.tolist() == [[1, 4], [1, 4]]


def test_padding_rows_are_never_read() -> None:
    p = problem(2)
    poisoned = p.teacher_weight.clone()
    poisoned[p.size :] = math.nan
    for selection, tail in CASES:
        uniforms = _uniforms(13, selection)
        clean = _made(p.teacher, selection, tail, size=p.size, uniforms=uniforms)
        found = _made(replace(p.teacher, weight=poisoned), selection, tail, size=p.size, uniforms=uniforms)
        assert torch.equal(found.ids, clean.ids)
        assert torch.equal(found.probs, clean.probs)


def test_bfloat16_products_accumulate_in_float32() -> None:
    p = problem(3, tokens=20, E=64).cast(torch.bfloat16)
    found = _made(p.teacher, TopK(5), Tail.OTHER, size=p.size)
    p = p.cast(torch.float64)
    expected = reference.sparse_targets(p.teacher, selection=TopK(5), tail=Tail.OTHER, vocab_size=p.size)
    assert found.probs.dtype == torch.float32
    # Logits of ±30 in float32 are good to 2e-6.
    torch.testing.assert_close(found.probs.double(), expected.probs, rtol=1e-5, atol=1e-6)
    assert torch.equal(found.ids, expected.ids)


# Draws.


def _teacher(V: int, seed: int, exponent: float = 1.2) -> Tensor:
    """[V] float64: a Zipfian distribution, shuffled."""
    p = torch.arange(1, V + 1, dtype=torch.float64) ** -exponent
    return (p / p.sum())[torch.randperm(V, generator=torch.Generator().manual_seed(seed))]


def _mean_target(found: SparseTargets, V: int) -> Tensor:
    """[V]: the mean over tokens of the targets."""
    kept = found.ids >= 0
    return torch.zeros(V, dtype=torch.float64).index_add(0, found.ids[kept], found.probs[kept].double()) / len(found)


def test_counts_of_a_row_add_up_to_the_draws() -> None:
    p, draws = problem(4, tokens=40), 9
    found = _made(
        p.teacher,
        Sampled(draws),
        size=p.size,
        uniforms=_uniforms(40, Sampled(draws)),
    )
    counts = found.probs * draws
    assert torch.equal(counts, counts.round())
    assert counts.sum(dim=1).tolist() == [draws] * 40
    for row, count in zip(found.ids, counts, strict=True):
        kept = row[row >= 0]
        assert torch.equal(kept, kept.unique())
        assert torch.equal(row >= 0, count > 0)
        assert (row[len(kept) :] == -1).all()
    assert (found.log_tail == -math.inf).all()
    assert (found.ids[:, -1] >= 0).any(), "the last column is somebody's"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_counts_are_an_unbiased_estimate(dtype: torch.dtype) -> None:
    """150,000 draws of 40 ids: every mean within 5 standard errors, and χ² where 39 degrees of freedom put it."""
    V, tokens, draws = 40, 3000, 50
    p = _teacher(V, seed=5)
    logits = p.log().to(dtype).expand(tokens, V)
    weight, hidden = logits[:1].T.contiguous(), torch.ones(tokens, 1, dtype=dtype)
    found = _made(Head(hidden, weight), Sampled(draws), uniforms=_uniforms(tokens, Sampled(draws), seed=6))
    mean = _mean_target(found, V)
    error = (p * (1 - p) / (tokens * draws)).sqrt()
    assert ((mean - p).abs() < 5 * error).all()
    chi_squared = float((tokens * draws * (mean - p).square() / p).sum())
    assert 39 - 3.5 * math.sqrt(78) < chi_squared < 39 + 5 * math.sqrt(78)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_ids_below_the_resolution_of_float32_are_drawn(dtype: torch.dtype) -> None:
    """A thousand ids of 1e-9 each at the end of the order, where a float32 sum of the distribution stands still at 1.

    With stratified draws each of 1e-10, those ids get a thousandth of a millionth each, to the last one.
    """
    V = 1002
    p = torch.full((V,), 1e-9, dtype=torch.float64)
    p[0], p[1] = 0.6, 0.4 - 1e-6
    steps = torch.arange(10_000, dtype=torch.float64)
    uniforms = (1 - 1e-6 + (steps + 0.5) * 1e-10).unsqueeze(1)
    hidden, weight = torch.ones(10_000, 1, dtype=dtype), p.log().to(dtype).unsqueeze(1)
    found = _made(Head(hidden, weight), Sampled(1), uniforms=uniforms)
    counts = found.ids.flatten().bincount(minlength=V)
    # In float32 the two likely ids' logits are off by 3e-8, which moves the start of the others by as much: 30 ids.
    whole = counts[2:] if dtype == torch.float64 else counts[102:900]
    assert (whole - 10).abs().max() <= 1
    assert counts[1] <= (1 if dtype == torch.float64 else 500)


def test_draws_at_the_edges() -> None:
    """u = 0 is the first id with a mass, u just below 1 the last; a u on an edge belongs to the id after it."""
    p = torch.tensor([[0.0, 0.25, 0.25, 0.0, 0.5, 0.0]], dtype=torch.float64)
    uniforms = torch.tensor([[0.0, 0.25, 0.4999, 0.5, 1 - 2**-53]], dtype=torch.float64)
    found = _of(p.log(), Sampled(5), uniforms=uniforms)
    assert found.ids.tolist() == [[1, 2, 4]]
    assert found.probs[0].tolist() == pytest.approx([0.2, 0.4, 0.4])


def test_the_same_uniforms_give_the_same_ids_in_any_chunk() -> None:
    p, uniforms = problem(7, tokens=30), _uniforms(30, Sampled(11))
    found = [
        _made(p.teacher, Sampled(11), size=p.size, uniforms=uniforms, logit_memory=memory)
        for memory in (1, 21 * 8 * 7, 1 << 20)
    ]
    for other in found[1:]:
        assert torch.equal(other.ids, found[0].ids)
        assert torch.equal(other.probs, found[0].probs)


# Memory and refusals.


@pytest.mark.parametrize(("selection", "tail"), [*MOST_LIKELY[3:6], *MOST_LIKELY[9:15], *MOST_LIKELY[15:18], CASES[-1]])
def test_memory_is_one_chunk_of_logits(selection: Selection, tail: Tail, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but the buffer is as large as a chunk's logits, though blocks are float64.

    100 tokens, of which 32 fit, are four chunks of 25.
    """
    size, memory = 400, 25 * 400 * 4
    monkeypatch.setattr(buffers, "BLOCK_ELEMENTS", 2 * size)
    p = problem(8, tokens=100, rows=size, size=size).cast(torch.float32)
    with LargeStorages(memory) as large:
        _made(
            p.teacher,
            selection,
            tail,
            uniforms=_uniforms(100, selection),
            logit_memory=32 * size * 4,
        )
    assert [storage.nbytes() for storage in large.kept.values()] == [memory]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sampled(0), "draws is 0"),
        (lambda: TopK(0), "k is 0"),
        (lambda: Threshold(0.0), "epsilon is 0.0"),
        (lambda: Threshold(1.0), "epsilon is 1.0"),
        (lambda: Threshold(math.nan), "epsilon is nan"),
        (lambda: TopP(1.0, 50), r"p is 1.0.*TopK\(50\)"),
        (lambda: TopP(0.95, 0), "max_ids is 0"),
    ],
)
def test_a_selection_says_what_it_takes(make: Callable[[], Selection], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


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
        ({"selection": Sampled(3), "tail": Tail.OTHER}, "tail is other, but counts"),
        ({"selection": Sampled(3), "tail": Tail.DROPPED}, "tail is dropped, but counts"),
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
