"""A teacher that runs while the student trains, on the student's ranks or on ranks of its own.

Legend: B sequences of a micro-batch, S tokens of a sequence, N = B·S, E teacher width, v rows of a vocabulary slice, K
tokens of a probe, L tokens whose hidden states it holds.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from megadistill import timeline
from megadistill.distributed.collectives import all_gather_rows
from megadistill.distributed.topology import Topology
from megadistill.distributed.vocab import VocabSlice
from megadistill.errors import UserError
from megadistill.loss import Head, label_loss
from megadistill.loss.sparse import sparse_targets, uniforms_per_token
from megadistill.teacher.disaggregated import RemoteTeacher
from megadistill.teacher.pipeline import TeacherPipeline
from megadistill.train.objective import Objective, selection, uniforms
from megadistill.train.resilience.sdc import FrozenWeights
from megadistill.train.setup.setup import Setup
from megadistill.train.setup.vocab_map import translated
from megadistill.train.teacher.float8_check import Float8Difference, float8_difference
from megadistill.train.teacher.probe import PROBE_STATES, ProbeInput, ProbeOutput, TeacherCheck, check_probe
from megadistill.train.teacher.protocol import Teacher
from megadistill.train.teacher.saved_targets import SavedTargets
from megadistill.train.teacher.targets import HiddenTarget, SparseTarget, StudentOutput, TargetedBatch
from megadistill.types import (
    LogitTransform,
    LossTerms,
    SequencePart,
    SparseTargets,
    TokenBatch,
    to_device,
    token_digest,
)
from megadistill.units import readable


@dataclass(frozen=True)
class LiveTeacher(Teacher):
    """A forward pass for each micro-batch, and this rank's rows of the teacher's head."""

    pipeline: TeacherPipeline | RemoteTeacher
    head: Tensor
    """[v, E]"""
    bias: Tensor | None = None
    """[v]: -inf for an id that the teacher does not know; None where it knows all."""
    logits: LogitTransform = LogitTransform()
    ids: Tensor | None = None
    """[true vocabulary] int64, on the host: the teacher's id for each of the student's; None: the same ids."""
    topology: Topology | None = None
    """Groups of ranks that may share sequences; None: they are read whole."""
    saved: SavedTargets | None = None
    """Receives the truncated targets; None where the recipe does not save them."""

    @property
    def answers_any_tokens(self) -> bool:
        return True

    def head_on(self, hidden: Tensor) -> Head:
        """The loss's inputs of this teacher, for hidden states [N, E]."""
        return Head(hidden, self.head, self.bias, self.logits)

    def teacher_targets(self, batches: Iterator[TokenBatch]) -> Generator[TargetedBatch, None, None]:
        """See `Teacher` and `live_targets`."""
        with closing(self.live_targets(batches)) as targets:
            for target in targets:
                yield TargetedBatch(target.batch, target)

    def live_targets(self, batches: Iterator[TokenBatch]) -> Generator["LiveTarget", None, None]:
        """The target of each micro-batch. Collective; see `TeacherPipeline.signals`.

        Raises:
            UserError: a token without a teacher's id.
            SignalMismatch: hidden states of another batch.
        """
        in_flight: deque[tuple[TokenBatch, TokenBatch]] = deque()

        def entering() -> Iterator[TokenBatch]:
            for batch in batches:
                read = batch if self.ids is None else translated(batch, self.ids)
                if read.part.parts > 1:  # the teacher reads a part of each row, of which it answers the digest
                    read = replace(read, digests=token_digest(read.tokens))
                in_flight.append((batch, read))
                yield read

        with closing(self.pipeline.signals(entering())) as signals:
            for signal in signals:
                batch, read = in_flight.popleft()
                yield LiveTarget(self, batch, signal.hidden_for(read))

    def start(self) -> None:
        if self.saved is not None:
            self.saved.open()

    def check(
        self, setup: Setup, vocab: VocabSlice, topology: Topology, *, rows: Callable[[Setup], TokenBatch]
    ) -> list[TeacherCheck]:
        def forward(probe: ProbeInput) -> ProbeOutput:
            return self.output(probe, setup, vocab)

        def compare(probe: ProbeInput) -> Float8Difference:
            return self.float8_difference(probe, setup, vocab, topology)

        in_float8 = setup.recipe.teacher is not None and setup.recipe.teacher.precision == "float8"
        how: dict[str, Any] = {"forward": forward, "compare": compare if in_float8 else None}
        try:
            return [check_probe(setup, topology, width=self.head.shape[1], rows=lambda: rows(setup), **how)]
        except UserError:
            self.close()  # of the recipe's making, not of a rank's: those of the teacher's own end as well
            raise

    def float8_difference(
        self, probe: ProbeInput, setup: Setup, vocab: VocabSlice, topology: Topology
    ) -> Float8Difference:
        """This teacher, which is in float8, against the native one. Collective over the world."""
        float8 = self.head_on(self._hidden(probe, setup))
        return float8_difference(setup, topology, vocab, tokens=probe.tokens, float8=float8)

    def describe_prefetch(self, *, micro_batch: int, sequence_length: int) -> str | None:
        if not self.pipeline.ahead:
            return None
        held = readable(self.pipeline.bytes_in_flight(micro_batch, sequence_length), "B")
        plural = "" if self.pipeline.ahead == 1 else "es"
        return f"teacher prefetch: {self.pipeline.ahead} micro-batch{plural}, {held} per rank"

    def frozen_weights(self) -> FrozenWeights | None:
        return FrozenWeights.of([("rows of the head", self.head)])

    def flush(self) -> None:
        if self.saved is not None:
            self.saved.flush()

    def finish(self) -> str | None:
        return None if self.saved is None else self.saved.finish()

    def close(self) -> None:
        self.pipeline.close()

    def output(self, probe: ProbeInput, setup: Setup, vocab: VocabSlice) -> ProbeOutput:
        """The output for a probe, as a micro-batch of the run has it. Collective."""
        K, hidden_KE = len(probe.tokens), self._hidden(probe, setup)
        with torch.no_grad():
            terms = label_loss(
                self.head_on(hidden_KE[:-1]),
                probe.tokens[1:].to(hidden_KE.device),
                token_weights=torch.full((K - 1,), 1 / (K - 1), device=hidden_KE.device),
                vocab=vocab,
            )
        return ProbeOutput(hidden_KE[:PROBE_STATES].float().cpu(), terms.student_ce.double().cpu())

    def _hidden(self, probe: ProbeInput, setup: Setup) -> Tensor:
        """[K, E]: final hidden states of the probe, out of a micro-batch of the run's shape."""
        B, S = setup.shapes[0].micro_batch, setup.shapes[0].sequence_length
        batch = probe.batch(rows=B, sequence=S, document_mask=setup.recipe.data.document_mask)
        part = SequencePart() if self.topology is None else self.topology.sequence_part
        (target,) = self.live_targets(iter([batch.of_part(part)]))
        own_sE = target.hidden.view(B, S // part.parts, -1)[0, : len(probe.tokens)]
        group = None if self.topology is None else self.topology.sequence_group
        return all_gather_rows(own_sE, group)[: len(probe.tokens)]


@dataclass(frozen=True)
class ColocatedTeacher(LiveTeacher):
    """A live teacher with a stage on each of the student's ranks."""

    pipeline: TeacherPipeline

    def frozen_weights(self) -> FrozenWeights | None:
        return FrozenWeights.of(chain(self.pipeline.stage.weights(), [("rows of the head", self.head)]))


@dataclass(frozen=True)
class LiveTarget:
    """A live teacher's hidden states, whole or truncated as the objective has it."""

    teacher: LiveTeacher
    batch: TokenBatch
    hidden: Tensor
    """[N, E]"""

    def loss(self, student: StudentOutput) -> LossTerms:
        whole = HiddenTarget(self.teacher.head_on(self.hidden))
        if student.objective.loss.targets is None:
            return whole.loss(student)
        with timeline.span(timeline.COMPUTE, "teacher targets"):
            targets = self.truncated(student.objective, student.vocab)
        terms = SparseTarget(targets).loss(student)
        if not student.options.diagnostics:
            return terms
        with torch.no_grad():  # the complete distribution is not what the student learns from
            diagnosed = whole.loss(student)
        named = ("kl", "teacher_ce", "teacher_entropy", "agreement", "diagnostics")
        return replace(terms, **{name: getattr(diagnosed, name) for name in named})

    def complete(self) -> Head | None:
        return self.teacher.head_on(self.hidden)

    def truncated(self, objective: Objective, vocab: VocabSlice) -> SparseTargets:
        """The part of the distribution that `loss.targets` selects, saved too where the recipe asks for that.

        Collective over the vocab group.
        """
        teacher, section = self.teacher, objective.loss.targets
        assert section is not None
        chosen, tail = selection(section)
        randoms = None
        if (per_token := uniforms_per_token(chosen)) > 0:
            sequence = self.batch.starts.shape[1]
            randoms = uniforms(self.batch.slots, sequence=sequence, per_token=per_token, seed=objective.seed)
            randoms = self.batch.part.of(randoms.view(-1, sequence, *randoms.shape[1:])).flatten(0, 1)
            randoms = to_device(randoms, self.hidden.device)
        targets = sparse_targets(
            teacher.head_on(self.hidden),
            selection=chosen,
            tail=tail,
            vocab=vocab,
            temperature=objective.loss.temperature,
            uniforms=randoms,
            logit_memory=objective.options().logit_memory,
        )
        if teacher.saved is not None:
            teacher.saved.add(self.batch, targets)
        return targets
