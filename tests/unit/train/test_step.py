"""The numbers of a step, side by side for one reduction."""

import math
from typing import Any

import pytest
import torch

from megadistill.train.step import _finite, _numbers
from megadistill.types import DIAGNOSTIC_NAMES, METRIC_NAMES, Diagnostics, LossTerms


def _terms(diagnostics: Diagnostics | None) -> LossTerms:
    numbers: dict[str, Any] = {name: torch.tensor(float(place)) for place, name in enumerate(METRIC_NAMES)}
    return LossTerms(**numbers, diagnostics=diagnostics)


def test_every_number_has_its_name() -> None:
    diagnostics = Diagnostics(
        acceptance=torch.tensor(0.5),
        reverse_kl=torch.tensor(math.inf),
        jsd=torch.tensor(0.25),
        top_k_mass=torch.tensor([0.1, 0.2, 0.3]),
        kl_by_entropy_decile=torch.arange(10) / 10,
    )
    names = (*METRIC_NAMES, *DIAGNOSTIC_NAMES)
    numbers = dict(zip(names, _numbers(_terms(diagnostics)).tolist(), strict=True))
    assert [numbers[name] for name in METRIC_NAMES] == list(range(9))
    assert numbers["acceptance"] == 0.5
    assert numbers["forward_kl"] == pytest.approx(4.5), "the deciles add up to it"
    assert numbers["top_64_mass"] == pytest.approx(0.2)
    assert numbers["kl_entropy_decile_1"] == 0.0
    assert numbers["kl_entropy_decile_10"] == pytest.approx(9.0), "the mean over the decile's own tenth of the tokens"
    assert "reverse_kl" not in _finite(numbers, DIAGNOSTIC_NAMES), "JSON has no infinity"
    assert len(_finite(numbers, DIAGNOSTIC_NAMES)) == len(DIAGNOSTIC_NAMES) - 1
    assert _numbers(_terms(None)).tolist() == list(range(9))
