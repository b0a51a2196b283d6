"""Indexing token files of other programs: a split whose sequences are read where they lie.

The files stay as they are. The index is a folder of its own: one index for each file, the tokenizer, and manifest.json,
which is written last. The sequence length belongs to the index, so that a corpus may have several.
"""

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from pydantic import TypeAdapter, ValidationError

from megadistill.data.prepare.token_formats.formats import FORMATS
from megadistill.data.prepare.token_formats.index_file import Documents, IndexedFile, IndexSpec, ShowIds
from megadistill.data.prepare.token_formats.index_record import indexed_once, remove_records
from megadistill.data.prepare.token_formats.token_scan import ScanOptions
from megadistill.data.prepare.workers import begin_worker, worker_pool
from megadistill.data.shards.manifest import (
    FORMAT_VERSION,
    DataFolder,
    DecoderRecord,
    Manifest,
    PackerRecord,
    SourceRecord,
    StoredDtype,
    TokenFileFormat,
    TokenFormatName,
    TokenizerRecord,
    read_dtype,
)
from megadistill.data.shards.npy import MAX_LENGTH
from megadistill.data.shards.shard import INDEX_SUFFIX, FileName
from megadistill.data.shards.shard_table import ShardTable
from megadistill.data.storage.base import Folder
from megadistill.data.storage.open import folder_of
from megadistill.data.tokenizers.tokenizer import load_tokenizer, tokenizer_record
from megadistill.errors import RestartFault, UserError
from megadistill.outputs import require_writable_folder
from megadistill.progress import ShowProgress
from megadistill.redaction import redact_url
from megadistill.units import number_of

TOKENIZER_FOLDER: Final = "tokenizer"
PARENT: Final = "../"
MIN_BYTES: Final = 64 << 20
"""Bytes of files from which on several processes are quicker than one."""
FILES_A_PROCESS: Final = 2
"""Files that wait or are read, for each process."""


@dataclass(frozen=True)
class IndexReport:
    """The result of `index_token_files`."""

    manifest: Manifest
    files: tuple[IndexedFile, ...]
    remote: str | None
    """The URL of the data's folder, where it is not a local one."""

    def lines(self) -> list[str]:
        """The lines that the command prints: numbers of the index, and of ids and files that were left out."""
        manifest, folder = self.manifest, self.manifest.folder.location
        documents = "where documents begin is not known"
        if manifest.documents is not None:
            documents = f"{number_of(manifest.documents, 'document')} begin in them"
        lines = [
            f"{folder}/manifest.json: {number_of(manifest.sequences, 'sequence')} of {manifest.sequence_length:,} "
            f"tokens in {number_of(len(manifest.shards), 'file')}; {documents}"
        ]
        left_out = sum(file.left_out for file in self.files)
        short = [file.name for file in self.files if file.shard is None]
        if left_out:
            lines.append(f"{number_of(left_out, 'id')} at the end of files fill no sequence, and are left out")
        if short:
            names = ", ".join(short[:5]) + (", …" if len(short) > 5 else "")
            lines.append(f"{number_of(len(short), 'file')} with fewer ids than a sequence left out: {names}")
        if self.remote is not None:
            lines.append(f"copy {folder} into {self.remote}: the index is read there, beside its files")
        return lines


def index_token_files(
    paths: Sequence[str],
    *,
    format: TokenFormatName,
    sequence_length: int,
    tokenizer: Path,
    dtype: str | None = None,
    column: str | None = None,
    documents: Documents = "format",
    split: str = "train",
    output: Path | None = None,
    processes: int | None = None,
    progress: ShowProgress,
) -> IndexReport:
    """Makes an index of token files, which stay as they are. Broken off and started again, it reads no file twice.

    `paths` are prefixes, files or folders, as the `format` has them; all files lie in one folder, local or behind a
    URL. `output` is the folder of the index, beside or below that of the files (default: a folder below it, named after
    the file and the sequence length). Files are read by several `processes` (default: one a core).

    Raises:
        UserError: a file is damaged or missing, has another dtype, or ids that the tokenizer has not; one line. No
            manifest was written.
        RestartFault: a worker process was killed.
    """
    if not 1 <= sequence_length < MAX_LENGTH:
        raise UserError(f"--sequence-length {sequence_length}: a sequence has 1 to {MAX_LENGTH - 1} tokens")
    location, names = _located([path for given in paths for path in FORMATS[format].files(given)])
    _require_name(split, "--split")
    output, relative = _place_of_index(location, names, sequence_length, output)
    Manifest.refuse_finished(output)
    require_writable_folder(output, "--output")
    model = load_tokenizer(tokenizer)
    if documents == "bos" and model.bos is None:
        raise UserError(f"--documents bos: {tokenizer} has no BOS: give --documents eos, or leave it out")
    options = ScanOptions(model.vocab_size, dtype, column)
    spec = IndexSpec(format, options, sequence_length, documents, model.bos, model.eos)
    stored, decoder, total = _require_alike(folder_of(location), names, spec)
    is_new = not output.exists()
    output.mkdir(parents=True, exist_ok=True)
    try:
        work = _Work(location, output, spec, model.sha256)
        files = tuple(_index_all(work, names, processes, total, split, progress))
        record = _record(files, spec, relative, stored, decoder)
        model.write(output / TOKENIZER_FOLDER)
        written = tokenizer_record(model, TOKENIZER_FOLDER, output / TOKENIZER_FOLDER)
        manifest = _manifest(files, record, spec, written, split, location)
        manifest.write(output)
        remove_records(output, {file.name for file in files if file.shard})
    except BaseException:
        with suppress(OSError):
            if is_new:
                output.rmdir()  # which indices of files keep from it
        raise
    remote = redact_url(location) if "://" in location else None
    return IndexReport(manifest.lying_in(folder_of(str(output))), files, remote)


def _located(paths: Sequence[str]) -> tuple[str, list[str]]:
    """The folder of all files, and their names in it."""
    parents = {path: path.rpartition("/")[0] if "/" in path else "." for path in paths}
    folders = dict.fromkeys(parent if "://" in parent else str(Path(parent or "/")) for parent in parents.values())
    if len(folders) > 1:
        first, second, *_ = map(redact_url, folders)
        raise UserError(
            f"files of one index lie in one folder, and these lie in {first} and {second}: index each folder by "
            "itself, and name the indices as data.sources of a recipe"
        )
    names = [path.rpartition("/")[2] for path in paths]
    for path, name in zip(paths, names, strict=True):
        _require_name(name, redact_url(path))
    twice = next((name for name in names if names.count(name) > 1), None) if len({*names}) < len(names) else None
    if twice is not None:
        raise UserError(f"{twice} is given twice: give each file once")
    indices = {name + INDEX_SUFFIX for name in names}.intersection(names)
    if indices:
        index = min(indices)
        raise UserError(
            f"{index} has the name that the index of {index.removesuffix(INDEX_SUFFIX)} gets: index one of them by "
            "itself, or a link to it with another name"
        )
    return next(iter(folders)), names


def _require_name(name: str, what: str) -> None:
    try:
        TypeAdapter(FileName).validate_python(name)
    except ValidationError:
        raise UserError(
            f"{what}: {name!r} is not a name for a manifest: use letters, digits, '.', '_' and '-', and begin with a "
            "letter, a digit or '_' (a link to the file may have such a name)"
        ) from None


def _place_of_index(location: str, names: Sequence[str], sequence_length: int, output: Path | None) -> tuple[Path, str]:
    """The folder of the index, and the folder of the files relative to it."""
    if "://" in location:
        if output is None or "://" in str(output):
            raise UserError(
                f"{redact_url(location)} is a URL: give --output FOLDER, a local one, and copy it there when it is made"
            )
        return output, PARENT
    folder = Path(location).absolute()
    stem = names[0].rpartition(".")[0] or names[0] if len(names) == 1 else folder.name
    output = folder / f"{stem}-s{sequence_length}" if output is None else output
    if output.resolve() == folder.resolve():
        raise UserError(f"--output {output} is the folder of the files: give a folder below it, or beside it")
    for place in (folder.parent.resolve() / folder.name, folder.resolve()):  # the first keeps a link to a folder
        relative = os.path.relpath(place, output.resolve())
        relative = PARENT if relative == os.pardir else relative
        with suppress(ValidationError):
            return output, TypeAdapter(DataFolder).validate_python(relative)
    raise UserError(
        f"--output {output}: an index lies below the folder of its files, {location}, or beside it: where nothing can "
        "be written there, make a link to that folder beside --output, and give the files through the link"
    )


def _require_alike(
    folder: Folder, names: Sequence[str], spec: IndexSpec
) -> tuple[StoredDtype, DecoderRecord | None, int]:
    """dtype and decoder of all files, and their bytes, from their headers.

    Raises:
        UserError: a file is damaged, or unlike the others.
    """
    kinds: dict[tuple[StoredDtype, DecoderRecord | None], str] = {}
    total = 0
    for name in names:
        kinds.setdefault(FORMATS[spec.format].stored_as(folder, name, spec.options), name)
        total += folder.open(name).size
    if len(kinds) > 1:
        ((first, one), a), ((second, other), b), *_ = kinds.items()
        what = [str(first), str(second)] if first != second else [str(one), str(other)]
        raise UserError(
            f"{a} has ids of {what[0]}, {b} of {what[1]}: files of one index have one type: index them apart"
        )
    (dtype, decoder), _ = next(iter(kinds.items()))
    return dtype, decoder, total


def _record(
    files: Sequence[IndexedFile],
    spec: IndexSpec,
    relative: str,
    dtype: StoredDtype,
    decoder: DecoderRecord | None,
) -> TokenFileFormat:
    if not any(file.shard for file in files):
        raise UserError(
            f"no file has the {spec.sequence_length + 1} ids of a sequence and its last label: give a smaller "
            "--sequence-length"
        )
    return TokenFileFormat(
        kind="token_file",
        format=spec.format,
        folder=relative,
        dtype=dtype,
        has_documents=any(file.knows_documents for file in files if file.shard),
        segments=max(file.segments for file in files),
        decoder=decoder,
    )


def _manifest(
    files: Sequence[IndexedFile],
    record: TokenFileFormat,
    spec: IndexSpec,
    tokenizer: TokenizerRecord,
    split: str,
    location: str,
) -> Manifest:
    indexed = [file for file in files if file.shard]
    shards = ShardTable.of(file.shard for file in indexed if file.shard)
    with_bos = all(file.begins_with_bos for file in indexed)
    return Manifest(
        version=FORMAT_VERSION,
        split=split,
        sequence_length=spec.sequence_length,
        dtype=read_dtype(record.dtype),
        vocab_size=spec.options.vocab_size,
        largest_id=max(file.largest_id for file in indexed),
        sample_format=record,
        tokenizer=tokenizer,
        packer=PackerRecord(name="external", version=1, bos=spec.bos, eos=None, sequence_bos=with_bos),
        documents=sum(file.documents for file in indexed) if record.has_documents else None,
        tokens=int(shards.sequences.sum()) * spec.sequence_length,
        text_bytes=None,
        source=SourceRecord(inputs=(location.rpartition("/")[2],)),
        shards=shards,
    )


@dataclass(frozen=True)
class _Work:
    """All that a process needs to index files."""

    location: str
    output: Path
    spec: IndexSpec
    tokenizer: str
    """sha256"""

    def index(self, folder: Folder, name: str, show: ShowIds) -> IndexedFile:
        return indexed_once(folder, name, self.output, self.spec, self.tokenizer, show)


def _index_all(
    work: _Work, names: Sequence[str], processes: int | None, total: int, split: str, show: ShowProgress
) -> Iterator[IndexedFile]:
    """The indices of all files in their order, whatever the number of processes."""
    done = tokens = 0

    def show_part(size: int, ids: int) -> None:
        show(split, done=done + size, total=total, tokens=tokens + ids)

    def count(file: IndexedFile) -> IndexedFile:
        nonlocal done, tokens
        done += folder.open(file.name).size if file.shard is None else file.shard.bytes
        tokens += file.shard.sequences * work.spec.sequence_length if file.shard else 0
        show(split, done=done, total=total, tokens=tokens)
        return file

    folder = folder_of(work.location)
    show(split, done=0, total=total, tokens=0)
    processes = min(processes or len(os.sched_getaffinity(0)), len(names))
    if processes == 1 or total < MIN_BYTES:
        yield from (count(work.index(folder, name, show_part)) for name in names)
        return
    location = work.location if "://" in work.location else str(Path(work.location).absolute())
    absolute = replace(work, location=location, output=work.output.absolute())
    pool = worker_pool(processes, __name__, _initialise, (absolute,))
    pending: deque[Future[IndexedFile]] = deque()
    try:
        for name in names:
            pending.append(pool.submit(_index, name))
            if len(pending) == FILES_A_PROCESS * processes:
                yield count(pending.popleft().result())
        for future in pending:
            yield count(future.result())
    except BrokenProcessPool:
        raise RestartFault(
            "a worker process was killed, most likely for lack of memory: start the same command again, which reads "
            "no file twice, with fewer --processes"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


# In the worker processes

_work: _Work
_folder: Folder


def _initialise(work: _Work) -> None:
    global _work, _folder
    begin_worker()
    _work, _folder = work, folder_of(work.location)


def _index(name: str) -> IndexedFile:
    return _work.index(_folder, name, lambda size, ids: None)
