"""Layers to stages: every layer once, in order, balanced, the extra ones at the end."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megadistill.errors import UserError
from megadistill.model.split import stage_layers


def test_the_extra_layers_are_at_the_end() -> None:
    assert stage_layers(5, 3) == [range(0, 1), range(1, 3), range(3, 5)]


@given(st.integers(1, 130).flatmap(lambda layers: st.tuples(st.just(layers), st.integers(1, layers))))
def test_every_layer_is_in_one_stage(sizes: tuple[int, int]) -> None:
    layers, stages = sizes
    cut = stage_layers(layers, stages)
    assert [layer for stage in cut for layer in stage] == list(range(layers))
    lengths = [len(stage) for stage in cut]
    assert len(cut) == stages
    assert lengths == sorted(lengths)
    assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize("stages", [0, -1, 6])
def test_impossible_cuts_are_refused(stages: int) -> None:
    with pytest.raises(UserError, match=f"5 layers cannot be cut into {stages} stages: it takes 1 to 5"):
        stage_layers(5, stages)
