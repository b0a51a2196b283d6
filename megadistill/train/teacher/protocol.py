"""The protocol of a teacher: what the training loop calls, whatever kind of teacher a run has."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator

from megadistill.distributed.topology import Topology
from megadistill.distributed.vocab import VocabSlice
from megadistill.train.resilience.sdc import FrozenWeights
from megadistill.train.setup.setup import Setup
from megadistill.train.teacher.probe import TeacherCheck
from megadistill.train.teacher.targets import LabelTarget, TargetedBatch
from megadistill.types import TokenBatch


class Teacher(ABC):
    """Source of a run's targets, on one rank. Only `teacher_targets` must be implemented."""

    @property
    def answers_any_tokens(self) -> bool:
        """Whether `teacher_targets` takes micro-batches of any tokens, those of held-out splits too."""
        return False

    @abstractmethod
    def teacher_targets(self, batches: Iterator[TokenBatch]) -> Generator[TargetedBatch, None, None]:
        """Each micro-batch with its target, in order; reads ahead in `batches` as far as it likes. Collective.

        Close the generator before another one is begun.
        """

    def start(self) -> None:  # noqa: B027 (optional)
        """Prepares for the steps after a start or a rollback. Collective."""

    def check(
        self, setup: Setup, vocab: VocabSlice, topology: Topology, *, rows: Callable[[Setup], TokenBatch]
    ) -> list[TeacherCheck]:
        """Compares each teacher with the one of the run's first start. Collective, while no targets are being made.

        Args:
            rows: reads the first micro-batch of the stream that the teacher of a setup learns from; called on rank 0
                alone, where it is needed.

        Returns:
            Nothing where there is nothing to compare.

        Raises:
            OperatorFault: on every rank, where it is another teacher on one of them.
        """
        return []

    def describe_prefetch(self, *, micro_batch: int, sequence_length: int) -> str | None:
        """A log line: how far the teacher runs ahead, and the memory that takes; None where it does not."""
        return None

    def frozen_weights(self) -> FrozenWeights | None:
        """The weights that this rank holds, with their digests; None where it holds none."""
        return None

    def flush(self) -> None:  # noqa: B027 (optional)
        """Makes targets that are being saved durable, before a checkpoint counts their slots as done."""

    def finish(self) -> str | None:
        """Completes the targets that were saved, after the run's last step; a log line on rank 0. Collective."""
        return None

    def close(self) -> None:  # noqa: B027 (optional)
        """Tells ranks that serve this one that no more requests come."""


class NoTeacher(Teacher):
    """A run from labels."""

    def teacher_targets(self, batches: Iterator[TokenBatch]) -> Generator[TargetedBatch, None, None]:
        for batch in batches:
            yield TargetedBatch(batch, LabelTarget())
