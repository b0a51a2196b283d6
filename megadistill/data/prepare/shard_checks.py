"""Checking the shards of a split one by one, in this process or in several."""

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from megadistill.data.prepare.workers import begin_worker, worker_pool
from megadistill.data.shards.manifest import Manifest, PackerRecord
from megadistill.data.shards.opening import OpenShard, ShardFault
from megadistill.data.shards.packing import PACKER_VERSIONS
from megadistill.data.shards.reader import SequenceReader, open_shard
from megadistill.data.shards.sequence_batch import SequenceBatch
from megadistill.data.shards.token_files.token_file import TokenFile
from megadistill.data.storage.base import sha256_of
from megadistill.errors import RestartFault

MAX_LINES: Final = 1000
"""Faults of a split that are listed; the others are only counted."""
MIN_INDICES: Final = 256
"""Indices from which on workers are quicker than one process: they take a second to start."""
MIN_BYTES: Final = 64 << 20
"""Bytes of shards from which on workers are quicker than one process, where the shards are read."""
INDICES_A_JOB: Final = 64
"""Indices that a worker checks at a time."""
JOBS_A_PROCESS: Final = 2


@dataclass(frozen=True)
class ShardCheck:
    """The result of a part of the shards, or of a part of one shard."""

    faults: tuple[str, ...]
    """A line each, MAX_LINES at most."""
    fault_count: int
    bytes: int
    """Bytes of the tars that were dealt with: the progress that it counts for."""
    sequences: int = 0
    """Sequences that were read."""
    tokens: int = 0
    """Predicted tokens of those."""


def check_shards(
    manifest: Manifest, location: str, *, quick: bool, processes: int | None = None
) -> Iterator[ShardCheck]:
    """The results of all shards in their order, whatever the number of `processes` (None: a process a core).

    `location` is that of the manifest. `quick` opens the shards, with their indices; otherwise each is read, too.

    Raises:
        RestartFault: a worker process was killed.
    """
    shards = len(manifest.shards)
    processes = processes or len(os.sched_getaffinity(0))
    if processes == 1 or (shards < MIN_INDICES if quick else shards == 1 or manifest.bytes < MIN_BYTES):
        yield from _results(manifest, range(shards), quick=quick)
        return
    if "://" not in location:
        location = str(Path(location).resolve())  # a worker may have another working directory
    step = INDICES_A_JOB if quick else 1
    pool = worker_pool(min(processes, shards), __name__, _initialise, (location, quick))
    pending: deque[Future[list[ShardCheck]]] = deque()
    try:
        for start in range(0, shards, step):
            pending.append(pool.submit(_check, range(start, min(start + step, shards))))
            if len(pending) == JOBS_A_PROCESS * processes:
                yield from pending.popleft().result()
        for future in pending:
            yield from future.result()
    except BrokenProcessPool:
        raise RestartFault(
            "a worker process was killed, most likely for lack of memory: start the same command again, with fewer "
            "--processes"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _results(manifest: Manifest, numbers: Iterable[int], *, quick: bool) -> Iterator[ShardCheck]:
    reader = SequenceReader(manifest)
    for number in numbers:
        shard = manifest.shards[number]
        try:
            opened = open_shard(manifest, number)
        except ShardFault as fault:
            yield _result(number, [str(fault)], shard.bytes)
            continue
        if quick:
            yield _result(number, [], shard.bytes)
            continue
        yield _result(number, list(_hash_faults(opened, shard.sha256)), 0)
        first = 0
        for batch in reader.read_shard(number):
            faults = [str(batch.faults[row]) for row in sorted(batch.faults)]
            faults += _bos_faults(batch, manifest.packer, first)
            before, first = first, first + len(batch.bounds)
            part = shard.bytes * first // shard.sequences - shard.bytes * before // shard.sequences
            tokens = batch.predicted_tokens(across_documents=manifest.packer.across_documents)
            yield _result(number, faults, part, sequences=len(batch.bounds), tokens=tokens)


def _result(number: int, faults: list[str], size: int, *, sequences: int = 0, tokens: int = 0) -> ShardCheck:
    lines = tuple(f"shard {number}: {fault}" for fault in faults[:MAX_LINES])
    return ShardCheck(lines, len(faults), size, sequences, tokens)


def _bos_faults(batch: SequenceBatch, packer: PackerRecord, first: int) -> Iterator[str]:
    """A line for each sequence, counted from `first`, that does not begin with the BOS that its manifest records.

    With the packers of `tokenize` every document in a sequence begins with it too.
    """
    if not packer.sequence_bos:
        return
    for row in sorted({*range(len(batch.bounds))} - batch.faults.keys()):
        places = batch.bounds[row][:-1] if packer.name in PACKER_VERSIONS else [0]
        ids = batch.tokens[row][places]
        if (ids != packer.bos).any():
            place = int((ids != packer.bos).argmax())
            yield (
                f"sequence {first + row}: expected BOS (id {packer.bos}), as its manifest records, at token "
                f"{int(places[place])}, found id {int(ids[place])}"
            )


def _hash_faults(shard: OpenShard | TokenFile, expected: str) -> Iterator[str]:
    try:
        digest = sha256_of(shard.file)
    except OSError as error:
        yield f"{shard.path}: expected {shard.file.size} bytes, found: {error.strerror or error}"
        return
    if digest != expected:
        yield f"{shard.path}: expected sha256 {expected[:12]}…, found {digest[:12]}…"


# In the worker processes

_manifest: Manifest
_quick: bool


def _initialise(location: str, quick: bool) -> None:
    global _manifest, _quick
    begin_worker()
    _manifest, _quick = Manifest.load(location), quick


def _check(numbers: range) -> list[ShardCheck]:
    return list(_results(_manifest, numbers, quick=_quick))
