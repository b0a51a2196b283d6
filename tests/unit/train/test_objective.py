"""The recipe's loss section over a run: every key reaches the loss, weights move together, draws are a slot's own."""

from dataclasses import asdict

import pytest
import torch

from megadistill.config.recipe import LossSection, ScheduleSection, TargetsSection
from megadistill.loss import Elementwise, LossOptions
from megadistill.loss.sparse import Sampled, SampledDistinct, Threshold, TopK, TopP
from megadistill.train.objective import Objective, selection, uniforms
from megadistill.types import Tail

STEPS = 10


def objective(**loss: object) -> Objective:
    return Objective(LossSection.model_validate(loss), length=STEPS, seed=1)


@pytest.mark.parametrize(
    "loss",
    [
        {"temperature": 2.5, "temperature_squared": True, "kd_weight": 0.7, "ce_weight": 0.3, "z_loss": 1e-4},
        {"divergence": "jsd", "beta": 0.25, "label_fraction": 0.15},
        {"divergence": "skew_kl", "alpha": 0.25},
        {"divergence": "reverse_kl"},
        {"divergence": "tvd"},
    ],
)
def test_every_key_of_the_recipe_reaches_the_loss(loss: dict[str, object]) -> None:
    made = objective(**loss)
    values = asdict(made.divergence(3))
    assert values.pop("kind") is made.loss.divergence
    assert values.pop("parameter") == (loss.get("beta") or loss.get("alpha"))
    of_the_divergence, options = (
        {"divergence", "beta", "alpha"},
        {"logit_memory_mb", "elementwise", "diagnostics_every"},
    )
    elsewhere = {*of_the_divergence, *options, "schedule", "targets", "router_aux_loss_coef", "router_z_loss_coef"}
    assert values == made.loss.model_dump(exclude=elsewhere)
    assert made.scheduled_weights(3) is None


def test_how_the_loss_is_computed_is_handed_on_too() -> None:
    made = objective(logit_memory_mb=3, elementwise="compiled", diagnostics_every=4)
    assert made.options(diagnostics=True) == LossOptions(3 * 1024 * 1024, Elementwise.COMPILED, diagnostics=True)
    assert [step for step in range(1, 10) if made.computes_diagnostics(step)] == [4, 8]
    assert not any(objective().computes_diagnostics(step) for step in range(1, 10))


def test_the_label_takes_what_the_divergence_gives_up() -> None:
    schedule = ScheduleSection(kind="wsd", warmup_steps=2, decay_steps=4, final_ratio=0.0)
    made = objective(kd_weight=0.9, ce_weight=0.1, label_fraction=0.2, schedule=schedule.model_dump())
    values = [made.divergence(step) for step in range(1, STEPS + 1)]
    shares = [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    assert [d.kd_weight for d in values] == pytest.approx([0.9 * share for share in shares])
    assert [d.kd_weight + d.ce_weight for d in values] == pytest.approx([1.0] * STEPS)
    assert [d.label_fraction for d in values] == [0.2] * 9 + [0.0], "with no divergence left there is nothing to route"
    assert made.scheduled_weights(8) == {"kd_weight": values[7].kd_weight, "ce_weight": values[7].ce_weight}


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ({}, (Sampled(50), Tail.RENORMALISED)),
        ({"draws": 16}, (Sampled(16), Tail.RENORMALISED)),
        ({"select": "sampled_distinct"}, (SampledDistinct(256), Tail.RENORMALISED)),
        ({"select": "top_k", "k": 12}, (TopK(12), Tail.OTHER)),
        ({"select": "top_k", "k": 12, "tail": "renormalised"}, (TopK(12), Tail.RENORMALISED)),
        ({"select": "threshold", "epsilon": 1e-3, "tail": "dropped"}, (Threshold(1e-3), Tail.DROPPED)),
        ({"select": "top_p", "p": 0.95, "max_ids": 50}, (TopP(0.95, 50), Tail.OTHER)),
    ],
)
def test_the_recipes_targets_are_a_selection(targets: dict[str, object], expected: tuple[object, Tail]) -> None:
    assert selection(TargetsSection.model_validate(targets)) == expected


def test_a_sequences_draws_are_those_of_its_slot() -> None:
    """Whoever computes them, beside whichever other slots, before or after a resume."""
    slots = torch.tensor([7, 2, 1_000_000_007])
    values = uniforms(slots, sequence=5, per_token=3, seed=1)
    assert values.shape == (15, 3)
    assert values.dtype == torch.float64
    assert bool(((values >= 0) & (values < 1)).all())
    assert torch.equal(values[5:10], uniforms(slots[1:2], sequence=5, per_token=3, seed=1))
    assert not torch.equal(values[:5], values[5:10])
    assert not torch.equal(values, uniforms(slots, sequence=5, per_token=3, seed=2))
    assert values[0, 0].item() == pytest.approx(0.47053192100687613, abs=1e-15), (
        "the draws of a run are part of its numbers"
    )


def test_draws_are_uniform() -> None:
    values = uniforms(torch.arange(40), sequence=50, per_token=50, seed=3).flatten()
    counts = torch.histc(values.float(), bins=20, min=0, max=1)
    assert bool(((counts / values.numel() * 20 - 1).abs() < 0.05).all())  # 100,000 draws: five standard deviations
