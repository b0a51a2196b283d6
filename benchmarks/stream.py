"""The cost of reading the stream: CPU seconds a token against plain WebDataset iteration and a flat memory map, over
the same tokens, page cache warm; the time to locate a far position; the wait that prefetching leaves.

    python -m benchmarks.stream --help
"""

import argparse
import importlib
import importlib.util
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset

from benchmarks.measure import Spread, rounds
from benchmarks.report import Report, cell, parser
from benchmarks.token_tables import BATCH, TABLES
from megadistill.data import Manifest, TokenStream
from megadistill.data.prepare.token_formats.formats import FORMATS
from megadistill.data.prepare.token_formats.index_file import IndexSpec, index_file
from megadistill.data.prepare.token_formats.token_scan import ScanOptions
from megadistill.data.shards.manifest import (
    PackerRecord,
    SampleFormat,
    SourceRecord,
    TokenFileFormat,
    TokenFormatName,
    TokenizerRecord,
)
from megadistill.data.shards.packing import PackedSequence
from megadistill.data.shards.shard import Shard
from megadistill.data.shards.shard_table import ShardTable
from megadistill.data.shards.tar import write_shard
from megadistill.data.storage.local import LocalFolder
from megadistill.data.stream.order import CurriculumEntry, Order, Source

QUESTIONS = ("speed", "position", "wait")
MEASURED = ("megadistill/data", "megadistill/types.py", "benchmarks/*.py")
VOCAB = 50_000
MEGATRON_UINT16 = 8
"""The number of uint16 in Megatron's indices."""
DOCUMENT = 700
"""Tokens of a document: the sequences say where documents begin."""

HELP = """\
questions (all of them, when --only does not choose):
  speed     CPU seconds of this process to read every sequence once into int64 tokens and labels, in batches of 256:
            ours in its shuffled order, every byte checked (crc32) and every id, from tars, and in place from
            Megatron's .bin and .idx, MDS, Arrow files of datasets, and parquet; a flat numpy memmap read at random
            places, unchecked; plain webdataset, .npy members; and on the same files, where they are installed,
            Megatron's IndexedDataset and datasets (pip install -e '.[oracles]'), mosaic-streaming (pip install
            mosaicml-streaming; without it there are no files in MDS), and pyarrow
  position  seconds to find 256 slots in the middle of a manifest of 10^12 tokens, and memory for it
  wait      seconds that a step of --step-ms waits for its batch, with and without the thread that reads ahead

how to read it: million tokens a CPU second; a ratio is the median over rounds of this / that in the same round"""

Read = Callable[[], int]
"""Reads all sequences once; how many there were."""


def _write(folder: Path, sequences: int, sequence: int) -> Manifest:
    """Random tokens: our shards, the same tokens flat in tokens.bin, in order."""
    random = np.random.default_rng(0)
    tokens = random.integers(0, VOCAB, (sequences, sequence + 1), dtype=np.uint16)
    bounds = np.array([*range(0, sequence + 1, DOCUMENT), sequence + 1], dtype=np.int32)
    tokens.tofile(folder / "tokens.bin")
    per_shard = 4096
    shards = tuple(
        write_shard(
            folder / f"shard-{number:05d}.tar",
            (PackedSequence(row.astype(np.int32), bounds) for row in tokens[start : start + per_shard]),
            dtype="uint16",
        )
        for number, start in enumerate(range(0, sequences, per_shard))
    )
    packer = PackerRecord(name="chunk", version=2, bos=None, eos=2)
    sample_format = SampleFormat(kind="npy", tokens="tokens.npy", bounds="bounds.npy")
    return _write_manifest(folder, shards, sequence, sample_format, packer, documents=None)


def _write_manifest(
    folder: Path,
    shards: tuple[Shard, ...],
    sequence: int,
    sample_format: SampleFormat | TokenFileFormat,
    packer: PackerRecord,
    *,
    documents: int | None,
) -> Manifest:
    Manifest(
        version=3,
        split="train",
        sequence_length=sequence,
        dtype="uint16",
        vocab_size=VOCAB,
        sample_format=sample_format,
        tokenizer=TokenizerRecord(kind="sentencepiece", file="tokenizer.model", sha256="0" * 64),
        packer=packer,
        documents=documents,
        tokens=sum(shard.sequences for shard in shards) * sequence,
        text_bytes=None,
        source=SourceRecord(inputs=("random",)),
        shards=ShardTable.of(shards),
    ).write(folder)
    return Manifest.load(folder / "manifest.json")


def _index_megatron(folder: Path, sequences: int, sequence: int) -> Manifest:
    """The same tokens as Megatron's .bin and .idx, an item and a document a sequence, and an index of them."""
    length = sequence + 1
    (folder / "megatron.bin").symlink_to("tokens.bin")
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, MEGATRON_UINT16, sequences, sequences + 1)
    pointers = (np.arange(sequences, dtype="<i8") * 2 * length).tobytes()
    items = np.full(sequences, length, "<i4").tobytes() + pointers
    (folder / "megatron.idx").write_bytes(header + items + np.arange(sequences + 1, dtype="<i8").tobytes())
    return _index(folder, "megatron", folder / "megatron", sequence)


def _index(folder: Path, format: TokenFormatName, path: Path, sequence: int) -> Manifest:
    """An index of token files, each of which stays as it is."""
    kind, output = FORMATS[format], folder / f"{format}-in-place"
    paths = [Path(name) for name in kind.files(str(path))]
    data = LocalFolder(paths[0].parent)
    output.mkdir()
    spec = IndexSpec(format, ScanOptions(VOCAB), sequence, "format", bos=None, eos=2)
    files = [index_file(data, each.name, output, spec, lambda size, ids: None) for each in paths]
    dtype, decoder = kind.stored_as(data, paths[0].name, spec.options)
    record = TokenFileFormat(
        kind="token_file",
        format=format,
        folder="../" if paths[0].parent == folder else f"../{paths[0].parent.name}",
        dtype=dtype,
        has_documents=all(each.knows_documents for each in files),
        segments=max(each.segments for each in files),
        decoder=decoder,
    )
    packer = PackerRecord(name="external", version=1, bos=None, eos=None)
    shards = tuple(each.shard for each in files if each.shard)
    documents = sum(each.documents for each in files) if record.has_documents else None
    return _write_manifest(output, shards, sequence, record, packer, documents=documents)


def ours(manifest: Manifest, sequences: int) -> int:
    stream = TokenStream(manifest, seed=1, batch_slots=BATCH, rank=0, world_size=1)
    read = 0
    for batch, _ in stream:
        read += len(batch)
        if read >= sequences:
            return read
    raise AssertionError("the stream has no end")


def memmap(folder: Path, sequences: int, sequence: int) -> int:
    """nanoGPT's way: rows of a flat file at random places, cast to int64 twice."""
    flat = np.memmap(folder / "tokens.bin", dtype=np.uint16, mode="r")
    places = np.random.default_rng(1).permutation(sequences) * (sequence + 1)
    for start in range(0, sequences, BATCH):
        rows = places[start : start + BATCH].tolist()
        torch.stack([torch.from_numpy(flat[i : i + sequence].astype(np.int64)) for i in rows])
        torch.stack([torch.from_numpy(flat[i + 1 : i + 1 + sequence].astype(np.int64)) for i in rows])
    return sequences


def plain_webdataset(manifest: Manifest) -> int:
    paths = [f"{manifest.folder.location}/{shard.name}" for shard in manifest.shards]
    samples = webdataset.WebDataset(paths, shardshuffle=False).decode()
    return _in_batches(sample["tokens.npy"] for sample in samples)


def megatron_datasets() -> Any:
    return importlib.import_module("megatron.core.datasets.indexed_dataset")


def megatron(folder: Path, sequences: int) -> int:
    dataset = megatron_datasets().IndexedDataset(str(folder / "megatron"))
    return _in_batches(dataset[i] for i in np.random.default_rng(1).permutation(sequences).tolist())


def _in_batches_of(rows: Callable[[Path], Iterator[np.ndarray]], path: Path) -> int:
    return _in_batches(rows(path))


def _in_batches(sequences: Iterator[np.ndarray]) -> int:
    """Int64 tokens and labels, as ours gives them."""
    read = 0
    rows: list[np.ndarray] = []
    for sequence in sequences:
        rows.append(sequence)
        if len(rows) == BATCH:
            batch = np.stack(rows).astype(np.int64)
            torch.from_numpy(np.ascontiguousarray(batch[:, :-1]))
            torch.from_numpy(np.ascontiguousarray(batch[:, 1:]))
            read += len(rows)
            rows.clear()
    return read + len(rows)


def _write_for_others(folder: Path, sequences: int, sequence: int, report: Report) -> dict[str, Read]:
    """The same tokens in other formats: ours in place, and their own readers, for those that are installed."""
    tokens = np.fromfile(folder / "tokens.bin", dtype=np.uint16).reshape(sequences, sequence + 1)
    contenders: dict[str, Read] = {}
    try:
        megatron_datasets()
        contenders["Megatron's IndexedDataset"] = partial(megatron, folder, sequences)
    except ImportError as missing:
        report.console.print(f"  Megatron's IndexedDataset is left out: {missing}", highlight=False)
    for table in TABLES:
        try:
            path = table.write(folder, tokens)
        except ImportError as missing:
            report.console.print(f"  {table.format} is left out: {missing}", highlight=False)
            continue
        manifest = _index(folder, table.format, path, sequence)
        contenders[f"ours, {table.format} in place, all checked"] = partial(ours, manifest, sequences)
        if importlib.util.find_spec(table.library) is None:
            report.console.print(f"  {table.reader} is left out: {table.library} is not installed", highlight=False)
        else:
            contenders[table.reader] = partial(_in_batches_of, table.rows, path)
    return contenders


def _cpu_seconds(read: Read, sequences: int) -> float:
    began = time.process_time()
    count = read()
    taken = time.process_time() - began
    assert count == sequences, f"{count} sequences of {sequences}"
    return taken


def speed(folder: Path, manifest: Manifest, sequences: int, sequence: int, report: Report) -> None:
    shape = f"{sequences} sequences of {sequence}, uint16"
    report.console.print(f"\n[bold]speed[/bold], {shape}", highlight=False)
    reads: dict[str, Read] = {
        "ours, all checked": partial(ours, manifest, sequences),
        "ours, Megatron's files in place, all checked": partial(
            ours, _index_megatron(folder, sequences, sequence), sequences
        ),
        "flat memmap, at random": partial(memmap, folder, sequences, sequence),
        "webdataset, .npy": partial(plain_webdataset, manifest),
        **_write_for_others(folder, sequences, sequence, report),
    }
    for read in reads.values():
        read()
    times = rounds({name: partial(_cpu_seconds, read, sequences) for name, read in reads.items()}, report.repeats)
    table = report.table(f"speed: {shape}", "", "M tokens a CPU second", "its CPU seconds to ours")
    for name, own in times.items():
        ratio = Spread.of_ratios(own, times["ours, all checked"])
        report.add("speed", shape, name, Spread.of(own), unit="cpu s", ratio=ratio, to="ours, all checked")
        table.add_row(name, f"{sequences * sequence / Spread.of(own).median / 1e6:,.0f}", cell(ratio))
    report.console.print(table)


def position(report: Report) -> None:
    shape = "10^12 tokens, sequences of 2048, 119210 shards"
    counts = [4096] * 119_210
    curriculum = [CurriculumEntry(10**8, {"a": 0.9, "b": 0.1}), CurriculumEntry(None, {"a": 0.5, "b": 0.5})]
    began = time.perf_counter()
    order = Order({"a": Source("a", counts), "b": Source("b", counts)}, curriculum, seed=1)
    opened = time.perf_counter() - began
    seconds = []
    for repeat in range(report.repeats):
        began = time.perf_counter()
        order.locate(np.arange(256) + (repeat + 1) * 10**8)
        seconds.append(time.perf_counter() - began)
    report.add("position", shape, "the order made", opened)
    report.add("position", shape, "256 slots found", Spread.of(seconds))
    table = report.table(f"position: {shape}", "", "ms")
    table.add_row("the order made from the shards' counts, once", f"{opened * 1e3:.1f}")
    table.add_row("256 slots found, each time in another epoch or window", f"{Spread.of(seconds).median * 1e3:.2f}")
    report.console.print(table)


def wait(manifest: Manifest, step_ms: float, report: Report) -> None:
    """A step that sleeps, as a host does while its device computes."""
    shape = f"batches of {BATCH} sequences of {manifest.sequence_length}, steps of {step_ms:.0f} ms"
    table = report.table(f"wait: {shape}", "batches read ahead", "ms a step waits")
    for prefetch in (0, 2):
        stream = TokenStream(manifest, seed=1, batch_slots=BATCH, rank=0, world_size=1, prefetch=prefetch)
        waited, batches = [], iter(stream)
        for _ in range(20):
            began = time.perf_counter()
            next(batches)
            waited.append(time.perf_counter() - began)
            time.sleep(step_ms / 1e3)
        spread = Spread.of(waited[1:])
        report.add("wait", shape, f"{prefetch} ahead", spread)
        table.add_row(str(prefetch), f"{spread.median * 1e3:.2f}")
    report.console.print(table)


def _arguments() -> argparse.Namespace:
    options = parser("stream", __doc__, HELP, QUESTIONS)
    options.add_argument("--sequences", type=int, default=32_768, help="how many (default %(default)s)")
    options.add_argument("--sequence-length", type=int, default=2048, help="tokens of each (default %(default)s)")
    options.add_argument("--step-ms", type=float, default=50.0, help="of wait (default %(default)s)")
    options.add_argument("--folder", type=Path, help="where the data goes for the time of the run")
    return options.parse_args()


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(1)
    report = Report(threads=1, repeats=arguments.repeats, measured=MEASURED)
    report.print_machine()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        if {"speed", "wait"} & set(arguments.only):
            manifest = _write(folder, arguments.sequences, arguments.sequence_length)
        if "speed" in arguments.only:
            speed(folder, manifest, arguments.sequences, arguments.sequence_length, report)
        if "position" in arguments.only:
            position(report)
        if "wait" in arguments.only:
            wait(manifest, arguments.step_ms, report)
    if not arguments.no_csv:
        report.append_to(arguments.csv)


if __name__ == "__main__":
    main()
