"""Where a recipe's work lies: the numbers that memory and traffic are both counted from. Arithmetic alone.

Legend: V padded vocabulary, D and E widths of student and teacher, G the student's ranks, p ranks of a vocab group (and
stages of a colocated teacher), v = V/p rows of a slice, N tokens of a rank's micro-batch, S of a sequence; n tokens of
a chunk of the loss, of the whole group.
"""

import math
from dataclasses import dataclass
from functools import cached_property

from megadistill.config import Recipe
from megadistill.distributed.roles import Roles
from megadistill.distributed.vocab import block_cyclic_ranges, padded_vocabulary
from megadistill.models.families import EMBEDDING, HEAD
from megadistill.plan.counts.model_stats import ModelStats, RecipeStats
from megadistill.plan.counts.zero import GatheredParams, Zero, count_gathered
from megadistill.precision import torch_dtype

FLOAT32 = 4


@dataclass(frozen=True)
class Sharding:
    """A recipe's models and batch on ranks.

    Raises:
        UserError: the batch or the vocabulary does not divide over the ranks.
    """

    recipe: Recipe
    measured: RecipeStats
    vocab_size: int
    ranks: int
    """G"""
    ranks_per_node: int
    group_size: int
    """p"""
    roles: Roles | None
    zero: Zero

    def __post_init__(self) -> None:
        self.recipe.accumulation(self.ranks)
        block_cyclic_ranges(self.padded, self.ranks, self.group_size, rank=0)

    @property
    def student(self) -> ModelStats:
        return self.measured.student

    @property
    def teacher(self) -> ModelStats | None:
        return self.measured.teacher

    @cached_property
    def accumulation(self) -> int:
        return self.recipe.accumulation(self.ranks)

    @property
    def sequences(self) -> int:
        """B: of a rank's micro-batch."""
        return self.recipe.train.micro_batch

    @cached_property
    def tokens(self) -> int:
        """N"""
        return self.sequences * self.student.sequence_length

    @cached_property
    def element(self) -> int:
        """Bytes of a number in the run's precision."""
        return torch_dtype(self.recipe.train.precision).itemsize

    @cached_property
    def padded(self) -> int:
        """V"""
        return padded_vocabulary(self.vocab_size, self.recipe.student.vocab_multiple)

    @cached_property
    def rows(self) -> int:
        """v"""
        return self.padded // self.group_size

    @cached_property
    def unpadded_rows(self) -> int:
        """Of the rank that has most: those that are not padding."""
        ranges = block_cyclic_ranges(self.padded, self.ranks, self.group_size, rank=0)
        return sum(max(0, min(stop, self.vocab_size) - start) for start, stop in ranges)

    @property
    def stages(self) -> int:
        return self.group_size if self.roles is None else self.roles.stages

    @cached_property
    def sizes(self) -> list[int]:
        """Of the student's parameters, the vocabulary padded."""
        tables = (EMBEDDING, HEAD)
        return [
            self.padded * shape[1] if name in tables else math.prod(shape)
            for name, shape in self.student.shapes.items()
        ]

    def pieces(self, ranks: int) -> int:
        """Parameters that a rank holds when each one is cut into as many equal pieces."""
        return sum(-(-size // ranks) for size in self.sizes)

    @cached_property
    def persistent(self) -> int:
        """Parameters too small for ZeRO-3 to gather anew: every rank holds them whole."""
        return sum(size for size in self.sizes if size <= self.zero.stage3_param_persistence_threshold)

    @cached_property
    def embedding(self) -> int:
        """Parameters, the vocabulary padded."""
        return self.padded * self.student.width

    @cached_property
    def gathered(self) -> GatheredParams:
        """What a micro-step gathers of the student: no head, which the loss computes where it lies."""
        if self.ranks == 1:
            return GatheredParams(0, 0, 0, 0, 0, 0)
        (_, *others) = self.student.modules
        bound = self.zero.stage3_param_persistence_threshold
        modules = ((self.embedding,), *(tuple(_moving(module, bound) for module in part) for part in others))
        return count_gathered(modules, self.zero, recompute=self.recomputes)

    @cached_property
    def live_at_loss(self) -> int:
        """GatheredParams parameters that live when the forward pass ends.

        Where nothing is computed recompute, every matrix of the layers: torch keeps the transposed view that it has
        multiplied with, and so what ZeRO-3 has gathered, until it has gone back through it, though ZeRO-3 lets it go
        and gathers it recompute.
        """
        if self.recomputes:
            return self.gathered.at_loss
        return max(self.gathered.at_loss, sum(self.layer_matrices))

    @cached_property
    def live_in_backward(self) -> int:
        if not self.recomputes:
            return self.live_at_loss
        return max(self.gathered.peak_backward, max(self.layer_matrices))

    @cached_property
    def layer_matrices(self) -> list[int]:
        """Parameters of each layer that are gathered each time."""
        if self.ranks == 1:
            return [0]
        _, *layers, _ = self.student.modules
        return [
            sum(_moving(module, self.zero.stage3_param_persistence_threshold) for module in part) for part in layers
        ]

    @property
    def recomputes(self) -> bool:
        return self.recipe.student.activation_checkpointing

    @cached_property
    def reduced(self) -> int:
        """Parameters whose gradient ZeRO-3 reduces in a micro-step: all but an untied head's."""
        head = 0 if self.student.tied else self.embedding
        return sum(self.sizes) - head

    @property
    def heads(self) -> int:
        """Models whose logits the loss holds at a time: truncated targets are made before it."""
        return 2 if self.teacher is not None and self.recipe.loss.targets is None else 1

    @property
    def in_flight(self) -> int:
        """Chunks of the loss at a time (`loss.problem.Plan`)."""
        return 1 if self.group_size == 1 else 2

    @cached_property
    def chunk(self) -> int:
        """Tokens that each rank gives to a chunk of the loss (`loss.problem.agree`)."""
        fit = (self.recipe.loss.logit_memory_mb << 20) // (self.heads * FLOAT32 * max(1, self.unpadded_rows))
        chunks = math.ceil(self.tokens / max(1, fit // (self.group_size * self.in_flight)))
        return math.ceil(self.tokens / chunks)


def _moving(module: tuple[int, ...], bound: int) -> int:
    """Parameters of a module that are gathered each time."""
    return sum(size for size in module if size > bound)
