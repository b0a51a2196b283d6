"""`tokenize`: what is taken, where it goes, what is counted, what is refused; the same bytes however it is done."""

import fcntl
import gzip
import io
import itertools
import json
import math
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import webdataset
from backports import zstd
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from rich.console import Console

from megadistill.data.prepare import tokenizer_training as training_sample
from megadistill.data.prepare.shard_tasks import shard_mb_for
from megadistill.data.prepare.tokenize import tokenize
from megadistill.data.prepare.tokenize_report import TokenizeReport
from megadistill.data.prepare.tokenizer_training import TrainingSample
from megadistill.data.shards.manifest import Manifest
from megadistill.data.text.corpus import Document
from megadistill.data.text.left_out import LeftOut
from megadistill.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from megadistill.errors import UserError
from megadistill.progress import console_progress
from tests.unit.data.corpora import BODY, byte_level_tokenizer, document_texts, tree, write_texts

SEQUENCE = 16


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 text files. Not to be written to."""
    return write_texts(tmp_path_factory.mktemp("corpus") / "corpus", document_texts())


@pytest.fixture(scope="module")
def given(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained tokenizer.model."""
    output = tmp_path_factory.mktemp("given") / "out"
    _run(corpus, output, tokenizer=None, vocab_size=330)
    return output / "tokenizer" / "tokenizer.model"


def _run(inputs: Path, output: Path, **changes: Any) -> TokenizeReport:
    options: dict[str, Any] = {"sequence_length": SEQUENCE, "heldout_fraction": 0.3, "shard_mb": 0.002, "processes": 1}
    return tokenize([inputs], output, **options | {"progress": lambda stage, **numbers: None} | changes)


def _samples(folder: Path) -> list[dict[str, NDArray[Any]]]:
    manifest = Manifest.load(folder / "manifest.json")
    shards = [str(folder / shard.name) for shard in manifest.shards]
    return list(webdataset.WebDataset(shards, shardshuffle=False).decode())


def _documents_of(sample: dict[str, NDArray[Any]]) -> list[NDArray[np.int32]]:
    tokens, bounds = sample["tokens.npy"].astype(np.int32), sample["bounds.npy"]
    return [tokens[start:stop] for start, stop in itertools.pairwise(bounds)]


@pytest.mark.parametrize("packer", ["chunk", "bestfit"])
def test_the_bytes_do_not_depend_on_the_number_of_processes(
    packer: str, corpus: Path, given: Path, tmp_path: Path
) -> None:
    for processes in (1, 2, 3):
        report = _run(
            corpus, tmp_path / str(processes), tokenizer=given, vocab_size=None, packer=packer, processes=processes
        )
    assert len(report.train.manifest.shards) > 3
    first = tree(tmp_path / "1")
    assert first == tree(tmp_path / "2") == tree(tmp_path / "3")
    assert {"train/manifest.json", "train/shard-00001.tar", "heldout/shard-00000.tar.idx.npy"} <= first.keys()
    assert not [name for name in first if name.rpartition("/")[2].startswith(".")]


def test_training_a_tokenizer_gives_the_same_bytes_twice(corpus: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        _run(corpus, tmp_path / name, tokenizer=None, vocab_size=330)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    assert {"tokenizer/tokenizer.model", "tokenizer/tokenizer.json"} <= tree(tmp_path / "one").keys()


def _write_lines(folder: Path, texts: list[str]) -> None:
    half = len(texts) // 2
    for name, part in (("a.jsonl", texts[:half]), ("b.jsonl", texts[half:])):
        lines = "".join(json.dumps({"id": i, "body": text}) + "\n" for i, text in enumerate(part)).encode()
        (folder / name).write_bytes(lines)


def _write_gzip(folder: Path, texts: list[str]) -> None:
    _write_lines(folder, texts)
    for path in list(folder.iterdir()):
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()


def _write_zstd(folder: Path, texts: list[str]) -> None:
    _write_lines(folder, texts)
    for path in list(folder.iterdir()):
        path.with_name(f"{path.name}.zst").write_bytes(zstd.compress(path.read_bytes()))
        path.unlink()


def _write_parquet(folder: Path, texts: list[str]) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"body": texts}), folder / "a.parquet", row_group_size=7)


@pytest.mark.parametrize("write", [_write_lines, _write_gzip, _write_zstd, _write_parquet])
def test_every_kind_of_file_gives_the_same_data_set(write: Any, corpus: Path, given: Path, tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    write(folder, document_texts())
    options = {"vocab_size": None, "tokenizer": given}
    seen: list[tuple[int, int]] = []

    def progress(stage: str, *, done: int, total: int, tokens: int) -> None:
        seen.append((done, total))

    _run(folder, tmp_path / "lines", text_field="body", progress=progress, **options)
    _run(corpus, tmp_path / "files", **options)
    assert tree(tmp_path / "lines") == tree(tmp_path / "files")
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert seen == sorted(seen)
    assert (seen[0], seen[-1]) == ((0, size), (size, size)), "bytes of the files as they lie there"


def test_chunks_are_the_documents_of_a_shard_in_order(corpus: Path, given: Path, tmp_path: Path) -> None:
    report = _run(corpus, tmp_path / "out", tokenizer=given, vocab_size=None, heldout_fraction=0)
    tokenizer = load_tokenizer(given)
    manifest = Manifest.load(tmp_path / "out" / "train" / "manifest.json")
    texts = iter(document_texts())
    tokens = text_bytes = dropped = documents = 0
    for shard in manifest.shards:
        run: list[str] = []
        while sum(len(text.encode()) for text in run) < 2000 and (text := next(texts, None)) is not None:
            run.append(text)
        expected = [id for text in run for id in [*tokenizer.encode(text).tolist(), tokenizer.eos]]
        path = str(tmp_path / "out" / "train" / shard.name)
        sequences = [
            sample["tokens.npy"].tolist() for sample in webdataset.WebDataset(path, shardshuffle=False).decode()
        ]
        whole = (len(expected) - 1) // SEQUENCE
        assert sequences == [expected[k * SEQUENCE : (k + 1) * SEQUENCE + 1] for k in range(whole)]
        tokens += whole * SEQUENCE
        dropped += len(expected) - 1 - whole * SEQUENCE
        text_bytes += len(tokenizer.decode(np.array(expected[1 : whole * SEQUENCE + 1])).encode())
        documents += len(run)
    assert next(texts, None) is None
    assert (manifest.tokens, manifest.text_bytes, manifest.documents) == (tokens, text_bytes, documents) != (0, 0, 0)
    assert (report.train.manifest.tokens, report.train.dropped, report.train.padding) == (tokens, dropped, 0)
    assert manifest.packer.model_dump() == {"name": "chunk", "version": 2, "bos": None, "eos": tokenizer.eos}


def test_an_output_inside_of_the_input_is_no_input(tmp_path: Path) -> None:
    """A trained tokenizer is written before the text is read a second time."""
    inside = write_texts(tmp_path / "inside", document_texts())
    outside = write_texts(tmp_path / "outside", document_texts())
    inner = _run(inside, inside / "made" / "set", tokenizer=None, vocab_size=300)
    outer = _run(outside, tmp_path / "set", tokenizer=None, vocab_size=300)
    for ours, theirs in ((inner.train, outer.train), (inner.heldout, outer.heldout)):
        assert ours is not None
        assert theirs is not None
        assert ours.manifest.shards == theirs.manifest.shards
        assert (ours.dropped, ours.padding) == (theirs.dropped, theirs.padding)


@pytest.mark.parametrize("kind", ["sentencepiece", "huggingface"])
def test_bestfit_keeps_documents_whole_and_counts_what_it_predicts(
    kind: str, corpus: Path, given: Path, tmp_path: Path
) -> None:
    path = given if kind == "sentencepiece" else byte_level_tokenizer(tmp_path / "byte_level", BODY)
    report = _run(
        corpus,
        tmp_path / "out",
        tokenizer=path,
        vocab_size=None,
        heldout_fraction=0,
        packer="bestfit",
        sequence_length=400,
    )
    tokenizer = load_tokenizer(path)
    begin = [] if tokenizer.bos is None else [tokenizer.bos]
    expected = Counter((*begin, *tokenizer.encode(text).tolist(), tokenizer.eos) for text in document_texts())
    samples = _samples(tmp_path / "out" / "train")
    assert Counter(tuple(document.tolist()) for sample in samples for document in _documents_of(sample)) == expected
    manifest = Manifest.load(tmp_path / "out" / "train" / "manifest.json")
    tokens = sum((len(document) - 1) * count for document, count in expected.items())
    padding = manifest.sequences * 401 - sum(len(document) * count for document, count in expected.items())
    unpredicted = 0 if begin else sum(int(tokenizer.piece_bytes[d[0]]) * count for d, count in expected.items())
    assert manifest.tokens == report.train.manifest.tokens == tokens
    assert manifest.text_bytes == sum(len(text.encode()) for text in document_texts()) - unpredicted
    assert (report.train.dropped, report.train.padding) == (0, padding)
    assert (manifest.tokenizer.kind, manifest.tokenizer.sha256) == (kind, tokenizer.sha256)
    assert (manifest.packer.bos, manifest.packer.eos) == (tokenizer.bos, tokenizer.eos)
    written = load_tokenizer(tmp_path / "out" / "train" / manifest.tokenizer.file)
    assert (written.kind, written.sha256, written.bos) == (kind, tokenizer.sha256, tokenizer.bos)


def test_splits_are_disjoint_and_copies_stay_together(given: Path, tmp_path: Path) -> None:
    texts = document_texts()
    corpus = write_texts(tmp_path / "corpus", [*texts, *texts])
    report = _run(corpus, tmp_path / "out", tokenizer=given, vocab_size=None, packer="bestfit", sequence_length=400)
    assert report.heldout is not None
    train, heldout = report.train.manifest.documents, report.heldout.manifest.documents
    assert train is not None
    assert heldout is not None
    assert train + heldout == 2 * len(texts)
    assert 0.1 < heldout / (2 * len(texts)) < 0.5
    tokenizer = load_tokenizer(given)
    seen = {split: _texts(tmp_path / "out" / split, tokenizer) for split in ("train", "heldout")}
    for text in texts:
        assert sorted(seen[split][text] for split in seen) == [0, 2], text


def _texts(folder: Path, tokenizer: Tokenizer) -> Counter[str]:
    return Counter(tokenizer.decode(d[:-1]) for sample in _samples(folder) for d in _documents_of(sample))


def test_with_no_share_held_out_there_is_no_such_split(corpus: Path, given: Path, tmp_path: Path) -> None:
    report = _run(corpus, tmp_path / "out", tokenizer=given, vocab_size=None, heldout_fraction=0)
    assert report.heldout is None
    assert report.train.manifest.documents == len(document_texts())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["tokenize.json", "tokenizer", "train"]


def test_what_is_taken_and_what_is_counted(given: Path, tmp_path: Path) -> None:
    corpus = write_texts(tmp_path / "corpus", document_texts())
    (corpus / "empty.txt").write_text(" \n\t")
    (corpus / "latin.txt").write_bytes(b"caf\xe9")
    (corpus / "code.py").write_text("not text")
    (corpus / "test").mkdir()
    (corpus / "test" / "inside.txt").write_text("left out")
    outside = write_texts(tmp_path / "outside", ["elsewhere"])
    (corpus / "linked.txt").symlink_to(next(outside.iterdir()))
    os.symlink(outside, corpus / "linked")
    report = _run(corpus, tmp_path / "out", tokenizer=given, vocab_size=None, include=["*.txt"], exclude=["*/test/*"])
    assert report.heldout is not None
    documents = [split.manifest.documents or 0 for split in (report.train, report.heldout)]
    assert sum(documents) == len(document_texts())
    assert report.left_out == {LeftOut.EMPTY: 1, LeftOut.INVALID: 1}
    assert Manifest.load(tmp_path / "out" / "train" / "manifest.json").source.inputs == ("corpus",)
    table = io.StringIO()
    Console(file=table, width=200).print(report.table())
    assert f"{report.train.manifest.tokens:,}" in table.getvalue()
    assert f"{report.train.dropped:,}" in table.getvalue()
    assert report.notes() == [
        "left out: 1 empty document, 1 document that is not UTF-8",
        f"no text in 4 B of the {report.input_bytes / 1000:.3g} kB of the input; --text-field names the field with the "
        "text, --exclude leaves files out:",
        f"  {corpus}/latin.txt (4 B): it is not UTF-8: no text, or in another encoding (iconv -f ENCODING -t UTF-8 "
        "converts it)",
    ]


def test_files_of_records_that_are_one_document_each_are_named(corpus: Path, given: Path, tmp_path: Path) -> None:
    corpus = shutil.copytree(corpus, tmp_path / "corpus")
    (corpus / "a.json").write_text('[{"text": "one"}, {"text": "two"}]')
    (corpus / "b.csv").write_text("id,text\n1,one\n")
    (corpus / "c.csv.gz").write_bytes(gzip.compress(b"id,text\n2,two\n"))
    (corpus / "d.jsonl").write_text('{"text": "a document"}\n')
    (corpus / "e.json.gz").write_bytes(gzip.compress(b'{"text": "another document"}\n'))
    (corpus / "f.tsv").write_text(" ")
    report = _run(corpus, tmp_path / "out", tokenizer=given, vocab_size=None)
    assert report.whole == {".json": 1, ".csv": 2}
    assert report.notes()[1].startswith("1 *.json, 2 *.csv: each file is one document as it is, ")
    assert report.notes()[1].endswith("convert it to .jsonl, or leave it out with --exclude '*.json'")


def test_a_given_model_is_copied(corpus: Path, given: Path, tmp_path: Path) -> None:
    _run(corpus, tmp_path / "out", tokenizer=given, vocab_size=None)
    assert (tmp_path / "out" / "tokenizer" / "tokenizer.model").read_bytes() == given.read_bytes()
    assert Manifest.load(tmp_path / "out" / "train" / "manifest.json").vocab_size == 330


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": None}, "either --tokenizer"),
        ({"vocab_size": 260}, "300 is the least"),
        ({"vocab_size": 9000}, "does not fit the text: Vocabulary size too high"),
        ({"sequence_length": 0}, "--sequence-length 0"),
        ({"shard_mb": 0}, "--shard-mb 0"),
        ({"shard_mb": math.nan}, "--shard-mb nan"),
        ({"processes": 0}, "--processes 0"),
        ({"packer": "other"}, "--packer other: give chunk or bestfit"),
        ({"heldout_fraction": 1.0}, "between 0 and 1"),
        ({"heldout_fraction": math.nan}, "between 0 and 1"),
        ({"heldout_fraction": 1e-9}, "puts all 40 documents into train: raise it"),
        ({"heldout_fraction": 1 - 1e-9}, "puts all 40 documents into heldout: lower it"),
        ({"sequence_length": 10**6}, "train split, .* fewer than the 1000001 tokens"),
        ({"include": ["*.md"]}, "matches --include"),
        ({"tokenizer": Path("missing.model"), "vocab_size": None}, "missing.model cannot be read"),
    ],
)
def test_refused_with_the_way_out_and_without_a_manifest(
    changes: dict[str, Any], message: str, corpus: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message) as refused:
        _run(corpus, tmp_path / "out", **{"tokenizer": None, "vocab_size": 330} | changes)
    assert "\n" not in str(refused.value)
    assert not list((tmp_path / "out").rglob("manifest.json"))


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_a_share_that_empties_a_split_is_refused_in_one_pass_too(
    fraction: float, corpus: Path, given: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="puts all 40 documents into"):
        _run(corpus, tmp_path / "out", tokenizer=given, vocab_size=None, heldout_fraction=fraction)


def test_no_text_no_input_and_a_damaged_one_are_refused(given: Path, tmp_path: Path) -> None:
    options = {"tokenizer": given, "vocab_size": None}
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UserError, match="no text to tokenize: 1 empty"):
        _run(tmp_path / "empty.txt", tmp_path / "out", **options)
    with pytest.raises(UserError, match="no text to tokenize: 1 empty"):
        _run(tmp_path / "empty.txt", tmp_path / "out", tokenizer=None, vocab_size=330)
    with pytest.raises(UserError, match="does not exist"):
        _run(tmp_path / "nowhere", tmp_path / "out", **options)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in document_texts()).encode()
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(lines)[:-9])
    with pytest.raises(UserError, match=r"cut\.jsonl\.gz is damaged or cut off"):
        _run(tmp_path / "cut.jsonl.gz", tmp_path / "out", **options)
    assert not list((tmp_path / "out").rglob("manifest.json"))


def test_a_finished_split_is_not_overwritten(corpus: Path, given: Path, tmp_path: Path) -> None:
    _run(corpus, tmp_path / "out", tokenizer=given, vocab_size=None)
    before = tree(tmp_path / "out")
    with pytest.raises(UserError, match="made otherwise: --sequence-length was 16, is 8: give another --output"):
        _run(corpus, tmp_path / "out", tokenizer=given, vocab_size=None, sequence_length=8)
    (tmp_path / "out" / "tokenize.json").unlink()
    with pytest.raises(UserError, match="a manifest is never changed"):
        _run(corpus, tmp_path / "out", tokenizer=given, vocab_size=None)
    assert tree(tmp_path / "out") == before


def test_the_same_command_again_has_nothing_to_do(corpus: Path, given: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"tokenizer": given, "vocab_size": None}
    first = _run(corpus, tmp_path / "out", **options)
    before = tree(tmp_path / "out")
    again = _run(corpus, tmp_path / "out", **options, processes=2, progress=_never)
    assert again.already_there
    assert again.heldout is not None
    assert first.heldout is not None
    for ours, theirs in ((again.train, first.train), (again.heldout, first.heldout)):
        assert ours.manifest.fingerprint == theirs.manifest.fingerprint
        assert ours.cells().items() < theirs.cells().items()
    assert "already there, made by the same command" in again.heading()
    assert again.notes() == ["nothing was written"]
    assert tree(tmp_path / "out") == before
    shutil.rmtree(tmp_path / "out" / "heldout")
    with pytest.raises(UserError, match="a manifest is never changed"):
        _run(corpus, tmp_path / "out", **options)


def _never(stage: str, **numbers: int) -> None:
    raise AssertionError("nothing is to be done")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"tokenizer": None, "vocab_size": 300},
            r"--tokenizer was sha256 \w+, is not given; --vocab-size was not",
        ),
        ({"packer": "bestfit"}, "--packer was chunk, is bestfit"),
        ({"text_field": "body"}, "--text-field was text, is body"),
        ({"heldout_fraction": 0.2}, "--heldout-fraction was 0.3, is 0.2"),
        ({"exclude": ["doc00039*"]}, r"--exclude was not given, is doc00039\*"),
        ({"shard_mb": 1}, "--shard-mb was 0.002, is 1"),
    ],
)
def test_another_command_is_told_what_differs(
    changes: dict[str, Any], says: str, corpus: Path, given: Path, tmp_path: Path
) -> None:
    _run(corpus, tmp_path / "out", tokenizer=given, vocab_size=None)
    with pytest.raises(UserError, match=says) as refused:
        _run(corpus, tmp_path / "out", **{"tokenizer": given, "vocab_size": None} | changes)
    assert "\n" not in str(refused.value)


def test_input_that_has_changed_is_told_too(given: Path, tmp_path: Path) -> None:
    corpus = write_texts(tmp_path / "corpus", document_texts())
    options: dict[str, Any] = {"tokenizer": given, "vocab_size": None}
    _run(corpus, tmp_path / "out", **options)
    path = corpus / "doc00000.txt"
    os.utime(path, (1, 1))
    with pytest.raises(UserError, match="files of its input were written again since"):
        _run(corpus, tmp_path / "out", **options)
    path.write_text("more text than before " * 100)
    with pytest.raises(UserError, match=r"its input was 40 files, .* kB, is 40 files, .* kB"):
        _run(corpus, tmp_path / "out", **options)


def _lines_of(field: str) -> bytes:
    return "".join(json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(document_texts())).encode()


def test_files_without_text_are_named_with_their_fields(given: Path, tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.jsonl").write_bytes(2 * _lines_of("text"))
    (tmp_path / "corpus" / "b.jsonl").write_bytes(_lines_of("body"))
    pyarrow.parquet.write_table(pyarrow.table({"content": ["x"], "text": [3]}), tmp_path / "corpus" / "c.parquet")
    report = _run(tmp_path / "corpus", tmp_path / "out", tokenizer=given, vocab_size=None)
    left_out, heading, body, content = report.notes()
    assert left_out == "left out: 41 records without the text field"
    assert heading.startswith("no text in ")
    assert "b.jsonl (" in body
    assert body.endswith("): its fields are 'id', 'body'")
    assert content.endswith("): its fields are 'content', 'text' (which is not text)")


@pytest.mark.parametrize("tokenizer", [True, False])
def test_input_that_is_mostly_without_text_is_refused(tokenizer: bool, given: Path, tmp_path: Path) -> None:
    """As soon as that is certain; without the files, the shards that are there are used."""
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.jsonl").write_bytes(_lines_of("text"))
    (tmp_path / "corpus" / "b.jsonl").write_bytes(2 * _lines_of("body"))
    options: dict[str, Any] = {"tokenizer": given if tokenizer else None, "vocab_size": None if tokenizer else 330}
    with pytest.raises(
        UserError, match=r"no text in .* kB of the .* kB of the input: .*b\.jsonl \(.*\): its fields"
    ) as no:
        _run(tmp_path / "corpus", tmp_path / "out", **options)
    for part in ("'id', 'body'", "--text-field", "--exclude"):
        assert part in str(no.value)
    assert not list((tmp_path / "out").rglob("manifest.json"))
    report = _run(tmp_path / "corpus", tmp_path / "out", **options, exclude=["b.jsonl"])
    assert report.notes()[0] == "left out: nothing"
    assert not tokenizer or report.reused


def test_two_do_not_write_to_one_folder(corpus: Path, given: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with open(tmp_path / "out" / ".incomplete", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another `megadistill tokenize` is writing"):
            _run(corpus, tmp_path / "out", tokenizer=given, vocab_size=None)


def test_an_output_that_cannot_be_written_to_is_refused(corpus: Path, given: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written .*: give an --output"):
        _run(corpus, tmp_path / "file" / "out", tokenizer=given, vocab_size=None)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@hypothesis.given(texts=st.lists(st.text("ab\né", min_size=1, max_size=30), max_size=30))
def test_the_training_sample_is_the_documents_with_the_smallest_digests(
    monkeypatch: pytest.MonkeyPatch, texts: list[str]
) -> None:
    monkeypatch.setattr(training_sample, "SAMPLE_BYTES", 100)
    documents = [Document(text.encode()) for text in texts]
    sample = TrainingSample()
    for document in documents:
        sample.add(document)
    left, expected = 100, []
    for document in sorted(documents, key=lambda document: document.digest):
        for line in document.text.split("\n"):
            if left > 0:
                left -= len(line.encode()) + 1
                expected.append(line)
    assert list(sample.lines()) == expected
    assert sample.bytes < 100 + 62, "no more than it needs is held"


def test_progress_is_plain_lines_without_a_terminal(
    corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with console_progress() as show:
        report = _run(corpus, tmp_path / "out", tokenizer=None, vocab_size=330, progress=show)
    lines = capfd.readouterr().err.splitlines()
    stages = ["sample", "sample", "tokenizer", "tokenizer", "shards", "shards"]
    assert [line.split(":")[0] for line in lines] == stages, "a line when a stage begins and when it ends"
    assert "tokens/s" in lines[-1]
    assert "\x1b" not in "".join(lines)
    assert report.seconds > 0


@pytest.mark.parametrize(
    ("text_bytes", "size", "shards"),
    [(10**6, 32, 1), (640 * 10**9, 32, 20_000), (641 * 10**9, 64, 10_016), (60 * 10**12, 512, 117_188)],
)
def test_the_size_of_shards_goes_with_the_corpus(text_bytes: int, size: int, shards: int) -> None:
    """15T tokens are some 60 TB of text: 117,000 shards, in place of two million of 32 MB."""
    assert shard_mb_for(text_bytes) == size
    assert -(-text_bytes // (size * 10**6)) == shards


def test_the_same_command_finds_a_large_corpus_of_an_earlier_release_finished(
    corpus: Path, given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those cut every corpus into shards of 32 MB."""
    options: dict[str, Any] = {"tokenizer": given, "vocab_size": None}
    _run(corpus, tmp_path / "out", **options, shard_mb=32)
    monkeypatch.setattr("megadistill.data.prepare.shard_tasks.ENOUGH_SHARDS", 0)
    assert _run(corpus, tmp_path / "out", **options, shard_mb=None).already_there
    with pytest.raises(UserError, match="--shard-mb was 32, is 64"):
        _run(corpus, tmp_path / "out", **options, shard_mb=64)


def test_many_shards_are_warned_of_before_anything_is_written(
    tmp_path: Path, given: Path, caplog: pytest.LogCaptureFixture
) -> None:
    large = tmp_path / "large.parquet"
    with open(large, "wb") as file:
        file.truncate(3 * 10**12)  # bytes of a file without blocks
    with pytest.raises(UserError, match="parquet"):
        _run(large, tmp_path / "out", tokenizer=given, vocab_size=None, shard_mb=32)
    assert "about 281,250 shards of 32 MB of text" in caplog.text
    assert "--shard-mb 512 would make about 17,578" in caplog.text
    caplog.clear()
    with pytest.raises(UserError, match="parquet"):
        _run(large, tmp_path / "out", tokenizer=given, vocab_size=None, shard_mb=None)
    assert not caplog.text
