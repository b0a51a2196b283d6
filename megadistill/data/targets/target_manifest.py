"""Target sets: the record of stored sparse targets, the run that they fit, and the shard of each slot.

A target set is one folder: `targets.json`, shards `shard-00003-000000.tar` (the first number is the rank that wrote it;
plain WebDataset tars, a sample a slot), and beside each its index. `targets.json` is written last: a folder without one
is incomplete.

Legend: S tokens of a sequence, N slots to locate, R ranges of slots.
"""

import json
from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic.dataclasses import dataclass

from megadistill.config.recipe import TargetsSection, TeacherPrecision
from megadistill.data.shards.hashed_record import HashedRecord, Sha256
from megadistill.data.shards.shard import Shard
from megadistill.data.storage.open import folder_of
from megadistill.data.stream.order import order_differences
from megadistill.errors import UserError
from megadistill.io import parse_json
from megadistill.redaction import redact_url
from megadistill.types import Tail

SCAN_SLOTS: Final = 1 << 20
"""Slots examined at a time."""

Slot = Annotated[int, Field(ge=0, lt=1 << 62)]
Slots = NDArray[np.int64]


class TargetKey(BaseModel):
    """All that decides the numbers of stored targets: a run with another key cannot learn from them."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    tokenizer: Sha256
    order: str
    """Description of the order, which decides the sequence of a slot, as JSON: `Cursor.order`."""
    teacher: Sha256 | None
    """`teacher_fingerprint` of its folder; None only in the key of a run that names no teacher."""
    teacher_precision: TeacherPrecision = Field(default="native", exclude_if=lambda precision: precision == "native")
    """Precision of its products. Not written where it is native."""
    vocab_map: Sha256 | None
    """Hash of the map from the student's ids to the teacher's; None: both have the same ids."""
    targets: TargetsSection
    """Selection of the ids that are stored."""
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)]
    """Seed of the draws."""
    sequence_length: Annotated[int, Field(ge=1, le=1 << 24)]
    vocab_size: Annotated[int, Field(ge=2, le=1 << 24)]
    """Number of ids, without padding."""
    document_mask: bool
    insert_bos: bool = Field(default=False, exclude_if=lambda holds: not holds)
    """Whether BOS was put in front of the sequences when they were read. Not written where it is false."""

    @field_validator("order")
    @classmethod
    def _is_an_object(cls, order: str) -> str:
        if not isinstance(parse_json(order.encode()), dict):
            raise ValueError("it is not a JSON object")
        return order

    @property
    def tail(self) -> Tail:
        return Tail(self.targets.tail or Tail.RENORMALISED)

    @property
    def max_ids_per_token(self) -> int:
        """The most ids that a token can have."""
        return self.targets.max_ids_per_token(self.vocab_size)


def key_differences(stored: TargetKey, run: TargetKey, *, stop: int) -> list[str]:
    """Differences that keep a run from learning from targets of slots below `stop`; a line each.

    Orders may differ in what those slots do not need, such as later curriculum entries. The teacher, its precision and
    the map of its ids are compared where the run names one; the seed only where something was drawn.
    """
    lines = [
        f"{title} was {_described(getattr(stored, name))}, is {_described(getattr(run, name))}"
        for name, title in _FIELDS.items()
        if getattr(stored, name) != getattr(run, name)
        and not (name in ("teacher", "teacher_precision", "vocab_map") and run.teacher is None)
        and not (name == "seed" and not stored.targets.is_random and not run.targets.is_random)
    ]
    if stored.order != run.order:
        lines += order_differences(json.loads(stored.order), json.loads(run.order), next_slot=stop)
    return lines


_FIELDS: Final = {
    "tokenizer": "the tokenizer",
    "teacher": "the teacher",
    "teacher_precision": "teacher.precision",
    "vocab_map": "teacher.vocab_map",
    "targets": "loss.targets",
    "temperature": "loss.temperature",
    "seed": "the seed of the draws",
    "sequence_length": "the sequence length",
    "vocab_size": "the vocabulary size",
    "document_mask": "data.document_mask",
    "insert_bos": "data.insert_bos",
}


def _described(value: Any) -> str:
    if isinstance(value, TargetsSection):
        return ", ".join(f"{name} {part}" for name, part in value.model_dump(exclude_none=True).items())
    return f"{value[:12]}…" if isinstance(value, str) and len(value) > 12 else str(value)


Extent = Annotated[int, Field(ge=1, lt=1 << 62)]
SlotRange = tuple[Slot, Extent, Extent, Extent]
"""first, length, stride, count: the slots first + k·stride + i, for k below count and i below length ≤ stride."""


@dataclass(frozen=True, slots=True, config=ConfigDict(extra="forbid", strict=True))
class TargetShard:
    """One shard, and its slots in order; a rank's rows of many batches are one range."""

    file: Shard
    slots: Annotated[tuple[SlotRange, ...], Field(min_length=1)]

    def __post_init__(self) -> None:
        if sum(length * count for _, length, _, count in self.slots) != self.file.sequences:
            raise ValueError(
                f"{self.file.name} has {self.file.sequences} samples, and its ranges have another number of slots"
            )
        if any(length > stride for _, length, stride, _ in self.slots):
            raise ValueError(f"{self.file.name} has a range that overlaps itself")
        ends = [_end(part) for part in self.slots]
        if max(ends) > 1 << 62:
            raise ValueError(f"{self.file.name} has a range that ends beyond all slots")
        if any(after[0] < end for end, after in zip(ends, self.slots[1:], strict=False)):
            raise ValueError(f"{self.file.name} has ranges that are not in order")

    @property
    def stop(self) -> int:
        """The last slot, plus one."""
        return _end(self.slots[-1])


def _end(part: SlotRange) -> int:
    first, length, stride, count = part
    return first + (count - 1) * stride + length


def split_into_ranges(slots: Sequence[int]) -> tuple[SlotRange, ...]:
    """Ascending slots as few ranges."""
    edges = [0, *(i for i in range(1, len(slots)) if slots[i] != slots[i - 1] + 1), len(slots)]
    ranges: list[SlotRange] = []
    for start, stop in pairwise(edges):
        first, length = slots[start], stop - start
        if ranges:
            begin, same, stride, count = ranges[-1]
            apart = first - begin if count == 1 else stride
            if length == same and first == begin + count * apart:
                ranges[-1] = (begin, same, apart, count + 1)
                continue
        ranges.append((first, length, length, 1))
    return tuple(ranges)


class SlotMap:
    """The place of each slot, among shards whose slots may be interleaved."""

    def __init__(self, shards: Iterable[TargetShard]) -> None:
        ranges = [
            (first, length, stride, count, number, before)
            for number, shard in enumerate(shards)
            for (first, length, stride, count), before in zip(shard.slots, _before(shard.slots), strict=True)
        ]
        table_R6 = np.array(sorted(ranges), dtype=np.int64).reshape(-1, 6)
        self._first, self._length, self._stride, self._count, self._shard, self._before = table_R6.T
        self._stop = self._first + (self._count - 1) * self._stride + self._length
        self._reach = np.maximum.accumulate(self._stop)

    def locate(self, slots_N: Slots) -> NDArray[np.int64]:
        """[N, 2]: shard, and sample in it, of each slot [N]; -1 where no shard has it."""
        places_N2 = np.full((len(slots_N), 2), -1, dtype=np.int64)
        lows = np.searchsorted(self._reach, slots_N, side="right")
        highs = np.searchsorted(self._first, slots_N, side="right")
        for row, (slot, low, high) in enumerate(zip(slots_N.tolist(), lows.tolist(), highs.tolist(), strict=True)):
            here = slice(low, high)
            rounds, inside = np.divmod(slot - self._first[here], self._stride[here])
            hits = np.flatnonzero((inside < self._length[here]) & (rounds < self._count[here]))
            if len(hits):
                part = int(hits[0])
                sample = self._before[here][part] + rounds[part] * self._length[here][part] + inside[part]
                places_N2[row] = self._shard[here][part], sample
        return places_N2

    def first_missing(self, start: int, stop: int) -> int:
        """The first slot of [start, stop) that no shard has; `stop` where none is missing."""
        for begin in range(start, stop, SCAN_SLOTS):
            end = min(begin + SCAN_SLOTS, stop)
            held = np.zeros(end - begin, dtype=np.bool_)
            for part in np.flatnonzero((self._first < end) & (self._stop > begin)).tolist():
                first, stride, length = int(self._first[part]), int(self._stride[part]), int(self._length[part])
                rounds = np.arange(
                    max(0, (begin - first) // stride), min(int(self._count[part]), (end - first) // stride + 1)
                )
                if length > SCAN_SLOTS:  # of a few rounds
                    for start in (first + rounds * stride).tolist():
                        held[max(0, start - begin) : max(0, start + length - begin)] = True
                    continue
                slots = (first + rounds[:, None] * stride + np.arange(length)).reshape(-1)
                held[slots[(slots >= begin) & (slots < end)] - begin] = True
            if not held.all():
                return begin + int(held.argmin())
        return stop


def _before(ranges: Sequence[SlotRange]) -> list[int]:
    """Number of slots of a shard before each of its ranges."""
    return list(accumulate((length * count for _, length, _, count in ranges[:-1]), initial=0))


class TargetManifest(HashedRecord):
    """The record of a finished target set. Immutable."""

    FILE: ClassVar[str] = "targets.json"
    TITLE: ClassVar[str] = "target set"
    VERSION: ClassVar[str] = "2"
    LOCATION: ClassVar[str] = "the folder of a finished target set"
    WAY_OUT: ClassVar[str] = "store the targets"

    version: Literal[2]
    key: TargetKey
    shards: Annotated[tuple[TargetShard, ...], Field(min_length=1, max_length=1 << 24)]

    @classmethod
    def load(cls, location: Path | str) -> "TargetManifest":
        """The target set in the folder at `location`, a path or a URL.

        Raises:
            UserError: there is none, it was changed by hand, or it has another format version; one line.
        """
        return cls._read(folder_of(str(location)), cls.FILE, f"{redact_url(location)}/{cls.FILE}")

    @property
    def slots(self) -> int:
        """Number of slots in the set."""
        return sum(shard.file.sequences for shard in self.shards)

    @property
    def stop(self) -> int:
        """The last slot, plus one."""
        return max(shard.stop for shard in self.shards)

    @property
    def bytes_per_token(self) -> float:
        """Bytes of the tars, headers included, for each token of the slots."""
        return sum(shard.file.bytes for shard in self.shards) / (self.slots * self.key.sequence_length)

    def require_compatible(self, run: TargetKey) -> None:
        """Raises UserError, with the differences: a run with this key cannot learn from these targets."""
        differing = key_differences(self.key, run, stop=self.stop)
        if differing:
            raise UserError(
                f"the targets in {self.folder.location} were stored for another run: {'; '.join(differing)}: "
                "undo the change, or store them again"
            )
