"""Selection of the checkpoint that a run resumes from.

It is the newest whose sizes and sha256 match the manifest; the ranks share the reading. A damaged checkpoint is
reported, renamed so that no run reads it, and skipped. One that cannot be read at the moment is not damaged: reading is
tried again, then left to a restart. A run that has saved and has no valid checkpoint does not start from scratch.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from megadistill.distributed.collectives import barrier, broadcast_object, first_false
from megadistill.distributed.topology import Topology
from megadistill.errors import OperatorFault, RestartFault, UserError
from megadistill.io import sync_folder
from megadistill.train.checkpoint.attempt import Attempt
from megadistill.train.checkpoint.folders import checkpoint_folders
from megadistill.train.checkpoint.format import Checkpoint, CheckpointManifest, refuse_average
from megadistill.train.checkpoint.writer import remove

logger = logging.getLogger(__name__)

READ_ATTEMPTS, READ_PAUSE_SECONDS = 3, 2.0
KEEP_ABANDONED = 2
"""Checkpoints abandoned by rollbacks that stay on the disk."""

T = TypeVar("T")


@dataclass(frozen=True)
class Quarantined:
    """A checkpoint that was skipped, under its new name."""

    step: int
    path: Path
    reason: str


def latest_valid(
    folder: Path,
    topology: Topology,
    attempt: Attempt,
    *,
    saved_before: bool,
    newer_than: int = -1,
    is_abandoned: Callable[[CheckpointManifest], bool] = lambda manifest: False,
) -> tuple[Checkpoint | None, list[Quarantined]]:
    """The checkpoint to resume from, None for a run that has never saved, and those quarantined. Collective.

    `saved_before`: whether this run is known to have saved. `newer_than`: step of a local save that is valid; None is
    returned where no checkpoint is newer, and nothing of older ones is read. `is_abandoned`: whether a rollback went
    back to before a checkpoint.

    Raises:
        OperatorFault: the run has saved and has no valid checkpoint, or the ranks see different folders.
        RestartFault: a checkpoint cannot be read at the moment.
    """
    quarantined: list[Quarantined] = []
    while True:
        folders = _read(lambda: checkpoint_folders(folder), folder, topology)
        step = max(folders, default=0)
        _require_shared_folder(folder, step, topology)
        if newer_than >= 0 and step <= newer_than:
            return None, quarantined
        if not folders:
            break
        checkpoint, damage = verified(folders[step], topology)
        abandoned = checkpoint is not None and is_abandoned(checkpoint.manifest)
        if checkpoint is not None and not abandoned:
            return checkpoint, quarantined
        kind = "rolled-back" if abandoned else "corrupt"
        target = folder / f".{kind}-a{attempt.number}-{folders[step].name}"
        if topology.is_first:
            attempt.require_newest()
            _rename(folders[step], target)
            if abandoned:
                _remove_abandoned(folder)
        quarantined.append(Quarantined(step, target, damage or "abandoned by a rollback"))
        barrier(topology.world_group)  # no rank lists the folder before the rename
    if saved_before or any(folder.glob(".corrupt-*")):
        raise OperatorFault(
            f"{folder} has no valid checkpoint, and this run has saved before, so it does not start from scratch. "
            "Restore a checkpoint under its name (quarantined ones are there as .corrupt-*), or use another run.folder"
        )
    return None, quarantined


def verified(path: Path, topology: Topology) -> tuple[Checkpoint | None, str]:
    """The checkpoint if every rank's share of its files is valid; None and the damage otherwise. Collective.

    Rank 0 reads the manifest for all: it has a line for each rank's file.
    """
    content, damage = _read(lambda: _manifest(path) if topology.is_first else ("", ""), path, topology)
    content, damage = broadcast_object((content, damage), topology.world_group)
    if damage:
        if topology.is_first:
            logger.warning("%s", damage)
        return None, damage
    checkpoint = Checkpoint(path, CheckpointManifest.model_validate_json(content))
    damage = _read(lambda: _damage(checkpoint, topology), path, topology)
    failing = first_false(not damage, topology.device, topology.world_group)
    if failing is None:
        return checkpoint, ""
    if damage:
        logger.warning("%s", damage)
    return None, damage or f"damaged: see the log of rank {failing}"


def _manifest(path: Path) -> tuple[str, str]:
    """The manifest of a checkpoint, as JSON, and the damage in it."""
    try:
        manifest = Checkpoint(path).manifest
        refuse_average(manifest, path)
        return manifest.model_dump_json(), ""
    except (OperatorFault, UserError) as fault:
        return "", str(fault)


def _damage(checkpoint: Checkpoint, topology: Topology) -> str:
    """The damage in this rank's share of the files."""
    try:
        checkpoint.verify(topology.rank, topology.world)
    except OperatorFault as fault:
        return str(fault)
    return ""


def _read(read: Callable[[], T], path: Path, topology: Topology) -> T:
    """The result of `read`, which is tried again after an OSError. Collective.

    Raises:
        RestartFault: the error persists on some rank.
    """
    results: list[T] = []
    problem = ""
    for left in reversed(range(READ_ATTEMPTS)):
        try:
            results.append(read())
            break
        except OSError as error:
            problem = str(error)
            if left:
                time.sleep(READ_PAUSE_SECONDS)
    failing = first_false(bool(results), topology.device, topology.world_group)
    if failing is not None:
        raise RestartFault(f"{path} cannot be read: {problem or f'see the log of rank {failing}'}")
    return results[0]


def _require_shared_folder(folder: Path, step: int, topology: Topology) -> None:
    """Raises OperatorFault: the ranks see different newest checkpoints, as in a run folder on each node's own disk."""
    first_step = broadcast_object(step, topology.world_group)
    other = first_false(step == first_step, topology.device, topology.world_group)
    if other is not None:
        raise OperatorFault(
            f"rank {other} and rank 0 see different newest checkpoints in {folder} (step {step} on rank "
            f"{topology.rank}, step {first_step} on rank 0): run.folder must be one folder that every node shares"
        )


def _rename(path: Path, target: Path) -> None:
    if target.exists():  # two rollbacks of one attempt
        remove(target)
    path.rename(target)
    sync_folder(path.parent)


def _remove_abandoned(folder: Path) -> None:
    """Removes the abandoned checkpoints but for the newest `KEEP_ABANDONED`."""
    abandoned = sorted(folder.glob(".rolled-back-*"), key=lambda path: path.name.rpartition("step-")[2])
    for path in abandoned[:-KEEP_ABANDONED]:
        remove(path)
