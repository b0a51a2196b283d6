"""A tokenizer that puts BOS before a text: every sequence of `tokenize` begins with it, and the manifest records it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megadistill.data.prepare.finished_output import RECORD_FILE
from megadistill.data.prepare.tokenize import tokenize
from megadistill.data.prepare.tokenize_report import TokenizeReport
from megadistill.data.shards.manifest import Manifest
from megadistill.data.shards.reader import SequenceReader
from megadistill.data.tokenizers.tokenizer import load_tokenizer
from megadistill.errors import UserError
from tests.unit.data.corpora import BODY, byte_level_tokenizer, document_texts, write_texts
from tests.unit.data.reference_packing import sequences_with_bos

SEQUENCE = 24


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with texts/, and bos/, a tokenizer that puts id 0 before a text."""
    folder = tmp_path_factory.mktemp("corpus")
    write_texts(folder / "texts", document_texts())
    byte_level_tokenizer(folder / "bos", BODY)
    return folder


def _run(corpus: Path, output: Path, **changes: Any) -> TokenizeReport:
    options: dict[str, Any] = {
        "sequence_length": SEQUENCE,
        "heldout_fraction": 0,
        "processes": 1,
        "tokenizer": corpus / "bos",
        "vocab_size": None,
    }
    return tokenize([corpus / "texts"], output, **options | {"progress": lambda stage, **numbers: None} | changes)


def _sequences(output: Path) -> Iterator[tuple[list[int], list[int]]]:
    manifest = Manifest.load(output / "train" / "manifest.json")
    for number in range(len(manifest.shards)):
        for batch in SequenceReader(manifest).read_shard(number):
            yield from zip(batch.tokens.tolist(), [bounds.tolist() for bounds in batch.bounds], strict=True)


def test_every_sequence_begins_with_bos_and_each_byte_of_text_is_predicted_once(corpus: Path, tmp_path: Path) -> None:
    report = _run(corpus, tmp_path / "out").train
    tokenizer = load_tokenizer(corpus / "bos")
    assert tokenizer.bos == 0
    framed = [[0, *tokenizer.encode(text).tolist(), tokenizer.eos] for text in document_texts()]
    stream = [token for document in framed for token in document]
    starts = [place == 0 for document in framed for place in range(len(document))]
    # The reference's BOS is another id than this tokenizer's.
    shifted = sequences_with_bos([token + 1 for token in stream], starts, SEQUENCE)
    expected = [([token - 1 for token in tokens], bounds) for tokens, bounds in shifted]
    assert list(_sequences(tmp_path / "out")) == expected
    labels = [token for tokens, _ in expected for token in tokens[1:]]
    manifest = report.manifest
    assert manifest.packer.model_dump() == {
        "name": "chunk",
        "version": 2,
        "bos": 0,
        "eos": tokenizer.eos,
        "sequence_bos": True,
    }
    assert manifest.tokens == len(labels) == manifest.sequences * SEQUENCE
    rest = [token for token in stream if token != 0][len([label for label in labels if label != 0]) :]
    assert report.dropped == len(rest)
    text_bytes = sum(len(text.encode()) for text in document_texts())
    assert manifest.text_bytes == text_bytes - sum(int(tokenizer.piece_bytes[token]) for token in rest)


def test_bestfit_predicts_all_of_the_text_and_drops_nothing(corpus: Path, tmp_path: Path) -> None:
    report = _run(corpus, tmp_path / "out", packer="bestfit").train
    tokenizer = load_tokenizer(corpus / "bos")
    assert report.dropped == 0
    assert report.manifest.packer.sequence_bos
    assert report.manifest.text_bytes == sum(len(text.encode()) for text in document_texts())
    assert report.manifest.tokens == sum(len(tokenizer.encode(text)) + 1 for text in document_texts())
    for tokens, bounds in _sequences(tmp_path / "out"):
        assert [place for place, token in enumerate(tokens[: bounds[-1]]) if token == 0] == bounds[:-1]


def test_without_insert_bos_sequences_are_those_of_earlier_releases(corpus: Path, tmp_path: Path) -> None:
    report = _run(corpus, tmp_path / "out", insert_bos=False).train
    stream = [0]
    for text in document_texts():
        tokenizer = load_tokenizer(corpus / "bos")
        stream += [*tokenizer.encode(text).tolist(), tokenizer.eos, 0]
    tokens = [tokens for tokens, _ in _sequences(tmp_path / "out")]
    assert tokens == [stream[k * SEQUENCE : (k + 1) * SEQUENCE + 1] for k in range(len(tokens))]
    assert "sequence_bos" not in json.loads((tmp_path / "out" / "train" / "manifest.json").read_text())["packer"]
    assert report.manifest.packer.bos == 0


def test_a_tokenizer_without_bos_is_packed_as_before_and_nothing_new_is_recorded(corpus: Path, tmp_path: Path) -> None:
    """The bytes of both are those of a release that had no such option."""
    trained = {"tokenizer": None, "vocab_size": 330}
    for name, insert_bos in (("with", True), ("without", False)):
        _run(corpus, tmp_path / name, insert_bos=insert_bos, **trained)
    files = ("train/manifest.json", "train/shard-00000.tar", RECORD_FILE)
    for file in files:
        assert (tmp_path / "with" / file).read_bytes() == (tmp_path / "without" / file).read_bytes()
    assert "sequence_bos" not in (tmp_path / "with" / "train" / "manifest.json").read_text()
    assert "bos" not in (tmp_path / "with" / RECORD_FILE).read_text()


def test_a_data_set_of_an_earlier_release_is_not_taken_for_one_with_bos(corpus: Path, tmp_path: Path) -> None:
    _run(corpus, tmp_path / "out", insert_bos=False)
    record = tmp_path / "out" / RECORD_FILE
    values = json.loads(record.read_text())
    del values["options"]["--insert-bos"]
    record.write_text(json.dumps(values))
    with pytest.raises(UserError, match="--insert-bos was not given, is True: give another --output"):
        _run(corpus, tmp_path / "out")
