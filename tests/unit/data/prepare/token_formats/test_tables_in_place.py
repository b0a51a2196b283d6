"""MDS, saved data sets and parquet as a run reads them: indexed, in order, checked, local and remote."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from numpy.typing import NDArray

from megadistill.data import Manifest, TokenStream
from megadistill.data.prepare.token_formats.index_token_files import index_token_files
from megadistill.data.prepare.verify import verify
from megadistill.data.shards.manifest import TokenFormatName
from megadistill.data.shards.reader import SequenceReader
from megadistill.data.tokenizers.tokenizer import load_tokenizer
from megadistill.errors import UserError
from tests.unit.data.corpora import byte_level_tokenizer
from tests.unit.data.prepare.token_formats.mds_files import write_mds
from tests.unit.data.prepare.token_formats.saved_sets import write_set
from tests.unit.data.servers import serving

SEQUENCE = 16
IDS = 250
Rows = Sequence[NDArray[np.int32]]


def _write_mds(folder: Path, files: Sequence[Rows]) -> Path:
    return write_mds(folder, {"id": "str", "tokens": "ndarray:int32"}, [_samples(rows) for rows in files])


def _samples(rows: Rows) -> list[dict[str, Any]]:
    return [{"id": "a" * (number % 3), "tokens": ids} for number, ids in enumerate(rows)]


def _write_arrow(folder: Path, files: Sequence[Rows]) -> Path:
    return write_set(folder, [_table(rows) for rows in files], rows=4)


def _write_parquet(folder: Path, files: Sequence[Rows]) -> Path:
    folder.mkdir()
    for number, rows in enumerate(files):
        path = folder / f"{number}.parquet"
        pyarrow.parquet.write_table(_table(rows), path, row_group_size=4, use_dictionary=False, compression="none")
    return folder


def _table(rows: Rows) -> pyarrow.Table:
    lists = pyarrow.array([ids.tolist() for ids in rows], pyarrow.list_(pyarrow.int32()))
    mask = pyarrow.array([[1] * len(ids) for ids in rows], pyarrow.list_(pyarrow.int8()))
    return pyarrow.table({"attention_mask": mask, "input_ids": lists})


WRITERS: dict[TokenFormatName, Callable[[Path, Sequence[Rows]], Path]] = {
    "mds": _write_mds,
    "arrow": _write_arrow,
    "parquet": _write_parquet,
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_level_tokenizer(tmp_path_factory.mktemp("tokenizer") / "bpe", "some words " * 30)


@pytest.fixture(params=WRITERS)
def format(request: pytest.FixtureRequest) -> TokenFormatName:
    name: TokenFormatName = request.param
    return name


def _files(*, length: int | None = None) -> list[Rows]:
    """Two files of ten rows."""
    random = np.random.default_rng(3)
    lengths = [int(random.integers(1, 40)) if length is None else length for _ in range(20)]
    rows = [random.integers(0, IDS, count).astype("int32") for count in lengths]
    return [rows[:10], rows[10:]]


def _index(format: TokenFormatName, folder: Path, tokenizer: Path, **options: Any) -> Manifest:
    report = index_token_files(
        [str(folder)],
        format=format,
        sequence_length=SEQUENCE,
        tokenizer=tokenizer,
        progress=lambda stage, **numbers: None,
        **options,
    )
    return report.manifest


def _expected(rows: Rows) -> NDArray[Any]:
    """[Q, S + 1]: the sequences of a file, each of which begins with the last id of the one before."""
    ids = np.concatenate(rows)
    return np.stack([ids[start : start + SEQUENCE + 1] for start in range(0, len(ids) - SEQUENCE, SEQUENCE)])


def test_the_sequences_are_those_of_the_rows(format: TokenFormatName, tmp_path: Path, tokenizer: Path) -> None:
    files = _files()
    manifest = _index(format, WRITERS[format](tmp_path / "data", files), tokenizer)
    assert manifest.documents == sum(_starts(rows, len(_expected(rows))) for rows in files)
    reader = SequenceReader(Manifest.load(f"{manifest.folder.location}/manifest.json"))
    for number, rows in enumerate(files):
        expected = _expected(rows)
        (batch,) = reader.read_shard(number)
        assert not batch.faults
        np.testing.assert_array_equal(batch.tokens, expected)
        starts = np.cumsum([len(ids) for ids in rows])
        for sequence, bounds in enumerate(batch.bounds):
            first, last = sequence * SEQUENCE, sequence * SEQUENCE + SEQUENCE + 1
            inside = [int(start) - first for start in starts if first < start < last]
            assert bounds.tolist() == [0, *inside, SEQUENCE + 1]
    assert verify(manifest.folder.location, quick=False, progress=lambda stage, **numbers: None).ok


def _starts(rows: Rows, sequences: int) -> int:
    """Documents that begin in the sequences of a file."""
    starts = np.cumsum([0, *(len(ids) for ids in rows)])[:-1]
    return int((starts <= sequences * SEQUENCE).sum())


def test_ranks_read_the_same_stream_locally_and_behind_a_url(
    format: TokenFormatName, tmp_path: Path, tokenizer: Path
) -> None:
    folder = WRITERS[format](tmp_path / "data", _files())
    manifest = _index(format, folder, tokenizer)
    index = Path(manifest.folder.location).name
    local = _stream(manifest, 1)
    with serving(tmp_path) as server:
        remote = _stream(Manifest.load(f"{server.url}/data/{index}/manifest.json"), 1)
    assert local == _stream(manifest, 2) == remote
    assert len(local) == 12


def _stream(manifest: Manifest, world: int) -> dict[int, list[int]]:
    """Slot -> tokens, of one batch as the ranks of a world read it."""
    rows: dict[int, list[int]] = {}
    for rank in range(world):
        stream = iter(TokenStream(manifest, seed=5, batch_slots=12, rank=rank, world_size=world))
        batch, _ = next(stream)
        rows |= dict(zip(batch.slots.tolist(), batch.tokens.tolist(), strict=True))
    return rows


def test_a_damaged_byte_costs_the_sequences_that_it_lies_in(
    format: TokenFormatName, tmp_path: Path, tokenizer: Path
) -> None:
    """In parquet those of its row group: the ids of a page are packed together."""
    files = _files()
    folder = WRITERS[format](tmp_path / "data", files)
    manifest = _index(format, folder, tokenizer)
    path = folder / manifest.shards[1].name
    content = bytearray(path.read_bytes())
    if format == "parquet":
        chunk = pyarrow.parquet.read_metadata(path).row_group(0).column(1)
        place = chunk.data_page_offset + chunk.total_compressed_size - 3
    else:
        place = content.find(files[1][4].astype("<i4").tobytes())
    assert place > 0
    content[place] ^= 1
    path.write_bytes(content)
    batches = [next(iter(SequenceReader(manifest).read_shard(number))) for number in (0, 1)]
    assert not batches[0].faults
    damaged = sorted(batches[1].faults)
    firsts = range(0, SEQUENCE * len(batches[1].tokens), SEQUENCE)
    if format == "parquet":
        end = sum(len(ids) for ids in files[1][:4])
        lie_there = [n for n, first in enumerate(firsts) if first < end]
    else:
        at = sum(len(ids) for ids in files[1][:4])
        lie_there = [n for n, first in enumerate(firsts) if first <= at <= first + SEQUENCE]
    assert damaged
    assert set(damaged) <= set(lie_there) if format == "parquet" else damaged == lie_there
    report = verify(manifest.folder.location, quick=False, progress=lambda stage, **numbers: None)
    assert len(report.splits[0].faults) == len(damaged) + 1, "and the sha256 of the file"


def test_rows_of_one_length_have_documents_behind_each_eos(
    format: TokenFormatName, tmp_path: Path, tokenizer: Path
) -> None:
    files = _files(length=SEQUENCE)
    eos = load_tokenizer(tokenizer).eos
    for rows in files:
        for ids in rows:
            ids[ids == eos] = eos + 1
        rows[2][5] = eos
    manifest = _index(format, WRITERS[format](tmp_path / "data", files), tokenizer)
    (batch,) = SequenceReader(manifest).read_shard(0)
    assert [bounds.tolist() for bounds in batch.bounds[:3]] == [[0, 17], [0, 17], [0, 6, 17]]
    np.testing.assert_array_equal(batch.tokens[:, :-1], np.stack(files[0])[:-1])


def test_ids_that_the_tokenizer_has_not_are_refused_when_indexed(
    format: TokenFormatName, tmp_path: Path, tokenizer: Path
) -> None:
    vocab = load_tokenizer(tokenizer).vocab_size
    for number, id in enumerate((vocab, -1)):
        files = _files()
        files[1][3][0] = id
        folder = WRITERS[format](tmp_path / f"data{number}", files)
        with pytest.raises(UserError, match=rf"expected ids from 0 to {vocab - 1}, as the tokenizer .*, found {id}"):
            _index(format, folder, tokenizer)
        assert not list(folder.rglob("manifest.json"))


def test_files_of_two_types_are_refused_together(format: TokenFormatName, tmp_path: Path, tokenizer: Path) -> None:
    if format == "mds":
        wide = np.arange(40)
        folder = write_mds(
            tmp_path / "data", {"tokens": "ndarray"}, [[{"tokens": wide}], [{"tokens": wide.astype("<u2")}]]
        )
    else:
        tables = [
            pyarrow.table({"input_ids": pyarrow.array([list(range(40))], pyarrow.list_(kind))})
            for kind in (pyarrow.int64(), pyarrow.uint16())
        ]
        folder = write_set(tmp_path / "data", tables)
        if format == "parquet":
            for number, table in enumerate(tables):
                pyarrow.parquet.write_table(table, folder / f"{number}.parquet")
    with pytest.raises(UserError, match=r"has ids of int64, .* of uint16: files of one index have one type"):
        _index(format, folder, tokenizer)


def test_a_run_without_pyarrow_is_refused_when_it_starts(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or each sequence of parquet would be a damaged one, and a masked sample; the other formats need none."""
    streams = [
        _index(name, WRITERS[name](tmp_path / name, _files()), tokenizer) for name in ("mds", "arrow", "parquet")
    ]
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for manifest in streams[:2]:
        assert len(_stream(manifest, 1)) == 12
    with pytest.raises(UserError, match=r"parquet .* needs pyarrow: pip install 'megadistill\[parquet\]'"):
        TokenStream(streams[2], seed=5, batch_slots=12, rank=0, world_size=1, on_corrupt_sample="mask")
