"""Truncated targets on 1 to 4 real ranks: those of one process with the whole vocabulary, for every slicing."""

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megadistill.distributed.topology import Topology
from megadistill.distributed.vocab import block_cyclic_ranges
from megadistill.loss import Divergence, Head, VocabSlice, reference
from megadistill.loss.sparse import (
    Sampled,
    SampledDistinct,
    Selection,
    Threshold,
    TopK,
    TopP,
    sparse_targets,
    uniforms_per_token,
)
from megadistill.types import LogitTransform, SparseTargets, Tail
from tests.ranks.harness import run_ranks
from tests.ranks.loss.test_loss import ROWS, SIZE, SLICINGS, TOKENS, Ranges
from tests.unit.loss.problems import TOLERANCE, Problem, Truth, problem, relative_error, run, truth

SELECTIONS: list[tuple[Selection, Tail]] = [
    (TopK(1), Tail.OTHER),
    (TopK(6), Tail.DROPPED),
    (TopK(6), Tail.RENORMALISED),
    (TopK(50), Tail.OTHER),
    (Threshold(0.05), Tail.OTHER),
    (Threshold(0.5), Tail.DROPPED),
    (Threshold(0.5), Tail.RENORMALISED),
    (TopP(0.9, 4), Tail.OTHER),
    (TopP(0.7, 21), Tail.RENORMALISED),
    (Sampled(12), Tail.RENORMALISED),
    (Sampled(1), Tail.RENORMALISED),
    (SampledDistinct(5), Tail.RENORMALISED),
    (SampledDistinct(50), Tail.RENORMALISED),
]

MODELS: dict[str, tuple[LogitTransform, float, float]] = {
    "plain": (LogitTransform(), 1.0, 0.0),
    "warm and capped": (LogitTransform(softcap=4.0, scale=0.5), 2.0, 0.0),
    "a fifth of the ids unknown": (LogitTransform(scale=1.5), 0.7, 0.2),
    "equal logits": (LogitTransform(), 1.0, 0.0),
}


@dataclass(frozen=True)
class Case:
    name: str
    seed: int
    slices: list[Ranges]
    tokens: list[int]
    selection: Selection
    tail: Tail
    model: str
    dtype: torch.dtype
    logit_memory: int

    def problem(self) -> Problem:
        """Of the whole group. In "equal logits" they are whole numbers from -2 to 2, with ties in every slice."""
        p = problem(self.seed, tokens=sum(self.tokens), rows=ROWS, size=SIZE)
        if self.model == "equal logits":
            p.teacher_hidden[:, 1:] = 0
            p.teacher_hidden[:, 0] = 1
            p.teacher_weight[:, 0] = p.teacher_weight[:, 0].round().clamp(-2, 2)
        return p

    def bias(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        bias = torch.zeros(ROWS, dtype=torch.float64)
        bias[torch.rand(ROWS, generator=generator) < MODELS[self.model][2]] = -math.inf
        bias[8] = 0.0
        return bias

    def uniforms(self) -> Tensor | None:
        numbers = uniforms_per_token(self.selection)
        if numbers == 0:
            return None
        generator = torch.Generator().manual_seed(self.seed)
        return torch.rand(sum(self.tokens), numbers, dtype=torch.float64, generator=generator)

    def truth(self) -> SparseTargets:
        """Of the whole group, in float64."""
        p, (transform, temperature, _) = self.problem(), MODELS[self.model]
        return reference.sparse_targets(
            Head(p.teacher_hidden, p.teacher_weight, self.bias(), transform),
            selection=self.selection,
            tail=self.tail,
            vocab_size=SIZE,
            temperature=temperature,
            uniforms=self.uniforms(),
        )

    def tokens_of(self, rank: int) -> slice:
        return slice(sum(self.tokens[:rank]), sum(self.tokens[: rank + 1]))


def _cases(g: int) -> list[Case]:
    """Every slicing with every distribution of tokens and every selection; dtypes, models and chunks are dealt out."""
    cases: list[Case] = []
    for name, slices in SLICINGS[g].items():
        for whose, tokens in TOKENS.items():
            for selection, tail in SELECTIONS:
                i = len(cases)
                model = list(MODELS)[(i + i // len(SELECTIONS)) % len(MODELS)]
                dtype = list(TOLERANCE)[(i + i // len(SELECTIONS) + i // (4 * len(SELECTIONS))) % 2]
                case = Case(
                    name=f"{name}; {whose}; {selection}, {tail.value}; {model}; {dtype}",
                    seed=i,
                    slices=slices,
                    tokens=tokens[:g],
                    selection=selection,
                    tail=tail,
                    model=model,
                    dtype=dtype,
                    logit_memory=(1, 700, 3000, 1 << 20)[(i + i // (4 * len(SELECTIONS))) % 4],
                )
                cases.append(case)
    return cases


def _run_cases(topology: Topology, cases: list[Case]) -> list[SparseTargets]:
    return [_run_case(topology, case) for case in cases]


def _run_case(topology: Topology, case: Case) -> SparseTargets:
    rank = topology.group_rank
    p, (transform, temperature, _), own = case.problem().cast(case.dtype), MODELS[case.model], case.tokens_of(rank)
    rows = torch.tensor([row for first, stop in case.slices[rank] for row in range(first, stop)], dtype=torch.int64)
    uniforms = case.uniforms()
    return sparse_targets(
        Head(p.teacher_hidden[own], p.teacher_weight[rows], case.bias().to(case.dtype)[rows], transform),
        selection=case.selection,
        tail=case.tail,
        vocab=VocabSlice(case.slices[rank], SIZE, topology.vocab_group),
        temperature=temperature,
        uniforms=None if uniforms is None else uniforms[own],
        logit_memory=case.logit_memory,
    )


@pytest.mark.parametrize("g", SLICINGS)
def test_targets_are_the_references(g: int) -> None:
    """The same for every slicing, since the reference knows none; and as wide on a rank without tokens."""
    cases = _cases(g)
    truths = [case.truth() for case in cases]
    for rank, founds in enumerate(run_ranks(g, _run_cases, cases)):
        for case, expected, found in zip(cases, truths, founds, strict=True):
            own, tolerance = case.tokens_of(rank), TOLERANCE[case.dtype]
            try:
                assert found.ids.shape == found.probs.shape == (case.tokens[rank], expected.ids.shape[1])
                assert torch.equal(found.ids, expected.ids[own])
                for name in ("probs", "log_tail"):
                    value, true = getattr(found, name), getattr(expected, name)[own]
                    assert value.dtype == case.dtype
                    torch.testing.assert_close(value.double(), true, rtol=tolerance, atol=10 * tolerance)
                assert (found.tail, found.temperature) == (case.tail, expected.temperature)
            except AssertionError as error:
                raise AssertionError(f"rank {rank} of {g}, {case.name}: {error}") from error


def _trained_on_distinct_ids(topology: Topology, slices: list[Ranges], tokens: list[int]) -> Truth:
    """This rank's loss and gradients from targets that the group drew: 5 distinct ids of each token."""
    rank, p = topology.group_rank, problem(77, tokens=sum(tokens), rows=ROWS, size=SIZE)
    own = slice(sum(tokens[:rank]), sum(tokens[: rank + 1]))
    rows = torch.tensor([row for first, stop in slices[rank] for row in range(first, stop)], dtype=torch.int64)
    mine = replace(
        p,
        student_hidden=p.student_hidden[own],
        student_weight=p.student_weight[rows],
        teacher_hidden=p.teacher_hidden[own],
        teacher_weight=p.teacher_weight[rows],
        labels=p.labels[own],
        token_weights=p.token_weights[own],
    )
    vocab = VocabSlice(slices[rank], SIZE, topology.vocab_group)
    targets = sparse_targets(
        mine.teacher,
        selection=SampledDistinct(5),
        tail=Tail.RENORMALISED,
        vocab=vocab,
        uniforms=_uniforms_of(sum(tokens))[own],
        logit_memory=700,
    )
    return run(mine, Divergence(ce_weight=0.3), vocab=vocab, targets=targets, logit_memory=700)


def _uniforms_of(tokens: int) -> Tensor:
    return torch.rand(tokens, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(78))


@pytest.mark.parametrize("g", [1, 2, 3])
def test_gradients_of_distinct_ids_are_the_references(g: int) -> None:
    """From the teacher's hidden states to dX and dW: draws, renormalised target, loss; against one dense process."""
    slices, tokens = list(SLICINGS[g].values())[-1], TOKENS["one has none"][:g]
    p = problem(77, tokens=sum(tokens), rows=ROWS, size=SIZE)
    targets = reference.sparse_targets(
        p.teacher,
        selection=SampledDistinct(5),
        tail=Tail.RENORMALISED,
        vocab_size=SIZE,
        uniforms=_uniforms_of(sum(tokens)),
    )
    expected = truth(p, Divergence(ce_weight=0.3), targets=targets)
    found = run_ranks(g, _trained_on_distinct_ids, slices, tokens)
    rows = torch.cat([torch.arange(*pair) for ranges in slices for pair in ranges])
    loss = sum(float(part.terms.loss) for part in found)
    assert loss == pytest.approx(expected.terms.loss.item(), rel=1e-12)
    assert relative_error(torch.cat([part.hidden_grad for part in found]), expected.hidden_grad) < 1e-12
    assert relative_error(torch.cat([part.weight_grad for part in found]), expected.weight_grad[rows]) < 1e-12


def _drawn_at_edges(topology: Topology) -> list[list[int]]:
    """Ids drawn on and around the edges of the ranges, whose last ids the teacher does not know; see the test."""
    rank, known = topology.group_rank, torch.tensor([True, True, False] * 8)
    edges = torch.arange(1, 9, dtype=torch.float64) / 8
    uniforms = torch.cat([edges[:-1], edges - 1e-9]).expand(3, -1)
    ranges = block_cyclic_ranges(24, 8, topology.group_size, rank)
    rows = torch.cat([torch.arange(*pair) for pair in ranges])
    found = sparse_targets(
        Head(
            torch.zeros(3, 2, dtype=torch.float64),
            torch.zeros(len(rows), 2, dtype=torch.float64),
            torch.where(known, 0.0, -math.inf)[rows],
        ),
        selection=Sampled(15),
        tail=Tail.RENORMALISED,
        vocab=VocabSlice(ranges, 24, topology.vocab_group),
        uniforms=uniforms,
    )
    ids: list[list[int]] = found.ids.tolist()
    return ids


@pytest.mark.parametrize("g", [1, 2, 4])
def test_a_draw_on_the_edge_of_a_range_is_the_next_ranges_first_id(g: int) -> None:
    """Sixteen known ids of equal mass, two to a range and then an unknown one: sums and edges are exact."""
    # Each edge but the last gives the first id after it; just before each edge is the last known id before it.
    expected = sorted([*range(3, 24, 3), *range(1, 24, 3)])
    for found in run_ranks(g, _drawn_at_edges):
        assert found == [expected] * 3


def _drawn_by_rounding(topology: Topology) -> bool:
    """Whether only known ids are drawn, by numbers within rounding of the edges of the ranges."""
    rank, generator = topology.group_rank, torch.Generator().manual_seed(0)
    known = torch.tensor([True, True, False] * 8)
    weight = torch.randn(24, 2, generator=generator, dtype=torch.float64)
    hidden = torch.randn(400, 2, generator=generator, dtype=torch.float64)
    p = (hidden @ weight.T).masked_fill(~known, -math.inf).softmax(dim=1)
    edges = p.cumsum(dim=1)[:, 2::3]
    uniforms = torch.cat([edges + ulps * 2**-53 for ulps in range(-3, 4)], dim=1).clamp(0, 1 - 2**-53)
    ranges = block_cyclic_ranges(24, 8, topology.group_size, rank)
    rows = torch.cat([torch.arange(*pair) for pair in ranges])
    found = sparse_targets(
        Head(hidden, weight[rows], torch.where(known, 0.0, -math.inf)[rows]),
        selection=Sampled(uniforms.shape[1]),
        tail=Tail.RENORMALISED,
        vocab=VocabSlice(ranges, 24, topology.vocab_group),
        uniforms=uniforms,
    )
    return bool(known[found.ids[found.ids >= 0]].all())


@pytest.mark.parametrize("g", [1, 2, 4])
def test_rounding_never_draws_an_id_without_mass(g: int) -> None:
    assert all(run_ranks(g, _drawn_by_rounding))


def _refused(topology: Topology, what: str) -> str:
    """The message of the ValueError that this rank raises."""
    rank, p = topology.group_rank, problem(0, tokens=4)
    uniforms = torch.full((2, 3), 0.5, dtype=torch.float64)
    if what == "uniforms" and rank == 1:
        uniforms[0, 2] = math.nan
    ranges: Any = SLICINGS[2]["uneven"][rank] if what == "uniforms" or rank == 1 else ((0, 6),)
    rows = torch.arange(*ranges[0])
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the parent matches the message)
        sparse_targets(
            Head(p.teacher_hidden[2 * rank : 2 * rank + 2], p.teacher_weight[rows]),
            selection=Sampled(3),
            tail=Tail.RENORMALISED,
            vocab=VocabSlice(ranges, SIZE, topology.vocab_group),
            uniforms=uniforms,
        )
    return str(caught.value)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("slices", "the slices hold [6, 14] true rows, which do not add up to a vocabulary of 21"),
        ("uniforms", "[0, 1] uniforms (by rank) are not in [0, 1)"),
    ],
)
def test_ranks_that_disagree_are_all_told(what: str, message: str) -> None:
    for found in run_ranks(2, _refused, what):
        assert message in found
