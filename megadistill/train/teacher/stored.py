"""A teacher whose targets were computed and stored before the run; it is not in memory."""

from collections.abc import Generator, Iterator
from dataclasses import dataclass

from megadistill.data.targets.target_reader import TargetReader
from megadistill.train.teacher.protocol import Teacher
from megadistill.train.teacher.targets import SparseTarget, TargetedBatch
from megadistill.types import TokenBatch


@dataclass(frozen=True)
class StoredTeacher(Teacher):
    """Reads targets by slot."""

    reader: TargetReader
    device: str

    def teacher_targets(self, batches: Iterator[TokenBatch]) -> Generator[TargetedBatch, None, None]:
        """See `Teacher`.

        Raises:
            ShardFault: a slot has no targets, damaged ones, or those of other tokens.
        """
        for batch in batches:
            targets = self.reader.read(batch.slots, batch.digests).to(self.device)
            yield TargetedBatch(batch, SparseTarget(targets))
