"""A recipe's models and batch on ranks: the numbers that memory and traffic are counted from.

Legend: V padded vocabulary, D and E widths of student and teacher, G the student's ranks in R replicas of w = G/R, p
ranks of a vocab group (and stages of a colocated teacher), v = V/p rows of a slice, N tokens of a rank's micro-batch, S
of a sequence; n tokens of a chunk of the loss, of the whole group.
"""

import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from megadistill.config.auto import Choice, choose_compile
from megadistill.config.recipe import WHOLE_DATA, AttentionSetting, Checkpointing, Recipe, TeacherSection
from megadistill.distributed.roles import Roles
from megadistill.distributed.vocab import block_cyclic_ranges, padded_vocabulary
from megadistill.loss.inputs import ChunkPlan, fitting_tokens
from megadistill.models.attention.choice import choose_attention
from megadistill.models.attention.shared_sequences import check_shared_sequences
from megadistill.models.experts import RouterCoefs
from megadistill.models.families import EMBEDDING, HEAD, expert_layers
from megadistill.plan.counts.activations import Activations, Traffic
from megadistill.plan.counts.model_stats import ModelStats, RecipeStats
from megadistill.plan.counts.zero import GatheredParams, Zero, count_gathered
from megadistill.precision import torch_dtype
from megadistill.student.deepspeed_config import RANKS_OF_A_SMALL_WORLD

FLOAT32 = 4
"""Bytes of a float32."""


COMPILED_FORWARD, COMPILED_BACKWARD = 4, 7
"""Times that compiled layers read or write a score of eager attention: written by a product, read and written by the
fused softmax, read by a product; backward, two products write or read each of three, and one kernel reads two."""


@dataclass(frozen=True)
class MemoryTraffic:
    """Bytes of a sequence that a model's layers read and write in the device's memory, beside the products' own."""

    student: Traffic
    """The student's attention scores."""
    recompute: int
    """Elementwise work that selective checkpointing recomputes; 0 for compiled layers, which recompute in the kernels
    that read the kept tensors anyhow."""
    teacher: int
    """Attention scores of all layers of a live teacher, in its forward pass."""


@dataclass(frozen=True)
class Sharding:
    """A recipe's models and batch on ranks.

    Raises:
        UserError: the vocab group does not divide a replica, or the ranks that share sequences the student's.
    """

    recipe: Recipe
    stats: RecipeStats
    vocab_size: int
    """Ids of the data's vocabulary."""
    ranks: int
    """G: the student's ranks."""
    ranks_per_node: int
    group_size: int
    """p: ranks of a vocab group."""
    roles: Roles | None = None
    """Ranks of student and teacher, for a teacher on ranks of its own."""
    zero: Zero = field(default_factory=Zero)
    replicas: int = 1
    """R: copies of the student, on as many of its ranks each."""

    def __post_init__(self) -> None:
        self.recipe.accumulation(self.ranks)
        self._refuse_shared_sequences()
        block_cyclic_ranges(self.padded_vocab, self.shard, self.group_size, rank=0)

    def _refuse_shared_sequences(self) -> None:
        models = {"student.config": (self.student.config, self.student_attention)}
        if self.teacher is not None:
            models[f"{self.teacher_key}.path"] = (self.teacher.config, self.teacher_attention)
        check_shared_sequences(self.recipe, {"": self.stats.sequence_length}, models)

    @property
    def shard(self) -> int:
        """w: ranks of a replica, over which ZeRO-3 shards the student."""
        return self.ranks // self.replicas

    @property
    def student(self) -> ModelStats:
        return self.stats.student

    @property
    def teacher(self) -> ModelStats | None:
        return self.stats.teacher

    @property
    def live_teacher(self) -> ModelStats:
        """The teacher of a run that has one."""
        assert self.stats.teacher is not None
        return self.stats.teacher

    @property
    def teacher_section(self) -> TeacherSection:
        """The recipe's section of a live teacher."""
        return self.recipe.teacher_sections[self.teacher_key]

    @property
    def teacher_key(self) -> str:
        """The recipe's key of the teacher."""
        return "teacher" if self.stats.teacher_name is None else f"teachers.{self.stats.teacher_name}"

    @cached_property
    def each_teacher(self) -> tuple["Sharding", ...]:
        """The same with each of several teachers alone, this one first; else this alone."""
        return (self, *(replace(self, stats=each) for each in self.stats.others))

    @property
    def live_teachers(self) -> list["Sharding"]:
        """Those of `each_teacher` with a teacher in memory."""
        return [each for each in self.each_teacher if each.teacher is not None]

    @property
    def loss_passes(self) -> float:
        """Teachers of a token, in the mean: of each the loss computes the student's logits once more."""
        return sum(each.stats.share for each in self.each_teacher)

    @property
    def most_teachers(self) -> int:
        """Most teachers of a token."""
        of_sources = map(self.recipe.teachers_of, self.recipe.data.sources or [WHOLE_DATA])
        return max(1, *map(len, of_sources))

    @property
    def steps(self) -> int:
        """Optimizer steps that the run takes itself: without those of the run that it begins from."""
        return self.recipe.train.steps - self.stats.first_step

    @cached_property
    def accumulation(self) -> int:
        """Micro-steps of an optimizer step."""
        return self.recipe.accumulation(self.ranks)

    @property
    def sequences(self) -> int:
        """B: sequences of a rank's micro-batch, of which it may have a part."""
        return self.recipe.train.micro_batch

    @property
    def sequence_ranks(self) -> int:
        """Ranks that share each sequence."""
        return self.recipe.distributed.sequence

    @cached_property
    def tokens(self) -> int:
        """N: tokens of a rank's micro-batch."""
        return self.sequences * self.stats.sequence_length // self.sequence_ranks

    @cached_property
    def itemsize(self) -> int:
        """Bytes of a number in the run's precision."""
        return torch_dtype(self.recipe.train.precision).itemsize

    @cached_property
    def padded_vocab(self) -> int:
        """V: rows of the padded vocabulary."""
        return padded_vocabulary(self.vocab_size, self.recipe.student.vocab_multiple, ranks=self.shard)

    @cached_property
    def rows(self) -> int:
        """v: rows of a vocab slice."""
        return self.padded_vocab // self.group_size

    @cached_property
    def unpadded_rows(self) -> int:
        """Rows without padding, on the rank that has most of them."""
        ranges = block_cyclic_ranges(self.padded_vocab, self.shard, self.group_size, rank=0)
        return sum(max(0, min(stop, self.vocab_size) - start) for start, stop in ranges)

    @property
    def stages(self) -> int:
        """Stages of a live teacher's pipeline."""
        return self.group_size if self.roles is None else self.roles.stages

    @cached_property
    def param_sizes(self) -> list[int]:
        """Sizes of the student's parameters, with the padded vocabulary."""
        tables = (EMBEDDING, HEAD)
        return [
            self.padded_vocab * shape[1] if name in tables else math.prod(shape)
            for name, shape in self.student.shapes.items()
        ]

    @cached_property
    def partition_size(self) -> int:
        """Parameters of a ZeRO-3 partition: each parameter is cut into w equal pieces."""
        return sum(-(-size // self.shard) for size in self.param_sizes)

    @cached_property
    def persistent(self) -> int:
        """Parameters that every rank holds whole between steps."""
        return sum(self.persistent_sizes)

    @cached_property
    def persistent_sizes(self) -> tuple[int, ...]:
        """Their sizes: up to DeepSpeed's persistence threshold, and in a large replica the last norm."""
        threshold = self.zero.stage3_param_persistence_threshold
        small = tuple(size for size in self.param_sizes if size <= threshold)
        norm = tuple(size for module in self.student.modules[-1] for size in module if size > threshold)
        return small + (norm if self.shard > RANKS_OF_A_SMALL_WORLD else ())

    @cached_property
    def embedding_size(self) -> int:
        """Parameters of the embedding, with the padded vocabulary."""
        return self.padded_vocab * self.student.width

    @cached_property
    def gathered(self) -> GatheredParams:
        """Parameters that a micro-step gathers of the student, without the head, which is never gathered."""
        if self.shard == 1:
            return GatheredParams(0, 0, 0, 0, 0, 0, 0)
        (_, *others) = self.student.modules
        leaves = ((self.embedding_size,), *(self.gathered_sizes(part) for part in others))
        first = self.counts_experts_first
        return count_gathered(leaves, self.zero, prefetch=self.prefetch, forward_first=first)

    @cached_property
    def prefetch(self) -> int:
        """Parameters that ZeRO-3 gathers ahead at a time: DeepSpeed's file has it, or the largest layer."""
        size = self.zero.stage3_prefetch_bucket_size
        return max(self.layer_matrices) if size is None else size

    @cached_property
    def live_at_loss(self) -> int:
        """Gathered parameters in memory at the end of the forward pass.

        Without recomputation these are all matrices of the layers: autograd keeps the transposed view that was
        multiplied, and with it the gathered storage, until its backward pass, although ZeRO-3 releases the parameter.
        """
        if self.checkpoints:
            return self.gathered.at_loss
        return max(self.gathered.at_loss, sum(self.layer_matrices) + self.gathered.again_at_loss)

    @cached_property
    def live_in_backward(self) -> int:
        """Most gathered parameters in memory in the backward pass."""
        return max(self.gathered.peak_backward, *self.layer_matrices) if self.checkpoints else self.live_at_loss

    @cached_property
    def layer_matrices(self) -> list[int]:
        """Partitioned parameters of each layer."""
        if self.shard == 1:
            return [0]
        _, *layers, _ = self.student.modules
        return [sum(self.gathered_sizes(part)) for part in layers]

    def gathered_sizes(self, part: tuple[tuple[int, ...], ...]) -> tuple[int, ...]:
        """Sizes of a part's parameters that are gathered at each use."""
        if part is self.student.modules[-1] and self.shard > RANKS_OF_A_SMALL_WORLD:
            return ()
        threshold = self.zero.stage3_param_persistence_threshold
        return tuple(size for module in part for size in module if size > threshold)

    @property
    def checkpoints(self) -> bool:
        """Whether the backward pass recomputes anything of the layers."""
        return self.recipe.student.activation_checkpointing != "none"

    @property
    def recomputes(self) -> bool:
        """Whether the backward pass recomputes the layers, products included."""
        return self.recipe.student.activation_checkpointing == "full"

    @cached_property
    def counts_experts_first(self) -> bool:
        """Whether a forward pass counts the tokens of each expert before the micro-steps, for the balance loss."""
        coefs = RouterCoefs.of(self.recipe.loss, self.student.config)
        return coefs.aux > 0 and self.accumulation > 1 and bool(expert_layers(self.student.config))

    @cached_property
    def reduced(self) -> int:
        """Parameters whose gradient ZeRO-3 reduces in a micro-step: all but an untied head's."""
        return sum(self.param_sizes) - (0 if self.student.tied else self.embedding_size)

    @property
    def reduce_itemsize(self) -> int:
        """Bytes of a gradient's number when it is reduced: the weights' precision, unless DeepSpeed's file differs."""
        return self.zero.reduce_element_bytes or self.itemsize

    @cached_property
    def student_attention(self) -> Choice:
        """Implementation of the student's attention on an accelerator, and the reason.

        Raises:
            UserError: the recipe names one that cannot compute the model.
        """
        return self._attention(self.recipe.student.attention, self.student, "student.attention")

    @cached_property
    def teacher_attention(self) -> Choice:
        """Likewise of a live teacher's."""
        return self._attention(self.teacher_section.attention, self.live_teacher, f"{self.teacher_key}.attention")

    def _attention(self, setting: AttentionSetting, model: ModelStats, key: str) -> Choice:
        return choose_attention(
            setting,
            model.config,
            accelerator=True,
            precision=self.recipe.train.precision,
            documents=self.recipe.data.document_mask,
            sequence_length=self.stats.sequence_length,
            flash=setting == "flash",  # of what is installed there nothing is known
            triton=True,
            key=key,
        )

    @property
    def choices(self) -> dict[str, Choice]:
        """Attention and compilation of the models' layers, by the recipe's keys."""
        choices = {"student.attention": self.student_attention, "student.compile": self.student_compiled}
        for each in self.live_teachers:
            choices[f"{each.teacher_key}.attention"] = each.teacher_attention
            choices[f"{each.teacher_key}.compile"] = each.teacher_compiled
        return choices

    @property
    def student_compiled(self) -> Choice:
        """Whether the student's layers are compiled on an accelerator."""
        return choose_compile(self.recipe.student.compile, accelerator=True, triton=True)

    @property
    def teacher_compiled(self) -> Choice:
        """Whether a live teacher's layers are compiled on an accelerator."""
        return choose_compile(self.teacher_section.compile, accelerator=True, triton=True)

    @cached_property
    def student_activations(self) -> Activations:
        """The student's activations of a sequence, in the run's precision, masking, attention and checkpointing."""
        return self._activations(self.recipe.student.activation_checkpointing)

    def _activations(self, checkpointing: Checkpointing) -> Activations:
        precision, masked = self.recipe.train.precision, self.recipe.data.document_mask
        attention = self.student_attention.value
        how: dict[str, Any] = {"attention": attention, "checkpointing": checkpointing, "ranks": self.sequence_ranks}
        return self.student.activations(precision, masked=masked, **how)

    @cached_property
    def traffic(self) -> "MemoryTraffic":
        """Memory traffic beside the products, which an MFU without it leaves out."""
        student, teacher = Traffic(), Traffic()
        if self.student_attention.value == "eager":
            student = self.student_activations.score_traffic
            if self.student_compiled.value == "compiled":
                student = self._compiled_scores(self.student)
        if self.teacher is not None and self.teacher_attention.value == "eager":
            teacher = self.teacher_activations.score_traffic
            if self.teacher_compiled.value == "compiled":
                teacher = self._compiled_scores(self.teacher)
        forward_passes = 2 if self.counts_experts_first else 1
        recompute = 0
        if self.recipe.student.activation_checkpointing == "selective" and self.student_compiled.value == "eager":
            selective, plain = self.student_activations, self._activations("none")
            scores = selective.score_traffic.backward - plain.score_traffic.backward
            recompute = max(0, selective.elementwise_backward - plain.elementwise_backward - scores)
        student = Traffic(forward_passes * student.forward, student.backward)
        return MemoryTraffic(student, recompute, teacher.forward)

    def _compiled_scores(self, model: ModelStats) -> Traffic:
        """Traffic of scores in memory where a compiler has fused the arithmetic between attention's two products."""
        heads, S = model.config.num_attention_heads, model.sequence_length
        access = self.itemsize * model.layers * heads * S * S
        again = COMPILED_FORWARD if model is self.student and self.checkpoints else 0
        return Traffic(COMPILED_FORWARD * access, (COMPILED_BACKWARD + again) * access)

    @cached_property
    def teacher_activations(self) -> Activations:
        """A live teacher's activations of a sequence."""
        return self.live_teacher.activations(
            self.recipe.train.precision,
            masked=self.recipe.data.document_mask,
            attention=self.teacher_attention.value,
            ranks=self.sequence_ranks,
        )

    @property
    def heads(self) -> int:
        """Models whose logits the loss holds at a time: truncated targets are made before it."""
        return 2 if self.teacher is not None and self.recipe.loss.targets is None else 1

    @cached_property
    def loss_chunks(self) -> ChunkPlan:
        """The chunks of tokens in the loss, of a whole micro-batch."""
        return self.chunks_of(self.tokens)

    @property
    def tokens_with_teacher(self) -> int:
        """Tokens of a rank's micro-batch that the teacher teaches, in the mean."""
        return round(self.stats.share * self.tokens)

    def chunks_of(self, tokens: int) -> ChunkPlan:
        """The chunks of so many tokens in the loss."""
        fitting = fitting_tokens(
            self.recipe.loss.logit_memory_mb << 20, models=self.heads, itemsize=FLOAT32, rows=self.unpadded_rows
        )
        return ChunkPlan.of(tokens, fitting, self.group_size)
