"""A `Divergence` refuses what cannot be meant, and says the way out."""

from typing import Any

import pytest

from megadistill.loss import Divergence


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "forward_kl"}, "DivergenceKind.FORWARD_KL"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"kd_weight": -1.0}, "kd_weight is -1.0"),
        ({"ce_weight": float("nan")}, "ce_weight is nan"),
        ({"kd_weight": 0.0}, "all 0"),
    ],
)
def test_it_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Divergence(**arguments)


def test_the_factor_of_the_kl() -> None:
    assert Divergence(temperature=3.0, kd_weight=0.5).kd_factor == 0.5
    assert Divergence(temperature=3.0, kd_weight=0.5, temperature_squared=True).kd_factor == 4.5
