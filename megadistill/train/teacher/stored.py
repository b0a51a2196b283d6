"""A teacher whose targets were computed and stored before the run; it is not in memory."""

from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace

from torch import Tensor

from megadistill.data.targets.target_reader import TargetReader
from megadistill.train.teacher.protocol import Teacher
from megadistill.train.teacher.targets import SparseTarget, TargetedBatch
from megadistill.types import SparseTargets, TokenBatch


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
            targets = _of_part(self.reader.read(batch.slots, batch.digests), batch)
            yield TargetedBatch(batch, SparseTarget(targets.to(self.device)))


def _of_part(targets: SparseTargets, batch: TokenBatch) -> SparseTargets:
    """The targets of this rank's tokens, of those of whole sequences."""
    if batch.part.parts == 1:
        return targets

    def of(rows: Tensor) -> Tensor:
        return batch.part.of(rows.view(len(batch), -1, *rows.shape[1:])).flatten(0, 1)

    return replace(targets, ids=of(targets.ids), probs=of(targets.probs), log_tail=of(targets.log_tail))
