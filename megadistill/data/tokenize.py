"""Tokenizing: text files to a data set (tokenizer, train split, held-out split). It knows no order and no batches.

One file is one document, and a document's text decides its split, so that copies of a text land on the same side.
Files are read once to sort them into splits and once to encode them: memory holds one document and one shard's worth
of tokens, not the text.

Legend: S tokens of a sequence; a unit has S + 1.
"""

import hashlib
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from megadistill.data.packing import CHUNK, CHUNK_VERSION, Ids, chunk
from megadistill.data.shards import (
    FORMAT_VERSION,
    Manifest,
    PackerRecord,
    SourceRecord,
    TokenizerRecord,
    refuse_finished,
    token_dtype,
    write_shards,
)
from megadistill.data.stream import shift
from megadistill.data.tokenizer import MODEL_FILE, Tokenizer, train_tokenizer
from megadistill.errors import UserError

TRAIN, HELDOUT = "train", "heldout"
TOKENIZER_FOLDER = "tokenizer"

SAMPLE_BYTES = 10_000_000
"""Text that a tokenizer is trained on, at most: whole documents in the order of their digests."""

LINE_SECONDS = 10.0
"""Between plain lines where there is no terminal."""


class ShowProgress(Protocol):
    """Told of work as it is done: `stage` in words, bytes of text done and in all, tokens made of them."""

    def __call__(self, stage: str, *, done: int, total: int, tokens: int) -> None: ...


@dataclass(frozen=True)
class SplitReport:
    """What one split came to."""

    documents: int
    units: int
    shards: int
    tokens: int
    text_bytes: int


@dataclass(frozen=True)
class TokenizeReport:
    """What `tokenize` did. `empty` and `invalid` count documents left out: blank ones, and those that are not UTF-8."""

    output: Path
    vocab_size: int
    train: SplitReport
    heldout: SplitReport
    empty: int
    invalid: int
    seconds: float

    def table(self) -> Table:
        """For a person: a row a split, and what was left out below."""
        shown = Table(
            title=f"{self.output}: {self.vocab_size:,} ids, {self.seconds:.0f} s",
            caption=f"left out: {self.empty:,} empty documents, {self.invalid:,} that are not UTF-8",
            title_justify="left",
            caption_justify="left",
        )
        shown.add_column("split")
        for heading in ("documents", "sequences", "shards", "tokens", "text", "bytes a token"):
            shown.add_column(heading, justify="right")
        for name, split in ((TRAIN, self.train), (HELDOUT, self.heldout)):
            counts = [f"{count:,}" for count in (split.documents, split.units, split.shards, split.tokens)]
            per_token = f"{split.text_bytes / split.tokens:.2f}"
            shown.add_row(name, *counts, f"{split.text_bytes / 1e6:.1f} MB", per_token)
        return shown


def tokenize(
    inputs: Sequence[Path],
    output: Path,
    *,
    tokenizer: Path | None,
    vocab_size: int | None,
    sequence_length: int,
    heldout_fraction: float,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    units_per_shard: int = 4096,
    progress: ShowProgress | None = None,
) -> TokenizeReport:
    """Writes `output`/tokenizer, `output`/train and `output`/heldout; the same text gives the same bytes.

    `inputs` are text files, taken as they are, and folders, walked in sorted order without following symbolic links.
    Of a folder's files those are taken that match a pattern of `include` and none of `exclude`. A pattern matches the
    path relative to the folder (`*` crosses `/`), the same with a leading `/`, or the file's name.

    Either `tokenizer`, a SentencePiece model, makes the ids, or one of `vocab_size` pieces is trained on the training
    documents. `progress` is told how it goes; by default a bar on a terminal, a line every ten seconds elsewhere.

    Raises:
        UserError: an argument, the text or the output folder does not do; no manifest was written.
    """
    began = time.perf_counter()
    _check(inputs, tokenizer, vocab_size, sequence_length, heldout_fraction, units_per_shard)
    for split in (TRAIN, HELDOUT):
        refuse_finished(output / split)
    with nullcontext(progress) if progress else _console_progress() as show:
        model = Tokenizer.load(tokenizer) if tokenizer else None
        corpus = _read_corpus(_files(inputs, include, exclude), heldout_fraction)
        if model is None:
            assert vocab_size is not None
            model = _train(corpus.train, vocab_size, show)
        model.write(output / TOKENIZER_FOLDER)
        source = SourceRecord(
            inputs=tuple(path.resolve().name for path in inputs),  # no folders above: moving the text changes nothing
            include=tuple(include),
            exclude=tuple(exclude),
            heldout_fraction=heldout_fraction,
        )
        manifests = [
            _write_split(
                output / split,
                documents,
                model,
                sequence_length=sequence_length,
                units_per_shard=units_per_shard,
                source=source,
                show=show,
            )
            for split, documents in ((TRAIN, corpus.train), (HELDOUT, corpus.heldout))
        ]
    for manifest in manifests:  # last, when nothing can fail any more
        manifest.write(output / manifest.split)
    train, heldout = map(_split_report, manifests)
    return TokenizeReport(
        output=output,
        vocab_size=model.vocab_size,
        train=train,
        heldout=heldout,
        empty=corpus.empty,
        invalid=corpus.invalid,
        seconds=time.perf_counter() - began,
    )


@dataclass(frozen=True)
class _Document:
    path: Path
    size: int
    digest: bytes
    """Of its text: decides the split, and the order in which documents train a tokenizer."""

    def read(self) -> str:
        return self.path.read_bytes().decode()  # not read_text, which would rewrite line ends


@dataclass(frozen=True)
class _Corpus:
    train: list[_Document]
    heldout: list[_Document]
    empty: int
    invalid: int


def _check(
    inputs: Sequence[Path],
    tokenizer: Path | None,
    vocab_size: int | None,
    sequence_length: int,
    heldout_fraction: float,
    units_per_shard: int,
) -> None:
    if (tokenizer is None) == (vocab_size is None):
        raise UserError("give either --tokenizer, a SentencePiece model, or --vocab-size, to train one")
    if vocab_size is not None and vocab_size < 300:
        raise UserError(
            f"--vocab-size {vocab_size}: 256 byte pieces and 3 control pieces leave no room; 300 is the least"
        )
    for option, value in (("--sequence-length", sequence_length), ("--units-per-shard", units_per_shard)):
        if value < 1:
            raise UserError(f"{option} {value}: give at least 1")
    if not 0 < heldout_fraction < 1:
        raise UserError(f"--heldout-fraction {heldout_fraction}: give a share between 0 and 1, such as 0.01")
    for path in inputs:
        if not path.exists():
            raise UserError(f"{path} does not exist: give text files, or folders of them")


def _files(inputs: Sequence[Path], include: Sequence[str], exclude: Sequence[str]) -> Iterator[Path]:
    found = False
    for given in inputs:
        for path in [given] if given.is_file() else _walk(given, include, exclude):
            found = True
            yield path
    if not found:
        raise UserError(
            f"no file of {', '.join(map(str, inputs))} matches --include {' '.join(include)}"
            f"{f' and not --exclude {chr(32).join(exclude)}' if exclude else ''}: change the patterns"
        )


def _walk(folder: Path, include: Sequence[str], exclude: Sequence[str]) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise _unreadable(error) from None

    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders.sort()
        for name in sorted(names):
            path = Path(parent, name)
            relative = path.relative_to(folder).as_posix()
            wanted = _matches(relative, include) and not _matches(relative, exclude)
            if wanted and path.is_file() and not path.is_symlink():
                yield path


def _unreadable(error: OSError) -> UserError:
    return UserError(f"{error.filename} cannot be read ({error.strerror}): make it readable, or --exclude it")


def _matches(relative: str, patterns: Iterable[str]) -> bool:
    forms = (relative, f"/{relative}", relative.rpartition("/")[2])
    return any(fnmatchcase(form, pattern) for pattern in patterns for form in forms)


def _read_corpus(files: Iterable[Path], heldout_fraction: float) -> _Corpus:
    corpus = {TRAIN: list[_Document](), HELDOUT: list[_Document]()}
    empty = invalid = 0
    for path in files:
        try:
            data = path.read_bytes()
        except OSError as error:
            raise _unreadable(error) from None
        try:
            blank = not data.decode().strip()
        except UnicodeDecodeError:
            invalid += 1
            continue
        if blank:
            empty += 1
            continue
        digest = hashlib.blake2b(data, digest_size=8).digest()
        held_out = int.from_bytes(digest, "big") < heldout_fraction * 2**64
        corpus[HELDOUT if held_out else TRAIN].append(_Document(path, len(data), digest))
    train, heldout = corpus[TRAIN], corpus[HELDOUT]
    if not train and not heldout:
        raise UserError(f"no text to tokenize: {empty} documents are empty, {invalid} are not UTF-8")
    if not train or not heldout:
        raise UserError(
            f"--heldout-fraction {heldout_fraction} puts all {len(train) + len(heldout)} documents into "
            f"{'train' if train else 'heldout'}: {'raise' if train else 'lower'} it, or give more documents "
            "(a document is one file, and stays whole)"
        )
    return _Corpus(train=train, heldout=heldout, empty=empty, invalid=invalid)


def _train(documents: Sequence[_Document], vocab_size: int, show: ShowProgress) -> Tokenizer:
    total = min(SAMPLE_BYTES, sum(document.size for document in documents))
    show("tokenizer", done=0, total=total, tokens=0)
    model = train_tokenizer(_sample(documents), vocab_size=vocab_size)
    show("tokenizer", done=total, total=total, tokens=0)
    return model


def _sample(documents: Sequence[_Document]) -> Iterator[str]:
    """Lines of about SAMPLE_BYTES of text: a random choice of documents, and always the same one."""
    left = SAMPLE_BYTES
    for document in sorted(documents, key=lambda document: document.digest):
        for line in document.read().split("\n"):
            if left <= 0:
                return
            left -= len(line.encode()) + 1
            yield line


def _write_split(
    folder: Path,
    documents: Sequence[_Document],
    model: Tokenizer,
    *,
    sequence_length: int,
    units_per_shard: int,
    source: SourceRecord,
    show: ShowProgress,
) -> Manifest:
    """Writes the shards of a split and returns its manifest, which is not written yet."""
    text_bytes = 0

    def counted(units: Iterable[Ids]) -> Iterator[Ids]:
        nonlocal text_bytes
        for unit in units:
            _, labels = shift(unit)
            text_bytes += int(model.piece_bytes[labels].sum())
            yield unit

    encoded = _encoded(documents, model, folder.name, show)
    shards = write_shards(
        folder,
        counted(chunk(encoded, sequence_length=sequence_length, eos=model.eos)),
        vocab_size=model.vocab_size,
        units_per_shard=units_per_shard,
    )
    if not shards:
        raise UserError(
            f"the {folder.name} split, {len(documents)} documents, has fewer than the {sequence_length + 1} tokens of "
            "one sequence: shorten --sequence-length, change --heldout-fraction, or give more text"
        )
    return Manifest(
        version=FORMAT_VERSION,
        split=folder.name,
        sequence_length=sequence_length,
        dtype=token_dtype(model.vocab_size),
        vocab_size=model.vocab_size,
        tokenizer=TokenizerRecord(kind="sentencepiece", file=f"{TOKENIZER_FOLDER}/{MODEL_FILE}", sha256=model.sha256),
        packer=PackerRecord(name=CHUNK, version=CHUNK_VERSION, bos=False, eos=True),
        documents=len(documents),
        tokens=sum(shard.units for shard in shards) * sequence_length,
        text_bytes=text_bytes,
        source=source,
        shards=shards,
    )


def _encoded(documents: Sequence[_Document], model: Tokenizer, stage: str, show: ShowProgress) -> Iterator[Ids]:
    total = sum(document.size for document in documents)
    done = tokens = 0
    show(stage, done=0, total=total, tokens=0)
    for document in documents:
        ids = model.encode(document.read())
        done += document.size
        tokens += len(ids)
        show(stage, done=done, total=total, tokens=tokens)
        yield ids


def _split_report(manifest: Manifest) -> SplitReport:
    return SplitReport(
        documents=manifest.documents,
        units=manifest.units,
        shards=len(manifest.shards),
        tokens=manifest.tokens,
        text_bytes=manifest.text_bytes,
    )


@contextmanager
def _console_progress() -> Iterator[ShowProgress]:
    """A bar a stage on a terminal; elsewhere a line when a stage begins, every LINE_SECONDS, and when it ends."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _plain_lines(lambda line: console.print(line, highlight=False, soft_wrap=True))
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[rate]}"), console=console) as bars:
        tasks = {}
        began = {}

        def show(stage: str, *, done: int, total: int, tokens: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total, rate="")
                began[stage] = time.perf_counter()
            bars.update(tasks[stage], completed=done, rate=_rate(tokens, time.perf_counter() - began[stage]))

        yield show


def _plain_lines(say: Callable[[str], None]) -> ShowProgress:
    began: dict[str, float] = {}
    said: dict[str, float] = {}

    def show(stage: str, *, done: int, total: int, tokens: int) -> None:
        now = time.perf_counter()
        began.setdefault(stage, now)
        if done < total and now - said.get(stage, -math.inf) < LINE_SECONDS:
            return
        said[stage] = now
        say(f"{stage}: {done / 1e6:.1f} of {total / 1e6:.1f} MB {_rate(tokens, now - began[stage])}".rstrip())

    return show


def _rate(tokens: int, seconds: float) -> str:
    return f"{tokens:,} tokens, {tokens / seconds:,.0f} tokens/s" if tokens and seconds > 0 else ""
