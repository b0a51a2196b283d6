"""The vocabulary-parallel loss on 1 to 4 real ranks against the float64 reference on the whole vocabulary.

Every gradient is compared in size too (a factor of g, as a differentiated collective brings, is an error of 100 % or
more): rank by rank, the tokens' gradients and the slice's rows.
"""

import itertools
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megadistill.distributed.topology import Topology
from megadistill.distributed.vocab import block_cyclic_ranges
from megadistill.loss import Divergence, DivergenceKind, Head, LossOptions, VocabSlice, distill_loss, label_loss
from megadistill.types import IGNORED_LABEL, PER_TOKEN_NAMES, SparseTargets, Tail
from tests.ranks.harness import run_ranks
from tests.unit.loss.problems import (
    DIVERGENCES,
    TAILS,
    TOLERANCE,
    Problem,
    Truth,
    assert_terms,
    assert_within_bf16,
    problem,
    relative_error,
    run,
    scalars,
    sparse,
    truth,
)

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
    tail: Tail | None = None
    bent: bool = False

    def problem(self) -> Problem:
        """Of the whole group. The labels walk over the first and the last true row of every slice."""
        # Logits of about 1: the rounding of a float32 product, which is nobody's mistake, grows with them.
        p = problem(self.seed, tokens=sum(self.tokens), rows=ROWS, size=SIZE, scale=0.5)
        p = p.bent() if self.bent else p
        edges = [
            row for ranges in self.slices for first, stop in ranges for row in (first, stop - 1) if first <= row < SIZE
        ]
        labels = p.labels.clone()
        labels[: len(edges)] = torch.tensor(edges)[: len(labels)]
        if self.bent:  # the id that the teacher does not know is nobody's label
            labels[labels == SIZE // 2] = IGNORED_LABEL
        return replace(p, labels=labels)

    @property
    def diagnosed(self) -> bool:
        return self.divergence is not None and self.tail is None and not self.bent

    @property
    def per_token(self) -> bool:
        """Whether the terms of each token are asked for, which must not depend on other tokens."""
        return self.seed % 5 == 0 and (self.divergence is None or self.divergence.label_fraction == 0)

    def targets(self) -> SparseTargets | None:
        """Of the whole group."""
        if self.tail is None or self.divergence is None:
            return None
        return sparse(self.problem(), self.tail, kept=6, temperature=self.divergence.temperature, seed=self.seed)

    def tokens_of(self, rank: int) -> slice:
        return slice(sum(self.tokens[:rank]), sum(self.tokens[: rank + 1]))

    def rows_of(self, rank: int) -> Tensor:
        return torch.tensor([row for first, stop in self.slices[rank] for row in range(first, stop)], dtype=torch.int64)


OBJECTIVES: list[tuple[Divergence | None, Tail | None, bool]] = [
    *((divergence, None, False) for divergence in DIVERGENCES.values()),
    *((d, None, True) for d in DIVERGENCES.values() if d.formula is not DivergenceKind.REVERSE_KL),
    *((divergence, tail, bent) for tail, divergence in TAILS.values() for bent in (False, True)),
    (None, None, False),
    (None, None, True),
]
"""What is asked for, the tail of sparse targets, and whether the logits are bent (softcap, scale, bias)."""


def _cases(g: int) -> list[Case]:
    """Every slicing with every distribution of tokens, in both dtypes; the objectives are dealt out among them, so that
    each meets every slicing, and both dtypes."""
    cases: list[Case] = []
    for i, (name, slices) in enumerate(SLICINGS[g].items()):
        for j, (whose, tokens) in enumerate(TOKENS.items()):
            for k, (divergence, tail, bent) in enumerate(OBJECTIVES[(i + j) % 4 :: 4]):
                dtype = list(TOLERANCE)[(i + k) % 2]
                case = Case(
                    name=f"{name}; {whose}; {dtype}; {divergence}; {tail}; {'bent' if bent else 'plain'}",
                    seed=len(cases),
                    slices=slices,
                    tokens=tokens[:g],
                    divergence=divergence,
                    dtype=dtype,
                    chunk_tokens=(1, 5, 8, 1024)[(i + j + len(cases)) % 4],
                    tail=tail,
                    bent=bent,
                )
                cases.append(case)
    return cases


def _logit_memory(case: Case, g: int) -> int:
    """What holds `case.chunk_tokens` tokens on the rank that has most rows."""
    models = 1 if case.divergence is None or case.tail is not None else 2
    most = max(sum(max(0, min(stop, SIZE) - first) for first, stop in ranges) for ranges in case.slices)
    in_flight = 1 if g == 1 else 2
    return case.chunk_tokens * in_flight * models * most * (8 if case.dtype == torch.float64 else 4)


def _run_case(topology: Topology, case: Case) -> Truth:
    rank = topology.group_rank
    tokens, rows = case.tokens_of(rank), case.rows_of(rank)
    p, targets = case.problem().cast(case.dtype), case.targets()
    mine = replace(
        p,
        student_hidden=p.student_hidden[tokens],
        student_weight=p.student_weight[rows],
        teacher_hidden=p.teacher_hidden[tokens],
        teacher_weight=p.teacher_weight[rows],
        labels=p.labels[tokens],
        token_weights=p.token_weights[tokens],
        student_bias=None if p.student_bias is None else p.student_bias[rows],
        teacher_bias=None if p.teacher_bias is None else p.teacher_bias[rows],
    )
    if targets is not None:
        # Ranks may keep different numbers of ids: this one has a place more that it does not use.
        spare = (0, rank % 2)
        targets = replace(
            targets,
            ids=torch.nn.functional.pad(targets.ids[tokens], spare, value=-1),
            probs=torch.nn.functional.pad(targets.probs[tokens], spare),
            log_tail=targets.log_tail[tokens],
        )
    options: dict[str, Any] = {"logit_memory": _logit_memory(case, topology.group_size)}
    if case.diagnosed:
        options["diagnostics"] = True
    options["per_token"] = case.per_token
    vocab = VocabSlice(case.slices[rank], SIZE, topology.vocab_group)
    return run(mine, case.divergence, vocab=vocab, targets=targets, upstream=UPSTREAM, z_loss=0.1, **options)


def _run_cases(topology: Topology, cases: list[Case]) -> list[Truth]:
    return [_run_case(topology, case) for case in cases]


def _check(case: Case, founds: list[Truth]) -> None:
    """The gradients, put together, and the terms of all ranks added up; each rank's own where no token's part in the
    loss hangs on the others' (a share of all tokens' entropies does)."""
    p, tolerance, targets = case.problem(), TOLERANCE[case.dtype], case.targets()
    whole = truth(p, case.divergence, z_loss=0.1, targets=targets, diagnostics=case.diagnosed)
    told = [scalars(found.terms) for found in founds]
    for name, true in scalars(whole.terms).items():
        total = sum(terms[name] for terms in told)
        assert total == pytest.approx(true, rel=tolerance, abs=tolerance * 1e-2), name
    rows = torch.cat([case.rows_of(rank) for rank in range(len(founds))])
    hidden_grad = torch.cat([found.hidden_grad for found in founds])
    weight_grad = torch.cat([found.weight_grad for found in founds])
    assert relative_error(hidden_grad, UPSTREAM * whole.hidden_grad) < tolerance
    assert relative_error(weight_grad, UPSTREAM * whole.weight_grad[rows]) < tolerance
    assert not weight_grad[rows >= SIZE].any()
    if whole.bias_grad is not None:
        bias_grad = torch.cat([found.bias_grad for found in founds if found.bias_grad is not None])
        assert relative_error(bias_grad, UPSTREAM * whole.bias_grad[rows]) < tolerance
    for rank, found in enumerate(founds):
        tokens = case.tokens_of(rank)
        if case.tail is None:
            assert found.terms.kl >= 0
        if case.divergence is None or case.divergence.label_fraction == 0:
            only_mine = torch.zeros_like(p.token_weights)
            only_mine[tokens] = p.token_weights[tokens]
            mine = truth(replace(p, token_weights=only_mine), case.divergence, z_loss=0.1, targets=targets)
            assert_terms(replace(found.terms, diagnostics=None), mine.terms, tolerance)
        if case.per_token:
            assert found.terms.per_token is not None
            of_tokens = zip(range(tokens.start, tokens.stop), found.terms.per_token.tolist(), strict=True)
            for token, values in of_tokens:
                only_it = torch.zeros_like(p.token_weights).index_fill(0, torch.tensor([token]), 1)
                alone = replace(p, token_weights=p.token_weights * only_it)
                terms = scalars(truth(alone, case.divergence, z_loss=0.1, targets=targets).terms)
                expected = [terms[name] for name in PER_TOKEN_NAMES]
                assert values == pytest.approx(expected, rel=tolerance, abs=tolerance * 1e-2), f"token {token}"


@pytest.mark.parametrize("g", SLICINGS)
def test_loss_and_gradients_are_the_references(g: int) -> None:
    cases = _cases(g)
    _check_all(g, cases)


def _check_all(g: int, cases: list[Case]) -> None:
    for case, founds in zip(cases, zip(*run_ranks(g, _run_cases, cases), strict=True), strict=True):
        try:
            _check(case, list(founds))
        except AssertionError as error:
            raise AssertionError(f"{g} ranks, {case.name}: {error}") from error


BF16_OBJECTIVES: list[tuple[Divergence | None, Tail | None, bool]] = [
    (DIVERGENCES["kl"], None, False),
    (DIVERGENCES["all"], None, True),
    (DIVERGENCES["all with jsd"], None, True),
    (DIVERGENCES["routed, all with skew kl at 2"], None, False),
    (TAILS["top-k and other, all at 2"][1], Tail.OTHER, True),
    (TAILS["dropped"][1], Tail.DROPPED, False),
    (None, None, True),
]


@pytest.mark.parametrize("g", [2, 3])
def test_bf16_operands_are_gathered_and_multiplied_as_on_an_accelerator(g: int) -> None:
    """Hidden states are gathered in bf16, dlogits is rounded to it; statistics, dX and dW are added up in float32.

    The bounds are those of one process: a sum over ranks is not rounded to bf16 on its way.
    """
    slicings = list(SLICINGS[g].items())
    cases = [
        Case(name, 50 + i, slices, TOKENS["one has none"][:g], divergence, torch.bfloat16, 5, tail, bent)
        for i, (divergence, tail, bent) in enumerate(BF16_OBJECTIVES)
        for name, slices in [slicings[i % len(slicings)]]
    ]
    for case, results in zip(cases, zip(*run_ranks(g, _run_cases, cases), strict=True), strict=True):
        p, targets = case.problem().cast(torch.bfloat16), case.targets()
        expected = truth(p, case.divergence, z_loss=0.1, targets=targets)
        for name in ("loss", "kl", "student_ce", "log_z"):
            total = sum(getattr(result.terms, name) for result in results)
            assert total == pytest.approx(getattr(expected.terms, name).item(), rel=1e-6, abs=1e-8), (case.name, name)
        rows = torch.cat([case.rows_of(rank) for rank in range(g)]).argsort()
        whole = Truth(
            expected.terms,
            torch.cat([result.hidden_grad for result in results]),
            torch.cat([result.weight_grad for result in results])[rows],
            None if expected.bias_grad is None else torch.cat([_bias_grad(result) for result in results])[rows],
        )
        assert whole.hidden_grad.dtype == whole.weight_grad.dtype == torch.bfloat16
        assert_within_bf16(p, whole, expected, case.divergence, targets, upstream=UPSTREAM, z_loss=0.1)


def _bias_grad(result: Truth) -> Tensor:
    assert result.bias_grad is not None
    return result.bias_grad


def _drawn_case(draw: st.DrawFn, g: int) -> Case:
    """Any slices (contiguous or dealt out in blocks), any tokens, any objective, any chunk."""
    cuts = sorted(draw(st.lists(st.integers(0, ROWS), min_size=2 * g - 1, max_size=2 * g - 1)))
    blocks = list(itertools.pairwise([0, *cuts, ROWS]))  # two for each rank, some of them empty
    owners = draw(st.permutations([*range(g), *range(g)]))
    divergence, tail, bent = draw(st.sampled_from(OBJECTIVES))
    return Case(
        name="drawn",
        seed=draw(st.integers(0, 10_000)),
        slices=[
            tuple(block for block, owner in zip(blocks, owners, strict=True) if owner == rank) for rank in range(g)
        ],
        tokens=draw(st.lists(st.integers(0, 6), min_size=g, max_size=g)),
        divergence=divergence,
        dtype=torch.float64,
        chunk_tokens=draw(st.integers(1, 20)),
        tail=tail,
        bent=bent,
    )


@settings(max_examples=4, suppress_health_check=list(HealthCheck))
@given(data=st.data(), g=st.integers(2, 4))
def test_any_slices_tokens_and_objectives(data: st.DataObject, g: int) -> None:
    """Each example is many cases: the ranks start once for all of them."""
    cases = data.draw(st.lists(st.composite(_drawn_case)(g), min_size=20, max_size=20))
    _check_all(g, cases)


class _Collectives(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records every collective: (operation, bytes of its result)."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            result = args[0][0] if isinstance(args[0], list) else args[0]
            self.calls.append((func.overloadpacket.__name__, result.nbytes))
        return func(*args, **(kwargs or {}))


def _count_collectives(topology: Topology, case: Case) -> list[list[tuple[str, int]]]:
    """The collectives of a forward that wants gradients, of its backward, and of a forward that wants none."""
    rank, p = topology.group_rank, case.problem()
    tokens, rows = case.tokens_of(rank), case.rows_of(rank)

    def loss(hidden: Tensor) -> Tensor:
        assert case.divergence is not None
        return distill_loss(
            Head(hidden, p.student_weight[rows]),
            Head(p.teacher_hidden[tokens], p.teacher_weight[rows]),
            p.labels[tokens],
            token_weights=p.token_weights[tokens],
            divergence=case.divergence,
            vocab=VocabSlice(case.slices[rank], SIZE, topology.vocab_group),
            options=LossOptions(logit_memory=_logit_memory(case, topology.group_size)),
        ).loss

    with _Collectives() as forward:
        trained = loss(p.student_hidden[tokens].requires_grad_())
    with _Collectives() as backward:
        torch.autograd.backward(trained)
    with _Collectives() as evaluation:
        loss(p.student_hidden[tokens])
    return [forward.calls, backward.calls, evaluation.calls]


@pytest.mark.parametrize("divergence", [Divergence(), Divergence(temperature=2.0, ce_weight=0.5, z_loss=0.1)])
def test_a_chunk_of_forward_kl_has_one_small_collective(divergence: Divergence) -> None:
    """A chunk: both hidden states in, one gather of six numbers for each token, model and slice, one gradient out.

    The gathers of the next chunk are sent before the statistics of this one, and its gradient after those.
    """
    g, k, longest, D, E = 2, 2, 5, 5, 7
    case = Case("", 0, SLICINGS[2]["uneven"], [longest, 3], divergence, torch.float64, g * k)
    gather, scatter, reduce = "_allgather_base_", "_reduce_scatter_base_", "allreduce_"
    once = [(gather, 8 * g * 7), (gather, 8 * g * longest), (gather, 8 * g * longest)]
    sizes = [g * k, g * k, g * 1]
    hidden = [[(gather, 8 * n * D), (gather, 8 * n * E)] for n in sizes]
    statistics = [(gather, 8 * g * n * 2 * 6) for n in sizes]
    gradient = [(scatter, 8 * n // g * D) for n in sizes]
    kl = (reduce, 8 * g * 3)
    with_gradient = [
        *once, *hidden[0], *hidden[1], statistics[0], *hidden[2], statistics[1], gradient[0], statistics[2],
        gradient[1], gradient[2], kl,
    ]  # fmt: skip
    without = [call for call in with_gradient if call[0] != scatter]
    for forward, backward, evaluation in run_ranks(g, _count_collectives, case):
        assert forward == with_gradient
        assert backward == []
        assert evaluation == without


@pytest.mark.parametrize("kind", [kind for kind in DivergenceKind if kind is not DivergenceKind.FORWARD_KL])
def test_the_other_divergences_add_one_number_a_token(kind: DivergenceKind) -> None:
    g, k, longest = 2, 2, 4
    case = Case("", 0, SLICINGS[2]["uneven"], [longest, 3], Divergence(kind), torch.float64, g * k)
    plain = replace(case, divergence=Divergence())
    for more, less in zip(run_ranks(g, _count_collectives, case), run_ranks(g, _count_collectives, plain), strict=True):
        assert sorted(more[0]) == sorted([*less[0], *[("allreduce_", 8 * g * k)] * 2])
        assert more[1] == []
        assert more[2] == less[2]


def _agreement(topology: Topology, best: int) -> float:
    """Of a student to whom all ids are alike, with a teacher whose most likely id is `best`."""
    rank, p = topology.group_rank, problem(0, tokens=4, rows=ROWS, size=SIZE)
    rows = torch.arange(ROWS).chunk(topology.group_size)[rank]
    own = slice(2 * rank, 2 * rank + 2)
    teacher_weight = torch.zeros_like(p.teacher_weight)
    teacher_weight[best] = 1.0
    terms = distill_loss(
        Head(p.student_hidden[own], torch.zeros_like(p.student_weight)[rows]),
        Head(torch.ones_like(p.teacher_hidden)[own], teacher_weight[rows]),
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
            Head(hidden, p.student_weight[rows]),
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
