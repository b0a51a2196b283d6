"""Vocabulary slices: the rows of the vocabulary that a rank computes on.

Legend: V padded vocabulary, w world, p ranks of a vocab group, v this rank's rows.
"""

import itertools
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from megadistill.errors import UserError
from megadistill.types import to_device

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class _Tables(NamedTuple):
    """Both directions between local rows and global ids, on one device."""

    ids_v: Tensor
    """[v] int64: the global id of each local row."""
    row_of_id: Tensor
    """[size + 1] int64: the local row of each true id, -1 where another rank holds it; the last is -1 too."""


@dataclass(frozen=True)
class VocabSlice:
    """This rank's rows of a vocabulary: ascending half-open ranges of global ids.

    The `v` local rows of a weight are the rows of `ranges`, one after the other. Slices of a group are disjoint, may
    be uneven, and may be empty. `size` is the true vocabulary: ids from `size` on are padding, which no softmax sees.
    `group` is the process group whose slices together hold every id below `size`; None for a single process.

    Ids and rows are looked up in tables, made at the first use on a device (8 bytes an id of the vocabulary): two
    kernels for any number of ranges, of which a rank of thousands has hundreds.
    """

    ranges: tuple[tuple[int, int], ...]
    size: int
    group: "ProcessGroup | None" = None
    _tables: dict[torch.device, _Tables] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        ends = [0, *(bound for pair in self.ranges for bound in pair)]
        if any(later < earlier for earlier, later in itertools.pairwise(ends)):
            raise ValueError(f"vocabulary ranges must ascend without overlap, got {self.ranges}")
        if self.size <= 0:
            raise ValueError(f"a vocabulary needs at least one id, got size {self.size}")

    @classmethod
    def contiguous(cls, start: int, stop: int, size: int, group: "ProcessGroup | None" = None) -> "VocabSlice":
        """Rows `start` to `stop` of a vocabulary of `size` true ids."""
        return cls(ranges=((start, stop),), size=size, group=group)

    @cached_property
    def rows(self) -> int:
        """v: local rows, padding included."""
        return sum(stop - start for start, stop in self.ranges)

    @cached_property
    def true_rows(self) -> int:
        """Local rows that are not padding. Ranges ascend, so these come first."""
        return sum(max(0, min(stop, self.size) - start) for start, stop in self.ranges)

    def global_ids(self, device: torch.device | None = None) -> Tensor:
        """[v] int64: the global id of each local row. The same tensor at each call: do not write to it."""
        return self._on(device or torch.device("cpu")).ids_v

    def local_rows(self, ids: Tensor) -> Tensor:
        """int64, the shape of `ids`: the local row of each global id, -1 where another rank (or nobody) holds it."""
        return self._on(ids.device).row_of_id[ids.clamp(-1, self.size)]  # both ends are the last element, which is -1

    def _on(self, device: torch.device) -> _Tables:
        if device not in self._tables:
            starts_R, stops_R = torch.tensor(self.ranges, dtype=torch.int64).view(-1, 2).unbind(dim=1)
            lengths_R = stops_R - starts_R
            shifts_R = starts_R - (lengths_R.cumsum(0) - lengths_R)
            ids_v = to_device(torch.arange(self.rows) + shifts_R.repeat_interleave(lengths_R), device)
            row_of_id = ids_v.new_full((self.size + 1,), -1)
            row_of_id[ids_v[: self.true_rows]] = torch.arange(self.true_rows, device=device)
            self._tables[device] = _Tables(ids_v, row_of_id)
        return self._tables[device]


def padded_vocabulary(size: int, multiple: int, *, ranks: int) -> int:
    """The vocabulary rounded up to a multiple, and on to one of `ranks`, the ranks of a replica of the student.

    Every ZeRO-3 partition of the head is then whole rows. The padding belongs to the layout: a checkpoint written with
    one is read with another.
    """
    padded = -(-size // multiple) * multiple
    return -(-padded // ranks) * ranks


def block_cyclic_ranges(padded: int, world: int, group_size: int, rank: int) -> tuple[tuple[int, int], ...]:
    """The rows on which `rank` computes, when ZeRO-3 stores [V, D] as `world` contiguous row blocks.

    Rank (n, j), n = rank // p and j = rank % p, computes on the blocks s ≡ j (mod p): one block when p = w, else the
    w/p blocks that live on the ranks with the same j.

    `padded`: see `padded_vocabulary`.

    Raises:
        UserError: the group does not divide the world.
    """
    assert padded % world == 0, f"a padded vocabulary of {padded} does not divide over {world} ranks"
    if world % group_size:
        raise UserError(f"distributed.vocab_group is {group_size}, which does not divide the {world} ranks of this run")
    block = padded // world
    return tuple((s * block, (s + 1) * block) for s in range(rank % group_size, world, group_size))
