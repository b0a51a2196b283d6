"""What is counted of the real models, once: parameters on meta, activations on fake tensors. It knows no recipe.

Legend: V vocabulary, D width, S tokens of a sequence.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import torch

from megadistill.errors import UserError
from megadistill.models.families import EMBEDDING, HEAD, parameter_shapes
from megadistill.models.flops import (
    LAYERS,
    Flops,
    ParameterCounts,
    flops_per_token,
    layer_costs,
    layer_parameters,
    parameter_counts,
)
from megadistill.models.partition import balanced_sizes
from megadistill.plan.counts.activations import Activations, count_activations
from megadistill.precision import Precision, torch_dtype


@dataclass(frozen=True, eq=False)
class ModelStats:
    """A model, without its weights. Nothing here depends on ranks."""

    config: Any
    sequence_length: int
    parameters: ParameterCounts
    forward: Flops
    """Of one token."""
    shapes: dict[str, tuple[int, ...]]
    """Of each parameter, by its name; a tied head has none of its own. The vocabulary is the config's."""
    layer_parameters: tuple[int, ...]
    layer_costs: tuple[int, ...]
    """Active parameters of each layer: what stages are cut by."""
    _activations: dict[tuple[str, bool], Activations] = field(default_factory=dict, repr=False)
    _stages: dict[int, tuple[int, ...]] = field(default_factory=dict, repr=False)

    @property
    def width(self) -> int:
        return int(self.config.hidden_size)

    @property
    def layers(self) -> int:
        return len(self.layer_parameters)

    @property
    def tied(self) -> bool:
        return HEAD not in self.shapes

    def activations(self, precision: Precision, *, masked: bool) -> Activations:
        """Of one sequence; `masked`: documents are read by themselves. Counted when first asked for."""
        key = (precision, masked)
        if key not in self._activations:
            dtype = torch_dtype(precision)
            self._activations[key] = count_activations(self.config, self.sequence_length, dtype=dtype, masked=masked)
        return self._activations[key]

    @cached_property
    def modules(self) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """Sizes of the parameters of each module of the decoder, in three levels: part, module, parameter.

        Parts are the embedding, each layer and the last norm, in the order of the forward pass; the head is none.
        """
        parts: dict[str, dict[str, list[int]]] = {}
        for name, shape in self.shapes.items():
            if name == HEAD:
                continue
            module, _, _ = name.rpartition(".")
            part = LAYERS + name.removeprefix(LAYERS).split(".")[0] if name.startswith(LAYERS) else module
            parts.setdefault(part, {}).setdefault(module, []).append(torch.Size(shape).numel())
        return tuple(tuple(tuple(sizes) for sizes in modules.values()) for modules in parts.values())

    def stage_sizes(self, stages: int) -> tuple[int, ...]:
        """Layers of each stage of a frozen pipeline, as `model.split.stage_layers` cuts them.

        Raises:
            UserError: fewer than one stage, or more than layers.
        """
        if not 1 <= stages <= self.layers:
            raise UserError(f"a model of {self.layers} layers cannot be cut into {stages} stages: 1 to {self.layers}")
        if stages not in self._stages:
            self._stages[stages] = tuple(balanced_sizes(self.layer_costs, stages))
        return self._stages[stages]

    def stage_costs(self, stages: int) -> tuple[int, ...]:
        """Active parameters of each stage's layers."""
        return _summed(self.layer_costs, self.stage_sizes(stages))

    def stage_parameters(self, stages: int) -> tuple[int, ...]:
        """What each stage holds: its layers, the first one the embedding, too, and the last one the last norm."""
        held = list(_summed(self.layer_parameters, self.stage_sizes(stages)))
        held[0] += self.parameters.embedding
        held[-1] += self.parameters.body - sum(self.layer_parameters)
        return tuple(held)


def _summed(values: Sequence[int], sizes: Sequence[int]) -> tuple[int, ...]:
    """Sums of consecutive parts."""
    ends = [0, *accumulate(sizes)]
    return tuple(sum(values[start:stop]) for start, stop in pairwise(ends))


@dataclass(frozen=True, eq=False)
class RecipeStats:
    """The models of a recipe."""

    student: ModelStats
    teacher: ModelStats | None
    """None where no teacher is in memory."""


def measure_models(student: Any, teacher: Any | None, *, sequence_length: int) -> RecipeStats:
    """`student` and `teacher` are Hugging Face configs of supported families; the student's vocabulary is the data's.

    Takes about a second for each model; no weights are allocated.
    """
    return RecipeStats(
        measure_model(student, sequence_length), None if teacher is None else measure_model(teacher, sequence_length)
    )


def measure_model(config: Any, sequence_length: int) -> ModelStats:
    shapes = parameter_shapes(config)
    assert EMBEDDING in shapes
    return ModelStats(
        config=config,
        sequence_length=sequence_length,
        parameters=parameter_counts(config),
        forward=flops_per_token(config, sequence_length),
        shapes={name: tuple(shape) for name, shape in shapes.items()},
        layer_parameters=tuple(layer_parameters(config)),
        layer_costs=tuple(layer_costs(config)),
    )
