"""Expected loss of a student, distilled or from labels, by the distillation scaling law.

Busbridge et al., Distillation Scaling Laws (2502.08606), fitted on English C4: equation 8 and its supervised twin.
Losses are cross-entropies in nats a token with the paper's tokenizer and data: differences carry over better.

Legend: N non-embedding parameters of the student, D tokens that it reads, L_T the teacher's cross-entropy.
"""

from dataclasses import dataclass

from megadistill.errors import UserError
from megadistill.plan.counts.requirements import Requirements
from megadistill.units import count

PARAMETERS = (143e6, 12.6e9)
"""Smallest and largest number of parameters of the fitted models; the largest students had 7.75e9."""
TOKENS = (4e9, 512e9)
"""Fewest and most tokens that the fitted students read."""
LOWEST_LOSS = 2.3
"""Lowest cross-entropy of the fitted students."""

# Supervised: E + (A/N^a + B/D^b)^g.
_E, _A, _B, _a, _b, _g = 1.220, 3355.0, 18186.0, 0.408, 0.431, 0.452
# Distilled: A', B', a', b', g' and c0, c1, f1, d1.
_AD, _BD, _ad, _bd, _gd = 2243.0, 24181.0, 0.321, 0.637, 0.764
_C0, _C1, _F1, _D1 = 2.549, 522.6, 0.090, 1.315


@dataclass(frozen=True)
class Expectation:
    """Expected cross-entropies."""

    parameters: int
    """N: the student's non-embedding parameters."""
    tokens: int
    """D: tokens of the run."""
    teacher_nats_per_token: float
    """L_T"""
    distilled_nats_per_token: float
    """Loss of the distilled student."""
    labels_nats_per_token: float
    """Loss of a student from labels, on as many tokens."""
    labels_equal_compute_tokens: int
    """Tokens from labels that take the same FLOPs."""
    labels_equal_compute_nats_per_token: float
    """Loss of a student from labels, on `labels_equal_compute_tokens`."""
    outside: tuple[str, ...]
    """Reasons why this lies outside the fitted range; empty within."""


def supervised_loss(parameters: float, tokens: float) -> float:
    """L~(N, D) of training from labels."""
    return float(_E + (_A / parameters**_a + _B / tokens**_b) ** _g)


def distilled_loss(parameters: float, tokens: float, *, teacher: float) -> float:
    """L_S(N, D, L_T).

    The factor falls where the teacher is far below what the student could reach by itself: the capacity gap.
    """
    alone = supervised_loss(parameters, tokens)
    gap: float = (1 + (teacher / (alone * _D1)) ** (1 / _F1)) ** (-_C1 * _F1)
    own: float = (_AD / parameters**_ad + _BD / tokens**_bd) ** _gd
    return float(teacher + gap * own / teacher**_C0)


def forecast(
    requirements: Requirements, *, teacher_loss: float | None, teacher_tokens: float | None
) -> Expectation | None:
    """The law's expectation for a run; None where not one teacher is in memory, or its quality is not given.

    Args:
        teacher_loss: its cross-entropy, nats a token.
        teacher_tokens: in its place, the tokens that it was trained on, for which the supervised law gives a loss.

    Raises:
        UserError: a value out of range, or both values.
    """
    if teacher_loss is not None and teacher_tokens is not None:
        raise UserError("--teacher-loss and --teacher-tokens both describe the teacher: give one")
    for option, value in (("--teacher-loss", teacher_loss), ("--teacher-tokens", teacher_tokens)):
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"{option} {value:g}: give a positive number")
    if len(requirements.models) != 2:
        return None
    student, teacher = requirements.models
    if teacher_tokens is not None:
        teacher_loss = supervised_loss(teacher.parameters.body, teacher_tokens)
    if teacher_loss is None:
        return None
    parameters, tokens = student.parameters.body, requirements.earlier_tokens + requirements.tokens
    labels_tokens = tokens * requirements.flops_per_token // student.flops
    distilled = distilled_loss(parameters, tokens, teacher=teacher_loss)
    return Expectation(
        parameters=parameters,
        tokens=tokens,
        teacher_nats_per_token=teacher_loss,
        distilled_nats_per_token=distilled,
        labels_nats_per_token=supervised_loss(parameters, tokens),
        labels_equal_compute_tokens=labels_tokens,
        labels_equal_compute_nats_per_token=supervised_loss(parameters, labels_tokens),
        outside=outside_fit(parameters, tokens, distilled),
    )


def outside_fit(parameters: float, tokens: float, distilled: float) -> tuple[str, ...]:
    """Each amount that lies outside the range that the law was fitted on."""
    reasons = []
    if not PARAMETERS[0] <= parameters <= PARAMETERS[1]:
        reasons.append(f"{count(parameters)} parameters (143M to 12.6B were fitted)")
    if not TOKENS[0] <= tokens <= TOKENS[1]:
        reasons.append(f"{count(tokens)} tokens (4B to 512B)")
    if distilled < LOWEST_LOSS:
        reasons.append(f"a loss of {distilled:.2f} (above {LOWEST_LOSS})")
    return tuple(reasons)
