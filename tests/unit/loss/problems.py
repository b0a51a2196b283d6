"""Inputs for the loss tests, and their truth: the reference in float64, differentiated by autograd.

Legend: N tokens, D student width, E teacher width, V rows of the heads, U ≤ V the true vocabulary.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megadistill.loss import Divergence, reference
from megadistill.records import IGNORED_LABEL, LossTerms

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}

DIVERGENCES = {
    "kl": Divergence(),
    "kl at 2": Divergence(temperature=2.0),
    "kl at 2, squared": Divergence(temperature=2.0, temperature_squared=True),
    "kl at 1/2": Divergence(temperature=0.5),
    "ce": Divergence(kd_weight=0.0, ce_weight=1.0),
    "z-loss": Divergence(kd_weight=0.0, z_loss=1.0),
    "all": Divergence(temperature=2.0, temperature_squared=True, kd_weight=0.7, ce_weight=0.3, z_loss=0.01),
}


@dataclass(frozen=True)
class Problem:
    """The whole group's tokens and the whole heads."""

    student_hidden: Tensor
    student_weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    labels: Tensor
    token_weights: Tensor
    size: int

    def cast(self, dtype: torch.dtype) -> "Problem":
        """The same numbers, hidden states and heads in `dtype`; token weights stay as they are."""
        names = ("student_hidden", "student_weight", "teacher_hidden", "teacher_weight")
        return replace(self, **{name: getattr(self, name).to(dtype) for name in names})


@dataclass(frozen=True)
class Truth:
    terms: LossTerms
    hidden_grad: Tensor
    weight_grad: Tensor


def problem(
    seed: int, *, tokens: int = 13, D: int = 5, E: int = 7, rows: int = 24, size: int = 21, scale: float = 1.0
) -> Problem:
    """Random, in float64 but exact in float32. Some tokens have no label; some have weight 0."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).double()

    labels = torch.randint(size, (tokens,), generator=generator)
    weights = (torch.rand(tokens, generator=generator) / max(1, tokens)).double()
    labels[2::5] = IGNORED_LABEL
    weights[4::6] = 0
    return Problem(
        student_hidden=normal(tokens, D) * scale,
        student_weight=normal(rows, D),
        teacher_hidden=normal(tokens, E) * scale,
        teacher_weight=normal(rows, E),
        labels=labels,
        token_weights=weights,
        size=size,
    )


def truth(p: Problem, divergence: Divergence | None, *, z_loss: float = 0.0) -> Truth:
    """In float64; `divergence=None` is the label loss."""
    p = p.cast(torch.float64)
    hidden, weight = p.student_hidden.clone().requires_grad_(), p.student_weight.clone().requires_grad_()
    if divergence is None:
        terms = reference.label_loss(
            hidden, weight, p.labels, token_weights=p.token_weights, vocab_size=p.size, z_loss=z_loss
        )
    else:
        terms = reference.distill_loss(
            hidden,
            weight,
            p.teacher_hidden,
            p.teacher_weight,
            p.labels,
            token_weights=p.token_weights,
            divergence=divergence,
            vocab_size=p.size,
        )
    hidden_grad, weight_grad = torch.autograd.grad(terms.loss, (hidden, weight))
    return Truth(terms, hidden_grad, weight_grad)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """‖found - expected‖ / ‖expected‖; where nothing is expected, ‖found‖."""
    scale = float(expected.double().norm())
    return float((found.double() - expected.double()).norm()) / (scale if scale > 0 else 1.0)
