"""The distillation scaling law: what the paper says follows from it, and its limits."""

import itertools
import math

import pytest

from megadistill.plan.scaling_law import distilled_loss, expectation, supervised_loss

SIZES = (143e6, 546e6, 1.82e9, 7.75e9)


def test_the_supervised_law_by_hand() -> None:
    # 1e9 parameters: 3355 / 10^(9·.408) = .7151; 1e11 tokens: 18186 / 10^(11·.431) = .3302
    bracket = 3355 / 10**3.672 + 18186 / 10**4.741
    assert supervised_loss(1e9, 1e11) == pytest.approx(1.220 + math.exp(0.452 * math.log(bracket)), rel=1e-12)
    assert supervised_loss(1e30, 1e30) == pytest.approx(1.220, abs=1e-3), "the entropy of the text is left"


@pytest.mark.parametrize("parameters", SIZES)
def test_a_teacher_helps_on_few_tokens_and_labels_overtake_it_on_many(parameters: float) -> None:
    teacher = 2.1
    ahead = [
        distilled_loss(parameters, 2.0**power * 1e9, teacher=teacher) < supervised_loss(parameters, 2.0**power * 1e9)
        for power in range(1, 14)
    ]
    assert ahead[0]
    assert not ahead[-1]
    assert sum(now != then for now, then in itertools.pairwise(ahead)) == 1, "one crossing"


@pytest.mark.parametrize("parameters", SIZES[:2])
def test_a_teacher_may_be_too_strong(parameters: float) -> None:
    """The paper's U: the best teacher is neither the weakest nor the strongest."""
    teachers = [1.6 + step / 20 for step in range(28)]
    losses = [distilled_loss(parameters, 64e9, teacher=teacher) for teacher in teachers]
    best = losses.index(min(losses))
    assert 0 < best < len(teachers) - 1
    assert losses[0] > losses[best] + 0.005
    assert losses[-1] > losses[best] + 0.1


def test_a_weak_teacher_is_what_its_student_becomes() -> None:
    assert distilled_loss(7.75e9, 512e9, teacher=2.8) == pytest.approx(2.8, abs=0.01)


def test_the_teachers_flops_spent_on_labels() -> None:
    found = expectation(
        parameters=1_820_000_000, tokens=64_000_000_000, teacher=2.1, flops=60 * 10**9, teacher_flops=30 * 10**9
    )
    assert found.labels_tokens == 96_000_000_000
    assert found.labels_equal_compute == supervised_loss(1.82e9, 96e9) < found.labels
    assert found.outside == ("a loss of 2.18 (above 2.3)",)


@pytest.mark.parametrize(
    ("parameters", "tokens", "says"),
    [(143e6, 8e9, ""), (100e6, 8e9, "100M parameters"), (20e9, 64e9, "20B parameters"), (143e6, 1e12, "1T tok")],
)
def test_what_lies_outside_the_fit_is_said(parameters: float, tokens: float, says: str) -> None:
    found = expectation(parameters=int(parameters), tokens=int(tokens), teacher=2.4, flops=1, teacher_flops=1)
    assert says in ", ".join(found.outside)
    assert bool(says) == bool(found.outside)
