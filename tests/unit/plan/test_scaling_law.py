"""The distillation scaling law: what the paper says follows from it, and its limits."""

import itertools
import math

import pytest

from megadistill.plan.scaling_law import distilled_loss, forecast, outside_fit, supervised_loss
from tests.unit.plan.cases import LLAMA3_8B_BODY, large

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
    requirements = large()
    expected = forecast(requirements, teacher_loss=2.1, teacher_tokens=None)
    assert expected is not None
    student, teacher = requirements.models
    more = requirements.tokens * (student.flops + teacher.flops) // student.flops
    assert expected.labels_equal_compute_tokens == more
    assert expected.labels_equal_compute_nats_per_token == supervised_loss(LLAMA3_8B_BODY, more)
    assert expected.labels_equal_compute_nats_per_token < expected.labels_nats_per_token
    assert expected.distilled_nats_per_token == distilled_loss(LLAMA3_8B_BODY, requirements.tokens, teacher=2.1)
    assert expected.outside == outside_fit(LLAMA3_8B_BODY, requirements.tokens, expected.distilled_nats_per_token)


@pytest.mark.parametrize(
    ("parameters", "tokens", "reason"),
    [(143e6, 8e9, ""), (100e6, 8e9, "100M parameters"), (20e9, 64e9, "20B parameters"), (143e6, 1e12, "1T tok")],
)
def test_amounts_outside_the_fit_are_named(parameters: float, tokens: float, reason: str) -> None:
    outside = outside_fit(parameters, tokens, 2.4)
    assert reason in ", ".join(outside)
    assert bool(reason) == bool(outside)


def test_a_loss_below_the_fit_is_named() -> None:
    assert outside_fit(1.82e9, 64e9, 2.18) == ("a loss of 2.18 (above 2.3)",)
