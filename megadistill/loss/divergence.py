"""Which loss a run asks for: the divergence, its temperature, and the weight of each term. It knows no tensors."""

import math
from dataclasses import dataclass
from enum import Enum


class DivergenceKind(Enum):
    """How far the student's distribution p_s is from the teacher's p_t, for one token."""

    FORWARD_KL = "forward_kl"
    """KL(p_t ‖ p_s) = Σ p_t (ln p_t - ln p_s): the student covers all that the teacher holds likely."""


@dataclass(frozen=True)
class Divergence:
    """The loss of one token: `kd_weight · [T²] · KL(p_t^T ‖ p_s^T) + ce_weight · CE(label) + z_loss · (ln Z)²`.

    p^T is the softmax of logits/T. CE (against the label) and ln Z (of the student's partition function) are always
    at temperature 1. The T² factor keeps the size of the KL's gradient when T grows (Hinton et al., 2015,
    arXiv:1503.02531, section 2); the z-loss keeps ln Z near zero (PaLM, arXiv:2204.02311, section 5).

    Raises:
        ValueError: a temperature that is not positive, a weight that is negative or not finite, or no weight at all.
    """

    kind: DivergenceKind = DivergenceKind.FORWARD_KL
    temperature: float = 1.0
    temperature_squared: bool = False
    """Whether the KL term carries the factor T²."""
    kd_weight: float = 1.0
    ce_weight: float = 0.0
    z_loss: float = 0.0

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

    @property
    def kd_factor(self) -> float:
        """What multiplies the KL in the loss: `kd_weight`, times T² where that is asked for."""
        return self.kd_weight * (self.temperature**2 if self.temperature_squared else 1.0)
