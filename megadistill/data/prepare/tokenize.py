"""Tokenizing: a corpus to a data set (tokenizer, train split, held-out split).

Documents are read one after the other, sorted into the splits by their text, and cut into tasks; each task becomes a
shard, independently. The same command, started again after it ended at any instant, reuses what is whole; the result is
the same to the byte.
"""

import logging
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megadistill.data.prepare.encode import EncodedShard, EncodingSpec, PackerName, disk_faults
from megadistill.data.prepare.finished_output import InputFiles, TokenizeRecord
from megadistill.data.prepare.output_lock import TOKENIZER_FOLDER, is_incomplete, locked_output, remove_leftovers
from megadistill.data.prepare.shard_tasks import (
    HELDOUT,
    MANY_SHARDS,
    SHARD_MB,
    TRAIN,
    cut_into_tasks,
    shard_mb_for,
    split_of,
    text_bytes_of,
)
from megadistill.data.prepare.tokenize_report import SplitReport, TokenizeReport
from megadistill.data.prepare.tokenizer_training import TrainingSample, trained_tokenizer
from megadistill.data.prepare.workers import encode_all
from megadistill.data.shards.manifest import FORMAT_VERSION, MANIFEST, Manifest, SourceRecord, TokenizerRecord
from megadistill.data.shards.packing import CHUNK, PACKER_VERSIONS
from megadistill.data.shards.shard_table import ShardTable
from megadistill.data.shards.tar import SAMPLE_FORMAT
from megadistill.data.text.corpus import Corpus
from megadistill.data.text.input_files import find_files
from megadistill.data.tokenizers.tokenizer import Tokenizer, load_tokenizer, tokenizer_record
from megadistill.errors import UserError
from megadistill.progress import ShowProgress
from megadistill.units import number_of

logger = logging.getLogger(__name__)


def tokenize(
    inputs: Sequence[Path],
    output: Path,
    *,
    tokenizer: Path | None,
    vocab_size: int | None,
    sequence_length: int,
    heldout_fraction: float,
    progress: ShowProgress,
    packer: PackerName = CHUNK,
    insert_bos: bool = True,
    text_field: str = "text",
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    shard_mb: float | None = None,
    processes: int | None = None,
) -> TokenizeReport:
    """Writes `output`/tokenizer, `output`/train and `output`/heldout; the same text gives the same bytes.

    `inputs` are files, taken as they are, and folders, of whose files `include` and `exclude` choose (`input_files`);
    `corpus` says what a document is in each kind of file. A share of `heldout_fraction` of the documents is held out;
    with 0 there is no such split.

    Either `tokenizer`, a SentencePiece model or a Hugging Face tokenizer, makes the ids, or a SentencePiece model of
    `vocab_size` pieces is trained on the training documents. `insert_bos`: where the tokenizer puts BOS before a text,
    every sequence begins with one (see `packing`). `shard_mb` is the text of a shard in 10^6 bytes (None: 32 to 512,
    by the size of the input). `processes` encode at a time (default: one for each core that this process may use); for
    more than one, a script that calls this must keep its own acts under `if __name__ == "__main__"`.

    The same call on a finished output writes nothing.

    Raises:
        UserError: an argument, the text or the output folder is unusable, most of the input (by bytes) has no text, or
            the output was made by another command; no manifest was written.
        OperatorFault: the disk is full. RestartFault: a process was killed. The same command resumes.
    """
    began = time.perf_counter()
    _check(tokenizer, vocab_size, {"--sequence-length": sequence_length, "--processes": processes}, packer, shard_mb)
    files = _Inputs(inputs, output, include, exclude, text_field, heldout_fraction)
    folder = output / TOKENIZER_FOLDER
    given = None if tokenizer is None else load_tokenizer(tokenizer)  # before there is an output
    record = files.tokenize_record(
        tokenizer=None if given is None else f"sha256 {given.sha256[:12]}",
        vocab_size=vocab_size,
        sequence_length=sequence_length,
        packer=packer,
        shard_mb=(shard_mb := files.shard_mb(shard_mb)),
        **({} if given is None or given.bos is None else {"insert_bos": insert_bos}),
    )
    if not is_incomplete(output) and record.is_finished(output, files.splits):
        return _already_there(output, files.splits, record, seconds=time.perf_counter() - began)
    with disk_faults(output), locked_output(output, files.splits):
        model = given or _train(files, folder, vocab_size or 0, progress)
        model.write(folder)
        spec = EncodingSpec.of(model, packer=packer, sequence_length=sequence_length, insert_bos=insert_bos)
        corpus = files.corpus()
        shards, reused = _encode(
            corpus,
            files,
            folder / model.file,
            spec,
            task_bytes=round(shard_mb * 1e6),
            processes=processes or len(os.sched_getaffinity(0)),
            show=progress,
        )
        splits = _split_reports(files, shards, model, folder, spec)
        _write_records(output, record, [report.manifest for report in splits.values()])
    return TokenizeReport(
        output=output,
        vocab_size=model.vocab_size,
        train=splits[TRAIN],
        heldout=splits.get(HELDOUT),
        input_bytes=record.input.bytes,
        seconds=time.perf_counter() - began,
        left_out=corpus.left_out,
        first_places=corpus.first_places,
        unread=tuple(corpus.unread),
        whole=corpus.whole,
        reused=reused,
    )


def _write_records(output: Path, record: TokenizeRecord, manifests: Sequence[Manifest]) -> None:
    """The last step of all: from here on nothing about the input can fail."""
    record.write(output)
    for manifest in manifests:
        manifest.write(output / manifest.split)
    remove_leftovers(output, manifests)


def _already_there(output: Path, splits: Sequence[str], record: TokenizeRecord, *, seconds: float) -> TokenizeReport:
    reports = {split: SplitReport(Manifest.load(output / split / MANIFEST)) for split in splits}
    return TokenizeReport(
        output=output,
        vocab_size=reports[TRAIN].manifest.vocab_size,
        train=reports[TRAIN],
        heldout=reports.get(HELDOUT),
        input_bytes=record.input.bytes,
        seconds=seconds,
        left_out=Counter(),
        already_there=True,
    )


@dataclass(frozen=True)
class _Inputs:
    """The files of a data set; each pass over them reads the same documents."""

    inputs: Sequence[Path]
    output: Path
    include: Sequence[str]
    exclude: Sequence[str]
    text_field: str
    heldout_fraction: float

    def __post_init__(self) -> None:
        if not 0 <= self.heldout_fraction < 1:
            raise UserError(f"--heldout-fraction {self.heldout_fraction}: give a share between 0 and 1, such as 0.01")

    @property
    def splits(self) -> tuple[str, ...]:
        return (TRAIN, HELDOUT) if self.heldout_fraction else (TRAIN,)

    def corpus(self) -> Corpus:
        return Corpus(self._files(), text_field=self.text_field)

    def file_bytes(self) -> int:
        return sum(path.stat().st_size for path in self._files())

    def shard_mb(self, given: float | None) -> float:
        """The text of a shard in 10^6 bytes: the given one, or one that goes with the input; warns of many shards."""
        text_bytes = text_bytes_of(self._files())
        written = TokenizeRecord.read(self.output) if given is None else None
        if written is not None and written.options.get("--shard-mb") == SHARD_MB[0]:
            given = SHARD_MB[0]  # earlier releases took it for every input
        size = shard_mb_for(text_bytes) if given is None else given
        shards = round(text_bytes / (size * 1e6))
        if shards > MANY_SHARDS:
            logger.warning(
                "about %s shards of %g MB of text, with an index beside each: above %s a file system is slow to list "
                "and copy them; --shard-mb %d would make about %s",
                f"{shards:,}",
                size,
                f"{MANY_SHARDS:,}",
                SHARD_MB[-1],
                f"{round(text_bytes / (SHARD_MB[-1] * 1e6)):,}",
            )
        return size

    def _files(self) -> Iterator[Path]:
        return find_files(self.inputs, self.include, self.exclude, output=self.output)

    def tokenize_record(self, **options: str | float | None) -> TokenizeRecord:
        """The record of the command with these `options` and those of the input."""
        given: dict[str, Any] = {
            **options,
            "text_field": self.text_field,
            "heldout_fraction": self.heldout_fraction,
            "include": list(self.include),
            "exclude": list(self.exclude),
        }
        named = {f"--{name.replace('_', '-')}": value for name, value in given.items()}
        return TokenizeRecord(options=named, input=InputFiles.of(self._files()))

    def refuse_one_sided(self, documents: Counter[str], corpus: Corpus, total: int) -> None:
        """Raises UserError: there is no document, most of the input has no text, or a split has no document."""
        if not documents:
            raise corpus.no_documents()
        corpus.refuse_mostly_unread(total)
        empty = next((split for split in self.splits if not documents[split]), None)
        if empty is not None:
            full = HELDOUT if empty == TRAIN else TRAIN
            raise UserError(
                f"--heldout-fraction {self.heldout_fraction} puts all {number_of(documents.total(), 'document')} into "
                f"{full}: {'lower' if full == HELDOUT else 'raise'} it, or divide long files: a document stays whole"
            )

    def record(self) -> SourceRecord:
        return SourceRecord(
            inputs=tuple(path.resolve().name for path in self.inputs),  # no parent folders: a move changes nothing
            include=tuple(self.include),
            exclude=tuple(self.exclude),
            heldout_fraction=self.heldout_fraction,
        )


def _check(
    tokenizer: Path | None,
    vocab_size: int | None,
    sizes: Mapping[str, int | None],
    packer: str,
    shard_mb: float | None,
) -> None:
    if (tokenizer is None) == (vocab_size is None):
        raise UserError(
            "give either --tokenizer, a SentencePiece model or a Hugging Face tokenizer, or --vocab-size, to train one"
        )
    if vocab_size is not None and vocab_size < 300:
        raise UserError(
            f"--vocab-size {vocab_size}: 256 byte pieces and 3 control pieces leave too few; 300 is the least"
        )
    for option, value in sizes.items():
        if value is not None and value < 1:
            raise UserError(f"{option} {value}: give at least 1")
    if shard_mb is not None and not 1e-6 <= shard_mb < 1e6:
        raise UserError(f"--shard-mb {shard_mb}: give the millions of bytes of text in a shard, such as {SHARD_MB[0]}")
    if packer not in PACKER_VERSIONS:
        raise UserError(f"--packer {packer}: give {' or '.join(PACKER_VERSIONS)}")


def _train(files: _Inputs, folder: Path, vocab_size: int, show: ShowProgress) -> Tokenizer:
    total = files.file_bytes()
    corpus = files.corpus()
    sample = TrainingSample()
    documents: Counter[str] = Counter()
    show("sample", done=0, total=total, tokens=0)
    for document in corpus:
        split = split_of(document, files.heldout_fraction)
        documents[split] += 1
        if split == TRAIN:
            sample.add(document)
        corpus.refuse_mostly_unread(total)
        show("sample", done=min(corpus.bytes_read, total - 1), total=total, tokens=0)  # `total` is reported once, last
    files.refuse_one_sided(documents, corpus, total)
    show("sample", done=total, total=total, tokens=0)
    show("tokenizer", done=0, total=sample.bytes, tokens=0)
    model = trained_tokenizer(sample, folder, vocab_size=vocab_size)
    show("tokenizer", done=sample.bytes, total=sample.bytes, tokens=0)
    return model


def _encode(
    corpus: Corpus,
    files: _Inputs,
    tokenizer_file: Path,
    spec: EncodingSpec,
    *,
    task_bytes: int,
    processes: int,
    show: ShowProgress,
) -> tuple[dict[str, list[EncodedShard]], int]:
    """The results of each split's tasks, in order, and how many of their shards were reused."""
    total = files.file_bytes()
    read = tokens = reused = 0
    shards: dict[tuple[str, int], EncodedShard] = {}
    show("shards", done=0, total=total, tokens=0)
    tasks = cut_into_tasks(corpus, heldout_fraction=files.heldout_fraction, task_bytes=task_bytes)
    if total <= task_bytes:
        processes = 1  # quicker for a shard or two
    documents: Counter[str] = Counter()
    for task, shard, is_reused in encode_all(tasks, files.output, tokenizer_file, spec, processes=processes):
        shards[task.split, task.number] = shard
        documents[task.split] += shard.documents
        corpus.refuse_mostly_unread(total)
        read += task.file_bytes
        tokens += 0 if is_reused else shard.tokens
        reused += is_reused and shard.shard is not None
        show("shards", done=min(read, total - 1), total=total, tokens=tokens)
    files.refuse_one_sided(documents, corpus, total)
    show("shards", done=total, total=total, tokens=tokens)
    return {split: [shards[key] for key in sorted(shards) if key[0] == split] for split in files.splits}, reused


def _split_reports(
    files: _Inputs, shards: Mapping[str, Sequence[EncodedShard]], model: Tokenizer, folder: Path, spec: EncodingSpec
) -> dict[str, SplitReport]:
    """The reports of all splits; `folder` has the files of the tokenizer `model`."""
    tokenizer = tokenizer_record(model, f"../{TOKENIZER_FOLDER}", folder)
    return {
        split: _split_report(split, shards[split], model, tokenizer, spec, files.record()) for split in files.splits
    }


def _split_report(
    split: str,
    results: Sequence[EncodedShard],
    model: Tokenizer,
    tokenizer: TokenizerRecord,
    spec: EncodingSpec,
    source: SourceRecord,
) -> SplitReport:
    documents = sum(result.documents for result in results)
    files = tuple(result.shard for result in results if result.shard is not None)
    if not files:
        raise UserError(
            f"the {split} split, {documents} documents, has fewer than the {spec.sequence_length + 1} tokens of "
            "one sequence: shorten --sequence-length, change --heldout-fraction, or give more text"
        )
    manifest = Manifest(
        version=FORMAT_VERSION,
        split=split,
        sequence_length=spec.sequence_length,
        dtype=spec.dtype,
        vocab_size=model.vocab_size,
        largest_id=max(result.largest_id for result in results),
        sample_format=SAMPLE_FORMAT,
        tokenizer=tokenizer,
        packer=spec.packer,
        documents=documents,
        tokens=sum(result.tokens for result in results),
        text_bytes=sum(result.text_bytes for result in results),
        source=source,
        shards=ShardTable.of(files),
    )
    dropped, padding = sum(result.dropped for result in results), sum(result.padding for result in results)
    return SplitReport(manifest, dropped, padding)
