"""How a call of the loss computes: memory for logits, eager or compiled arithmetic, diagnostics."""

from dataclasses import dataclass
from enum import Enum

LOGIT_MEMORY = 512 << 20
"""Default bytes of logits: two models' of 2048 tokens, at a slice of 32,768 ids. With half of it the products of such
chunks are some 4 % slower on a CPU."""


class Elementwise(Enum):
    """How the arithmetic between the products is run: the softmaxes, the divergence and its gradient."""

    EAGER = "eager"
    """Torch's own operations, over blocks of rows. Works everywhere."""
    COMPILED = "compiled"
    """The same functions through `torch.compile`: one fused kernel each. Needs a C++ compiler on a CPU, Triton on a
    GPU, and some seconds at the first call."""


@dataclass(frozen=True)
class LossOptions:
    """Options that change the cost of a call, and none of its values.

    Raises:
        ValueError: `logit_memory` is not positive.
    """

    logit_memory: int = LOGIT_MEMORY
    """Bytes of logits, of all models, that exist at a time on a rank: the tokens of a chunk follow from it, at least
    one a rank. The smallest of the group counts."""
    elementwise: Elementwise = Elementwise.EAGER
    diagnostics: bool = False
    """Whether `LossTerms.diagnostics` is computed, where there is a teacher: each chunk's logits are read once more."""

    def __post_init__(self) -> None:
        if self.logit_memory < 1:
            raise ValueError(f"logit_memory is {self.logit_memory} bytes; a chunk needs at least one token's logits")
