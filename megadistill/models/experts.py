"""Room `model`: the experts of a mixture: fused in transformers, one by one in a checkpoint. It reads no file.

transformers turns one into the other when it loads and saves a whole model (`transformers.conversion_mapping`); here
the same is said of a single parameter, so that a stage reads no expert of another one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Size, Tensor


@dataclass(frozen=True)
class ExpertNames:
    """How a family's checkpoints name the block of experts and router, and the three matrices of an expert."""

    block: str
    gate: str
    up: str
    down: str


@dataclass(frozen=True)
class Piece:
    """A tensor of a checkpoint, and where it stands: it is `parameter[index]`, all of it where `index` is empty."""

    name: str
    index: tuple[int | slice, ...] = ()

    def of(self, parameter: Tensor) -> Tensor:
        """The view of the parameter that this piece fills."""
        return parameter[self.index] if self.index else parameter


FUSED = (".mlp.experts.gate_up_proj", ".mlp.experts.down_proj")
"""Endings of the fused parameters' names: [experts, 2 x inner, width], gate before up, and [experts, width, inner]."""


def pieces(name: str, shape: Sequence[int], experts: ExpertNames | None) -> list[Piece]:
    """What a checkpoint holds of the parameter `name`: itself, or with `experts` its tensors, expert by expert."""
    layer, found, rest = name.partition(".mlp.")
    if experts is None or not found:
        return [Piece(name)]
    block = f"{layer}.{experts.block}"
    if not name.endswith(FUSED):
        return [Piece(f"{block}.{rest}")]
    if name.endswith("down_proj"):
        return [Piece(f"{block}.experts.{expert}.{experts.down}.weight", (expert,)) for expert in range(shape[0])]
    inner = shape[1] // 2
    return [
        Piece(f"{block}.experts.{expert}.{matrix}.weight", (expert, rows))
        for expert in range(shape[0])
        for matrix, rows in ((experts.gate, slice(0, inner)), (experts.up, slice(inner, None)))
    ]


def active_share(name: str, shape: Size, experts_of_a_token: int) -> int:
    """Elements of the parameter `name` that one token is multiplied by: `experts_of_a_token` experts of the fused."""
    return shape.numel() // shape[0] * experts_of_a_token if name.endswith(FUSED) else shape.numel()
