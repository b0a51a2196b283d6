"""Layers to stages: every layer once, in order, balanced by cost, the larger stages at the end."""

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megadistill.errors import UserError
from megadistill.models.families import load_config
from megadistill.models.partition import balanced_sizes, stage_layers
from tests.unit.models.cases import CASES


def _config(case: str, **changes: Any) -> Any:
    return load_config(CASES[case] | changes, what="test")


def test_the_extra_layers_are_at_the_end() -> None:
    assert stage_layers(_config("llama"), 3) == [range(0, 1), range(1, 3), range(3, 5)]


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("qwen3_moe")])
@pytest.mark.parametrize("stages", [1, 2, 3, 4, 5])
def test_layers_that_are_alike_are_shared_out_evenly(case: str, stages: int) -> None:
    """Sliding or not, an expert or a dense layer: here all layers of a model cost the same."""
    assert stage_layers(_config(case), stages) == stage_layers(_config("llama"), stages)


@given(st.integers(1, 130).flatmap(lambda layers: st.tuples(st.just(layers), st.integers(1, layers))))
def test_equal_costs_give_sizes_that_differ_by_one_at_most_in_order(sizes: tuple[int, int]) -> None:
    layers, stages = sizes
    smaller, larger = layers // stages, layers % stages
    assert balanced_sizes((7,) * layers, stages) == (smaller,) * (stages - larger) + (smaller + 1,) * larger


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=9).flatmap(
        lambda costs: st.tuples(st.just(costs), st.integers(1, len(costs)))
    )
)
def test_unequal_costs_give_the_best_of_all_cuts(problem: tuple[list[int], int]) -> None:
    costs, stages = problem

    def rank(sizes: Sequence[int]) -> tuple[int, int, list[int]]:
        ends = [0, *itertools.accumulate(sizes)]
        parts = [sum(costs[start:stop]) for start, stop in itertools.pairwise(ends)]
        return max(parts), sum(part**2 for part in parts), list(sizes)

    layers = len(costs)
    cuts = [[0, *inner, layers] for inner in itertools.combinations(range(1, layers), stages - 1)]
    truth = min(rank([stop - start for start, stop in itertools.pairwise(cut)]) for cut in cuts)
    assert rank(balanced_sizes(tuple(costs), stages)) == truth


def test_dense_layers_and_layers_of_experts_are_weighed_by_what_a_token_passes_through() -> None:
    """Three of six experts of 40 on layers 0 and 1, then dense layers 20 times as wide."""
    wide = {"mlp_only_layers": [2, 3, 4], "intermediate_size": 800}
    assert stage_layers(_config("qwen3_moe", **wide), 2) == [range(0, 3), range(3, 5)]
    assert stage_layers(_config("qwen3_moe", **wide), 3) == [range(0, 3), range(3, 4), range(4, 5)]
    all_used = _config("qwen3_moe", **wide, num_experts=300, num_experts_per_tok=300)
    assert stage_layers(all_used, 3) == [range(0, 1), range(1, 2), range(2, 5)]
    idle = _config("qwen3_moe", **wide, num_experts=300)
    assert stage_layers(idle, 3) == [range(0, 3), range(3, 4), range(4, 5)], "297 idle experts cost nothing"


@pytest.mark.parametrize("stages", [0, -1, 6])
def test_impossible_cuts_are_refused(stages: int) -> None:
    with pytest.raises(UserError, match=f"5 layers cannot be cut into {stages} stages: give 1 to 5"):
        stage_layers(_config("llama"), stages)
