"""What a student may be expected to reach, distilled or from labels: a law from a paper. It knows no recipe.

Busbridge et al., Distillation Scaling Laws (2502.08606), fitted on English C4: equation 8 and its supervised twin.
Losses are cross-entropies in nats a token, of the paper's tokenizer and data: differences carry over better.

Legend: N non-embedding parameters of the student, D tokens that it reads, L_T the teacher's cross-entropy.
"""

from dataclasses import dataclass

from megadistill.plan.units import count

PARAMETERS = (143e6, 12.6e9)
"""Of the models that it was fitted on; the largest students had 7.75e9."""
TOKENS = (4e9, 512e9)
"""That the fitted students read."""
LOWEST_LOSS = 2.3
"""The fit used students above this cross-entropy."""

# Supervised: E + (A/N^a + B/D^b)^g.
_E, _A, _B, _a, _b, _g = 1.220, 3355.0, 18186.0, 0.408, 0.431, 0.452
# Distilled: A', B', a', b', g' and c0, c1, f1, d1.
_AD, _BD, _ad, _bd, _gd = 2243.0, 24181.0, 0.321, 0.637, 0.764
_C0, _C1, _F1, _D1 = 2.549, 522.6, 0.090, 1.315


@dataclass(frozen=True)
class Expectation:
    """Cross-entropies in nats a token."""

    parameters: int
    tokens: int
    teacher: float
    distilled: float
    labels: float
    """From labels, on as many tokens."""
    labels_tokens: int
    """How many tokens from labels the same FLOPs pay for."""
    labels_equal_compute: float
    outside: tuple[str, ...]
    """How this lies outside what the law was fitted on; empty within."""


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


def expectation(*, parameters: int, tokens: int, teacher: float, flops: int, teacher_flops: int) -> Expectation:
    """`flops` and `teacher_flops`: of a token, of the student's training and of the teacher's reading."""
    more = tokens * (flops + teacher_flops) // flops
    distilled = distilled_loss(parameters, tokens, teacher=teacher)
    return Expectation(
        parameters=parameters,
        tokens=tokens,
        teacher=teacher,
        distilled=distilled,
        labels=supervised_loss(parameters, tokens),
        labels_tokens=more,
        labels_equal_compute=supervised_loss(parameters, more),
        outside=_outside(parameters, tokens, distilled),
    )


def _outside(parameters: float, tokens: float, distilled: float) -> tuple[str, ...]:
    said = []
    if not PARAMETERS[0] <= parameters <= PARAMETERS[1]:
        said.append(f"{count(parameters)} parameters (143M to 12.6B were fitted)")
    if not TOKENS[0] <= tokens <= TOKENS[1]:
        said.append(f"{count(tokens)} tokens (4B to 512B)")
    if distilled < LOWEST_LOSS:
        said.append(f"a loss of {distilled:.2f} (above {LOWEST_LOSS})")
    return tuple(said)
