"""The student's optimizers: construction, decay groups, state tensors and bytes per parameter.

A new one is a section in `config.recipe` (a member of `OptimizerUnion`) and an entry of `OPTIMIZERS`. Does not import
deepspeed, so that a plan or a model card can ask it.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from megadistill.config.recipe import OptimizerSection

MASTER = "master"
"""Name of the float32 copy of the weights, which every optimizer updates and every checkpoint holds."""
BYTES = 4
"""Bytes of a number of the optimizer's state: float32."""

Groups = list[dict[str, Any]]
"""Parameter groups of a torch optimizer."""


@dataclass(frozen=True)
class OptimizerKind:
    """Properties of the optimizers of one `kind`. The functions take a section of that kind."""

    build: Callable[[Groups, Any], torch.optim.Optimizer]
    """Constructs the torch optimizer, with learning rate 0: the training loop sets it at each step."""
    state: tuple[str, ...]
    """Names in `torch.optim.Optimizer.state` of the float32 tensors that have a parameter's shape."""
    gradient_mean: str | None
    """Name of the state that is a running mean of the gradient; None if there is none."""
    describe: Callable[[Any], str]
    """Name and hyperparameters as text."""


OPTIMIZERS = {
    "adamw": OptimizerKind(
        build=lambda groups, section: torch.optim.AdamW(
            groups, lr=0.0, betas=(section.beta1, section.beta2), eps=section.epsilon, fused=True
        ),
        state=("exp_avg", "exp_avg_sq"),
        gradient_mean="exp_avg",
        describe=lambda section: f"AdamW, β₁ {section.beta1:g}, β₂ {section.beta2:g}, ε {section.epsilon:g}",
    )
}
"""`train.optimizer.kind` -> its properties."""


_NOT_DECAYED = ("_bias", "norm.weight")
"""Ends of the names of biases and norms that have two dimensions: of a layer's experts, and of its heads."""


def build_optimizer(section: OptimizerSection, parameters: Iterable[tuple[str, Any]]) -> torch.optim.Optimizer:
    """The torch optimizer of ZeRO-3's named `parameters`: matrices have weight decay, norms and biases have none.

    Partitioned parameters all have ndim 1; `ds_shape` is the whole one's.
    """
    matrices: list[Any] = []
    vectors: list[Any] = []
    for name, parameter in parameters:
        is_matrix = len(parameter.ds_shape) >= 2 and not name.endswith(_NOT_DECAYED)
        (matrices if is_matrix else vectors).append(parameter)
    decay = ((matrices, section.weight_decay), (vectors, 0.0))
    groups = [{"params": members, "weight_decay": weight_decay} for members, weight_decay in decay]
    return OPTIMIZERS[section.kind].build(groups, section)


def state_kinds(section: OptimizerSection) -> tuple[str, ...]:
    """Names of the float32 tensors per parameter that a checkpoint holds: the master weights and the state."""
    return (MASTER, *OPTIMIZERS[section.kind].state)


def state_bytes(section: OptimizerSection) -> int:
    """Bytes per parameter of the tensors of `state_kinds`."""
    return BYTES * len(state_kinds(section))


def describe(section: OptimizerSection) -> str:
    """Name and hyperparameters as text, without the learning rate."""
    return f"{OPTIMIZERS[section.kind].describe(section)}, weight decay {section.weight_decay:g} on matrices"
