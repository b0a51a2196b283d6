"""Verifying: a data set against what its manifests say, all faults at once. It knows no order, and mends nothing.

Legend: S tokens of a sequence.
"""

import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from megadistill.data.shards.labels import predicted
from megadistill.data.shards.manifest import MANIFEST, Manifest
from megadistill.data.shards.reader import SequenceReader, ShardFault, open_shard
from megadistill.data.storage.base import sha256_of
from megadistill.data.storage.local import LocalFolder
from megadistill.data.storage.open import folder_of
from megadistill.data.tokenizers.base import tokenizer_sha256
from megadistill.errors import UserError
from megadistill.progress import ShowProgress, console_progress
from megadistill.redaction import redact_url

BATCH: Final = 256
"""SequenceBatch read at a time."""
MAX_LINES: Final = 1000
"""Faults of a split that are told one by one; the others are counted."""


@dataclass
class SplitCheck:
    """What was found in one split."""

    location: str
    """Of its manifest."""
    shards: int = 0
    sequences: int = 0
    faults: list[str] = field(default_factory=list)
    """A line each, MAX_LINES at most: shard, sequence, byte, what was expected, what was found."""
    fault_count: int = 0
    unlisted: list[str] = field(default_factory=list)
    """Names in the folder that the manifest does not speak of."""

    def add(self, fault: str) -> None:
        self.fault_count += 1
        if len(self.faults) < MAX_LINES:
            self.faults.append(fault)


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` found, a record a split."""

    splits: tuple[SplitCheck, ...]
    quick: bool
    seconds: float

    @property
    def ok(self) -> bool:
        return not any(split.fault_count for split in self.splits)

    def lines(self) -> list[str]:
        """Each fault, and each name that the manifests do not speak of, which is none."""
        lines = []
        for split in self.splits:
            lines += split.faults
            if split.fault_count > len(split.faults):
                lines.append(f"{split.location}: {split.fault_count - len(split.faults):,} further faults")
            lines += [f"{split.location} does not list {name}" for name in split.unlisted]
        return lines

    def table(self) -> Table:
        """For a person: a row a split."""
        depth = "manifests, sizes and indices" if self.quick else "manifests, sizes, hashes, and every sequence"
        table = Table(title=f"{depth}, {self.seconds:.0f} s", title_justify="left")
        table.add_column("manifest", overflow="fold")
        for heading in ("shards", "sequences", "faults"):
            table.add_column(heading, justify="right")
        for split in self.splits:
            counts = [f"{count:,}" for count in (split.shards, split.sequences, split.fault_count)]
            table.add_row(split.location, *counts)
        return table


def verify(location: Path | str, *, quick: bool, progress: ShowProgress | None = None) -> VerifyReport:
    """Checks a split, or all splits of a data set, and collects what is wrong.

    `location` is a manifest.json, the folder of a split or one above several, or a URL of a split. `quick` checks the
    manifest, the tokenizer, the sizes of the shards and their indices; otherwise also the sha256 of each shard, every
    sequence, and the number of tokens.

    Raises:
        UserError: there is no manifest.
    """
    began = time.perf_counter()
    locations = manifests_at(location)
    with nullcontext(progress) if progress else console_progress() as show:
        splits = tuple(_check(where, quick, show) for where in locations)
    return VerifyReport(splits, quick, time.perf_counter() - began)


def info(location: Path | str) -> list[Table]:
    """What the manifests at `location` (see `verify`) say, a table a split.

    Raises:
        UserError: there is no manifest, or it cannot be read; one line.
    """
    return [_described(Manifest.load(where), where) for where in manifests_at(location)]


def manifests_at(location: Path | str) -> list[str]:
    """The manifests at a location: itself, in it, or in the folders below.

    Raises:
        UserError: there is none, or it is out of reach.
    """
    text = str(location).rstrip("/")
    if "://" in text:
        folder = text.removesuffix(f"/{MANIFEST}")
        try:
            folder_of(folder).open(MANIFEST)
        except OSError as error:
            raise UserError(
                f"{redact_url(folder)} holds no {MANIFEST} ({error.strerror or error}): give the URL of a split"
            ) from None
        return [f"{folder}/{MANIFEST}"]
    if Path(text).name == MANIFEST and Path(text).is_file():
        return [text]
    found = sorted(str(path) for path in Path(location).rglob(MANIFEST))
    if not found:
        raise UserError(f"{location} holds no {MANIFEST}: give the folder of a data set, or tokenize a text first")
    return found


def _check(location: str, quick: bool, show: ShowProgress) -> SplitCheck:
    check = SplitCheck(redact_url(location))
    try:
        manifest = Manifest.load(location)
    except UserError as error:
        check.add(str(error))
        return check
    check.shards, check.sequences = len(manifest.shards), manifest.sequences
    if isinstance(manifest.folder, LocalFolder):
        folder = Path(manifest.folder.location)
        check.unlisted = _unlisted(manifest, folder)
        for fault in _tokenizer_faults(manifest, folder):
            check.add(fault)
    (_check_indices if quick else _check_sequences)(manifest, check, show)
    return check


def _unlisted(manifest: Manifest, folder: Path) -> list[str]:
    listed = {MANIFEST, manifest.tokenizer.file.partition("/")[0]}
    listed |= {name for shard in manifest.shards for name in (shard.name, shard.index)}
    return sorted(path.name for path in folder.iterdir() if path.name not in listed)


def _tokenizer_faults(manifest: Manifest, folder: Path) -> Iterator[str]:
    record = manifest.tokenizer
    path = (folder / record.file).resolve()
    try:
        found = tokenizer_sha256(path, prefer=record.kind)
    except UserError as error:
        yield f"tokenizer: {error}"
        return
    said = "none" if found is None else f"sha256 {found[1][:12]}…"
    if found is None or found[1] != record.sha256:
        yield f"tokenizer: {path}: expected sha256 {record.sha256[:12]}…, found {said}"


def _check_indices(manifest: Manifest, check: SplitCheck, show: ShowProgress) -> None:
    done, total = 0, sum(shard.bytes for shard in manifest.shards)
    for number, shard in enumerate(manifest.shards):
        try:
            open_shard(manifest, number)
        except ShardFault as fault:
            check.add(f"shard {number}: {fault}")
        done += shard.bytes
        show(f"{manifest.split}, indices", done=done, total=total, tokens=0)


def _check_sequences(manifest: Manifest, check: SplitCheck, show: ShowProgress) -> None:
    """Every byte, twice: for the sha256 of the tar, and sequence by sequence."""
    stage, total = manifest.split, sum(shard.bytes for shard in manifest.shards)
    reader = SequenceReader(manifest)
    done = sequences_read = tokens = 0
    show(stage, done=0, total=total, tokens=0)
    for number, shard in enumerate(manifest.shards):
        opened = _check_hash(manifest, number, check)
        for first in range(0, shard.sequences, BATCH) if opened else ():
            batch = np.arange(first, min(first + BATCH, shard.sequences))
            sequences = reader.read(np.stack([np.full_like(batch, number), batch], axis=1))
            for _, fault in sorted(sequences.faults.items()):
                check.add(f"shard {number}: {fault}")
            tokens += _tokens(manifest, sequences.bounds)
            sequences_read += len(batch)
            part = shard.bytes * (first + len(batch)) // shard.sequences
            show(stage, done=done + part, total=total, tokens=sequences_read * manifest.sequence_length)
        done += shard.bytes
    if not check.fault_count and tokens != manifest.tokens:
        check.add(f"{check.location}: expected {manifest.tokens} tokens, as it says, found {tokens}")


def _check_hash(manifest: Manifest, number: int, check: SplitCheck) -> bool:
    """Whether the shard opens at all."""
    expected = manifest.shards[number].sha256
    try:
        shard = open_shard(manifest, number)
    except ShardFault as fault:
        check.add(f"shard {number}: {fault}")
        return False
    try:
        found = sha256_of(shard.file)
    except OSError as error:
        check.add(f"shard {number}: {shard.path}: expected {shard.file.size} bytes, found: {error.strerror or error}")
        return True
    if found != expected:
        check.add(f"shard {number}: {shard.path}: expected sha256 {expected[:12]}…, found {found[:12]}…")
    return True


def _tokens(manifest: Manifest, bounds: list[NDArray[np.int64]]) -> int:
    """Labels that are learned without document masks; see `rows`."""
    sequence_length, across = manifest.sequence_length, manifest.packer.name != "bestfit"
    return int(predicted(bounds, sequence_length=sequence_length, across_documents=across).sum())


def _described(manifest: Manifest, location: str) -> Table:
    sizes = sum(shard.bytes for shard in manifest.shards)
    per_token = None if manifest.text_bytes is None else f"{manifest.text_bytes / max(manifest.tokens, 1):.3f}"
    tokenizer, packer = manifest.tokenizer, manifest.packer
    rows = {
        "split": manifest.split,
        "sequence length": f"{manifest.sequence_length:,}",
        "vocabulary": f"{manifest.vocab_size:,} ids, {manifest.dtype}",
        "tokenizer": f"{tokenizer.kind}, {tokenizer.file}, sha256 {tokenizer.sha256[:12]}…",
        "packer": f"{packer.name}, version {packer.version}",
        "documents": _count(manifest.documents),
        "sequences": _count(manifest.sequences),
        "tokens": _count(manifest.tokens),
        "text bytes": _count(manifest.text_bytes),
        "bytes a token": per_token or "not known",
        "shards": _count(len(manifest.shards)),
        "bytes of shards": _count(sizes),
        "fingerprint": manifest.fingerprint,
    }
    table = Table(title=redact_url(location), title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _count(value: int | None) -> str:
    return "not known" if value is None else f"{value:,}"
