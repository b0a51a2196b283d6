"""Which loss a run asks for: the divergence, its temperature, and the weight of each term. It knows no tensors."""

import math
from dataclasses import dataclass
from enum import Enum


class DivergenceKind(Enum):
    """How far the student's distribution p_s is from the teacher's p_t, for one token."""

    FORWARD_KL = "forward_kl"
    """KL(p_t ‖ p_s) = Σ p_t (ln p_t - ln p_s): the student covers all that the teacher holds likely."""
    REVERSE_KL = "reverse_kl"
    """KL(p_s ‖ p_t): the student keeps away from what the teacher holds unlikely. Infinite where p_t is 0."""
    JSD = "jsd"
    """β KL(p_t ‖ M) + (1-β) KL(p_s ‖ M), M = β p_t + (1-β) p_s (GKD, Agarwal et al., arXiv:2306.13649, section 2).
    β = 0 and β = 1, where that is 0, are forward and reverse KL by convention."""
    SKEW_KL = "skew_kl"
    """KL(p_t ‖ α p_t + (1-α) p_s): forward KL, bounded by -ln α (DistiLLM, Ko et al., arXiv:2402.03898)."""
    TVD = "tvd"
    """Total variation, ½ Σ |p_t - p_s|: bounded by 1, and so is its gradient."""


class Elementwise(Enum):
    """Who does the arithmetic between the products: the softmaxes, the divergence and its slope."""

    EAGER = "eager"
    """Torch's own operations, over blocks of rows. Works everywhere."""
    COMPILED = "compiled"
    """The same functions through `torch.compile`: one fused kernel a stage. Needs a C++ compiler on a CPU, Triton on a
    GPU, and some seconds at the first call."""


@dataclass(frozen=True)
class Divergence:
    """The loss of one token: `kd_weight · [T²] · D(p_t^T, p_s^T) + ce_weight · CE(label) + z_loss · (ln Z)²`.

    p^T is the softmax of logits/T. CE (against the label) and ln Z (of the student's partition function) are always
    at temperature 1. The T² factor keeps the size of the divergence's gradient when T grows (Hinton et al., 2015,
    arXiv:1503.02531, section 2); the z-loss keeps ln Z near zero (PaLM, arXiv:2204.02311, section 5).

    Raises:
        ValueError: a value outside its range, a β or α for a divergence that has none, or no weight at all.
    """

    kind: DivergenceKind = DivergenceKind.FORWARD_KL
    temperature: float = 1.0
    temperature_squared: bool = False
    """Whether the divergence carries the factor T²."""
    beta: float | None = None
    """JSD's β, the teacher's share of the mixture: in [0, 1], 0.5 where nothing is said."""
    alpha: float | None = None
    """Skew KL's α, the teacher's share of the mixture: in [0, 1), 0.1 where nothing is said."""
    kd_weight: float = 1.0
    ce_weight: float = 0.0
    z_loss: float = 0.0
    label_fraction: float = 0.0
    """The share of a call's labelled tokens, those where the teacher is surest (lowest entropy, at temperature 1), that
    learn from the label instead: CE at `kd_weight` in place of the divergence (Goyal et al., arXiv:2509.01649). The
    tokens of the vocab group are one population. It costs one more product with the teacher's head."""

    def __post_init__(self) -> None:
        if not isinstance(self.kind, DivergenceKind):
            known = ", ".join(str(kind) for kind in DivergenceKind)
            raise ValueError(f"kind is {self.kind!r}, which is no DivergenceKind; pass one of {known}")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"temperature is {self.temperature}; it divides the logits, so pass a positive number")
        for name in ("kd_weight", "ce_weight", "z_loss"):
            weight = getattr(self, name)
            if not (math.isfinite(weight) and weight >= 0):
                raise ValueError(f"{name} is {weight}; pass 0 to leave the term out, or a positive number")
        if self.kd_weight == self.ce_weight == self.z_loss == 0:
            raise ValueError("kd_weight, ce_weight and z_loss are all 0, so nothing is learned; set one of them")
        for name, kind in (("beta", DivergenceKind.JSD), ("alpha", DivergenceKind.SKEW_KL)):
            if getattr(self, name) is not None and self.kind is not kind:
                raise ValueError(
                    f"{name} is {getattr(self, name)}, but it belongs to {kind.value}, not {self.kind.value}"
                )
        if self.beta is not None and not 0 <= self.beta <= 1:
            raise ValueError(f"beta is {self.beta}; it is the teacher's share of the mixture, from 0 to 1")
        if self.alpha is not None and not 0 <= self.alpha < 1:
            raise ValueError(f"alpha is {self.alpha}; it is the teacher's share of the mixture, from 0 to below 1")
        if not 0 <= self.label_fraction < 1:
            raise ValueError(f"label_fraction is {self.label_fraction}; it is a share of the tokens, from 0 to below 1")
        if self.label_fraction > 0 and self.kd_weight == 0:
            raise ValueError("label_fraction gives tokens the label in place of the divergence, but kd_weight is 0")

    @property
    def kd_factor(self) -> float:
        """What the divergence is multiplied with."""
        return self.kd_weight * (self.temperature**2 if self.temperature_squared else 1.0)

    @property
    def formula(self) -> DivergenceKind:
        """The kind whose formula computes it: JSD at β = 0 and β = 1 is a KL, and so is skew KL at α = 0."""
        if self.kind is DivergenceKind.JSD and self.mixture in (0.0, 1.0):
            return DivergenceKind.FORWARD_KL if self.mixture == 0.0 else DivergenceKind.REVERSE_KL
        if self.kind is DivergenceKind.SKEW_KL and self.mixture == 0.0:
            return DivergenceKind.FORWARD_KL
        return self.kind

    @property
    def mixture(self) -> float:
        """The teacher's share of M, for the kinds that have one."""
        if self.kind is DivergenceKind.SKEW_KL:
            return 0.1 if self.alpha is None else self.alpha
        return 0.5 if self.beta is None else self.beta
