"""Experts of a mixture: their tensors in a checkpoint, their routers, and the weights of the routers' losses.

transformers fuses the experts of a layer into one parameter, and converts a whole model when it loads and saves it
(`transformers.conversion_mapping`). This is the conversion of a single parameter, so that a stage reads only its own
experts.
"""

from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import Module

from megadistill.config.recipe import LossSection


@dataclass(frozen=True)
class ExpertNames:
    """Names of the block of experts and router, and of an expert's three matrices, in a family's checkpoints."""

    block: str
    gate: str = ""
    up: str = ""
    down: str = ""
    """Empty, like the other two, where a checkpoint has the fused parameters, too; `gate` where experts have none."""
    module: str = "mlp"
    """Name of the block in a layer of transformers' model."""
    renamed: tuple[tuple[str, str], ...] = ()
    """(Name within the block in transformers' model, name in a checkpoint) of parameters that have two."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint and its place: it is `parameter[index]`, or the whole parameter if `index` is empty."""

    name: str
    index: tuple[int | slice, ...] = ()

    def view(self, parameter: Tensor) -> Tensor:
        """The part of the parameter that this tensor fills."""
        return parameter[self.index] if self.index else parameter


_GATE_UP, _UP, _DOWN = "experts.gate_up_proj", "experts.up_proj", "experts.down_proj"
"""Names of the fused parameters: [experts, 2 x inner, width], gate before up; of experts without a gate [experts,
inner, width]; and [experts, width, inner]."""


def is_stacked(name: str) -> bool:
    """Whether a parameter of a model with experts holds those of a layer, [experts, ..]: weights, or biases."""
    return ".experts." in name


def number_of_experts(config: Any) -> int:
    """Experts of a layer; families give the key two names."""
    return int(config.num_experts if hasattr(config, "num_experts") else config.num_local_experts)


def experts_per_token(config: Any) -> int:
    """Experts that a token goes through; families give the key two names."""
    return int(config.top_k_experts if hasattr(config, "top_k_experts") else config.num_experts_per_tok)


def stored_tensors(
    name: str, shape: Sequence[int], experts: ExpertNames | None, held: Container[str] = ()
) -> list[StoredTensor]:
    """The tensors of a checkpoint that make up the parameter `name`: itself, or the tensors of each expert.

    `held`: names of a folder. Qwen 3.5 is published with the fused parameters, and written with a tensor for each
    expert: those that it has are read.
    """
    layer, _, rest = ("", "", "") if experts is None else name.partition(f".{experts.module}.")
    if experts is None or not rest:
        return [StoredTensor(name)]
    block = f"{layer}.{experts.block}"
    if rest in (_GATE_UP, _UP, _DOWN) and name in held:
        return [StoredTensor(name)]
    if not experts.down or rest not in (_GATE_UP, _UP, _DOWN):
        return [StoredTensor(f"{block}.{dict(experts.renamed).get(rest, rest)}")]
    if rest in (_UP, _DOWN):
        matrix = experts.up if rest == _UP else experts.down
        return [StoredTensor(f"{block}.experts.{expert}.{matrix}.weight", (expert,)) for expert in range(shape[0])]
    inner = shape[1] // 2
    return [
        StoredTensor(f"{block}.experts.{expert}.{matrix}.weight", (expert, rows))
        for expert in range(shape[0])
        for matrix, rows in ((experts.gate, slice(0, inner)), (experts.up, slice(inner, None)))
    ]


def routers(decoder: Any) -> dict[int, Module]:
    """Number of each layer with experts -> its router; `router_outputs` reads what it gives."""
    blocks = {number: _block_of(layer) for number, layer in enumerate(decoder.layers)}
    return {
        number: getattr(block, "gate", None) or block.router for number, block in blocks.items() if block is not None
    }


def router_outputs(outputs: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [N, E], weights [N, K] and ids [N, K]: Granite's router gives the ids first in transformers 5.17."""
    first, second, third = outputs
    return (first, second, third) if first.is_floating_point() else (third, second, first)


def _block_of(layer: Any) -> Any:
    """A layer's block of experts and router; None: it has none."""
    blocks = [getattr(layer, name, None) for name in ("mlp", "block_sparse_moe", "feed_forward")]
    return next((block for block in (*blocks, layer) if hasattr(block, "experts")), None)  # Gemma 4's layer is its own


@dataclass(frozen=True)
class RouterCoefs:
    """Weights of the routers' losses in the objective."""

    aux: float = 0.0
    """Weight of the load-balancing loss."""
    z: float = 0.0
    """Weight of the routers' z-loss."""

    @classmethod
    def of(cls, loss: LossSection, config: Any) -> "RouterCoefs":
        """The recipe's where it has them, else those of a model with experts, else 0."""
        given = (loss.router_aux_loss_coef, loss.router_z_loss_coef)
        own = (getattr(config, name, None) for name in ROUTER_COEF_KEYS)
        return cls(*(float(own or 0.0) if given is None else given for given, own in zip(given, own, strict=True)))


def record_router_coefs(config: Any, coefs: RouterCoefs) -> None:
    """Writes the weights that a model with experts was trained with into its config."""
    for name, value in zip(ROUTER_COEF_KEYS, (coefs.aux, coefs.z), strict=True):
        if value or hasattr(config, name):
            setattr(config, name, float(value))


ROUTER_COEF_KEYS = ("router_aux_loss_coef", "router_z_loss_coef")
"""Keys of a config, and of the recipe's loss section, for `RouterCoefs`."""
