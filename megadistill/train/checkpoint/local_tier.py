"""The local tier: saves on the nodes' own disks or memory, with a copy of each rank's file on the next node.

`FOLDER/RUN/step-00000100-a3/` on each node holds the files of its ranks and those of the node before it, each with its
size and sha256 beside it, and a manifest without files. A save is one of all ranks, of one step and attempt: it is read
if every rank's file is whole somewhere, its own or the copy, so that a lost node costs none. `RUN` names the run and
its folder, so that no run reads another's. The durable checkpoints decide whatever the local tier cannot.
"""

import hashlib
import logging
import os
import re
import secrets
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megadistill.distributed.collectives import all_gather_rows, all_reduce_max, first_false
from megadistill.distributed.neighbour_copies import HostChannels, NodeRing, transfer
from megadistill.distributed.topology import Topology
from megadistill.errors import OperatorFault
from megadistill.io import open_regular, parse_json, read_file, write_file
from megadistill.outputs import require_writable_folder
from megadistill.train.checkpoint.attempt import Attempt, attempt_path
from megadistill.train.checkpoint.folders import checkpoint_name, step_of
from megadistill.train.checkpoint.format import (
    RNG_KEY,
    CheckpointManifest,
    FileRecord,
    rank_file,
    read_manifest,
    record_of,
    write_manifest,
    write_rank,
)
from megadistill.units import readable

logger = logging.getLogger(__name__)

KEEP = 2
"""Saves that stay on a node: a kill between the renames of two nodes leaves the one before on both."""
MANIFEST = "manifest.json"
MAX_LINE_BYTES = 1 << 20
NODE_FILE = ".node"
"""File in the folder that names the node: ranks that read the same name share the folder."""
ATTEMPTS = 1 << 20
"""More than the attempts of a run: step and attempt of a save are one number."""

IsUsable = Callable[[CheckpointManifest], bool]


class LocalCheckpoint:
    """A local save, of which this rank reads its own file: it has the world's size and layout of the run."""

    def __init__(self, folder: Path, manifest: CheckpointManifest, *, rank: int) -> None:
        self.folder, self.manifest = folder, manifest
        self._path = folder / rank_file(rank, manifest.world)

    @cached_property
    def _file(self) -> Any:
        return safe_open(self._path, framework="pt")

    def read(self, key: str, start: int, stop: int) -> Tensor:
        """Elements `start` to `stop` of a flattened tensor: those of this rank's file, and no others.

        Raises:
            OperatorFault: the file has other elements, or none of the key.
        """
        try:
            piece: Tensor = self._file.get_tensor(key)
        except SafetensorError as error:
            raise OperatorFault(f"{self._path}: cannot read {key}: {error}") from None
        if piece.numel() != stop - start:
            raise OperatorFault(f"{self._path}: {key} has {piece.numel()} elements, not {start} to {stop}")
        return piece

    def rng_state(self, rank: int, world: int) -> Tensor | None:
        """The rank's RNG state."""
        assert self._path.name == rank_file(rank, world)
        state: Tensor = self._file.get_tensor(RNG_KEY)
        return state

    def release(self) -> None:
        """Closes the file, which is memory-mapped."""
        self.__dict__.pop("_file", None)


class LocalTier:
    """The local saves of a run, as one of its ranks reads and writes them.

    `run` names the run, see `run_id`. Collective; but `write` and `commit` are called in the thread of the saver.

    Raises:
        OperatorFault: a node cannot write to the folder.
    """

    def __init__(self, folder: Path, topology: Topology, attempt: Attempt, *, run: str) -> None:
        self._root, self._topology, self._attempt = folder / run, topology, attempt
        self.steps: list[int] = []
        """Steps of the saves that this attempt has completed or read, oldest first; the same on every rank."""
        ring = NodeRing.of(self._node_ids(folder))
        self.node = ring.node_of(topology.rank)
        """The ranks that share this rank's folder."""
        self.nodes = len(ring.nodes)
        self.leads = topology.rank == self.node[0]
        """Whether this rank commits and deletes for its node."""
        self._target, self._sources = ring.target(topology.rank), ring.sources(topology.rank)
        self._channels = HostChannels(topology.rank, topology.timeout, topology.store)
        self._channels.connect(ring.links())
        if topology.is_first and self.nodes == 1:
            logger.info("checkpoint.local: one node: its saves have no copy elsewhere")

    @property
    def file_copies(self) -> int:
        """Files of this rank in a save: its own, and the copies on the next node."""
        return 1 if self.nodes == 1 else 2

    def temporary(self, step: int) -> Path:
        """Folder in which a save is written, on each node."""
        return self._root / f".tmp-{save_name(step, self._attempt.number)}"

    def target(self, step: int) -> Path:
        """The save under its name, on each node."""
        return self._root / save_name(step, self._attempt.number)

    def write(self, temporary: Path, state: Mapping[str, Tensor]) -> None:
        """Writes this rank's file, and exchanges copies with the nodes before and after.

        Raises:
            OSError, SafetensorError: a disk refuses it, here or on the rank whose copy belongs here.
        """
        rank, world = self._topology.rank, self._topology.world
        problem: OSError | SafetensorError | None = None
        try:
            temporary.mkdir(parents=True, exist_ok=True)
            write_rank(temporary, dict(state), rank=rank, world=world)
        except (OSError, SafetensorError) as error:  # the ranks around are waiting for its copy
            problem = error
            with suppress(OSError):
                _record_path(temporary, rank, world).unlink(missing_ok=True)
        sent = [] if self._target is None else [(self._channels.to(self._target), _paths(temporary, rank, world))]
        received = [(self._channels.to(source), _paths(temporary, source, world)) for source in self._sources]
        complete = transfer(sent, received)
        if problem is not None:
            raise problem
        for source, is_complete in zip(self._sources, complete, strict=True):
            if not is_complete or not _is_whole(temporary, source, world):
                raise OSError(f"the copy of rank {source}'s file did not arrive whole")

    def commit(self, temporary: Path, manifest: CheckpointManifest) -> tuple[str, ...]:
        """Makes the save visible on this node, when every rank has written, and deletes those before the last two.

        Raises:
            OperatorFault: a later attempt has started. OSError: the disk refuses it.
        """
        self._attempt.require_newest()
        write_manifest(temporary / MANIFEST, manifest)
        temporary.rename(self.target(manifest.step))
        saves, made = self._saves(), save_key(manifest.step, self._attempt.number)
        old = [key for key in sorted(saves)[:-KEEP] if key != made]  # later ones may be left that cannot be deleted
        return tuple(saves[key].name for key in old if self._delete(saves[key]))

    def completed(self, step: int) -> None:
        """Records that all nodes have committed a save."""
        self.steps = [*self.steps, step][-KEEP:]

    def newest(self, is_usable: IsUsable) -> LocalCheckpoint | None:
        """The newest save of which every rank's file is whole on some node. Collective; see `newest_save`.

        A rank that has no file of its own receives it. `is_usable`: whether a save belongs to the run as it goes on.
        """
        if self.leads:
            for path in (*self._root.glob(".tmp-*"), *self._root.glob(".removed-*")):  # of earlier attempts
                self._attempt.require_newest()
                shutil.rmtree(path, ignore_errors=True)
            for key, path in self._saves().items():  # or a save of this attempt could not take its name
                if not self._is_past(key):
                    self._delete(path)
        return newest_save(self, is_usable, self._topology, self._channels)

    def discard_after(self, step: int) -> None:
        """Deletes the saves after the step that the run resumes from, which it takes again. Collective."""
        for key, path in self._saves().items() if self.leads else ():
            if key // ATTEMPTS > step:
                self._delete(path)
        self.steps = [each for each in self.steps if each <= step]

    def clear(self) -> None:
        """Deletes all saves of the run, which is complete."""
        if self.leads and self._attempt.is_newest():
            shutil.rmtree(self._root, ignore_errors=True)

    def close(self) -> None:
        """Ends the connections. No save may be under way."""
        self._channels.close()

    def usable(self, is_usable: IsUsable) -> dict[int, CheckpointManifest]:
        """The saves on this node that have the world's size and are usable, by `save_key`. Their files are not read."""
        manifests = {}
        for key, path in self._saves().items():
            try:
                manifest = read_manifest(path / MANIFEST)
            except (OperatorFault, OSError) as error:
                logger.warning("local save left out: %s", error)
                continue
            same = manifest.world == self._topology.world and save_key(manifest.step, manifest.attempt) == key
            if same and self._is_past(key) and is_usable(manifest):
                manifests[key] = manifest
        return manifests

    def folder(self, key: int) -> Path:
        """The save of this key, on this node."""
        return self._root / save_name(*divmod(key, ATTEMPTS))

    def has(self, key: int, rank: int) -> bool:
        """Whether this node has the whole file of a rank. Reads all of it."""
        return _is_whole(self.folder(key), rank, self._topology.world)

    def _is_past(self, key: int) -> bool:
        """Whether a save is of an earlier attempt, or one that this attempt has completed.

        Another is of a run folder that was put back from an older copy of it, and counts attempts once more.
        """
        step, attempt = divmod(key, ATTEMPTS)
        return attempt < self._attempt.number or (attempt == self._attempt.number and step in self.steps)

    def _saves(self) -> dict[int, Path]:
        try:
            names = os.listdir(self._root)
        except OSError:
            return {}
        return {key: self._root / name for name in names if (key := _key_of(name)) is not None}

    def _delete(self, path: Path) -> bool:
        """Deletes a save; renamed first, so that a kill in the middle leaves none that looks complete."""
        if not self._attempt.is_newest():
            return False
        hidden = path.with_name(f".removed-{path.name}")
        try:
            shutil.rmtree(hidden, ignore_errors=True)
            path.rename(hidden)
        except OSError as error:
            logger.warning("old local save %s cannot be deleted: %s", path, error)
            return False
        shutil.rmtree(hidden, ignore_errors=True)
        return True

    def _node_ids(self, folder: Path) -> list[int]:
        """The id of each rank's node, by rank: 8 bytes of each rank. Collective."""
        topology, own, problem = self._topology, 0, ""
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            own = node_id(folder)
        except (OSError, ValueError) as error:
            problem = f"checkpoint.local.folder: {error}"
            logger.warning("%s", problem)
        failing = first_false(not problem, topology.device, topology.world_group)
        if failing is not None:
            reason = problem or f"checkpoint.local.folder: {folder} cannot be used: see the log of rank {failing}"
            raise OperatorFault(f"{reason}. Name a folder that each node can write to, or leave that node out")
        ids = torch.tensor([own], dtype=torch.int64, device=topology.device)
        gathered: list[int] = all_gather_rows(ids, topology.world_group).tolist()
        return gathered


def newest_save(
    tier: LocalTier, is_usable: IsUsable, topology: Topology, channels: HostChannels
) -> LocalCheckpoint | None:
    """Agrees on the newest save that is whole, and sends files to ranks without their own. Collective.

    For each candidate the ranks reduce one number, then a number a rank, twice where a file is not on its own node.
    """
    usable, bound = tier.usable(is_usable), 1 << 62
    while True:
        own = max((key for key in usable if key < bound), default=-1)
        value = torch.tensor([own], dtype=torch.int64, device=topology.device)
        bound = int(all_reduce_max(value, topology.world_group).item())
        if bound < 0:
            return None
        holders = _holders(tier, bound, topology, is_known=bound in usable)
        if -1 in holders:
            if topology.is_first:
                step, lacking = bound // ATTEMPTS, holders.count(-1)
                logger.warning("local save of step %d left out: the files of %d ranks are lost", step, lacking)
            continue
        if _fetch(tier, bound, holders, topology, channels):
            folder = tier.folder(bound)
            checkpoint = LocalCheckpoint(folder, read_manifest(folder / MANIFEST), rank=topology.rank)
            tier.steps = [step for step in tier.steps if step < checkpoint.manifest.step] + [checkpoint.manifest.step]
            return checkpoint


def _holders(tier: LocalTier, key: int, topology: Topology, *, is_known: bool) -> list[int]:
    """For each rank's file of a save: the rank itself where its node has it, else a rank that has it; -1: none.

    Each rank reads the file of its own; copies of others are read where one is lost alone.
    """
    holders = torch.full((topology.world,), -1, dtype=torch.int32)
    if is_known and tier.has(key, topology.rank):
        holders[topology.rank] = topology.rank
    holders = all_reduce_max(holders.to(topology.device), topology.world_group).cpu()
    lost = (holders < 0).nonzero().flatten().tolist()
    if not lost:
        return [*map(int, holders.tolist())]
    place, ranks = tier.node.index(topology.rank), len(tier.node)
    for number, rank in enumerate(lost):
        if number % ranks == place and is_known and tier.has(key, rank):
            holders[rank] = topology.rank
    return [*map(int, all_reduce_max(holders.to(topology.device), topology.world_group).tolist())]


def _fetch(tier: LocalTier, key: int, holders: list[int], topology: Topology, channels: HostChannels) -> bool:
    """Sends the files that are held by other ranks to those that need them. Whether all arrived whole. Collective."""
    folder, world, problem = tier.folder(key), topology.world, ""
    for rank, holder in enumerate(holders):
        if rank == holder or topology.rank not in (rank, holder):
            continue
        try:
            if topology.rank == holder:
                transfer([(channels.to(rank), [folder / MANIFEST, *_paths(folder, rank, world)])], [])
            else:
                _receive(folder, rank, world, channels, holder)
        except OSError as error:
            problem = str(error)
            logger.warning("local save of step %d: %s", key // ATTEMPTS, problem)
    return first_false(not problem, topology.device, topology.world_group) is None


def _receive(folder: Path, rank: int, world: int, channels: HostChannels, holder: int) -> None:
    """Receives this rank's file into its node's folder, where other ranks may do the same."""
    arriving = folder.with_name(f".tmp-{folder.name}-rank-{rank}")
    paths = [arriving / MANIFEST, *_paths(arriving, rank, world)]
    problem: OSError | None = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        arriving.mkdir(exist_ok=True)
    except OSError as error:  # receives nonetheless: the sender does not wait for ever
        problem = error
    (complete,) = transfer([], [(channels.to(holder), paths)])
    if problem is not None:
        raise problem
    if not complete or not _is_whole(arriving, rank, world):
        raise OSError(f"the file of rank {rank} did not arrive whole from rank {holder}")
    for path in reversed(paths):  # the manifest last
        path.replace(folder / path.name)
    shutil.rmtree(arriving, ignore_errors=True)


def describe_local_folder(folder: Path) -> str:
    """A line on a node's folder of local saves, for a check before a run: it can be written to, and what is free there.

    Raises:
        UserError: it cannot.
    """
    require_writable_folder(folder, "checkpoint.local.folder")
    there = next(each for each in (folder, *folder.parents) if each.exists())
    return f"{folder} can be written to, {readable(shutil.disk_usage(there).free, 'B')} free"


def resumed_steps(folder: Path) -> dict[int, int]:
    """Attempt -> the lowest step that it resumed from, by the run folder's events.jsonl; other lines are not parsed."""
    steps: dict[int, int] = {}
    try:
        file = open_regular(folder / "events.jsonl")
    except OSError:
        return steps
    with file:
        while line := file.readline(MAX_LINE_BYTES):
            if b'"resumed"' in line:
                with suppress(ValueError, KeyError, TypeError):
                    values = parse_json(line)
                    if values["event"] == "resumed":
                        attempt, step = int(values["attempt"]), int(values["step"])
                        steps[attempt] = min(step, steps.get(attempt, step))
    return steps


def was_passed_over(manifest: CheckpointManifest, resumed: Mapping[int, int]) -> bool:
    """Whether a later attempt has resumed from before a save: its steps were taken again, and its line is another."""
    return any(attempt > manifest.attempt and step < manifest.step for attempt, step in resumed.items())


def run_id(folder: Path) -> str:
    """A name of the run of this folder: of its first attempt's record, and of where the folder is. A copy of the
    folder, or a run that was begun anew at its place, has another."""
    record = read_file(attempt_path(folder, 1)) if attempt_path(folder, 1).exists() else b""
    return hashlib.sha256(record + str(folder.resolve()).encode()).hexdigest()[:16]


def node_id(folder: Path) -> int:
    """A number that the ranks which share the folder agree on: drawn by the first of them, which no other replaces.

    Raises:
        OSError: the folder cannot be written to. ValueError: the file is not one of these.
    """
    path = folder / NODE_FILE
    drawn = folder / f"{NODE_FILE}-{secrets.token_hex(8)}"
    if not path.exists():
        write_file(drawn, str(secrets.randbits(62)))  # synced: a node that loses power has no empty file
        with suppress(FileExistsError):
            os.link(drawn, path)
        drawn.unlink()
    return int(read_file(path, max_bytes=64))


def save_name(step: int, attempt: int) -> str:
    return f"{checkpoint_name(step)}-a{attempt}"


def save_key(step: int, attempt: int) -> int:
    """Step and attempt as one number, which orders saves."""
    return step * ATTEMPTS + attempt


def _key_of(name: str) -> int | None:
    match = re.fullmatch(r"(step-\d+)-a(\d{1,6})", name, flags=re.ASCII)
    step = None if match is None else step_of(match[1])
    return None if match is None or step is None else save_key(step, int(match[2]))


def _record_path(folder: Path, rank: int, world: int) -> Path:
    return folder / f"{rank_file(rank, world)}.json"


def _paths(folder: Path, rank: int, world: int) -> list[Path]:
    """A rank's file and its record."""
    return [folder / rank_file(rank, world), _record_path(folder, rank, world)]


def _is_whole(folder: Path, rank: int, world: int) -> bool:
    """Whether a rank's file is there, with the size and sha256 of its record."""
    path, record = _paths(folder, rank, world)
    try:
        return record_of(path) == FileRecord.model_validate_json(read_file(record))
    except (OSError, ValueError):
        return False
