"""Room `train`: which checkpoint a run goes on from. It reads no tensors, and knows no engine.

The newest whose content holds: sizes and sha256 of all files, shared out over the ranks. A damaged one is named, set
aside under a name that no run reads, and passed over. What cannot be read is no damage: that is tried again, and then
left to a restart. A run that has saved and finds nothing valid does not begin from scratch.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from megadistill.distributed.collectives import all_reduce_sum, barrier, everywhere
from megadistill.distributed.topology import Topology
from megadistill.errors import OperatorFault, RestartFault
from megadistill.train.checkpoint.attempt import Attempt
from megadistill.train.checkpoint.format import Checkpoint, CheckpointManifest, checkpoint_folders, sync_folder
from megadistill.train.checkpoint.writer import remove

READ_ATTEMPTS, READ_PAUSE_SECONDS = 3, 2.0
KEEP_ABANDONED = 2

Found = TypeVar("Found")


@dataclass(frozen=True)
class SetAside:
    """A checkpoint that was passed over, under its new name."""

    step: int
    path: Path
    reason: str


def newest_valid(
    folder: Path,
    topology: Topology,
    attempt: Attempt,
    *,
    saved_before: bool,
    abandoned: Callable[[CheckpointManifest], bool] = lambda manifest: False,
) -> tuple[Checkpoint | None, list[SetAside]]:
    """The checkpoint to go on from, None for a run that has never saved, and what was set aside. Collective.

    `saved_before`: whether this run is known to have saved. `abandoned`: whether a checkpoint belongs to a line of the
    run that a rollback gave up.

    Raises:
        OperatorFault: the run has saved and nothing valid is left, or the ranks see different folders.
        RestartFault: a checkpoint cannot be read at the moment.
    """
    aside: list[SetAside] = []
    while True:
        found = _readable(lambda: checkpoint_folders(folder), folder, topology)
        step = max(found, default=0)
        _require_one_folder(folder, step, topology)
        if not found:
            break
        checkpoint, damage, given_up = _looked_at(found[step], topology, abandoned)
        if checkpoint is not None:
            return checkpoint, aside
        kind = "rolled-back" if given_up else "corrupt"
        if topology.is_first:
            attempt.require_newest()
            _move(found[step], folder / f".{kind}-a{attempt.number}-{found[step].name}")
            if given_up:
                _remove_abandoned(folder)
        aside.append(SetAside(step, folder / f".{kind}-a{attempt.number}-{found[step].name}", damage))
        barrier(topology.world_group)  # nobody looks again before it has its new name
    if saved_before or any(folder.glob(".corrupt-*")):
        raise OperatorFault(
            f"{folder} holds no checkpoint that can be used, and this run has saved before: it does not begin from "
            "scratch. Bring a checkpoint back (those set aside are there as .corrupt-*), or begin anew in another "
            "run.folder"
        )
    return None, aside


def _looked_at(
    path: Path, topology: Topology, abandoned: Callable[[CheckpointManifest], bool]
) -> tuple[Checkpoint | None, str, bool]:
    """The checkpoint, if every rank finds its part of it whole and it was not given up; else why not. Collective."""
    checkpoint, damage = _readable(lambda: _verified(path, topology), path, topology)
    given_up = checkpoint is not None and abandoned(checkpoint.manifest)
    if everywhere(not damage, topology.device, topology.world_group):
        assert checkpoint is not None
        if not everywhere(not given_up, topology.device, topology.world_group):
            return None, "a rollback gave it up", True
        return checkpoint, "", False
    if damage:
        print(f"megadistill: rank {topology.rank}: {damage}", file=sys.stderr, flush=True)
    return None, damage or "another rank says why", False


def _verified(path: Path, topology: Topology) -> tuple[Checkpoint | None, str]:
    """The checkpoint, or why it is damaged, as far as this rank's part of its files goes."""
    try:
        checkpoint = Checkpoint(path)
        checkpoint.verify(topology.rank, topology.world)
    except OperatorFault as fault:
        return None, str(fault)
    return checkpoint, ""


def _readable(read: Callable[[], Found], path: Path, topology: Topology) -> Found:
    """What `read` returns, on every rank; an error of the disk is given time to pass. Collective.

    Raises:
        RestartFault: it has not passed, on this rank or on another one.
    """
    found: list[Found] = []
    problem = ""
    for left in reversed(range(READ_ATTEMPTS)):
        try:
            found.append(read())
            break
        except OSError as error:
            problem = f"{path} cannot be read: {error}"
            if left:
                time.sleep(READ_PAUSE_SECONDS)
    if everywhere(bool(found), topology.device, topology.world_group):
        return found[0]
    raise RestartFault(f"{path} cannot be read: another rank says why" if found else problem)


def _require_one_folder(folder: Path, step: int, topology: Topology) -> None:
    """Every rank must see the same newest one: ranks with folders of their own would train on from different steps."""
    told = torch.tensor(step if topology.is_first else 0, device=topology.device)
    first_step = int(all_reduce_sum(told, topology.world_group))
    if not everywhere(step == first_step, topology.device, topology.world_group):
        if step == first_step:
            raise OperatorFault(f"the newest checkpoint of {folder} cannot be used: another rank says why")
        raise OperatorFault(
            f"rank {topology.rank} sees step {step} as the newest checkpoint of {folder}, rank 0 sees step "
            f"{first_step}: run.folder must be one folder that every node shares"
        )


def _move(path: Path, target: Path) -> None:
    if target.exists():  # two rollbacks of one attempt
        remove(target)
    path.rename(target)
    sync_folder(path.parent)


def _remove_abandoned(folder: Path) -> None:
    """Of what rollbacks gave up, the newest few are kept for a person to look at."""
    found = sorted(folder.glob(".rolled-back-*"), key=lambda path: path.name.rpartition("step-")[2])
    for path in found[:-KEEP_ABANDONED]:
        remove(path)
