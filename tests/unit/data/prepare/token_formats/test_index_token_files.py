"""`shards index --format`: the stream that reads token files where they lie, where the index lies, what is refused."""

import itertools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from megadistill.cli.data import TOKEN_FORMATS
from megadistill.cli.main import run_command
from megadistill.data import Manifest, ShardFault, TokenStream
from megadistill.data.prepare.token_formats import index_file, index_token_files
from megadistill.data.prepare.token_formats.formats import FORMATS
from megadistill.data.prepare.token_formats.index_file import IndexedFile
from megadistill.data.prepare.verify import verify
from megadistill.data.shards.manifest import TokenFormatName
from megadistill.data.shards.packing import PackedSequence
from megadistill.data.shards.reader import SequenceReader
from megadistill.data.storage.local import LocalFolder
from megadistill.data.tokenizers.tokenizer import load_tokenizer
from megadistill.errors import UserError
from megadistill.io import file_sha256
from megadistill.types import TokenBatch
from tests.unit.data.corpora import byte_level_tokenizer
from tests.unit.data.prepare.token_formats.megatron_written import write_new
from tests.unit.data.servers import serving
from tests.unit.data.splits import write_split

S = 16
SEQUENCES = 40
"""Of each file."""
LEFT_OUT = 5
BOS, EOS = 0, 1
FIELDS = ("tokens", "labels", "slots", "digests", "starts")

Ids = NDArray[Any]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_level_tokenizer(tmp_path_factory.mktemp("tokenizer") / "bpe", "some words " * 30)


@pytest.fixture(scope="module")
def vocab(tokenizer: Path) -> int:
    return load_tokenizer(tokenizer).vocab_size


def _ids(vocab: int, *, seed: int, count: int = SEQUENCES * S + 1 + LEFT_OUT) -> Ids:
    """Ids without BOS and EOS."""
    return np.random.default_rng(seed).integers(2, vocab, count)


def _starts(seed: int) -> list[int]:
    places = np.random.default_rng(seed + 100).integers(1, SEQUENCES * S, 30)
    return [0, *np.unique(places).tolist()]


@pytest.fixture
def corpus(tmp_path: Path, vocab: int) -> Path:
    """The folder of two prefixes, `a` and `b`, with documents of one item each."""
    folder = tmp_path / "corpora" / "megatron"
    folder.mkdir(parents=True)
    for seed, name in enumerate("ab"):
        write_new(folder / name, [[part] for part in np.split(_ids(vocab, seed=seed), _starts(seed)[1:])], "int32")
    return folder


def _index(tokenizer: Path, *paths: Path, format: TokenFormatName = "megatron", **options: Any) -> Manifest:
    """As it is loaded from its file."""
    options = {"sequence_length": S, "progress": lambda stage, **numbers: None, **options}
    report = index_token_files.index_token_files(
        [str(path) for path in paths], format=format, tokenizer=tokenizer, **options
    )
    return Manifest.load(f"{report.manifest.folder.location}/manifest.json")


def _rows(ids: Ids, length: int = S) -> Ids:
    """[Q, S + 1]: the sequences, each of which begins with the last id of the one before."""
    return np.stack([ids[first : first + length + 1] for first in range(0, len(ids) - length, length)])


def _bounds(starts: list[int], sequence: int) -> list[int]:
    return [0, *(start - sequence * S for start in starts if 0 < start - sequence * S <= S), S + 1]


def _tree(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): file_sha256(path) for path in folder.rglob("*") if path.is_file()}


def _batches(manifest: Manifest, *, world: int = 1, count: int = 10, **options: Any) -> list[list[TokenBatch]]:
    """The batches of each rank."""
    return [
        [
            batch
            for batch, _ in itertools.islice(
                TokenStream(manifest, seed=3, batch_slots=8, rank=rank, world_size=world, **options), count
            )
        ]
        for rank in range(world)
    ]


def _require_equal(one: TokenBatch, other: TokenBatch) -> None:
    assert all(torch.equal(getattr(one, field), getattr(other, field)) for field in FIELDS)


def _verified(manifest: Manifest, *, quick: bool = False) -> list[str]:
    report = verify(manifest.folder.location, quick=quick, progress=lambda stage, **numbers: None, processes=1)
    return report.lines()


@pytest.mark.parametrize("document_mask", [False, True])
def test_a_stream_over_megatrons_files_is_that_of_tars_of_the_same_sequences(
    document_mask: bool, corpus: Path, tmp_path: Path, tokenizer: Path, vocab: int
) -> None:
    """Order, labels, documents; and the halves of two ranks together are the batches of one, from any cursor on."""
    manifest = _index(tokenizer, corpus / "a", corpus / "b")
    packed = [
        PackedSequence(row.astype(np.int32), np.array(_bounds(_starts(seed), number), dtype=np.int32))
        for seed in (0, 1)
        for number, row in enumerate(_rows(_ids(vocab, seed=seed)))
    ]
    tars = write_split(tmp_path / "tars", packed, per_shard=SEQUENCES, vocab=vocab, packer="external")
    (expected,) = _batches(tars, document_mask=document_mask)
    (found,) = _batches(manifest, document_mask=document_mask)
    for one, other in zip(expected, found, strict=True):
        _require_equal(one, other)
    whole = TokenStream(manifest, seed=3, batch_slots=8, rank=0, world_size=1, document_mask=document_mask)
    cursor = next(itertools.islice(iter(whole), 3, None))[1]
    halves = _batches(manifest, world=2, count=6, document_mask=document_mask, start=cursor)
    for number, parts in enumerate(zip(*halves, strict=True)):
        assert torch.equal(torch.cat([part.labels for part in parts]), expected[4 + number].labels)
        assert torch.equal(torch.cat([part.tokens for part in parts]), expected[4 + number].tokens)


def test_the_files_stay_as_they_are_and_the_index_counts_them(corpus: Path, tokenizer: Path, vocab: int) -> None:
    before = _tree(corpus)
    manifest = _index(tokenizer, corpus / "a", corpus / "b")
    assert {name: digest for name, digest in _tree(corpus).items() if "/" not in name} == before
    index = corpus / f"megatron-s{S}"
    assert manifest.folder.location == str(index)
    assert sorted(path.name for path in index.iterdir()) == [
        "a.bin.idx.npy",
        "b.bin.idx.npy",
        "manifest.json",
        "tokenizer",
    ]
    assert (manifest.sequences, manifest.sequence_length, manifest.tokens) == (2 * SEQUENCES, S, 2 * SEQUENCES * S)
    assert (manifest.dtype, manifest.vocab_size, manifest.packer.sequence_bos) == ("uint32", vocab, False)
    assert manifest.largest_id == max(int(_ids(vocab, seed=seed)[: SEQUENCES * S + 1].max()) for seed in (0, 1))
    assert manifest.documents == sum(len(_starts(seed)) for seed in (0, 1))
    assert _verified(manifest) == []
    assert _verified(manifest, quick=True) == []


def test_one_corpus_has_an_index_for_each_sequence_length(corpus: Path, tokenizer: Path, vocab: int) -> None:
    for length in (7, S, 100):
        manifest = _index(tokenizer, corpus / "a", sequence_length=length)
        assert manifest.folder.location == str(corpus / f"a-s{length}")
        (batch,) = SequenceReader(manifest).read_shard(0)
        np.testing.assert_array_equal(batch.tokens, _rows(_ids(vocab, seed=0), length))
    with pytest.raises(UserError, match="exists, and a manifest is never changed"):
        _index(tokenizer, corpus / "a")


def test_a_damaged_byte_is_a_masked_sample_and_a_line_of_verify(corpus: Path, tokenizer: Path) -> None:
    """The last id of a sequence is the first of the next: a byte there costs both."""
    manifest = _index(tokenizer, corpus / "a")
    (healthy,) = _batches(manifest, count=5)
    data = bytearray((corpus / "a.bin").read_bytes())
    data[4 * 21 * S + 1] ^= 1
    (corpus / "a.bin").write_bytes(data)
    lines = _verified(manifest)
    at = [f"shard 0: {corpus}/a.bin sequence {number} at byte {4 * number * S}: expected crc32" for number in (20, 21)]
    assert [line.rpartition(" 0x")[0].rpartition(" 0x")[0] for line in lines[1:]] == at
    assert "expected sha256" in lines[0]
    with pytest.raises(ShardFault, match="expected crc32"):
        _batches(manifest, count=5)
    (masked,) = _batches(manifest, count=5, on_corrupt_sample="mask")
    slots = [slot for batch in masked for slot, _ in batch.faults]
    assert len(slots) == 2
    for one, other in zip(healthy, masked, strict=True):
        whole = ~torch.isin(one.slots, torch.tensor(slots))
        assert torch.equal(one.tokens[whole], other.tokens[whole])
        assert (other.labels[~whole] < 0).all()
        assert (other.tokens[~whole] == 0).all()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data.unlink(), "No such file"),
        (lambda data: data.write_bytes(data.read_bytes()[:-4]), f"expected {4 * (SEQUENCES * S + 6)} bytes, found"),
        (lambda data: data.write_bytes(b""), "it is empty"),
    ],
    ids=["missing", "cut off", "empty"],
)
def test_a_file_that_is_gone_or_cut_off_is_a_fault_of_all_its_sequences(
    damage: Callable[[Path], Any], message: str, corpus: Path, tokenizer: Path
) -> None:
    manifest = _index(tokenizer, corpus / "a", corpus / "b")
    damage(corpus / "b.bin")
    reader = SequenceReader(manifest)
    (whole,), (lost,) = reader.read_shard(0), reader.read_shard(1)
    assert not whole.faults
    assert len(lost.faults) == SEQUENCES
    assert all(message in str(fault) for fault in lost.faults.values())
    assert not lost.tokens.any()
    assert any(message in line for line in _verified(manifest, quick=True))


def test_documents_of_flat_files_end_with_eos_or_begin_with_bos(tmp_path: Path, tokenizer: Path, vocab: int) -> None:
    ids = _ids(vocab, seed=5)
    starts = [0, 9, S, 3 * S + 1, 4 * S]
    for start in starts[1:]:
        ids[start - 1], ids[start] = EOS, BOS
    ids[SEQUENCES * S] = EOS
    corpus = tmp_path / "olmo"
    corpus.mkdir()
    (corpus / "part-00000.npy").write_bytes(ids.astype("<u2").tobytes())
    for documents in ("format", "eos", "bos"):
        manifest = _index(tokenizer, corpus, format="olmo", documents=documents, output=tmp_path / documents)
        (batch,) = SequenceReader(manifest).read_shard(0)
        assert [bounds.tolist() for bounds in batch.bounds] == [_bounds(starts, n) for n in range(SEQUENCES)]
        assert manifest.documents == len(starts)
        np.testing.assert_array_equal(batch.tokens, _rows(ids))
        assert (manifest.dtype, manifest.sample_format.has_documents) == ("uint16", True)


def test_files_without_eos_do_not_tell_where_documents_begin(tmp_path: Path, tokenizer: Path, vocab: int) -> None:
    (tmp_path / "a.u2").write_bytes(_ids(vocab, seed=5).astype("<u2").tobytes())
    manifest = _index(tokenizer, tmp_path / "a.u2", format="raw", dtype="uint16")
    assert (manifest.documents, manifest.sample_format.has_documents) == (None, False)
    (batch,) = SequenceReader(manifest).read_shard(0)
    assert {tuple(bounds) for bounds in batch.bounds} == {(0, S + 1)}
    assert _verified(manifest) == []
    with pytest.raises(UserError, match=r"data\.document_mask: .* do not record where documents begin"):
        TokenStream(manifest, seed=0, batch_slots=1, rank=0, world_size=1, document_mask=True)


def test_sequences_that_all_begin_with_bos_are_recorded_so(tmp_path: Path, tokenizer: Path, vocab: int) -> None:
    ids = _ids(vocab, seed=5)
    ids[::S] = BOS
    (tmp_path / "a.npy").write_bytes(ids.astype("<u2").tobytes())
    assert _index(tokenizer, tmp_path / "a.npy", format="olmo").packer.sequence_bos
    ids[3 * S] = 7
    (tmp_path / "b.npy").write_bytes(ids.astype("<u2").tobytes())
    assert not _index(tokenizer, tmp_path / "b.npy", format="olmo").packer.sequence_bos


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "int64", "uint16"])
def test_ids_of_every_type_are_read_and_checked(dtype: str, tmp_path: Path, tokenizer: Path, vocab: int) -> None:
    most = min(vocab, np.iinfo(dtype).max)
    ids = _ids(most, seed=3)
    write_new(tmp_path / "web", [[ids]], dtype)
    manifest = _index(tokenizer, tmp_path / "web")
    (batch,) = SequenceReader(manifest).read_shard(0)
    np.testing.assert_array_equal(batch.tokens, _rows(ids))
    assert batch.tokens.dtype == manifest.dtype == ("uint32" if dtype == "int64" else "uint16")


@pytest.mark.parametrize(("dtype", "id"), [("int32", -3), ("int16", -1), ("int32", 400), ("uint16", 65_535)])
def test_ids_that_the_tokenizer_has_not_are_refused_with_their_place(
    dtype: str, id: int, tmp_path: Path, tokenizer: Path, vocab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = _ids(vocab, seed=3)
    ids[345] = id
    write_new(tmp_path / "web", [[ids]], dtype)
    before = _tree(tmp_path)
    monkeypatch.setattr(index_file, "BLOCK_BYTES", 100)  # some sequences at a time
    with pytest.raises(UserError) as refused:
        _index(tokenizer, tmp_path / "web")
    assert str(refused.value) == (
        f"{tmp_path}/web.bin at byte {345 * np.dtype(dtype).itemsize}: expected ids from 0 to {vocab - 1}, as the "
        f"tokenizer has them, found {id}: give the tokenizer that made the ids"
    )
    assert _tree(tmp_path) == before
    assert not (tmp_path / f"web-s{S}").exists()


def test_blocks_of_any_size_make_the_same_index(
    corpus: Path, tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trees = []
    for number, size in enumerate((1, 700, 1 << 20)):
        monkeypatch.setattr(index_file, "BLOCK_BYTES", size)
        for documents in ("format", "eos", "bos"):
            output = tmp_path / "corpora" / f"{documents}-{number}"
            _index(tokenizer, corpus / "a", documents=documents, output=output)
        trees.append([_tree(tmp_path / "corpora" / f"{each}-{number}") for each in ("format", "eos", "bos")])
    assert trees[0] == trees[1] == trees[2]


@pytest.mark.thorough
def test_processes_make_the_same_index(
    corpus: Path, tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = _index(tokenizer, corpus, output=corpus / "one", processes=1)
    monkeypatch.setattr(index_token_files, "MIN_BYTES", 1)
    shown: list[int] = []
    two = _index(
        tokenizer,
        corpus,
        output=corpus / "two",
        processes=2,
        progress=lambda stage, done, total, tokens: shown.append(done),
    )
    assert one.fingerprint == two.fingerprint
    assert _tree(corpus / "one") == _tree(corpus / "two")
    assert shown == sorted(shown)
    (corpus / "b.bin").write_bytes(b"\xff" * (corpus / "b.bin").stat().st_size)
    with pytest.raises(UserError, match=r"b\.bin at byte 0: expected ids"):
        _index(tokenizer, corpus, output=corpus / "three", processes=2)
    assert not (corpus / "three" / "manifest.json").exists()


def test_a_command_that_was_broken_off_reads_no_file_again_that_it_finished(
    corpus: Path, tokenizer: Path, vocab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless the file, the options or its index have changed; and nothing of it is left when all are indexed."""
    monkeypatch.setattr("megadistill.data.storage.local.SETTLED_NS", -(10**18))
    read: list[str] = []

    def recorded(folder: LocalFolder, name: str, *rest: Any) -> IndexedFile:
        read.append(name)
        return index_file.index_file(folder, name, *rest)

    monkeypatch.setattr("megadistill.data.prepare.token_formats.index_record.index_file", recorded)
    bad, good = np.full(SEQUENCES * S + 1 + LEFT_OUT, vocab + 7), _ids(vocab, seed=8)
    write_new(corpus / "c", [[bad]], "int32")
    expected = _index(tokenizer, corpus / "a", corpus / "b", output=corpus / "whole")

    def start(**options: Any) -> list[str]:
        read.clear()
        with pytest.raises(UserError, match=r"c\.bin at byte 0: expected ids"):
            _index(tokenizer, corpus / "a", corpus / "b", corpus / "c", output=corpus / "out", **options)
        return [*read]

    assert start() == ["a.bin", "b.bin", "c.bin"]
    assert start() == ["c.bin"]
    assert start(documents="eos") == ["a.bin", "b.bin", "c.bin"]
    os.utime(corpus / "a.bin", (1, 1))
    (corpus / "out" / "b.bin.idx.npy").write_bytes(b"cut off")
    assert start(documents="eos") == ["a.bin", "b.bin", "c.bin"]
    assert start(documents="eos") == ["c.bin"]
    write_new(corpus / "c", [[good]], "int32")
    manifest = _index(tokenizer, corpus / "b", corpus / "c", output=corpus / "out", documents="eos")
    assert read[-1] == "c.bin"
    names = sorted(path.name for path in (corpus / "out").iterdir())
    assert names == ["b.bin.idx.npy", "c.bin.idx.npy", "manifest.json", "tokenizer"]
    assert manifest.shards[0].sha256 == expected.shards[1].sha256
    assert _verified(manifest) == []


def test_what_is_left_out_is_counted(tmp_path: Path, tokenizer: Path, vocab: int) -> None:
    corpus = tmp_path / "olmo"
    corpus.mkdir()
    for name, count in (("a", 3 * S + 1 + 4), ("b", S), ("c", S + 1)):
        (corpus / f"{name}.npy").write_bytes(_ids(vocab, seed=1, count=count).astype("<u2").tobytes())
    report = index_token_files.index_token_files(
        [str(corpus)], format="olmo", sequence_length=S, tokenizer=tokenizer, progress=lambda stage, **numbers: None
    )
    index = corpus / f"olmo-s{S}"
    assert report.lines() == [
        f"{index}/manifest.json: 4 sequences of {S} tokens in 2 files; where documents begin is not known",
        f"{4 + S} ids at the end of files fill no sequence, and are left out",
        "1 file with fewer ids than a sequence left out: b.npy",
    ]
    assert [shard.name for shard in report.manifest.shards] == ["a.npy", "c.npy"]
    with pytest.raises(UserError, match=f"no file has the {100 * S + 1} ids of a sequence"):
        _index(tokenizer, corpus, format="olmo", sequence_length=100 * S)


def test_an_index_lies_below_its_files_or_beside_them(corpus: Path, tmp_path: Path, tokenizer: Path) -> None:
    link = tmp_path / "elsewhere" / "corpus"
    link.parent.mkdir()
    link.symlink_to(corpus)
    places = {
        corpus / "deep": "../",
        corpus.parent / "beside": "../megatron",
        corpus.parent / "indices": "../megatron",
        corpus.parent: "megatron",
    }
    for output, relative in places.items():
        record = _index(tokenizer, corpus / "a", output=output).sample_format
        assert record.kind == "token_file"
        assert record.folder == relative
    linked = _index(tokenizer, link / "a", output=link.parent / "index")
    assert linked.sample_format.kind == "token_file"
    assert linked.sample_format.folder == "../corpus"
    assert _verified(linked) == []
    moved = Path(shutil.copytree(corpus.parent, tmp_path / "moved"))
    assert _verified(Manifest.load(moved / "beside" / "manifest.json")) == []
    for output, message in (
        (tmp_path / "far" / "away", "an index lies below the folder of its files"),
        (corpus, "is the folder of the files: give a folder below it"),
        (corpus / "two" / "deep", "an index lies below the folder of its files"),
    ):
        with pytest.raises(UserError, match=message):
            _index(tokenizer, corpus / "a", output=output)


def test_paths_that_make_no_index_are_refused_before_anything_is_read(
    corpus: Path, tmp_path: Path, tokenizer: Path, vocab: int
) -> None:
    write_new(tmp_path / "other", [[_ids(vocab, seed=1)]], "uint16")
    write_new(corpus / "narrow", [[_ids(vocab, seed=1)]], "uint16")
    (corpus / "a b.bin").write_bytes(b"1")
    raw = [corpus / "raw", corpus / "raw.idx.npy"]
    for path in raw:
        path.write_bytes(bytes(200))
    before = _tree(tmp_path)
    for paths, options, message in (
        ([corpus / "a", tmp_path / "other"], {}, "files of one index lie in one folder"),
        ([corpus / "a", corpus / "a.bin"], {}, r"a\.bin is given twice"),
        ([corpus / "a", corpus / "narrow"], {}, r"a\.bin has ids of int32, narrow\.bin of uint16"),
        ([corpus / "a b"], {}, "is not a name for a manifest"),
        (raw, {"format": "raw", "dtype": "uint16"}, r"raw\.idx\.npy has the name that the index of raw gets"),
        ([corpus / "none"], {}, r"none\.bin cannot be read \(No such file"),
        ([corpus / "a"], {"sequence_length": 1 << 25}, "a sequence has 1 to"),
        ([corpus / "a"], {"split": "a/b"}, "--split: 'a/b' is not a name"),
        ([corpus / "a"], {"dtype": "uint16"}, "--dtype uint16: .* tells the type of its ids"),
    ):
        with pytest.raises(UserError, match=message) as refused:
            _index(tokenizer, *paths, **options)
        assert "\n" not in str(refused.value)
    assert _tree(tmp_path) == before


def test_a_url_is_indexed_here_and_read_there(corpus: Path, tmp_path: Path, tokenizer: Path, vocab: int) -> None:
    local = _index(tokenizer, corpus / "a", output=corpus / "local")
    with serving(tmp_path) as server:
        url = f"{server.url}/corpora/megatron"
        with pytest.raises(UserError, match="is a URL: give --output FOLDER, a local one"):
            index_token_files.index_token_files(
                [f"{url}/a"], format="megatron", sequence_length=S, tokenizer=tokenizer, progress=lambda *a, **b: None
            )
        report = index_token_files.index_token_files(
            [f"{url}/a"],
            format="megatron",
            sequence_length=S,
            tokenizer=tokenizer,
            output=tmp_path / "made",
            progress=lambda stage, **numbers: None,
        )
        assert report.lines()[-1] == f"copy {tmp_path}/made into {url}: the index is read there, beside its files"
        shutil.copytree(tmp_path / "made", corpus / "made")
        remote = Manifest.load(f"{url}/made/manifest.json")
        assert remote.fingerprint == local.fingerprint
        (batch,) = SequenceReader(remote).read_shard(0)
        requests = len(server.requests)
    np.testing.assert_array_equal(batch.tokens, _rows(_ids(vocab, seed=0)))
    assert not batch.faults
    assert requests < 40


def test_the_command_indexes_shows_and_verifies(
    corpus: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["shards", "index", "--format", "megatron", str(corpus / "a"), "--tokenizer", str(tokenizer)]
    assert run_command([*command, "--sequence-length", str(S)]) == 0
    index = corpus / f"a-s{S}"
    documents = len(_starts(0))
    assert capsys.readouterr().out.splitlines() == [
        f"{index}/manifest.json: {SEQUENCES} sequences of {S} tokens in 1 file; {documents} documents begin in them",
        f"{LEFT_OUT} ids at the end of files fill no sequence, and are left out",
    ]
    assert run_command(["shards", "verify", str(corpus)]) == 0
    assert run_command(["shards", "info", str(index)]) == 0
    assert "megatron, ids as int32, read in place in ../" in " ".join(capsys.readouterr().out.split())
    for wrong, message in (
        (["--member", "u16"], "--member is for tars"),
        ([], "--format megatron needs --sequence-length"),
    ):
        assert run_command([*command, *wrong]) == 2
        assert message in capsys.readouterr().err
    tars = ["shards", "index", str(corpus), "--tokenizer", str(tokenizer)]
    for wrong, message in (
        (["--sequence-length", "8"], "--sequence-length is for token files"),
        (["--column", "a"], "--column is for token files"),
        (["--documents", "eos"], "--documents is for token files"),
        ([], "2 paths: give one folder of tars"),
    ):
        paths = [] if wrong else [str(corpus)]
        assert run_command([*tars[:2], *paths, *tars[2:], *wrong]) == 2
        assert message in capsys.readouterr().err


def test_the_command_has_every_format() -> None:
    assert TOKEN_FORMATS == get_args(TokenFormatName) == tuple(FORMATS)
