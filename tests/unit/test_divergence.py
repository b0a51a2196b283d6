"""A `Divergence` refuses what cannot be meant, and says the way out."""

from typing import Any

import pytest

from megadistill.divergence import Divergence, DivergenceKind, require_parameter


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "forward_kl"}, "DivergenceKind.FORWARD_KL"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"kd_weight": -1.0}, "kd_weight is -1.0"),
        ({"ce_weight": float("nan")}, "ce_weight is nan"),
        ({"kd_weight": 0.0}, "all 0"),
        ({"parameter": 0.5}, "forward_kl takes none"),
        ({"kind": DivergenceKind.JSD, "parameter": 1.1}, "beta is 1.1; .* from 0 to 1"),
        ({"kind": DivergenceKind.SKEW_KL, "parameter": 1.0}, "alpha is 1.0; .* less than 1"),
        ({"kind": DivergenceKind.SKEW_KL, "parameter": float("nan")}, "alpha is nan"),
    ],
)
def test_it_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Divergence(**arguments)


def test_the_factor_of_the_kl() -> None:
    assert Divergence(temperature=3.0, kd_weight=0.5).kd_factor == 0.5
    assert Divergence(temperature=3.0, kd_weight=0.5, temperature_squared=True).kd_factor == 4.5


def test_a_parameter_has_its_kinds_name_and_default() -> None:
    assert (Divergence(DivergenceKind.JSD).share, Divergence(DivergenceKind.SKEW_KL).share) == (0.5, 0.1)
    require_parameter(DivergenceKind.JSD, "beta", 1.0)
    with pytest.raises(ValueError, match=r"alpha is 0\.5, but it belongs to skew_kl, not jsd"):
        require_parameter(DivergenceKind.JSD, "alpha", 0.5)


@pytest.mark.parametrize(
    ("kind", "parameter", "formula"),
    [
        (DivergenceKind.JSD, 0.0, DivergenceKind.FORWARD_KL),
        (DivergenceKind.JSD, 1.0, DivergenceKind.REVERSE_KL),
        (DivergenceKind.JSD, 0.5, DivergenceKind.JSD),
        (DivergenceKind.SKEW_KL, 0.0, DivergenceKind.FORWARD_KL),
        (DivergenceKind.TVD, None, DivergenceKind.TVD),
    ],
)
def test_the_formula_at_the_ends_of_a_parameters_range(
    kind: DivergenceKind, parameter: float | None, formula: DivergenceKind
) -> None:
    assert Divergence(kind, parameter=parameter).formula is formula
