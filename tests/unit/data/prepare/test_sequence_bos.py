"""A tokenizer that puts BOS before a text: every sequence of `tokenize` begins with it, and the manifest records it."""

import io
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from megadistill.data import missing_bos
from megadistill.data.prepare.finished_output import RECORD_FILE
from megadistill.data.prepare.index_external import index
from megadistill.data.prepare.tokenize import tokenize
from megadistill.data.prepare.tokenize_report import TokenizeReport
from megadistill.data.prepare.verify import info, verify
from megadistill.data.shards.manifest import Manifest, PackerRecord
from megadistill.data.shards.reader import SequenceReader
from megadistill.data.stream.mixture import Mixture
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


@pytest.mark.parametrize("packer", ["chunk", "bestfit"])
def test_bos_and_eos_of_one_id_are_told_apart(packer: str, corpus: Path, tmp_path: Path) -> None:
    same = byte_level_tokenizer(tmp_path / "same", BODY, eos="<|b|>")
    reports = [_run(corpus, tmp_path / each.name, tokenizer=each, packer=packer) for each in (same, corpus / "bos")]
    assert load_tokenizer(same).bos == load_tokenizer(same).eos == 0
    assert reports[0].train.dropped == reports[1].train.dropped
    assert reports[0].train.manifest.tokens == reports[1].train.manifest.tokens


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


def _verified(location: Path) -> list[str]:
    return verify(location, quick=False, progress=lambda stage, **numbers: None).lines()


@pytest.mark.parametrize("packer", ["chunk", "bestfit"])
def test_verify_compares_the_first_tokens_with_the_record(packer: str, corpus: Path, tmp_path: Path) -> None:
    _run(corpus, tmp_path / "out", packer=packer, insert_bos=False)
    split = tmp_path / "out" / "train"
    assert _verified(split) == []
    manifest = Manifest.load(split / "manifest.json")
    record = manifest.packer.model_copy(update={"sequence_bos": True})
    values = {name: getattr(manifest, name) for name in Manifest.model_fields}
    Manifest(**{**values, "packer": record}).write(split)
    lines = _verified(split)
    without = sum(any(tokens[bound] for bound in bounds[:-1]) for tokens, bounds in _sequences(tmp_path / "out"))
    assert len(lines) == without > 1
    where = r"shard 0: sequence \d+: expected BOS \(id 0\), as its manifest records, at token \d+, found id \d+"
    assert re.fullmatch(where, lines[0])


@pytest.mark.parametrize("insert_bos", [True, False])
def test_tars_of_another_program_are_looked_at(insert_bos: bool, corpus: Path, tmp_path: Path) -> None:
    _run(corpus, tmp_path / "out", insert_bos=insert_bos)
    tars = tmp_path / "tars"
    tars.mkdir()
    for tar in (tmp_path / "out" / "train").glob("*.tar"):
        shutil.copy(tar, tars)
    manifest = index(
        tars, tokenizer=corpus / "bos", member="tokens.npy", dtype=None, split="train", progress=lambda *_, **__: None
    )
    assert (manifest.packer.bos, manifest.packer.sequence_bos) == (0, insert_bos)
    assert _verified(tars) == []


def test_info_tells_where_bos_stands(corpus: Path, tmp_path: Path) -> None:
    text = io.StringIO()
    for name, insert_bos in (("with", True), ("without", False)):
        _run(corpus, tmp_path / name, insert_bos=insert_bos)
        Console(file=text, width=200).print(*info(tmp_path / name))
    assert "id 0, in front of every sequence" in text.getvalue()
    assert "id 0, not in front of every sequence" in text.getvalue()


def _mixture(output: Path, **options: Any) -> Mixture:
    return Mixture.of(Manifest.load(output / "train" / "manifest.json"), **options)


def test_sequences_without_the_bos_of_a_model_are_reported_with_numbers_and_the_way_out(
    corpus: Path, tmp_path: Path
) -> None:
    for name, options in (("old", {"insert_bos": False}), ("new", {})):
        _run(corpus, tmp_path / name, **options)
    problem = missing_bos(corpus / "bos", _mixture(tmp_path / "old"), key="data.insert_bos=true")
    assert problem is not None
    begin = sum(tokens[0] == 0 for tokens, _ in _sequences(tmp_path / "old"))
    count = _mixture(tmp_path / "old").first.sequences
    assert problem.startswith(f"{begin} of the first {count:,} sequences begin with BOS (id 0), which the tokenizer in")
    assert f"megadistill tokenize ... --tokenizer {corpus / 'bos'}" in problem
    assert problem.endswith("or have it put in at reading time: data.insert_bos=true")
    assert missing_bos(None, _mixture(tmp_path / "old"), key="") is not None, "the data's own tokenizer"
    for mixture in (_mixture(tmp_path / "new"), _mixture(tmp_path / "old", insert_bos=True)):
        assert missing_bos(corpus / "bos", mixture, key="") is None


def test_a_manifest_that_does_not_record_bos_is_looked_at(corpus: Path, tmp_path: Path) -> None:
    """As if another program had packed with BOS, and an earlier release had indexed its shards."""
    _run(corpus, tmp_path / "out")
    split = tmp_path / "out" / "train"
    manifest = Manifest.load(split / "manifest.json")
    record = PackerRecord(name="external", version=1, bos=None, eos=None)
    values = {name: getattr(manifest, name) for name in Manifest.model_fields}
    Manifest(**{**values, "packer": record}).write(split)
    assert missing_bos(corpus / "bos", _mixture(tmp_path / "out"), key="") is None
    assert _mixture(tmp_path / "out", insert_bos=True).bos == 0, "from the tokenizer's files"


def test_a_tokenizer_without_bos_misses_none(corpus: Path, tmp_path: Path) -> None:
    _run(corpus, tmp_path / "out", tokenizer=None, vocab_size=330)
    assert missing_bos(None, _mixture(tmp_path / "out"), key="") is None
    assert missing_bos(tmp_path / "out" / "tokenizer", _mixture(tmp_path / "out"), key="") is None
