"""How a call of the loss computes: memory for logits, eager or compiled arithmetic, diagnostics."""

from dataclasses import dataclass
from enum import Enum

import torch

from megadistill.config.auto import Choice, choose_compile

LOGIT_MEMORY = 512 << 20
"""Default bytes of logits: two models' of 2048 tokens, at a slice of 32,768 ids. With half of it the products of such
chunks are some 4 % slower on a CPU."""


class Elementwise(Enum):
    """How the arithmetic between the products is run: the softmaxes, the divergence and its gradient."""

    AUTO = "auto"
    """Compiled on an accelerator with Triton, else eager."""
    EAGER = "eager"
    """Torch's own operations. Works everywhere: on a CPU over blocks of rows; on an accelerator, where each operation
    of a block is a launch, over a whole chunk, with some temporaries as large as one model's logits."""
    COMPILED = "compiled"
    """The same functions through `torch.compile`: one fused kernel each. Needs a C++ compiler on a CPU, Triton on a
    GPU, and some seconds at the first call."""

    def on(self, device: torch.device) -> "Elementwise":
        """Eager or compiled: what it comes to on this device."""
        return Elementwise(self.choice(accelerator=device.type != "cpu").value)

    def choice(self, *, accelerator: bool, triton: bool | None = None) -> Choice:
        """The same with its reason. `triton`: whether it is installed; None: look for it here."""
        if self is Elementwise.AUTO:
            return choose_compile("auto", accelerator=accelerator, triton=triton)
        return choose_compile(self is Elementwise.COMPILED, accelerator=accelerator, triton=triton)


@dataclass(frozen=True)
class LossOptions:
    """Options that change the cost of a call, and none of its values.

    Raises:
        ValueError: `logit_memory` is not positive.
    """

    logit_memory: int = LOGIT_MEMORY
    """Bytes of logits, of all models, that exist at a time on a rank: the tokens of a chunk follow from it, at least
    one a rank. The smallest of the group counts."""
    elementwise: Elementwise = Elementwise.AUTO
    diagnostics: bool = False
    """Whether `LossTerms.diagnostics` is computed, where there is a teacher: each chunk's logits are read once more."""
    per_token: bool = False
    """Whether `LossTerms.per_token` is computed: one more small all-reduce."""

    def __post_init__(self) -> None:
        if self.logit_memory < 1:
            raise ValueError(f"logit_memory is {self.logit_memory} bytes; a chunk needs at least one token's logits")
