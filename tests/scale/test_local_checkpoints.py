"""The local tier at 4,096 ranks: connections of a rank, and the bytes by which a start agrees on a save."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megadistill.distributed.neighbour_copies import NodeRing
from megadistill.train.checkpoint import local_tier as local
from megadistill.train.checkpoint.attempt import Attempt
from megadistill.train.checkpoint.local_tier import LocalTier
from tests.unit.train.cases import manifest_of, topology

WORLDS = [16, 512, 4096]
NODE = 8


@pytest.mark.parametrize("world", WORLDS)
def test_a_rank_has_two_connections(world: int) -> None:
    links = NodeRing.of([rank // NODE for rank in range(world)]).links()
    ends = torch.tensor(links).flatten().bincount(minlength=world)
    assert len(links) == world
    assert ends.tolist() == [2] * world


class _Collectives:
    """The collectives of one rank of a large world: the others have the same saves, and lack the files of one node."""

    def __init__(self, world: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.world, self.nbytes, self.lost = world, [0], range(NODE, 2 * NODE)
        """Bytes of each call that a rank receives."""
        monkeypatch.setattr(local, "all_gather_rows", self._gather)
        monkeypatch.setattr(local, "all_reduce_max", self._max)
        monkeypatch.setattr(local, "first_false", self._first_false)
        monkeypatch.setattr(local, "HostChannels", lambda *arguments: self)

    def connect(self, links: Any) -> None: ...

    def _gather(self, own: Tensor, group: Any) -> Tensor:
        self.nbytes.append(own.nbytes * self.world)
        return torch.tensor([rank // NODE for rank in range(self.world)])

    def _max(self, own: Tensor, group: Any) -> Tensor:
        self.nbytes.append(own.nbytes)
        if own.numel() == self.world:  # of the files of each rank; those of the lost node are on the one after it
            holders = torch.arange(self.world, dtype=torch.int32)
            is_second = bool((own >= 0).sum() != 1) or self.nbytes.count(own.nbytes) > 1
            holders[self.lost.start : self.lost.stop] = 2 * NODE if is_second else -1
            return torch.maximum(own, holders)
        return own

    def _first_false(self, flag: bool, device: Any, group: Any) -> int | None:
        self.nbytes.append(4)
        return None if flag else 0


@pytest.mark.parametrize("world", WORLDS)
def test_a_start_agrees_by_one_number_a_rank(world: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """8 bytes of each rank name its node, and 4 bytes the holder of its file, twice after a lost node."""
    collectives = _Collectives(world, monkeypatch)
    tier = LocalTier(tmp_path, topology(rank=0, world=world), Attempt(tmp_path / "run-folder", 1), run="run")
    tier._target, tier._sources = None, []
    manifest = manifest_of(10).model_copy(update={"world": world, "attempt": 1})
    tier.write(tier.temporary(10), {"master/w": torch.zeros(4), "rng": torch.zeros(1)})
    tier.commit(tier.temporary(10), manifest)
    tier.completed(10)
    checkpoint = tier.newest(lambda manifest: True)
    assert checkpoint is not None
    assert checkpoint.manifest.step == 10
    assert max(collectives.nbytes) == 8 * world
    assert sum(collectives.nbytes) <= 8 * world + 2 * 4 * world + 64
    assert len(collectives.nbytes) <= 8
    written = [path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()]
    assert max(written) < 4096, "a manifest of the tier lists no files of other ranks"
