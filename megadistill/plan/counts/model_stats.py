"""Parameters, FLOPs and activations of a recipe's models, counted once: on meta and on fake tensors.

Legend: V vocabulary, D width, S tokens of a sequence.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise
from typing import Any

from megadistill.config.recipe import Checkpointing
from megadistill.models.configs.unequal_layers import first_layers
from megadistill.models.families import HEAD, build_decoder, parameter_shapes
from megadistill.models.flops import (
    LAYERS,
    Flops,
    ParameterCounts,
    flops_per_token,
    layer_costs,
    layer_parameters,
    parameter_counts,
)
from megadistill.models.forward.hidden_streams import SPREADING, hidden_streams
from megadistill.models.forward.per_layer_inputs import has_per_layer_inputs
from megadistill.models.partition import stage_sizes
from megadistill.plan.counts.activations import Activations, count_activations
from megadistill.precision import Precision, torch_dtype
from megadistill.teacher.float8 import use_float8


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _part(name: str) -> str:
    """The layer of a parameter, or its module outside of the layers."""
    return LAYERS + name.removeprefix(LAYERS).split(".")[0] if name.startswith(LAYERS) else _module(name)


@dataclass(frozen=True, eq=False)
class ModelStats:
    """A model without its weights. Nothing here depends on ranks."""

    config: Any
    """Hugging Face config."""
    sequence_length: int
    parameters: ParameterCounts
    forward: Flops
    """FLOPs of one token's forward pass."""
    shapes: dict[str, tuple[int, ...]]
    """Shape of each parameter by its name, with the config's vocabulary; a tied head has none of its own."""
    layer_parameters: tuple[int, ...]
    layer_costs: tuple[int, ...]
    """Active parameters of each layer: stages are cut by them."""
    first_layers: tuple[int, ...]
    """Layers that a stage may begin with."""
    _activations: dict[tuple[str, bool, str, str, int], Activations] = field(default_factory=dict, repr=False)

    @property
    def width(self) -> int:
        return int(self.config.hidden_size)

    @property
    def packet_width(self) -> int:
        """Numbers of a token that a stage hands on."""
        return hidden_streams(self.config) * self.width

    @property
    def layers(self) -> int:
        return len(self.layer_parameters)

    @property
    def tied(self) -> bool:
        return HEAD not in self.shapes

    def activations(
        self,
        precision: Precision,
        *,
        masked: bool,
        attention: str,
        checkpointing: Checkpointing = "none",
        ranks: int = 1,
    ) -> Activations:
        """Activations of one sequence, counted at first use: see `count_activations`."""
        key = (precision, masked, attention, checkpointing, ranks)
        if key not in self._activations:
            self._activations[key] = count_activations(
                self.config,
                self.sequence_length,
                dtype=torch_dtype(precision),
                masked=masked,
                attention=attention,
                checkpointing=checkpointing,
                ranks=ranks,
            )
        return self._activations[key]

    @cached_property
    def modules(self) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """Sizes of the decoder's parameters, in three levels: part, module, parameter.

        Parts are the embedding, each layer and the last norm, in the order of the forward pass; the head is left out.
        """
        parts: dict[str, dict[str, list[int]]] = {}
        for name, shape in self._body.items():
            parts.setdefault(_part(name), {}).setdefault(_module(name), []).append(math.prod(shape))
        return tuple(tuple(tuple(sizes) for sizes in modules.values()) for modules in parts.values())

    @cached_property
    def decay_order(self) -> tuple[tuple[int, ...], ...]:
        """Sizes of each part's parameters, in the order of the optimizer's groups: matrices, then vectors."""
        parts: dict[str, tuple[list[int], list[int]]] = {}
        for name, shape in self._body.items():
            parts.setdefault(_part(name), ([], []))[len(shape) < 2].append(math.prod(shape))
        return tuple((*matrices, *vectors) for matrices, vectors in parts.values())

    @property
    def _body(self) -> dict[str, tuple[int, ...]]:
        return {name: shape for name, shape in self.shapes.items() if name != HEAD}

    def stage_sizes(self, stages: int) -> tuple[int, ...]:
        """Numbers of layers of each stage."""
        return stage_sizes(self.layer_costs, self.first_layers, stages)

    def stage_bytes(self, stages: int, *, itemsize: int, float8: bool = False) -> tuple[int, ...]:
        """Bytes of each stage: its layers, with the embedding on the first one and the last norm on the last.

        All have the embedding where layers read inputs of their own, which follow from it.

        `itemsize`: of a parameter; `float8`: whether the layers' matrices are rounded (`teacher.precision`).
        """
        layers = self.float8_layers(itemsize) if float8 else tuple(itemsize * size for size in self.layer_parameters)
        totals = list(_sums(layers, self.stage_sizes(stages)))
        for stage in range(stages if has_per_layer_inputs(self.config) else 1):
            totals[stage] += itemsize * self.parameters.embedding
        spreading = sum(math.prod(shape) for name, shape in self.shapes.items() if name.startswith(SPREADING))
        totals[0] += itemsize * spreading
        totals[-1] += itemsize * (self.parameters.body - sum(self.layer_parameters) - spreading)
        return tuple(totals)

    @lru_cache(maxsize=4)  # noqa: B019, a plan's models live as long as the plan
    def float8_layers(self, itemsize: int) -> tuple[int, ...]:
        """Bytes of each layer of a stage in float8, with its scales."""
        decoder: Any = build_decoder(self.config, layers=range(self.layers))
        use_float8(decoder)
        return tuple(
            sum(itemsize * each.numel() for each in layer.parameters())
            + sum(each.numel() * each.itemsize for each in layer.buffers())
            for layer in decoder.layers
        )


def _sums(values: Sequence[int], sizes: Sequence[int]) -> tuple[int, ...]:
    """Sums of consecutive parts of the given sizes."""
    return tuple(sum(values[start:stop]) for start, stop in pairwise(accumulate(sizes, initial=0)))


@dataclass(frozen=True, eq=False)
class RecipeStats:
    """The models of a recipe."""

    student: ModelStats
    teacher: ModelStats | None
    """None where no teacher is in memory: a run from labels, or from stored targets."""
    first_step: int = 0
    """Step of the checkpoint from which the run begins (`run.begin_from`)."""
    teacher_name: str | None = None
    """Name of the teacher, which is the largest of several; None for one without a name, or none."""
    share: float = 1.0
    """Fraction of the run's sequences that the teacher reads."""
    others: tuple["RecipeStats", ...] = ()
    """The same student with each of the other teachers."""

    @property
    def sequence_length(self) -> int:
        return self.student.sequence_length


def measure_models(student: Any, teacher: Any | None, *, sequence_length: int, first_step: int = 0) -> RecipeStats:
    """`student` and `teacher` are Hugging Face configs of supported families; the student's vocabulary is the data's.

    Takes about a second for each model; no weights are allocated.
    """
    teacher_stats = None if teacher is None else _stats(teacher, sequence_length)
    return RecipeStats(_stats(student, sequence_length), teacher_stats, first_step)


def measure_several(
    student: Any, teachers: Mapping[str, tuple[Any | None, float]], *, sequence_length: int, first_step: int = 0
) -> RecipeStats:
    """`measure_models` of several teachers by name: config (None where none is in memory) and `RecipeStats.share`."""
    own = _stats(student, sequence_length)
    of_each = [
        RecipeStats(own, None if config is None else _stats(config, sequence_length), first_step, name, share)
        for name, (config, share) in teachers.items()
    ]
    largest, *others = sorted(of_each, key=lambda each: -each.teacher.parameters.total if each.teacher else 0)
    return replace(largest, others=tuple(others))


def _stats(config: Any, sequence_length: int) -> ModelStats:
    return ModelStats(
        config=config,
        sequence_length=sequence_length,
        parameters=parameter_counts(config),
        forward=flops_per_token(config, sequence_length),
        shapes={name: tuple(shape) for name, shape in parameter_shapes(config).items()},
        layer_parameters=tuple(layer_parameters(config)),
        layer_costs=tuple(layer_costs(config)),
        first_layers=tuple(first_layers(config)),
    )
