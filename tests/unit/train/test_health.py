"""Numbers that are not finite stop a run, and the message names whose they are."""

import math

import pytest

from megadistill.errors import OperatorFault
from megadistill.records import METRIC_NAMES
from megadistill.train.health import require_finite

FINE = {**dict.fromkeys(METRIC_NAMES, 1.0), "grad_norm": 1.0}


def test_finite_numbers_pass() -> None:
    require_finite(3, FINE)
    require_finite(3, {"grad_norm": 0.0})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", FINE)
def test_one_bad_number_is_named_with_its_step(name: str, value: float) -> None:
    with pytest.raises(OperatorFault, match=rf"^step 7: {name} is -?(nan|inf), so ") as caught:
        require_finite(7, {**FINE, name: value})
    assert ("teacher is broken" in str(caught.value)) == name.startswith("teacher_")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["teacher_ce", "teacher_entropy"])
def test_a_broken_teacher_is_named_before_what_it_spoils(name: str) -> None:
    spoiled = {**FINE, "loss": math.nan, "kl": math.nan, "grad_norm": math.nan, name: math.nan}
    with pytest.raises(OperatorFault, match=f"{name} is nan, so the teacher is broken"):
        require_finite(1, spoiled)
