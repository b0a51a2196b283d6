"""Experts of a mixture: fused into one parameter in transformers, a tensor for each in a checkpoint.

transformers converts a whole model when it loads and saves it (`transformers.conversion_mapping`). This is the
conversion of a single parameter, so that a stage reads only its own experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ExpertNames:
    """Names of the block of experts and router, and of an expert's three matrices, in a family's checkpoints."""

    block: str
    gate: str
    up: str
    down: str


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint and its place: it is `parameter[index]`, or the whole parameter if `index` is empty."""

    name: str
    index: tuple[int | slice, ...] = ()

    def view(self, parameter: Tensor) -> Tensor:
        """The part of the parameter that this tensor fills."""
        return parameter[self.index] if self.index else parameter


FUSED = (".mlp.experts.gate_up_proj", ".mlp.experts.down_proj")
"""Suffixes of the fused parameters' names: [experts, 2 x inner, width], gate before up, and [experts, width, inner]."""


def stored_tensors(name: str, shape: Sequence[int], experts: ExpertNames | None) -> list[StoredTensor]:
    """The tensors of a checkpoint that make up the parameter `name`: itself, or the tensors of each expert."""
    layer, mlp, rest = name.partition(".mlp.")
    if experts is None or not mlp:
        return [StoredTensor(name)]
    block = f"{layer}.{experts.block}"
    if not name.endswith(FUSED):
        return [StoredTensor(f"{block}.{rest}")]
    if name.endswith("down_proj"):
        return [
            StoredTensor(f"{block}.experts.{expert}.{experts.down}.weight", (expert,)) for expert in range(shape[0])
        ]
    inner = shape[1] // 2
    return [
        StoredTensor(f"{block}.experts.{expert}.{matrix}.weight", (expert, rows))
        for expert in range(shape[0])
        for matrix, rows in ((experts.gate, slice(0, inner)), (experts.up, slice(inner, None)))
    ]
