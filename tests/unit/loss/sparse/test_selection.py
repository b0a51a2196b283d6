"""The limits of each kind of selection."""

import math
from collections.abc import Callable

import pytest

from megadistill.loss.sparse import Sampled, SampledDistinct, Selection, Threshold, TopK, TopP


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sampled(0), "draws is 0"),
        (lambda: SampledDistinct(0), "k is 0"),
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
