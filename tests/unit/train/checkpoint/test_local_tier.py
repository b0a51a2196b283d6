"""The local tier in threads, each of which is a rank and a node: which save is read, and what is never read."""

import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import combinations
from pathlib import Path
from queue import Queue
from typing import Any, TypeVar

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from megadistill.config.recipe import LocalCheckpointSection
from megadistill.distributed.neighbour_copies import NodeRing
from megadistill.errors import OperatorFault, Superseded, UserError
from megadistill.train.checkpoint import local_tier as local
from megadistill.train.checkpoint.attempt import Attempt, acquire
from megadistill.train.checkpoint.format import CheckpointManifest, rank_file
from megadistill.train.checkpoint.local_tier import (
    LocalTier,
    describe_local_folder,
    resumed_steps,
    run_id,
    was_passed_over,
)
from tests.unit.train.cases import manifest_of, topology

Value = TypeVar("Value")

WORLD = 3


class ThreadRanks:
    """Collectives and transfers of ranks that are threads; the module `local` is given them instead of torch's."""

    def __init__(self, world: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.world = world
        self._own, self._barrier = threading.local(), threading.Barrier(world)
        self._values: list[Any] = [None] * world
        self._queues = {(a, b): Queue[list[bytes | None]]() for a in range(world) for b in range(world)}
        monkeypatch.setattr(local, "all_reduce_max", lambda own, group: torch.stack(self._gather(own)).amax(0))
        monkeypatch.setattr(local, "all_gather_rows", lambda own, group: torch.cat(self._gather(own)))
        monkeypatch.setattr(local, "first_false", self._first_false)
        monkeypatch.setattr(local, "transfer", self._transfer)
        monkeypatch.setattr(local, "HostChannels", self._channels)

    def run(self, function: Callable[[int], Value]) -> list[Value]:
        """The results of `function(rank)`, by rank."""

        def ranked(rank: int) -> Value:
            self._own.rank = rank
            return function(rank)

        with ThreadPoolExecutor(self.world) as pool:
            return list(pool.map(ranked, range(self.world), timeout=60))

    def _gather(self, own: Any) -> list[Any]:
        self._values[self._own.rank] = own
        self._barrier.wait(30)
        values = list(self._values)
        self._barrier.wait(30)
        return values

    def _first_false(self, flag: bool, device: Any, group: Any) -> int | None:
        return next((rank for rank, value in enumerate(self._gather(flag)) if not value), None)

    def _channels(self, rank: int, timeout: Any, store: Any) -> Any:
        class Channels:
            def connect(self, links: Any) -> None: ...

            def to(self, peer: int) -> tuple[int, int]:
                return rank, peer

        return Channels()

    def _transfer(self, sent: Any, received: Any) -> list[bool]:
        for (rank, peer), paths in sent:
            self._queues[rank, peer].put([path.read_bytes() if path.exists() else None for path in paths])
        complete = []
        for (rank, peer), paths in received:
            contents = self._queues[peer, rank].get(timeout=30)
            complete.append(None not in contents)
            for path, content in zip(paths, contents, strict=True):
                if content is not None:
                    path.write_bytes(content)
        return complete


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> ThreadRanks:
    return ThreadRanks(WORLD, monkeypatch)


def _state(rank: int, step: int) -> dict[str, Tensor]:
    return {"master/w": torch.full((10 + rank,), float(100 * step + rank)), "rng": torch.zeros(3, dtype=torch.uint8)}


def _manifest(step: int, **values: Any) -> CheckpointManifest:
    return manifest_of(step).model_copy(update={"world": WORLD, "attempt": 1, **values})


def _tier(folder: Path, rank: int, *, number: int = 1, run: str = "run") -> LocalTier:
    placed = topology(rank=rank, world=WORLD)
    return LocalTier(folder / f"node-{rank}", placed, Attempt(folder / "run-folder", number), run=run)


def _save(folder: Path, rank: int, *manifests: CheckpointManifest, number: int = 1) -> LocalTier:
    tier = _tier(folder, rank, number=number)
    for manifest in manifests:
        temporary = tier.temporary(manifest.step)
        tier.write(temporary, _state(rank, manifest.step))
        tier.commit(temporary, manifest)
        tier.completed(manifest.step)
    return tier


def _newest(folder: Path, rank: int, is_usable: local.IsUsable = lambda manifest: True, **tier: Any) -> int | None:
    """The step of the save that the next attempt reads; this rank's values are compared."""
    checkpoint = _tier(folder, rank, **{"number": 2, **tier}).newest(is_usable)
    if checkpoint is None:
        return None
    step = checkpoint.manifest.step
    expected = _state(rank, step)["master/w"]
    assert torch.equal(checkpoint.read("master/w", 0, len(expected)), expected)
    with pytest.raises(OperatorFault, match=f"has {len(expected)} elements, not 0 to 4"):
        checkpoint.read("master/w", 0, 4)
    return step


def _damage(path: Path, number: int) -> None:
    """Removes a file, cuts it off, or flips a byte of it."""
    if number % 3 == 0:
        path.unlink()
    elif number % 3 == 1:
        os.truncate(path, path.stat().st_size - 1)
    else:
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)


def test_every_set_of_lost_files_is_decided_alike_and_never_mixes_steps(ranks: ThreadRanks, tmp_path: Path) -> None:
    """All 64 sets of lost files (own and copies, of 3 ranks) of the newest save, and of both saves."""
    whole = tmp_path / "whole"
    ranks.run(lambda rank: _save(whole, rank, _manifest(1), _manifest(2)))
    files = [(rank, holder) for rank in range(WORLD) for holder in (rank, (rank + 1) % WORLD)]
    sets = [lost for size in range(len(files) + 1) for lost in combinations(files, size)]
    for number, lost in enumerate(sets):
        copies = [{(rank, rank), (rank, (rank + 1) % WORLD)} for rank in range(WORLD)]
        survives = not any(both <= set(lost) for both in copies)
        for steps, fallback in (((2,), 1),) if survives else (((2,), 1), ((1, 2), None)):
            folder = tmp_path / f"{number}-{len(steps)}"
            shutil.copytree(whole, folder)
            for step in steps:
                for place, (rank, holder) in enumerate(lost):
                    save = folder / f"node-{holder}" / "run" / f"step-{step:08d}-a1"
                    _damage(save / rank_file(rank, WORLD), place + number)
            expected = 2 if survives else fallback
            assert ranks.run(partial(_newest, folder)) == [expected] * WORLD, (lost, steps)
            shutil.rmtree(folder)


def test_nodes_that_committed_another_last_save_agree_on_the_one_that_all_have(
    ranks: ThreadRanks, tmp_path: Path
) -> None:
    """A kill between the renames of two nodes: the bytes of step 3 are whole, and one node lacks it."""
    ranks.run(lambda rank: _save(tmp_path, rank, _manifest(1), _manifest(2), _manifest(3)))
    for node in (0, 1):
        save = tmp_path / f"node-{node}" / "run" / "step-00000003-a1"
        save.rename(save.with_name(f".tmp-{save.name}"))
    assert ranks.run(lambda rank: _newest(tmp_path, rank)) == [2] * WORLD
    assert not list(tmp_path.glob("node-*/run/.tmp-*")), "what was left over is still there"


@pytest.mark.parametrize("number", range(WORLD))
def test_nodes_that_changed_their_places_read_their_files_from_each_other(
    ranks: ThreadRanks, tmp_path: Path, number: int
) -> None:
    """A spare node is last: the nodes after the lost one have other ranks than before."""
    ranks.run(lambda rank: _save(tmp_path, rank, _manifest(5)))
    nodes = [tmp_path / f"node-{rank}" for rank in range(WORLD)]
    moved = [path.rename(path.with_name(f"former-{place}")) for place, path in enumerate(nodes)]
    for place, path in enumerate([*moved[:number], *moved[number + 1 :]]):
        path.rename(nodes[place])
    assert ranks.run(lambda rank: _newest(tmp_path, rank)) == [5] * WORLD


def test_what_belongs_elsewhere_is_never_read(ranks: ThreadRanks, tmp_path: Path) -> None:
    """Another run's folder, another world's save, a manifest that was changed, and what `is_usable` refuses."""
    ranks.run(lambda rank: _save(tmp_path, rank, _manifest(1), _manifest(2)))
    assert ranks.run(lambda rank: _newest(tmp_path, rank, run="another")) == [None] * WORLD
    assert ranks.run(lambda rank: _newest(tmp_path, rank, lambda manifest: manifest.step < 2)) == [1] * WORLD
    for rank in range(WORLD):
        path = tmp_path / f"node-{rank}" / "run" / "step-00000002-a1" / "manifest.json"
        path.write_text(path.read_text().replace('"step": 2', '"step": 3'))
    assert ranks.run(lambda rank: _newest(tmp_path, rank)) == [1] * WORLD

    other = tmp_path / "other"
    ranks.run(lambda rank: _save(other, rank, _manifest(4, world=4)))
    assert ranks.run(lambda rank: _newest(other, rank)) == [None] * WORLD


def test_saves_of_attempts_that_this_run_has_not_made_are_not_read(ranks: ThreadRanks, tmp_path: Path) -> None:
    """Those of a run folder that was put back from an older copy of it: attempt 3 starts once more."""
    ranks.run(lambda rank: _save(tmp_path, rank, _manifest(1)))
    ranks.run(lambda rank: _save(tmp_path, rank, _manifest(2, attempt=3), number=3))
    assert ranks.run(lambda rank: _newest(tmp_path, rank, number=3)) == [1] * WORLD
    again = ranks.run(lambda rank: _save(tmp_path, rank, _manifest(2, attempt=3), number=3))
    newest = ranks.run(lambda rank: again[rank].newest(lambda manifest: True))
    assert [each.manifest.step for each in newest if each is not None] == [2] * WORLD, "its own, after a rollback"


def test_two_saves_stay_and_those_that_the_run_takes_again_are_deleted(ranks: ThreadRanks, tmp_path: Path) -> None:
    def steps_of(rank: int) -> list[str]:
        return sorted(path.name for path in (tmp_path / f"node-{rank}" / "run").iterdir())

    tiers = ranks.run(lambda rank: _save(tmp_path, rank, *(_manifest(step) for step in (10, 20, 30, 40))))
    assert [tier.steps for tier in tiers] == [[30, 40]] * WORLD
    assert steps_of(0) == ["step-00000030-a1", "step-00000040-a1"]
    ranks.run(lambda rank: tiers[rank].discard_after(30))
    assert [tier.steps for tier in tiers] == [[30]] * WORLD
    assert [steps_of(rank) for rank in range(WORLD)] == [["step-00000030-a1"]] * WORLD
    ranks.run(lambda rank: tiers[rank].clear())
    assert not any((tmp_path / f"node-{rank}" / "run").exists() for rank in range(WORLD))


def test_an_attempt_that_was_replaced_neither_commits_nor_deletes(ranks: ThreadRanks, tmp_path: Path) -> None:
    attempt = acquire(tmp_path / "run-folder", {})
    tiers = ranks.run(lambda rank: _save(tmp_path, rank, _manifest(1), _manifest(2)))
    acquire(tmp_path / "run-folder", {})
    assert not attempt.is_newest()
    tier = tiers[0]
    tier.temporary(3).mkdir()
    with pytest.raises(Superseded, match="attempt 2 has started"):
        tier.commit(tier.temporary(3), _manifest(3))
    tier.discard_after(0)
    tier.clear()
    names = {path.name for path in (tmp_path / "node-0" / "run").iterdir()}
    assert names == {"step-00000001-a1", "step-00000002-a1", ".tmp-step-00000003-a1"}


@pytest.mark.parametrize("sizes", [(1, 1), (2, 2, 2), (8, 8, 4), (8, 3), (1, 4, 2), (3,)])
def test_a_copy_is_on_another_node_whatever_the_nodes_sizes(sizes: tuple[int, ...]) -> None:
    ids = [1000 + node for node, size in enumerate(sizes) for _ in range(size)]
    ring = NodeRing.of(ids)
    assert [len(node) for node in ring.nodes] == list(sizes)
    links = ring.links()
    assert len(links) == (sum(sizes) if len(sizes) > 1 else 0)
    for source, target in links:
        assert ids[source] != ids[target]
        assert ring.target(source) == target
        assert source in ring.sources(target)
    cyclic = NodeRing.of([5, 7, 5, 7])
    assert cyclic.nodes == ((0, 2), (1, 3)), "launchers that place ranks in turn"


def test_ranks_of_one_folder_are_one_node(tmp_path: Path) -> None:
    assert local.node_id(tmp_path) == local.node_id(tmp_path)
    (tmp_path / "other").mkdir()
    assert local.node_id(tmp_path / "other") != local.node_id(tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == [".node"]


def test_the_number_of_a_node_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a node that loses power has an empty file, with which no start is possible."""
    calls: list[str] = []
    link = os.link

    def linked(*paths: Path) -> None:
        calls.append("link")
        link(*paths)

    monkeypatch.setattr(os, "fsync", lambda descriptor: calls.append("fsync"))
    monkeypatch.setattr(os, "link", linked)
    local.node_id(tmp_path)
    assert calls.index("fsync") < calls.index("link")


def test_a_copy_of_a_run_folder_and_a_new_run_at_its_place_are_other_runs(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    acquire(folder, {"time": "now"})
    own = run_id(folder)
    acquire(folder, {"time": "later"})
    assert run_id(folder) == own
    shutil.copytree(folder, tmp_path / "copy")
    assert run_id(tmp_path / "copy") != own
    shutil.rmtree(folder)
    acquire(folder, {"time": "again"})
    assert run_id(folder) != own


def test_a_save_is_passed_over_when_a_later_attempt_resumed_before_it(tmp_path: Path) -> None:
    lines = [
        '{"event": "resumed", "attempt": 1, "step": 0}',
        '{"event": "checkpoint_saved", "attempt": 1, "step": 100, "note": "resumed"}',
        '{"event": "resumed", "attempt": 2, "step": 120}',
        '{"event": "resumed", "attempt": 2, "step": 100}',
        '{"event": "resumed", "att',
        '{"event": "resumed", "attempt": 3, "step": 130}',
    ]
    (tmp_path / "events.jsonl").write_text("\n".join(lines))
    resumed = resumed_steps(tmp_path)
    assert resumed == {1: 0, 2: 100, 3: 130}
    assert was_passed_over(_manifest(120), resumed), "attempt 2 went back to 100"
    assert not was_passed_over(_manifest(100), resumed)
    assert not was_passed_over(_manifest(130, attempt=2), resumed)
    assert was_passed_over(_manifest(140, attempt=2), resumed)
    assert not was_passed_over(_manifest(140, attempt=3), resumed)
    assert resumed_steps(tmp_path / "none") == {}


def test_a_folder_that_a_node_cannot_use_ends_the_start_everywhere(ranks: ThreadRanks, tmp_path: Path) -> None:
    (tmp_path / "node-1").write_text("a file")

    def start(rank: int) -> str:
        with pytest.raises(OperatorFault) as caught:
            _tier(tmp_path, rank)
        return str(caught.value)

    lines = ranks.run(start)
    assert all("checkpoint.local.folder" in line and "leave that node out" in line for line in lines)
    assert "see the log of rank 1" in lines[0]


def test_doctor_says_whether_a_node_can_keep_local_saves(tmp_path: Path) -> None:
    folder = tmp_path / "not" / "yet"
    assert describe_local_folder(folder).startswith(f"{folder} can be written to, ")
    assert not list(tmp_path.iterdir()), "a check leaves nothing"
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^checkpoint\.local\.folder .*file"):
        describe_local_folder(tmp_path / "file" / "local")


@pytest.mark.parametrize("folder", ["local", "", "~/local", "a\0b"])
def test_a_folder_is_named_from_the_root(folder: str) -> None:
    with pytest.raises(ValidationError, match=r"from the root|at least 1"):
        LocalCheckpointSection(every=1, folder=folder)


def test_one_node_has_no_copies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ranks = ThreadRanks(2, monkeypatch)

    def save(rank: int) -> tuple[int, int, bool]:
        placed = replace(topology(rank=rank, world=2), local_rank=rank)
        tier = LocalTier(tmp_path / "node", placed, Attempt(tmp_path / "run-folder", 1), run="run")
        tier.write(tier.temporary(1), _state(rank, 1))
        ranks._gather(None)
        if tier.leads:
            tier.commit(tier.temporary(1), _manifest(1, world=2))
        ranks._gather(None)
        tier.completed(1)
        checkpoint = tier.newest(lambda manifest: True)
        return tier.nodes, tier.file_copies, checkpoint is not None

    assert ranks.run(save) == [(1, 1, True)] * 2
    assert len(list((tmp_path / "node" / "run" / "step-00000001-a1").iterdir())) == 5
