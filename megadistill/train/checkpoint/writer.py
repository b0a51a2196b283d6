"""Asynchronous checkpoint writing.

A save is a few states that all ranks go through together, without a collective of its own while training continues:

1. `start` (collective): checks the free disk space. Rank 0 makes `.tmp-step-00000100-a3`; each rank starts to copy its
   tensors to host memory that all saves share, and hands the copies to its writing thread.
2. Each rank's thread writes, syncs and hashes its file. `flags` says that it has ended, well or not; the run adds the
   flags of all ranks up in the reduction that each step makes anyway, and gives the sums to `poll`.
3. When all have ended well, rank 0's thread commits: manifest, one rename, then it deletes what is too old. It does so
   only while its attempt is the newest of the run, so a process that was frozen meanwhile changes nothing.
4. Rank 0's notice of that ends the save, on all ranks after the same step.

A local save (`local`) goes the same way from the same copies: each node has a folder, the thread also exchanges files
with the nodes around, and one rank of each node commits.

A failure on any rank ends the save on all of them: the temporary folder is removed, older checkpoints are unchanged,
and the run continues. `finish` waits, and goes through the same states with reductions of its own.
"""

import logging
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from megadistill.config.recipe import CheckpointSection
from megadistill.distributed.collectives import all_reduce_sum, barrier, broadcast_object, first_false
from megadistill.distributed.topology import Topology
from megadistill.errors import OperatorFault, RestartFault
from megadistill.train.checkpoint.attempt import Attempt
from megadistill.train.checkpoint.folders import checkpoint_folders, checkpoint_name
from megadistill.train.checkpoint.format import CheckpointManifest, commit, write_rank
from megadistill.train.checkpoint.host_copies import HostCopies, HostState
from megadistill.train.checkpoint.local_tier import LocalTier
from megadistill.types import use_device
from megadistill.units import readable

SAVE_FLAGS = ("save_ended", "save_failed", "save_committed", "save_not_committed", "save_seconds")

FREE_SPACE_MARGIN = 1.05

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SaveResult:
    """How a save ended. The same on every rank, except for `problem`: the failing rank's has the reason."""

    step: int
    path: Path | None
    """The checkpoint; None: the save failed, and nothing was changed."""
    problem: str | None
    stall_seconds: float
    """Time that this rank waited for the save. On an accelerator the copy to the host is not in it: the device makes it
    between two steps, at the speed of its link."""
    write_seconds: float
    """Time that a rank's file took to write and hash, the mean over those that wrote one."""
    bytes: int
    """Size of this rank's tensors, which another replica may have written."""
    removed: tuple[str, ...] = ()
    """Names of the older checkpoints that were deleted; rank 0 only."""
    is_local: bool = False
    """Whether it is a save of the local tier: `path` is then on this rank's node."""


@dataclass
class _Save:
    """A save under way."""

    manifest: CheckpointManifest
    temporary: Path
    writing: Future[float]
    bytes: int
    stall_seconds: float
    local: LocalTier | None = None
    """The tier of a local save; None: a durable checkpoint."""
    committing: Future[tuple[str, ...]] | None = None
    ended: bool = False
    """Whether all ranks are known to have written their files."""
    write_seconds: float = 0.0
    """Mean time that a file took, once all have ended."""

    @property
    def committers(self) -> int:
        """Ranks that commit: the first of the world, of each node for a local save."""
        return 1 if self.local is None else self.local.nodes


class Saver:
    """Writes the checkpoints of a run, one at a time. That of step `stable_steps` is never deleted."""

    def __init__(
        self,
        folder: Path,
        topology: Topology,
        attempt: Attempt,
        section: CheckpointSection,
        *,
        stable_steps: int = 0,
        local: LocalTier | None = None,
    ) -> None:
        self._folder, self._topology, self._attempt, self._section = folder, topology, attempt, section
        self._local = local
        self._stable_steps = stable_steps
        self._thread = ThreadPoolExecutor(1, "checkpoint", initializer=use_device, initargs=(topology.device,))
        self._save: _Save | None = None
        self._copies = HostCopies(topology.device)
        self._started = 0
        """Durable saves of this attempt so far."""
        if topology.is_first:
            folder.mkdir(parents=True, exist_ok=True)
            for path in (*folder.glob(".tmp-*"), *folder.glob(".removed-*")):  # of earlier attempts
                attempt.require_newest()
                shutil.rmtree(path, ignore_errors=True)
        barrier(topology.world_group)

    def start(self, state: Mapping[str, Tensor], manifest: CheckpointManifest) -> list[SaveResult]:
        """Starts to save `state`, this rank's tensors as they are now: the run may change them afterwards. Collective.

        Replicas have the same state, and write in turn, one a save, as rank 0 counts them (a replica may have joined
        the run later): the ranks of the others have nothing to copy.
        `manifest` is that of the whole checkpoint, without its files. Returns the results of the saves that ended: the
        one before, which is waited for since its copies are in the same memory, and this one where it does not fit on
        the disk or saves are synchronous.
        """
        began = time.perf_counter()
        ended = [self.finish()] if self._save is not None else []
        bytes_ = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
        temporary = self._folder / f".tmp-{checkpoint_name(manifest.step)}-a{self._attempt.number}"
        problem, turn = self._make_folder(temporary, bytes_)
        if problem is not None:
            stall = time.perf_counter() - began
            return [*ended, SaveResult(manifest.step, None, problem, stall, 0.0, bytes_)]
        writes = turn == self._topology.replica
        copies = self._copies.start(state if writes else {})
        writing = self._thread.submit(_timed, lambda: self._write(temporary, copies) if writes else None)
        stall = time.perf_counter() - began
        self._save = _Save(manifest, temporary, writing, bytes_, stall)
        return ended if self._section.asynchronous else [*ended, self.finish()]

    def start_local(self, state: Mapping[str, Tensor], manifest: CheckpointManifest) -> list[SaveResult]:
        """Starts a save of the local tier, as `start` does, when none is under way. Collective where it is waited for.

        A disk that is too full fails the save when it is written to: no rank asks the others before it starts.
        """
        assert self._local is not None, "no local tier"
        assert self._save is None, "a save is under way"
        began, local = time.perf_counter(), self._local
        bytes_ = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
        temporary = local.temporary(manifest.step)
        copies = self._copies.start(state)
        writing = self._thread.submit(_timed, lambda: local.write(temporary, copies.wait()))
        self._save = _Save(manifest, temporary, writing, bytes_, time.perf_counter() - began, local)
        return [] if self._section.asynchronous else [self.finish()]

    @property
    def busy(self) -> bool:
        """Whether a save is under way: the same on every rank."""
        return self._save is not None

    def flags(self) -> dict[str, float]:
        """This rank's state of the save for the other ranks: 0 or 1 for each of `SAVE_FLAGS`, and its seconds."""
        flags = dict.fromkeys(SAVE_FLAGS, 0.0)
        save = self._save
        if save is None:
            return flags
        if save.committing is not None:
            if save.committing.done():
                flags["save_not_committed" if save.committing.exception() else "save_committed"] = 1.0
        elif not save.ended and save.writing.done():
            flags["save_ended"] = 1.0
            failed = save.writing.exception() is not None
            flags |= {"save_failed": float(failed), "save_seconds": 0.0 if failed else save.writing.result()}
        return flags

    def poll(self, reduced: Mapping[str, float]) -> SaveResult | None:
        """Advances the save by the sums of `flags` over ranks. Returns a result on the step that ends it. Collective.

        Raises:
            OperatorFault: another attempt at this run has started (on rank 0).
        """
        save = self._save
        if save is None:
            return None
        if not save.ended and reduced["save_ended"] == self._topology.world:
            save.ended = True
            writers = self._topology.shard_world if save.local is None else self._topology.world
            save.write_seconds = reduced["save_seconds"] / writers
            if reduced["save_failed"]:
                return self._end(save, complete=False)
            if self._topology.is_first if save.local is None else save.local.leads:
                save.committing = self._thread.submit(self._commit, save)
        elif reduced["save_not_committed"] + reduced["save_committed"] == save.committers:
            return self._end(save, complete=not reduced["save_not_committed"])
        return None

    def finish(self) -> SaveResult:
        """Waits for the save under way. Collective.

        Raises:
            OperatorFault: another attempt at this run has started.
        """
        save = self._save
        assert save is not None, "no save was started"
        began, stalled = time.perf_counter(), save.stall_seconds
        result = None
        while result is None:
            (save.committing or save.writing).exception()  # waits
            flags = self.flags()
            values = torch.tensor(list(flags.values()), device=self._topology.device)
            reduced = all_reduce_sum(values, self._topology.world_group).tolist()
            save.stall_seconds = stalled + time.perf_counter() - began
            result = self.poll(dict(zip(flags, reduced, strict=True)))
        return result

    def close(self) -> None:
        """Ends without waiting for the disk: a save that is not complete stays invisible."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _make_folder(self, temporary: Path, bytes_: int) -> tuple[str | None, int]:
        """Makes the temporary folder. Returns the problem where the files of a replica do not fit on the disk, and the
        replica that writes them. Collective."""
        replicas = self._topology.replicas
        needed = torch.tensor(float(bytes_), dtype=torch.float64, device=self._topology.device)
        needed = all_reduce_sum(needed, self._topology.world_group) / replicas
        needed_bytes = int(needed.item() * FREE_SPACE_MARGIN)
        problem = None
        if self._topology.is_first:
            try:
                self._attempt.require_newest()
                free = shutil.disk_usage(self._folder).free
                if free < needed_bytes:
                    sizes = f"{readable(free, 'B')} free, a checkpoint needs {readable(needed_bytes, 'B')}"
                    problem = f"{self._folder} has {sizes}"
                else:
                    shutil.rmtree(temporary, ignore_errors=True)
                    temporary.mkdir(parents=True)
            except OSError as error:
                problem = str(error)
        turn = self._started % replicas
        self._started += 1
        return broadcast_object((problem, turn), self._topology.world_group)

    def _write(self, temporary: Path, copies: HostState) -> None:
        shard, shards = self._topology.shard_rank, self._topology.shard_world
        write_rank(temporary, copies.wait(), rank=shard, world=shards)

    def _commit(self, save: _Save) -> tuple[str, ...]:
        """Makes the checkpoint visible and removes old ones, in the thread of the rank that commits."""
        if save.local is not None:
            return save.local.commit(save.temporary, save.manifest)
        self._attempt.require_newest()
        commit(save.temporary, self._folder / checkpoint_name(save.manifest.step), save.manifest)
        return self._remove_old()

    def _remove_old(self) -> tuple[str, ...]:
        folders = checkpoint_folders(self._folder)
        removed = []
        for step in sorted(folders)[: -self._section.keep_last]:
            if step == self._stable_steps or (self._section.keep_every and step % self._section.keep_every == 0):
                continue
            if not self._attempt.is_newest():
                break
            try:
                remove(folders[step])
            except OSError as error:  # the new checkpoint is complete nonetheless
                logger.warning("old checkpoint %s cannot be deleted: %s", folders[step], error)
            else:
                removed.append(folders[step].name)
        return tuple(removed)

    def _end(self, save: _Save, *, complete: bool) -> SaveResult:
        """Ends the save, on all ranks alike; one that is not complete is removed. Collective."""
        self._save = None
        error = save.writing.exception() or (save.committing.exception() if save.committing else None)
        if not isinstance(error, OSError | SafetensorError | OperatorFault | None):
            raise error
        numbers = save.stall_seconds, save.write_seconds, save.bytes
        step, local = save.manifest.step, save.local
        if complete:
            path = self._folder / checkpoint_name(step) if local is None else local.target(step)
            if local is not None:
                local.completed(step)
            removed = save.committing.result() if save.committing else ()
            return SaveResult(step, path, None, *numbers, removed, is_local=local is not None)
        if (self._topology.is_first if local is None else local.leads) and self._attempt.is_newest():
            shutil.rmtree(save.temporary, ignore_errors=True)
        failing = first_false(error is None, self._topology.device, self._topology.world_group)
        if isinstance(error, OperatorFault):
            raise error
        if error is None:
            return SaveResult(step, None, f"see the log of rank {failing}", *numbers, is_local=local is not None)
        logger.warning("checkpoint: %s", error)
        problem = f"rank {self._topology.rank}: {error}"
        return SaveResult(step, None, problem, *numbers, is_local=local is not None)


def require_saved(result: SaveResult) -> SaveResult:
    """The result of the last save of a run, which must succeed.

    Raises:
        RestartFault: it failed.
    """
    if result.path is None:
        raise RestartFault(
            f"checkpoint of step {result.step} not written: {result.problem}. Older ones are unchanged: free disk "
            "space and give the same command again, which resumes from the newest"
        )
    return result


def remove(folder: Path) -> None:
    """Deletes a checkpoint. It is renamed first, so that a kill in the middle leaves none that looks complete."""
    hidden = folder.with_name(f".removed-{folder.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    folder.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
