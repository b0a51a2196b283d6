"""Comparing a data set with its manifests, and reporting all faults at once."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from rich.table import Table

from megadistill.config.paths import wrong_path
from megadistill.data.prepare.output_lock import TOKENIZER_FOLDER, is_incomplete
from megadistill.data.shards.manifest import MANIFEST, Manifest, PackerRecord
from megadistill.data.shards.opening import OpenShard, ShardFault
from megadistill.data.shards.packing import PACKER_VERSIONS
from megadistill.data.shards.reader import SequenceBatch, SequenceReader, open_shard
from megadistill.data.storage.base import sha256_of
from megadistill.data.storage.local import LocalFolder
from megadistill.data.storage.open import folder_of
from megadistill.data.tokenizers.data_files import changed_files, hashes_in
from megadistill.data.tokenizers.tokenizer import tokenizer_sha256
from megadistill.errors import UserError
from megadistill.io import reason_of
from megadistill.progress import ShowProgress
from megadistill.redaction import redact_url
from megadistill.units import number_of, spell

MAX_LINES: Final = 1000
"""Faults of a split that are listed; the others are only counted."""


@dataclass
class SplitCheck:
    """The faults of one split."""

    location: str
    """Location of its manifest."""
    shards: int = 0
    sequences: int = 0
    faults: list[str] = field(default_factory=list)
    """A line each, MAX_LINES at most: shard, sequence, byte, expected, found."""
    fault_count: int = 0
    unlisted: list[str] = field(default_factory=list)
    """Names in the folder that are not in the manifest; not faults."""

    def add(self, *faults: str) -> None:
        self.fault_count += len(faults)
        self.faults += faults[: MAX_LINES - len(self.faults)]


@dataclass(frozen=True)
class VerifyReport:
    """The result of `verify`, a record a split."""

    splits: tuple[SplitCheck, ...]
    quick: bool
    seconds: float

    @property
    def ok(self) -> bool:
        return not any(split.fault_count for split in self.splits)

    def lines(self) -> list[str]:
        """A line for each fault, and for each name that is not in a manifest."""
        lines = []
        for split in self.splits:
            lines += split.faults
            if split.fault_count > len(split.faults):
                lines.append(f"{split.location}: {split.fault_count - len(split.faults):,} further faults")
            lines += [f"{split.location} does not list {name}" for name in split.unlisted]
        return lines

    def table(self) -> Table:
        """A row a split."""
        depth = "manifests, sizes and indices" if self.quick else "manifests, sizes, hashes, and every sequence"
        table = Table(title=f"{depth}, {spell(self.seconds)}", title_justify="left")
        table.add_column("manifest")
        for heading in ("shards", "sequences", "faults"):
            table.add_column(heading, justify="right")
        for split in self.splits:
            counts = [f"{count:,}" for count in (split.shards, split.sequences, split.fault_count)]
            table.add_row(split.location, *counts)
        return table


def verify(location: Path | str, *, quick: bool, progress: ShowProgress) -> VerifyReport:
    """Checks a split, or all splits of a data set, and collects the faults.

    `location` is a manifest.json, the folder of a split or one above several, or a URL of a split. `quick` checks the
    manifest, the tokenizer, the sizes of the shards and their indices; otherwise also the sha256 of each shard, every
    sequence, and the number of tokens.

    Raises:
        UserError: there is no manifest.
    """
    began = time.perf_counter()
    locations = find_manifests(location)
    splits = tuple(_check(where, quick, progress) for where in locations)
    splits += tuple(SplitCheck(str(folder), faults=[line], fault_count=1) for folder, line in unlisted_shards(location))
    return VerifyReport(splits, quick, time.perf_counter() - began)


def info(location: Path | str) -> list[Table]:
    """The contents of the manifests at `location` (see `verify`), a table a split.

    Raises:
        UserError: there is no manifest, or it cannot be read; one line.
    """
    return [_described(Manifest.load(where), where) for where in find_manifests(location)]


def find_manifests(location: Path | str) -> list[str]:
    """The manifests at a location: itself, in it, or in the folders below.

    Raises:
        UserError: there is none, or it is unreachable.
    """
    text = str(location).rstrip("/")
    if (Path(text) / "recipe.json").is_file() and (reason := wrong_path(text, "manifest")):
        raise UserError(reason)
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
    manifests = sorted(str(path) for path in Path(location).rglob(MANIFEST))
    if not manifests:
        without = unlisted_shards(Path(text).parent if Path(text).name == MANIFEST else location)
        if without:
            raise UserError("; ".join(line for _, line in without))
        if reason := wrong_path(location, "manifest"):
            raise UserError(reason)
        raise UserError(f"{location} holds no {MANIFEST}: give the folder of a data set, or tokenize a text first")
    return manifests


def unlisted_shards(location: Path | str) -> list[tuple[Path, str]]:
    """Folders at a local path, or below it, whose shards have no manifest; each with a line on the way out."""
    folders = {tar.parent for tar in Path(location).rglob("*.tar")} if Path(location).is_dir() else set()
    return [(folder, _without_manifest(folder)) for folder in sorted(folders) if not (folder / MANIFEST).exists()]


def _without_manifest(folder: Path) -> str:
    tars = len(list(folder.glob("*.tar")))
    problem = f"{folder} has {number_of(tars, 'shard')} and no {MANIFEST}"
    if is_incomplete(folder.parent):
        return f"{problem}: `megadistill tokenize` was broken off there: start the same command again"
    beside = next((place for place in (folder, folder.parent) if (place / TOKENIZER_FOLDER).is_dir()), None)
    tokenizer = "TOKENIZER" if beside is None else beside / TOKENIZER_FOLDER
    return f"{problem}: restore it, or make one: megadistill shards index {folder} --tokenizer {tokenizer}"


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
        check.add(*_tokenizer_faults(manifest, folder))
    _check_shards(manifest, check, quick, show)
    return check


def _unlisted(manifest: Manifest, folder: Path) -> list[str]:
    listed = {MANIFEST, manifest.tokenizer.file.partition("/")[0]}
    listed |= {name for shard in manifest.shards for name in (shard.name, shard.index)}
    return sorted(path.name for path in folder.iterdir() if path.name not in listed)


def _tokenizer_faults(manifest: Manifest, folder: Path) -> Iterator[str]:
    record = manifest.tokenizer
    path = (folder / record.file).resolve()
    if record.files:
        try:
            hashes = hashes_in(path.parent)
        except OSError as error:
            yield f"tokenizer: {path.parent}: {reason_of(error)}"
            return
        yield from (f"tokenizer: {path.parent}/{line}" for line in changed_files(hashes, record.files))
        return
    try:
        tokenizer = tokenizer_sha256(path, prefer=record.kind)
    except UserError as error:
        yield f"tokenizer: {error}"
        return
    if tokenizer is None or tokenizer[1] != record.sha256:
        actual = "none" if tokenizer is None else f"sha256 {tokenizer[1][:12]}…"
        yield f"tokenizer: {path}: expected sha256 {record.sha256[:12]}…, found {actual}"


def _check_shards(manifest: Manifest, check: SplitCheck, quick: bool, show: ShowProgress) -> None:
    """Opens every shard; unless `quick`, reads every byte twice: for the sha256 of the tar, and by sequence."""
    stage, total = f"{manifest.split}, indices" if quick else manifest.split, sum(one.bytes for one in manifest.shards)
    reader = SequenceReader(manifest)
    done = sequences = tokens = 0
    show(stage, done=0, total=total, tokens=0)
    for number, shard in enumerate(manifest.shards):
        try:
            opened, first = open_shard(manifest, number), 0
        except ShardFault as fault:
            check.add(f"shard {number}: {fault}")
        else:
            if not quick:
                check.add(*(f"shard {number}: {message}" for message in _hash_faults(opened, shard.sha256)))
            for batch in () if quick else reader.read_shard(number):
                check.add(*(f"shard {number}: {batch.faults[row]}" for row in sorted(batch.faults)))
                check.add(*(f"shard {number}: {line}" for line in _bos_faults(batch, manifest.packer, first)))
                first += len(batch.bounds)
                tokens += batch.predicted_tokens(across_documents=manifest.packer.across_documents)
                sequences += len(batch.bounds)
                part = done + shard.bytes * len(batch.bounds) // shard.sequences
                show(stage, done=min(part, total - 1), total=total, tokens=sequences * manifest.sequence_length)
        done += shard.bytes
        show(stage, done=done, total=total, tokens=sequences * manifest.sequence_length)
    if not quick and not check.fault_count and tokens != manifest.tokens:
        check.add(f"{check.location}: expected {manifest.tokens} tokens, as it records, found {tokens}")


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


def _hash_faults(shard: OpenShard, expected: str) -> Iterator[str]:
    try:
        digest = sha256_of(shard.file)
    except OSError as error:
        yield f"{shard.path}: expected {shard.file.size} bytes, found: {error.strerror or error}"
        return
    if digest != expected:
        yield f"{shard.path}: expected sha256 {expected[:12]}…, found {digest[:12]}…"


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
        "BOS": _bos(packer),
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
    table.add_column()
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _bos(packer: PackerRecord) -> str:
    if packer.bos is None:
        return "the tokenizer puts none before a text" if packer.name != "external" else "not known"
    if packer.sequence_bos:
        return f"id {packer.bos}, in front of every sequence"
    return f"id {packer.bos}, not in front of every sequence"


def _count(value: int | None) -> str:
    return "not known" if value is None else f"{value:,}"
