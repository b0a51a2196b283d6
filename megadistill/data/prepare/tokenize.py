"""Tokenizing: a corpus to a data set (tokenizer, train split, held-out split). It knows no order and no batches.

Documents are read one after the other, sorted into the splits by their text, and cut into runs; each run becomes a
shard, by itself. The same command, started again after it was broken off at any instant, keeps what is whole and goes
on; what it gives is the same to the byte.
"""

import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rich.table import Table

from megadistill.data.prepare.corpus import Corpus, LeftOut, find_files, in_words
from megadistill.data.prepare.encode import PACKERS, Finished, PackerName, Rules, disk_faults
from megadistill.data.prepare.output_lock import TOKENIZER_FOLDER, clear, unfinished
from megadistill.data.prepare.shard_tasks import HELDOUT, TRAIN, cut, split_of
from megadistill.data.prepare.tokenizer_training import TrainingSample, trained_tokenizer
from megadistill.data.prepare.workers import Done, Work, encode_all
from megadistill.data.shards.manifest import (
    FORMAT_VERSION,
    Manifest,
    PackerRecord,
    SampleFormat,
    SourceRecord,
    token_dtype,
)
from megadistill.data.shards.packing import CHUNK
from megadistill.data.tokenizers.base import Tokenizer, load_tokenizer, tokenizer_record
from megadistill.errors import UserError
from megadistill.progress import ShowProgress, console_progress

SHARD_MB: Final = 32
SAMPLE_FORMAT: Final = SampleFormat(kind="npy", tokens="tokens.npy", bounds="bounds.npy")


@dataclass(frozen=True)
class SplitReport:
    """What one split came to."""

    documents: int
    sequences: int
    shards: int
    tokens: int
    text_bytes: int
    dropped: int
    """Tokens that are in no sequence: what is left at the end of a shard."""
    padding: float
    """Share of the sequences' tokens."""


@dataclass(frozen=True)
class TokenizeReport:
    """What `tokenize` did."""

    output: Path
    vocab_size: int
    train: SplitReport
    heldout: SplitReport | None
    left_out: Counter[LeftOut]
    kept: int
    """Shards that an earlier start had written."""
    seconds: float

    def table(self) -> Table:
        """For a person: a column a split, and what was left out below."""
        resumed = f"; {self.kept:,} shards were kept from an earlier start" if self.kept else ""
        shown = Table(
            title=f"{self.output}: {self.vocab_size:,} ids, {self.seconds:.0f} s",
            caption=f"left out: {in_words(self.left_out) or 'nothing'}{resumed}",
            title_justify="left",
            caption_justify="left",
        )
        splits = {TRAIN: self.train} | ({HELDOUT: self.heldout} if self.heldout else {})
        shown.add_column("")
        for name in splits:
            shown.add_column(name, justify="right")
        for heading, cells in zip(_HEADINGS, zip(*map(_cells, splits.values()), strict=True), strict=True):
            shown.add_row(heading, *cells)
        return shown


_HEADINGS = ("documents", "sequences", "shards", "tokens", "text", "bytes a token", "padding", "tokens dropped")


def _cells(split: SplitReport) -> tuple[str, ...]:
    counts = (f"{count:,}" for count in (split.documents, split.sequences, split.shards, split.tokens))
    text = (f"{split.text_bytes / 1e6:,.1f} MB", f"{split.text_bytes / split.tokens:.2f}")
    return (*counts, *text, f"{split.padding:.2%}", f"{split.dropped:,}")


def tokenize(
    inputs: Sequence[Path],
    output: Path,
    *,
    tokenizer: Path | None,
    vocab_size: int | None,
    sequence_length: int,
    heldout_fraction: float,
    packer: PackerName = CHUNK,
    text_field: str = "text",
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    shard_mb: float = SHARD_MB,
    processes: int | None = None,
    progress: ShowProgress | None = None,
) -> TokenizeReport:
    """Writes `output`/tokenizer, `output`/train and `output`/heldout; the same text gives the same bytes.

    `inputs` are files, taken as they are, and folders, of whose files `include` and `exclude` choose (see
    `corpus.find_files`); `corpus` says what a document is in each kind of file. A share of `heldout_fraction` of the
    documents is held out; with 0 there is no such split.

    Either `tokenizer`, a SentencePiece model or a Hugging Face tokenizer, makes the ids, or a SentencePiece model of
    `vocab_size` pieces is trained on the training documents. `shard_mb` is the text of a shard in 10^6 bytes.
    `processes` encode at a time (default: one for each core that this process may use); for more than one, a script
    that calls this must keep its own acts under `if __name__ == "__main__"`. `progress` is told how it goes; by default
    a bar on a terminal, plain lines elsewhere.

    Raises:
        UserError: an argument, the text or the output folder does not do; no manifest was written.
        OperatorFault: the disk is full. RestartFault: a process was killed. The same command goes on.
    """
    began = time.perf_counter()
    _check(
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        sequence_length=sequence_length,
        heldout_fraction=heldout_fraction,
        packer=packer,
        shard_mb=shard_mb,
        processes=processes,
    )
    reading = _Reading(inputs, output, include, exclude, text_field, heldout_fraction)
    with (
        nullcontext(progress) if progress else console_progress() as show,
        disk_faults(output),
        unfinished(output, reading.splits),
    ):
        if tokenizer is not None:
            model = load_tokenizer(tokenizer)
        else:
            assert vocab_size is not None
            model = _trained(reading, output / TOKENIZER_FOLDER, vocab_size, show)
        model.write(output / TOKENIZER_FOLDER)
        dtype = token_dtype(model.vocab_size)
        rules = Rules.of(model, packer=packer, sequence_length=sequence_length, dtype=dtype)
        corpus = reading.corpus()
        done = _encoded(
            Work(output, output / TOKENIZER_FOLDER / model.file, rules),
            corpus,
            reading,
            run_bytes=round(shard_mb * 1e6),
            processes=processes or len(os.sched_getaffinity(0)),
            show=show,
        )
        manifests = {split: _manifest(split, done, model, rules, reading) for split in reading.splits}
        for split, manifest in manifests.items():  # last, when nothing can fail any more
            manifest.write(output / split)
        clear(output, manifests.values())
    reports = {split: _split_report(manifests[split], done) for split in manifests}
    return TokenizeReport(
        output=output,
        vocab_size=model.vocab_size,
        train=reports[TRAIN],
        heldout=reports.get(HELDOUT),
        left_out=corpus.left_out,
        kept=sum(one.kept and one.finished.shard is not None for one in done),
        seconds=time.perf_counter() - began,
    )


@dataclass(frozen=True)
class _Reading:
    """What is read; each pass over it reads the same."""

    inputs: Sequence[Path]
    output: Path
    include: Sequence[str]
    exclude: Sequence[str]
    text_field: str
    heldout_fraction: float

    @property
    def splits(self) -> tuple[str, ...]:
        return (TRAIN, HELDOUT) if self.heldout_fraction else (TRAIN,)

    def corpus(self) -> Corpus:
        return Corpus(self._files(), text_field=self.text_field)

    def file_bytes(self) -> int:
        return sum(path.stat().st_size for path in self._files())

    def _files(self) -> Iterator[Path]:
        return find_files(self.inputs, self.include, self.exclude, output=self.output)

    def refuse_one_sided(self, documents: Counter[str], corpus: Corpus) -> None:
        """Raises UserError: there is no document, or not one in each split."""
        if not documents:
            raise corpus.nothing()
        empty = next((split for split in self.splits if not documents[split]), None)
        if empty is not None:
            full = HELDOUT if empty == TRAIN else TRAIN
            raise UserError(
                f"--heldout-fraction {self.heldout_fraction} puts all {documents.total()} documents into {full}: "
                f"{'lower' if full == HELDOUT else 'raise'} it, or give more documents (one stays whole)"
            )

    def record(self) -> SourceRecord:
        return SourceRecord(
            inputs=tuple(path.resolve().name for path in self.inputs),  # no folders above: moving it changes nothing
            include=tuple(self.include),
            exclude=tuple(self.exclude),
            heldout_fraction=self.heldout_fraction,
        )


def _check(
    *,
    tokenizer: Path | None,
    vocab_size: int | None,
    sequence_length: int,
    heldout_fraction: float,
    packer: str,
    shard_mb: float,
    processes: int | None,
) -> None:
    if (tokenizer is None) == (vocab_size is None):
        raise UserError(
            "give either --tokenizer, a SentencePiece model or a Hugging Face tokenizer, or --vocab-size, to train one"
        )
    if vocab_size is not None and vocab_size < 300:
        raise UserError(
            f"--vocab-size {vocab_size}: 256 byte pieces and 3 control pieces leave no room; 300 is the least"
        )
    for option, value in (("--sequence-length", sequence_length), ("--processes", processes)):
        if value is not None and value < 1:
            raise UserError(f"{option} {value}: give at least 1")
    if not 1e-6 <= shard_mb < 1e6:
        raise UserError(f"--shard-mb {shard_mb}: give the millions of bytes of text in a shard, such as {SHARD_MB}")
    if not 0 <= heldout_fraction < 1:
        raise UserError(f"--heldout-fraction {heldout_fraction}: give a share between 0 and 1, such as 0.01")
    if packer not in PACKERS:
        raise UserError(f"--packer {packer}: give {' or '.join(PACKERS)}")


def _trained(reading: _Reading, folder: Path, vocab_size: int, show: ShowProgress) -> Tokenizer:
    total = reading.file_bytes()
    corpus = reading.corpus()
    sample = TrainingSample()
    documents: Counter[str] = Counter()
    show("sample", done=0, total=total, tokens=0)
    for document in corpus:
        split = split_of(document, reading.heldout_fraction)
        documents[split] += 1
        if split == TRAIN:
            sample.add(document)
        show("sample", done=min(corpus.bytes_read, total - 1), total=total, tokens=0)  # `total` is said once, last
    reading.refuse_one_sided(documents, corpus)
    show("sample", done=total, total=total, tokens=0)
    show("tokenizer", done=0, total=sample.bytes, tokens=0)
    model = trained_tokenizer(sample, folder, vocab_size=vocab_size)
    show("tokenizer", done=sample.bytes, total=sample.bytes, tokens=0)
    return model


def _encoded(
    work: Work, corpus: Corpus, reading: _Reading, *, run_bytes: int, processes: int, show: ShowProgress
) -> list[Done]:
    """What became of each run, in order."""
    total = reading.file_bytes()
    read = tokens = 0
    done: list[Done] = []
    show("shards", done=0, total=total, tokens=0)
    runs = cut(corpus, heldout_fraction=reading.heldout_fraction, run_bytes=run_bytes)
    if total <= run_bytes:
        processes = 1  # for one shard or two it is quicker not to start any
    for one in encode_all(work, runs, processes=processes):
        done.append(one)
        read += one.file_bytes
        tokens += 0 if one.kept else one.finished.tokens
        show("shards", done=min(read, total - 1), total=total, tokens=tokens)
    documents: Counter[str] = Counter()
    for one in done:
        documents[one.split] += one.finished.documents
    reading.refuse_one_sided(documents, corpus)
    show("shards", done=total, total=total, tokens=tokens)
    return sorted(done, key=lambda one: one.number)


def _of(split: str, done: Iterable[Done]) -> list[Finished]:
    return [one.finished for one in done if one.split == split]


def _manifest(split: str, done: Iterable[Done], model: Tokenizer, rules: Rules, reading: _Reading) -> Manifest:
    finished = _of(split, done)
    shards = tuple(one.shard for one in finished if one.shard is not None)
    documents = sum(one.documents for one in finished)
    if not shards:
        raise UserError(
            f"the {split} split, {documents} documents, has fewer than the {rules.sequence_length + 1} tokens of "
            "one sequence: shorten --sequence-length, change --heldout-fraction, or give more text"
        )
    return Manifest(
        version=FORMAT_VERSION,
        split=split,
        sequence_length=rules.sequence_length,
        dtype=rules.dtype,
        vocab_size=model.vocab_size,
        sample_format=SAMPLE_FORMAT,
        tokenizer=tokenizer_record(model, f"../{TOKENIZER_FOLDER}"),
        packer=PackerRecord(name=rules.packer, version=rules.packer_version, bos=rules.bos, eos=rules.eos),
        documents=documents,
        tokens=sum(one.tokens for one in finished),
        text_bytes=sum(one.text_bytes for one in finished),
        source=reading.record(),
        shards=shards,
    )


def _split_report(manifest: Manifest, done: Iterable[Done]) -> SplitReport:
    finished = _of(manifest.split, done)
    assert manifest.documents is not None
    assert manifest.text_bytes is not None
    return SplitReport(
        documents=manifest.documents,
        sequences=manifest.sequences,
        shards=len(manifest.shards),
        tokens=manifest.tokens,
        text_bytes=manifest.text_bytes,
        dropped=sum(one.dropped for one in finished),
        padding=sum(one.padding for one in finished) / (manifest.sequences * (manifest.sequence_length + 1)),
    )
