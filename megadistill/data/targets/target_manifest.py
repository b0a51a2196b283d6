"""Target sets: sparse targets that were stored, by slot; what they belong to, and which shard holds which slot.

It opens no shard, and knows neither teacher nor student. A target set is one folder: `targets.json`, shards
`shard-00003-000000.tar` (the first number is the rank that wrote it; plain WebDataset tars, a sample a slot), and
beside each its index. `targets.json` is written last: a folder without one is unfinished.

Legend: S tokens of a sequence, N slots asked for, R runs of slots.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError
from pydantic.dataclasses import dataclass

from megadistill.config import TargetsSection
from megadistill.data.shards.manifest import MAX_MANIFEST_BYTES, Sha256, Shard
from megadistill.data.storage.base import Folder
from megadistill.data.storage.open import folder_of
from megadistill.data.stream.order import differences as order_differences
from megadistill.errors import UserError
from megadistill.io import written_whole
from megadistill.redaction import shown
from megadistill.types import Tail

TARGETS: Final = "targets.json"
SCAN_SLOTS: Final = 1 << 20
"""Looked through at a time."""

Slot = Annotated[int, Field(ge=0, lt=1 << 62)]
Slots = NDArray[np.int64]


class TargetKey(BaseModel):
    """What stored targets belong to: whatever decides their numbers. A run that differs cannot learn from them."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    tokenizer: Sha256
    order: str
    """What decides which unit lies in a slot, as JSON: `Cursor.order`."""
    teacher: Sha256 | None
    """`teacher_fingerprint` of its folder; None, in the key of a run alone: the run names no teacher."""
    vocab_map: Sha256 | None
    """Of the map from the student's ids to the teacher's; None: both have the same ids."""
    targets: TargetsSection
    """What is kept of the teacher's distribution."""
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    seed: int
    """Of the draws."""
    sequence_length: Annotated[int, Field(ge=1, le=1 << 24)]
    vocab_size: Annotated[int, Field(ge=2, le=1 << 24)]
    """The true number of ids."""
    document_mask: bool

    @property
    def tail(self) -> Tail:
        return Tail(self.targets.tail or Tail.RENORMALISED)

    @property
    def most_kept(self) -> int:
        """No token keeps more ids than this."""
        asked = self.targets
        if asked.epsilon is not None:
            most = math.floor(1 / asked.epsilon) + 1  # a quotient is rounded
        else:
            most = next(number for number in (asked.draws, asked.k, asked.max_ids) if number is not None)
        return min(most, self.vocab_size)

    @property
    def order_fingerprint(self) -> str:
        """`TokenStream.fingerprint`."""
        return hashlib.sha256(self.order.encode()).hexdigest()


def key_differences(stored: TargetKey, run: TargetKey, *, stop: int) -> list[str]:
    """What keeps a run from learning from targets that were stored for slots below `stop`; a line each.

    Orders may differ in what those slots do not need, such as later stages. The teacher, and how its ids map, are
    compared where the run names one; the seed only where something was drawn.
    """
    found = [
        f"{words} was {_in_words(getattr(stored, name))}, is {_in_words(getattr(run, name))}"
        for name, words in _FIELDS.items()
        if getattr(stored, name) != getattr(run, name)
        and not (name in ("teacher", "vocab_map") and run.teacher is None)
        and not (name == "seed" and stored.targets.draws is None and run.targets.draws is None)
    ]
    if stored.order != run.order:
        found += order_differences(json.loads(stored.order), json.loads(run.order), next_slot=stop)
    return found


_FIELDS: Final = {
    "tokenizer": "the tokenizer",
    "teacher": "the teacher",
    "vocab_map": "teacher.vocab_map",
    "targets": "loss.targets",
    "temperature": "loss.temperature",
    "seed": "the seed of the draws",
    "sequence_length": "the sequence length",
    "vocab_size": "the vocabulary size",
    "document_mask": "data.document_mask",
}


def _in_words(value: Any) -> str:
    if isinstance(value, TargetsSection):
        return ", ".join(f"{name} {part}" for name, part in value.model_dump(exclude_none=True).items())
    return f"{value[:12]}…" if isinstance(value, str) else str(value)


SlotRun = tuple[Slot, Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]]
"""first, length, stride, count: the slots first + k·stride + i, for k below count and i below length ≤ stride."""


@dataclass(frozen=True, slots=True, config=ConfigDict(extra="forbid", strict=True))
class TargetShard:
    """One shard, and the slots in it, in their order; a rank's rows of many batches are one run."""

    file: Shard
    runs: Annotated[tuple[SlotRun, ...], Field(min_length=1)]

    def __post_init__(self) -> None:
        if sum(length * count for _, length, _, count in self.runs) != self.file.units:
            raise ValueError(
                f"{self.file.name} has {self.file.units} samples, and its runs have other numbers of slots"
            )
        if any(length > stride for _, length, stride, _ in self.runs):
            raise ValueError(f"{self.file.name} has a run that meets itself")
        ends = [_end(run) for run in self.runs]
        if any(after[0] < end for end, after in zip(ends, self.runs[1:], strict=False)):
            raise ValueError(f"{self.file.name} has runs that are not in order")

    @property
    def stop(self) -> int:
        """The last slot, and one."""
        return _end(self.runs[-1])


def _end(run: SlotRun) -> int:
    first, length, stride, count = run
    return first + (count - 1) * stride + length


def slot_runs(slots: Sequence[int]) -> tuple[SlotRun, ...]:
    """Ascending slots as runs."""
    edges = [0, *(i for i in range(1, len(slots)) if slots[i] != slots[i - 1] + 1), len(slots)]
    runs: list[SlotRun] = []
    for start, stop in pairwise(edges):
        first, length = slots[start], stop - start
        if runs:
            begun, same, stride, count = runs[-1]
            apart = first - begun if count == 1 else stride
            if length == same and first == begun + count * apart:
                runs[-1] = (begun, same, apart, count + 1)
                continue
        runs.append((first, length, length, 1))
    return tuple(runs)


class SlotMap:
    """Where each slot lies among shards whose slots may be interleaved."""

    def __init__(self, shards: Iterable[TargetShard]) -> None:
        runs = [
            (first, length, stride, count, number, before)
            for number, shard in enumerate(shards)
            for (first, length, stride, count), before in zip(shard.runs, _before(shard.runs), strict=True)
        ]
        table_R6 = np.array(sorted(runs), dtype=np.int64).reshape(-1, 6)
        self._first, self._length, self._stride, self._count, self._shard, self._before = table_R6.T
        self._stop = self._first + (self._count - 1) * self._stride + self._length
        self._reach = np.maximum.accumulate(self._stop)

    def locate(self, slots_N: Slots) -> NDArray[np.int64]:
        """[N, 2]: shard, and sample in the shard, of each slot [N]; -1 where no shard has it."""
        places_N2 = np.full((len(slots_N), 2), -1, dtype=np.int64)
        lows = np.searchsorted(self._reach, slots_N, side="right")
        highs = np.searchsorted(self._first, slots_N, side="right")
        for row, (slot, low, high) in enumerate(zip(slots_N.tolist(), lows.tolist(), highs.tolist(), strict=True)):
            here = slice(low, high)
            rounds, inside = np.divmod(slot - self._first[here], self._stride[here])
            found = np.flatnonzero((inside < self._length[here]) & (rounds < self._count[here]))
            if len(found):
                run = int(found[0])
                sample = self._before[here][run] + rounds[run] * self._length[here][run] + inside[run]
                places_N2[row] = self._shard[here][run], sample
        return places_N2

    def first_missing(self, start: int, stop: int) -> int:
        """The first slot of [start, stop) that no shard has; `stop` where none is missing."""
        for begin in range(start, stop, SCAN_SLOTS):
            end = min(begin + SCAN_SLOTS, stop)
            held = np.zeros(end - begin, dtype=np.bool_)
            for run in np.flatnonzero((self._first < end) & (self._stop > begin)).tolist():
                first, stride = int(self._first[run]), int(self._stride[run])
                rounds = np.arange(
                    max(0, (begin - first) // stride), min(int(self._count[run]), (end - first) // stride + 1)
                )
                slots = (first + rounds[:, None] * stride + np.arange(self._length[run])).reshape(-1)
                held[slots[(slots >= begin) & (slots < end)] - begin] = True
            if not held.all():
                return begin + int(held.argmin())
        return stop


def _before(runs: Sequence[SlotRun]) -> list[int]:
    """How many slots of a shard lie before each of its runs."""
    return list(accumulate((length * count for _, length, _, count in runs[:-1]), initial=0))


class TargetManifest(BaseModel):
    """A finished target set. Immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    version: Literal[1]
    key: TargetKey
    shards: Annotated[tuple[TargetShard, ...], Field(min_length=1, max_length=1 << 24)]

    _folder: Folder | None = PrivateAttr(default=None)

    @classmethod
    def load(cls, location: Path | str) -> "TargetManifest":
        """The target set in the folder at `location`, a path or a URL.

        Raises:
            UserError: there is none, it was changed by hand, or it is not one that this version reads; one line.
        """
        folder = folder_of(str(location))
        where, again = f"{shown(location)}/{TARGETS}", "store the targets again"
        try:
            text = folder.read_whole(TARGETS, max_bytes=MAX_MANIFEST_BYTES)
        except OSError as error:
            raise UserError(
                f"{where} cannot be read ({error.strerror or error}): give the folder of a finished target set"
            ) from None
        try:
            stored = _Stored.model_validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(map(str, first["loc"])) or "the file"
            raise UserError(f"{where} is no valid target set: {place}: {first['msg']}: {again}") from None
        manifest = cls(version=stored.version, key=stored.key, shards=stored.shards)
        if stored.sha256 != manifest.fingerprint:
            raise UserError(f"{where} was changed after it was written, and a target set is immutable: {again}")
        manifest._folder = folder
        return manifest

    def write(self, folder: Path) -> None:
        """Writes `folder`/targets.json, whole or not at all. The last act of storing."""
        stored = _Stored(version=self.version, key=self.key, shards=self.shards, sha256=self.fingerprint)
        with written_whole(folder / TARGETS) as file:
            file.write(stored.model_dump_json(indent=1).encode() + b"\n")

    @property
    def folder(self) -> Folder:
        """Where it was loaded from; shard names are relative to it."""
        assert self._folder is not None, "this manifest was not loaded from a file"
        return self._folder

    @property
    def slots(self) -> int:
        """How many it holds."""
        return sum(shard.file.units for shard in self.shards)

    @property
    def stop(self) -> int:
        """The last slot, and one."""
        return max(shard.stop for shard in self.shards)

    @property
    def bytes_per_token(self) -> float:
        """Of the tars, headers and all, for each token of their slots."""
        return sum(shard.file.bytes for shard in self.shards) / (self.slots * self.key.sequence_length)

    @property
    def fingerprint(self) -> str:
        """sha256 of the JSON without white space."""
        return hashlib.sha256(self.model_dump_json(exclude={"sha256"}).encode()).hexdigest()

    def require_compatible(self, run: TargetKey) -> None:
        """Raises UserError, which lists what differs: a run with this key cannot learn from these targets."""
        differing = key_differences(self.key, run, stop=self.stop)
        if differing:
            raise UserError(
                f"the targets in {self.folder.location} were stored for another run: {'; '.join(differing)}: "
                "undo the change, or store them again"
            )


class _Stored(TargetManifest):
    """A target set's manifest as it lies in its file."""

    sha256: Sha256
    """The fingerprint of the rest."""


def refuse_finished_targets(folder: Path) -> None:
    """Raises UserError where `folder` holds a finished target set, which is immutable."""
    if (folder / TARGETS).exists():
        raise UserError(
            f"{folder / TARGETS} exists, and a finished target set is never changed: give another folder, or delete it"
        )
