"""The vocabulary-parallel loss on 1 to 4 real ranks against the float64 reference on the whole vocabulary.

Every gradient is compared in size too (a factor of g, as a differentiated collective brings, is an error of 100 % or
more): rank by rank, the tokens' gradients and the slice's rows.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megadistill.comm.topology import Topology
from megadistill.comm.vocabulary import block_cyclic_ranges
from megadistill.loss import Divergence, VocabSlice, distill_loss, label_loss
from megadistill.records import LossTerms
from tests.ranks.harness import run_ranks
from tests.unit.loss.problems import DIVERGENCES, TOLERANCE, Problem, problem, relative_error, truth

ROWS, SIZE, UPSTREAM = 24, 21, 3.0

Ranges = tuple[tuple[int, int], ...]

SLICINGS: dict[int, dict[str, list[Ranges]]] = {
    1: {"whole": [((0, 24),)]},
    2: {"uneven": [((0, 7),), ((7, 24),)], "empty": [((0, 24),), ()]},
    3: {
        "uneven": [((0, 5),), ((5, 19),), ((19, 24),)],
        "empty": [((0, 12),), (), ((12, 24),)],
        "padding alone": [((0, 20),), ((20, 21),), ((21, 24),)],
    },
    4: {
        "uneven": [((0, 3),), ((3, 11),), ((11, 12),), ((12, 24),)],
        "empty": [((0, 10),), ((10, 10),), ((10, 23),), ((23, 24),)],
    },
}
for _g, _slicings in SLICINGS.items():
    for _blocks in (1, 2):
        _world = _g * _blocks
        _slicings[f"block-cyclic, {_blocks} a rank"] = [
            block_cyclic_ranges(ROWS, _world, _g, rank) for rank in range(_g)
        ]

TOKENS = {
    "even": [4, 4, 4, 4],
    "one has none": [5, 0, 3, 7],
    "the first has none": [0, 6, 1, 2],
    "nobody has any": [0] * 4,
}


@dataclass(frozen=True)
class Case:
    name: str
    seed: int
    slices: list[Ranges]
    tokens: list[int]
    divergence: Divergence | None
    dtype: torch.dtype
    chunk_tokens: int

    def problem(self) -> Problem:
        """Of the whole group. The labels walk over the first and the last true row of every slice."""
        p = problem(self.seed, tokens=sum(self.tokens), rows=ROWS, size=SIZE)
        edges = [row for ranges in self.slices for first, stop in ranges for row in (first, stop - 1) if row < SIZE]
        labels = p.labels.clone()
        labels[: len(edges)] = torch.tensor(edges)[: len(labels)]
        return replace(p, labels=labels)

    def tokens_of(self, rank: int) -> slice:
        return slice(sum(self.tokens[:rank]), sum(self.tokens[: rank + 1]))

    def rows_of(self, rank: int) -> Tensor:
        return torch.tensor([row for first, stop in self.slices[rank] for row in range(first, stop)], dtype=torch.int64)


def _cases(g: int) -> list[Case]:
    """Every slicing with every distribution of tokens, in both dtypes; the divergences are dealt out among them."""
    divergences: list[Divergence | None] = [*DIVERGENCES.values(), None]
    cases: list[Case] = []
    for i, (name, slices) in enumerate(SLICINGS[g].items()):
        for j, (whose, tokens) in enumerate(TOKENS.items()):
            for divergence in divergences[(i + j) % 4 :: 4]:
                for dtype in TOLERANCE:
                    case = Case(
                        name=f"{name}; {whose}; {dtype}; {divergence}",
                        seed=len(cases),
                        slices=slices,
                        tokens=tokens[:g],
                        divergence=divergence,
                        dtype=dtype,
                        chunk_tokens=(1, 5, 8, 1024)[(i + j + len(cases)) % 4],
                    )
                    cases.append(case)
    return cases


@dataclass(frozen=True)
class Found:
    terms: LossTerms
    hidden_grad: Tensor
    weight_grad: Tensor


def _run_case(topology: Topology, case: Case) -> Found:
    rank = topology.group_rank
    tokens, rows = case.tokens_of(rank), case.rows_of(rank)
    p = case.problem().cast(case.dtype)
    hidden, weight = p.student_hidden[tokens].requires_grad_(), p.student_weight[rows].requires_grad_()
    shared: dict[str, Any] = {
        "token_weights": p.token_weights[tokens],
        "vocab": VocabSlice(case.slices[rank], SIZE, topology.vocab_group),
        "chunk_tokens": case.chunk_tokens,
    }
    if case.divergence is None:
        terms = label_loss(hidden, weight, p.labels[tokens], z_loss=0.1, **shared)
    else:
        terms = distill_loss(
            hidden,
            weight,
            p.teacher_hidden[tokens],
            p.teacher_weight[rows],
            p.labels[tokens],
            divergence=case.divergence,
            **shared,
        )
    hidden_grad, weight_grad = torch.autograd.grad(terms.loss * UPSTREAM, (hidden, weight))
    return Found(replace(terms, loss=terms.loss.detach()), hidden_grad, weight_grad)


def _run_cases(topology: Topology, cases: list[Case]) -> list[Found]:
    return [_run_case(topology, case) for case in cases]


def _check(case: Case, rank: int, found: Found) -> None:
    p, tolerance = case.problem(), TOLERANCE[case.dtype]
    tokens, rows = case.tokens_of(rank), case.rows_of(rank)
    whole = truth(p, case.divergence, z_loss=0.1)
    only_mine = torch.zeros_like(p.token_weights)
    only_mine[tokens] = p.token_weights[tokens]
    mine = truth(replace(p, token_weights=only_mine), case.divergence, z_loss=0.1)
    for field in fields(LossTerms):
        value, true = getattr(found.terms, field.name).item(), getattr(mine.terms, field.name).item()
        assert value == pytest.approx(true, rel=tolerance, abs=tolerance * 1e-2), field.name
    assert found.terms.kl >= 0
    assert relative_error(found.hidden_grad, UPSTREAM * whole.hidden_grad[tokens]) < tolerance
    assert relative_error(found.weight_grad, UPSTREAM * whole.weight_grad[rows]) < tolerance
    assert not found.weight_grad[rows >= SIZE].any()


@pytest.mark.parametrize("g", SLICINGS)
def test_loss_and_gradients_are_the_references(g: int) -> None:
    cases = _cases(g)
    for rank, founds in enumerate(run_ranks(g, _run_cases, cases)):
        for case, found in zip(cases, founds, strict=True):
            try:
                _check(case, rank, found)
            except AssertionError as error:
                raise AssertionError(f"rank {rank} of {g}, {case.name}: {error}") from error


class _Collectives(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records every collective: (operation, elements of its result)."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            result = args[0][0] if isinstance(args[0], list) else args[0]
            self.calls.append((func.overloadpacket.__name__, result.numel()))
        return func(*args, **(kwargs or {}))


def _count_collectives(topology: Topology, case: Case) -> list[list[tuple[str, int]]]:
    """The collectives of a forward that wants gradients, of its backward, and of a forward that wants none."""
    rank, p = topology.group_rank, case.problem()
    tokens, rows = case.tokens_of(rank), case.rows_of(rank)

    def loss(hidden: Tensor) -> Tensor:
        assert case.divergence is not None
        return distill_loss(
            hidden,
            p.student_weight[rows],
            p.teacher_hidden[tokens],
            p.teacher_weight[rows],
            p.labels[tokens],
            token_weights=p.token_weights[tokens],
            divergence=case.divergence,
            vocab=VocabSlice(case.slices[rank], SIZE, topology.vocab_group),
            chunk_tokens=case.chunk_tokens,
        ).loss

    with _Collectives() as forward:
        trained = loss(p.student_hidden[tokens].requires_grad_())
    with _Collectives() as backward:
        torch.autograd.backward(trained)
    with _Collectives() as evaluation:
        loss(p.student_hidden[tokens])
    return [forward.calls, backward.calls, evaluation.calls]


@pytest.mark.parametrize(("temperature", "statistics"), [(1.0, 4), (2.0, 5)])
def test_a_chunk_has_one_small_collective(temperature: float, statistics: int) -> None:
    """A chunk: both hidden states in, one gather of a few numbers for each token, model and slice, one gradient out."""
    g, k, longest, D, E = 2, 2, 5, 5, 7
    case = Case("", 0, SLICINGS[2]["uneven"], [longest, 3], Divergence(temperature=temperature), torch.float64, g * k)
    gather, scatter, reduce = "_allgather_base_", "_reduce_scatter_base_", "allreduce_"
    counts_labels_weights = [(gather, g * 4), (gather, g * longest), (gather, g * longest)]
    with_gradient, without = list(counts_labels_weights), list(counts_labels_weights)
    for n in (g * k, g * k, g * 1):
        gathers = [(gather, n * D), (gather, n * E), (gather, g * n * 2 * statistics)]
        with_gradient += [*gathers, (scatter, n // g * D)]
        without += gathers
    kl_and_entropy = (reduce, g * 2)
    for forward, backward, evaluation in run_ranks(g, _count_collectives, case):
        assert forward == [*with_gradient, kl_and_entropy]
        assert backward == []
        assert evaluation == [*without, kl_and_entropy]


def _agreement(topology: Topology, best: int) -> float:
    """Of a student to whom all ids are alike, with a teacher whose most likely id is `best`."""
    rank, p = topology.group_rank, problem(0, tokens=4, rows=ROWS, size=SIZE)
    rows = torch.arange(ROWS).chunk(topology.group_size)[rank]
    own = slice(2 * rank, 2 * rank + 2)
    teacher_weight = torch.zeros_like(p.teacher_weight)
    teacher_weight[best] = 1.0
    terms = distill_loss(
        p.student_hidden[own],
        torch.zeros_like(p.student_weight)[rows],
        torch.ones_like(p.teacher_hidden)[own],
        teacher_weight[rows],
        p.labels[own],
        token_weights=torch.full((2,), 0.5),
        divergence=Divergence(),
        vocab=VocabSlice.contiguous(int(rows[0]), int(rows[-1]) + 1, SIZE, topology.vocab_group),
    )
    return terms.agreement.item()


@pytest.mark.parametrize(("best", "agreement"), [(0, 1.0), (12, 0.0)])
def test_of_equal_logits_the_lowest_id_wins_across_slices(best: int, agreement: float) -> None:
    assert run_ranks(2, _agreement, best) == [agreement, agreement]


def _refused(topology: Topology, what: str) -> str:
    """The message of the ValueError that this rank raises."""
    rank = topology.group_rank
    case = Case("", 0, SLICINGS[2]["uneven"], [4, 4], None, torch.float64, 4)
    p = case.problem()
    rows = case.rows_of(rank)[: 6 if what == "slices" and rank == 0 else None]
    labels = p.labels[case.tokens_of(rank)].clone()
    if what == "labels" and rank == 1:
        labels[2] = SIZE
    hidden = p.student_hidden[case.tokens_of(rank)].requires_grad_(what != "gradients" or rank == 0)
    ranges = ((int(rows[0]), int(rows[-1]) + 1),)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the parent matches the message)
        label_loss(
            hidden,
            p.student_weight[rows],
            labels,
            token_weights=p.token_weights[case.tokens_of(rank)],
            vocab=VocabSlice(ranges, SIZE, topology.vocab_group),
        )
    return str(caught.value)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("slices", "the slices hold [6, 14] true rows, which do not add up to a vocabulary of 21"),
        ("labels", "[0, 1] labels (by rank) are neither ids below 21"),
        ("gradients", "some ranks want gradients and some do not ([1, 0])"),
    ],
)
def test_ranks_that_disagree_are_all_told(what: str, message: str) -> None:
    for found in run_ranks(2, _refused, what):
        assert message in found
