"""Comparing a data set with its manifests, and reporting all faults at once."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rich.table import Table

from megadistill.config.paths import wrong_path
from megadistill.data.prepare.output_lock import TOKENIZER_FOLDER, is_incomplete
from megadistill.data.prepare.shard_checks import MAX_LINES, check_shards
from megadistill.data.shards.manifest import MANIFEST, MAX_LISTED, Manifest, PackerRecord, TokenFileFormat
from megadistill.data.shards.shard_table import TABLE_FILE
from megadistill.data.storage.local import LocalFolder
from megadistill.data.storage.open import folder_of
from megadistill.data.tokenizers.data_files import changed_files, hashes_in
from megadistill.data.tokenizers.tokenizer import tokenizer_sha256
from megadistill.errors import UserError
from megadistill.io import reason_of
from megadistill.progress import ShowProgress
from megadistill.redaction import redact_url
from megadistill.units import number_of, spell


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

    def add(self, *faults: str, count: int | None = None) -> None:
        """`count`: the number of faults, where not all of them are listed."""
        self.fault_count += len(faults) if count is None else count
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


def verify(location: Path | str, *, quick: bool, progress: ShowProgress, processes: int | None = None) -> VerifyReport:
    """Checks a split, or all splits of a data set, and collects the faults.

    `location` is a manifest.json, the folder of a split or one above several, or a URL of a split. `quick` checks the
    manifest, the tokenizer, the sizes of the shards and their indices; otherwise also the sha256 of each shard, every
    sequence, and the number of tokens. `processes` check shards at a time (default: one for each core that this process
    may use); the report does not depend on them.

    Raises:
        UserError: there is no manifest.
        RestartFault: a worker process was killed.
    """
    began = time.perf_counter()
    locations = find_manifests(location)
    splits = tuple(_check(where, quick, processes, progress) for where in locations)
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


def _check(location: str, quick: bool, processes: int | None, show: ShowProgress) -> SplitCheck:
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
    if manifest.has_table and (content := manifest.content_sha256()) != manifest.fingerprint:
        check.add(
            f"{check.location}: expected content_sha256 {manifest.fingerprint[:12]}…, as it records, found "
            f"{content[:12]}…"
        )
    _check_shards(manifest, location, check, quick=quick, processes=processes, show=show)
    return check


def _unlisted(manifest: Manifest, folder: Path) -> list[str]:
    listed = {MANIFEST, manifest.tokenizer.file.partition("/")[0], *((TABLE_FILE,) if manifest.has_table else ())}
    is_shard = manifest.shards.name_test()
    return sorted(path.name for path in folder.iterdir() if not (path.name in listed or is_shard(path.name)))


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


def _check_shards(
    manifest: Manifest, location: str, check: SplitCheck, *, quick: bool, processes: int | None, show: ShowProgress
) -> None:
    """Opens every shard; unless `quick`, reads every byte twice: for the sha256 of the tar, and by sequence."""
    stage, total = f"{manifest.split}, indices" if quick else manifest.split, manifest.bytes
    done = sequences = tokens = 0
    show(stage, done=0, total=total, tokens=0)
    for result in check_shards(manifest, location, quick=quick, processes=processes):
        check.add(*result.faults, count=result.fault_count)
        done += result.bytes
        sequences += result.sequences
        tokens += result.tokens
        show(stage, done=done, total=total, tokens=sequences * manifest.sequence_length)
    if not quick and not check.fault_count and tokens != manifest.tokens:
        check.add(f"{check.location}: expected {manifest.tokens} tokens, as it records, found {tokens}")


def _described(manifest: Manifest, location: str) -> Table:
    per_token = None if manifest.text_bytes is None else f"{manifest.text_bytes / max(manifest.tokens, 1):.3f}"
    tokenizer, packer = manifest.tokenizer, manifest.packer
    rows = {
        "split": manifest.split,
        "format": _format(manifest),
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
        "shards": f"{len(manifest.shards):,}, {_place_of_shards(manifest)}",
        "bytes of shards": _count(manifest.bytes),
        "fingerprint": manifest.fingerprint,
    }
    table = Table(title=redact_url(location), title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column()
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _format(manifest: Manifest) -> str:
    record = manifest.sample_format
    if isinstance(record, TokenFileFormat):
        column = f", column {record.decoder.column}" if record.decoder else ""
        return f"{record.format}{column}, ids as {record.dtype}, read in place in {record.folder}"
    return f"WebDataset, {record.tokens}"


def _place_of_shards(manifest: Manifest) -> str:
    if manifest.has_table:
        return f"in {TABLE_FILE}"
    long = len(manifest.shards) > MAX_LISTED
    return "listed in manifest.json" + (": `megadistill shards convert` makes starts quicker" if long else "")


def _bos(packer: PackerRecord) -> str:
    if packer.bos is None:
        return "the tokenizer puts none before a text" if packer.name != "external" else "not known"
    if packer.sequence_bos:
        return f"id {packer.bos}, in front of every sequence"
    return f"id {packer.bos}, not in front of every sequence"


def _count(value: int | None) -> str:
    return "not known" if value is None else f"{value:,}"
