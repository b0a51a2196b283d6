"""The divergences that a loss may minimise, with what each needs, and the weights of a loss's terms.

The arithmetic of a kind is in `loss/reference.py` (its definition) and `loss/pointwise.py` (what a run computes).
"""

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal


@dataclass(frozen=True)
class Parameter:
    """A number that a divergence takes besides the temperature: the key `loss.beta` or `loss.alpha` of a recipe."""

    name: Literal["beta", "alpha"]
    symbol: str
    meaning: str
    default: float
    includes_one: bool
    """The range is [0, 1] or [0, 1)."""

    @property
    def description(self) -> str:
        """Meaning, range and default."""
        return f"{self.meaning}, from 0 to {'' if self.includes_one else 'less than '}1 (default {self.default:g})"

    def require_in_range(self, value: float) -> None:
        """
        Raises:
            ValueError: the value is outside of the range.
        """
        if not (0 <= value < 1 or (self.includes_one and value == 1)):
            raise ValueError(f"{self.name} is {value}; it is {self.description}")


BETA = Parameter("beta", "β", "the teacher's share of the mixture", default=0.5, includes_one=True)
ALPHA = Parameter("alpha", "α", "the teacher's share of the mixture", default=0.1, includes_one=False)


@dataclass(frozen=True)
class DivergenceSpec:
    """All that the rest of the package must know of a divergence. Its arithmetic is in `loss`."""

    title: str
    """The name in a model card and in messages."""
    parameter: Parameter | None = None
    finite_at_zero: bool = True
    """Whether the value stays finite where the teacher's probability is 0."""
    limits: tuple[tuple[float, str], ...] = ()
    """(parameter value, name of the kind whose formula holds there)."""


class DivergenceKind(StrEnum):
    """How far the student's distribution p_s is from the teacher's p_t, for one token. A value is a recipe's word."""

    spec: DivergenceSpec

    def __new__(cls, name: str, spec: DivergenceSpec | None = None) -> "DivergenceKind":
        assert spec is not None, f"{name} needs a DivergenceSpec"
        member = str.__new__(cls, name)
        member._value_ = name
        member.spec = spec
        return member

    FORWARD_KL = "forward_kl", DivergenceSpec("forward KL, KL(teacher ‖ student)")
    """KL(p_t ‖ p_s) = Σ p_t (ln p_t - ln p_s): the student covers all that the teacher holds likely."""
    REVERSE_KL = "reverse_kl", DivergenceSpec("reverse KL, KL(student ‖ teacher)", finite_at_zero=False)
    """KL(p_s ‖ p_t): the student keeps away from what the teacher holds unlikely. Infinite where p_t is 0."""
    JSD = (
        "jsd",
        DivergenceSpec(
            "generalised Jensen-Shannon divergence", BETA, limits=((0.0, "forward_kl"), (1.0, "reverse_kl"))
        ),
    )
    """β KL(p_t ‖ M) + (1-β) KL(p_s ‖ M), M = β p_t + (1-β) p_s (GKD, Agarwal et al., arXiv:2306.13649, section 2).
    β = 0 and β = 1, where that is 0, are forward and reverse KL by convention."""
    SKEW_KL = "skew_kl", DivergenceSpec("skew KL", ALPHA, limits=((0.0, "forward_kl"),))
    """KL(p_t ‖ α p_t + (1-α) p_s): forward KL, bounded by -ln α (DistiLLM, Ko et al., arXiv:2402.03898)."""
    TVD = "tvd", DivergenceSpec("total variation distance")
    """Total variation, ½ Σ |p_t - p_s|: bounded by 1, and so is its gradient."""


def parameter_owners(name: str) -> dict[DivergenceKind, Parameter]:
    """The kinds whose parameter has this name."""
    return {kind: p for kind in DivergenceKind if (p := kind.spec.parameter) is not None and p.name == name}


def require_parameter(kind: DivergenceKind, name: str, value: float) -> None:
    """
    Raises:
        ValueError: the parameter `name` is not that of `kind`, or the value is outside of its range.
    """
    if (parameter := kind.spec.parameter) is None or parameter.name != name:
        raise ValueError(f"{name} is {value}, but it belongs to {' or '.join(parameter_owners(name))}, not {kind}")
    parameter.require_in_range(value)


@dataclass(frozen=True)
class Divergence:
    """The loss of one token: `kd_weight · [T²] · D(p_t^T, p_s^T) + ce_weight · CE(label) + z_loss · (ln Z)²`.

    p^T is the softmax of logits/T. CE (against the label) and ln Z (of the student's partition function) are always
    at temperature 1. The T² factor keeps the size of the divergence's gradient when T grows (Hinton et al., 2015,
    arXiv:1503.02531, section 2); the z-loss keeps ln Z near zero (PaLM, arXiv:2204.02311, section 5).

    Raises:
        ValueError: a value outside its range, a parameter for a divergence that has none, or no weight at all.
    """

    kind: DivergenceKind = DivergenceKind.FORWARD_KL
    temperature: float = 1.0
    temperature_squared: bool = False
    """Whether the divergence carries the factor T²."""
    parameter: float | None = None
    """β of JSD, α of skew KL: the teacher's share of the mixture M. None: the kind's default."""
    kd_weight: float = 1.0
    ce_weight: float = 0.0
    z_loss: float = 0.0
    label_fraction: float = 0.0
    """The share of a call's labelled tokens, those of lowest teacher entropy (at temperature 1), that learn from the
    label instead: CE at `kd_weight` in place of the divergence (Goyal et al., arXiv:2509.01649). The tokens of the
    vocab group are one population. It costs one more product with the teacher's head."""

    def __post_init__(self) -> None:
        if not isinstance(self.kind, DivergenceKind):
            known = ", ".join(repr(kind) for kind in DivergenceKind)
            raise ValueError(f"kind is {self.kind!r}, which is no DivergenceKind; pass one of {known}")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"temperature is {self.temperature}; it divides the logits, so pass a positive number")
        for name in ("kd_weight", "ce_weight", "z_loss"):
            weight = getattr(self, name)
            if not (math.isfinite(weight) and weight >= 0):
                raise ValueError(f"{name} is {weight}; pass 0 to leave the term out, or a positive number")
        if self.kd_weight == self.ce_weight == self.z_loss == 0:
            raise ValueError("kd_weight, ce_weight and z_loss are all 0, so nothing is learned; set one of them")
        if self.parameter is not None:
            if self.kind.spec.parameter is None:
                raise ValueError(f"parameter is {self.parameter}, but {self.kind} takes none: leave it out")
            self.kind.spec.parameter.require_in_range(self.parameter)
        if not 0 <= self.label_fraction < 1:
            raise ValueError(f"label_fraction is {self.label_fraction}; it is a share of the tokens, from 0 to below 1")
        if self.label_fraction > 0 and self.kd_weight == 0:
            raise ValueError("label_fraction gives tokens the label in place of the divergence, but kd_weight is 0")

    @property
    def kd_factor(self) -> float:
        """The divergence's factor in the loss: its weight, and T² where the loss carries it."""
        return self.kd_weight * (self.temperature**2 if self.temperature_squared else 1.0)

    @property
    def share(self) -> float:
        """The parameter, or the kind's default; 0 for a kind without one."""
        if self.parameter is not None or self.kind.spec.parameter is None:
            return self.parameter or 0.0
        return self.kind.spec.parameter.default

    @property
    def formula(self) -> DivergenceKind:
        """The kind whose formula computes it: JSD at β = 0 and β = 1 is a KL, and so is skew KL at α = 0."""
        return DivergenceKind(dict(self.kind.spec.limits).get(self.share, self.kind))
