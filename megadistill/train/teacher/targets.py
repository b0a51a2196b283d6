"""Room `train`: what a teacher says of the run's micro-batches, live or stored. It knows no student.

Legend: B sequences of a micro-batch, S tokens of a sequence, N = B·S, E teacher width, v rows of a vocabulary slice.
"""

from collections import deque
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import chain

from torch import Tensor

from megadistill.data.targets.target_reader import TargetReader
from megadistill.data.targets.target_writer import TargetWriter
from megadistill.distributed.vocab import VocabSlice
from megadistill.loss.sparse.targets import sparse_targets
from megadistill.teacher import RemoteTeacher, TeacherPipeline
from megadistill.train.objective import Objective, selection, uniforms
from megadistill.train.resilience.sdc import FrozenWeights
from megadistill.train.setup.vocab_map import translated
from megadistill.types import LogitTransform, SparseTargets, TokenBatch

Lesson = tuple[TokenBatch, Tensor | SparseTargets | None]
"""A micro-batch, and what its teacher says: hidden states [N, E], or stored targets for its N tokens."""


@dataclass(frozen=True)
class Teacher:
    """A live one: the pipeline, and the head's rows of this rank's slice of the vocabulary [v, E]."""

    pipeline: TeacherPipeline | RemoteTeacher
    head: Tensor
    bias: Tensor | None = None
    """[v]: -inf for an id that the teacher does not know; None where it knows all."""
    logits: LogitTransform = LogitTransform()
    ids: Tensor | None = None
    """[true vocabulary] int64, on the host: the teacher's id for each of the student's; None: the same ids."""
    store: TargetWriter | None = None
    """Where the targets that the run makes are kept."""

    def lessons(self, batches: Iterator[TokenBatch]) -> Generator[Lesson, None, None]:
        """Each batch with the hidden states [N, E] that answer it. Collective; see `TeacherPipeline.signals`.

        Raises:
            UserError: a token that the teacher has no id for; SignalMismatch: the teacher answered another batch.
        """
        under_way: deque[tuple[TokenBatch, TokenBatch]] = deque()

        def entering() -> Iterator[TokenBatch]:
            for batch in batches:
                read = batch if self.ids is None else translated(batch, self.ids)
                under_way.append((batch, read))
                yield read

        with closing(self.pipeline.signals(entering())) as signals:
            for signal in signals:
                batch, read = under_way.popleft()
                yield batch, signal.hidden_for(read)

    def targets(self, hidden: Tensor, batch: TokenBatch, objective: Objective, vocab: VocabSlice) -> SparseTargets:
        """What the recipe keeps of the distribution behind `hidden` [N, E]. Collective over the vocab group."""
        section = objective.loss.targets
        assert section is not None
        kept, tail = selection(section)
        draws = None
        if section.draws is not None:
            sequence = batch.tokens.shape[1]
            draws = uniforms(batch.slots, sequence=sequence, draws=section.draws, seed=objective.seed)
            draws = draws.to(hidden.device)
        made = sparse_targets(
            hidden,
            self.head,
            selection=kept,
            tail=tail,
            vocab=vocab,
            temperature=objective.loss.temperature,
            uniforms=draws,
            teacher_bias=self.bias,
            teacher_logits=self.logits,
            logit_memory=objective.logit_memory,
        )
        if self.store is not None:
            self.store.add(batch.slots, batch.digests, made)
        return made


@dataclass(frozen=True)
class StoredTeacher:
    """What a teacher said once, read by slot; no teacher is in memory."""

    reader: TargetReader
    device: str

    def lessons(self, batches: Iterator[TokenBatch]) -> Generator[Lesson, None, None]:
        """Each batch with its targets.

        Raises:
            ShardFault: the store has no targets for a slot, or damaged ones, or they were made of other tokens.
        """
        for batch in batches:
            yield batch, self.reader.read(batch.slots, batch.digests).to(self.device)


def lessons(teacher: Teacher | StoredTeacher | None, batches: Iterator[TokenBatch]) -> Generator[Lesson, None, None]:
    """The micro-batches of a run with what the teacher says of each; None where there is no teacher.

    Close it before others are begun; a teacher on ranks of its own listens until it is dismissed.
    """
    return teacher.lessons(batches) if teacher is not None else ((batch, None) for batch in batches)


def frozen_weights(teacher: Teacher) -> FrozenWeights:
    """What this rank holds of the teacher: its rows of the head, and its stage, but where that has ranks of its own."""
    stage = teacher.pipeline.stage.weights() if isinstance(teacher.pipeline, TeacherPipeline) else ()
    return FrozenWeights.of(chain(stage, [("rows of the head", teacher.head)]))
