"""`tokenize`: what is taken, where it goes, what is counted, what is refused; the same bytes twice."""

import hashlib
import io
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from rich.console import Console

from megadistill.data import Manifest, TokenizeReport, TokenStream, tokenize
from megadistill.data.tokenizer import Tokenizer
from megadistill.errors import UserError
from tests.unit.data.conftest import SEQUENCE, VOCAB, run_tokenize

BODY = "def hello(name: str) -> str:\n    return f'hello {name}, this is text number {n} of many'\n\n\n"


def _corpus(folder: Path, count: int = 40) -> Path:
    folder.mkdir()
    for i in range(count):
        (folder / f"doc{i:03d}.txt").write_text(BODY.replace("{n}", str(i * 7919)) * (1 + i % 5), encoding="utf-8")
    return folder


def _run(inputs: Path, output: Path, **changes: Any) -> TokenizeReport:
    options: dict[str, Any] = {"tokenizer": None, "vocab_size": 330, "sequence_length": 16, "heldout_fraction": 0.3}
    return tokenize([inputs], output, **options | {"progress": lambda stage, **numbers: None} | changes)


def _tree(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_a_second_run_gives_the_same_bytes(data_set: Path, tmp_path: Path) -> None:
    run_tokenize(tmp_path / "again")
    first = _tree(data_set)
    assert first == _tree(tmp_path / "again")
    assert {"train/manifest.json", "train/shard-00001.tar", "train/shard-00001.tar.idx.npy"} <= first.keys()
    assert {"heldout/manifest.json", "tokenizer/tokenizer.model", "tokenizer/tokenizer.json"} <= first.keys()
    assert not [name for name in first if name.endswith(".tmp")]


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_plain_webdataset_reads_the_same_units(data_set: Path, split: str) -> None:
    manifest = Manifest.load(data_set / split / "manifest.json")
    shards = [str(manifest.folder / shard.name) for shard in manifest.shards]
    samples = list(webdataset.WebDataset(shards, shardshuffle=False).decode())
    assert len(samples) == manifest.units
    stream = TokenStream(manifest, seed=1, batch_slots=1, rank=0, world_size=1)
    batch = stream.batch(range(manifest.units))
    ours = {(*tokens, labels[-1]) for tokens, labels in zip(batch.tokens.tolist(), batch.labels.tolist(), strict=True)}
    assert {tuple(sample["tokens.npy"].tolist()) for sample in samples} == ours
    assert samples[0]["tokens.npy"].dtype == np.uint16


def test_units_are_the_documents_in_order_and_text_bytes_is_theirs(data_set: Path, manifest: Manifest) -> None:
    tokenizer = Tokenizer.load(data_set / "tokenizer" / "tokenizer.model")
    assert tokenizer.sha256 == manifest.tokenizer.sha256
    assert manifest.tokenizer_folder == data_set / "tokenizer"
    assert manifest.vocab_size == tokenizer.vocab_size == VOCAB
    units = [
        sample["tokens.npy"].astype(np.int32)
        for shard in manifest.shards
        for sample in webdataset.WebDataset(str(manifest.folder / shard.name), shardshuffle=False).decode()
    ]
    labels = np.concatenate([unit[1:] for unit in units])
    assert manifest.tokens == len(labels) == manifest.units * SEQUENCE
    assert manifest.text_bytes == len(tokenizer.decode(labels).encode())
    texts = tokenizer.decode(np.concatenate([units[0][:1], labels]))
    assert texts.startswith("# Copyright"), "the first document of the folder, in sorted order"


def test_splits_are_disjoint_and_copies_stay_together(tmp_path: Path) -> None:
    corpus = _corpus(tmp_path / "corpus")
    for path in sorted(corpus.iterdir()):
        path.with_name(f"copy-of-{path.name}").write_bytes(path.read_bytes())
    report = _run(corpus, tmp_path / "out")
    assert report.train.documents + report.heldout.documents == 80
    assert report.train.documents % 2 == report.heldout.documents % 2 == 0
    assert 0.1 < report.heldout.documents / 80 < 0.5
    tokenizer = Tokenizer.load(tmp_path / "out" / "tokenizer" / "tokenizer.model")
    seen = {split: _text(tmp_path / "out" / split, tokenizer) for split in ("train", "heldout")}
    for i in range(40):
        marker = f"text number {i * 7919} of"
        assert (marker in seen["train"]) != (marker in seen["heldout"]), marker


def _text(folder: Path, tokenizer: Tokenizer) -> str:
    """Everything of a split but the tail, in the order of the documents."""
    manifest = Manifest.load(folder / "manifest.json")
    shards = [str(folder / shard.name) for shard in manifest.shards]
    units = [sample["tokens.npy"] for sample in webdataset.WebDataset(shards, shardshuffle=False).decode()]
    return tokenizer.decode(np.concatenate([unit[:-1] for unit in units]).astype(np.int32))


def test_what_is_taken(tmp_path: Path) -> None:
    corpus = _corpus(tmp_path / "corpus")
    (corpus / "empty.txt").write_text(" \n\t")
    (corpus / "latin.txt").write_bytes(b"caf\xe9")
    (corpus / "code.py").write_text("not text")
    (corpus / "test").mkdir()
    (corpus / "test" / "inside.txt").write_text("left out")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.txt").write_text("elsewhere")
    (corpus / "linked.txt").symlink_to(outside / "secret.txt")
    os.symlink(outside, corpus / "linked")
    report = _run(corpus, tmp_path / "out", include=["*.txt"], exclude=["*/test/*"])
    assert report.train.documents + report.heldout.documents == 40
    assert (report.empty, report.invalid) == (1, 1)
    assert Manifest.load(tmp_path / "out" / "train" / "manifest.json").source.inputs == ("corpus",)
    table = io.StringIO()
    Console(file=table, width=200).print(report.table())
    assert f"{report.train.tokens:,}" in table.getvalue()
    assert "1 empty documents, 1 that are not UTF-8" in table.getvalue()


def test_a_given_model_is_used_and_copied(data_set: Path, tmp_path: Path) -> None:
    given = data_set / "tokenizer" / "tokenizer.model"
    _run(_corpus(tmp_path / "corpus"), tmp_path / "out", tokenizer=given, vocab_size=None)
    assert (tmp_path / "out" / "tokenizer" / "tokenizer.model").read_bytes() == given.read_bytes()
    assert Manifest.load(tmp_path / "out" / "train" / "manifest.json").vocab_size == VOCAB


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": None}, "either --tokenizer"),
        ({"vocab_size": 260}, "300 is the least"),
        ({"vocab_size": 9000}, "does not fit the text: Vocabulary size too high"),
        ({"sequence_length": 0}, "--sequence-length 0"),
        ({"units_per_shard": 0}, "--units-per-shard 0"),
        ({"heldout_fraction": 1.0}, "between 0 and 1"),
        ({"heldout_fraction": math.nan}, "between 0 and 1"),
        ({"heldout_fraction": 1e-9}, "puts all 40 documents into train: raise it"),
        ({"heldout_fraction": 1 - 1e-9}, "puts all 40 documents into heldout: lower it"),
        ({"sequence_length": 10**6}, "train split, .* fewer than the 1000001 tokens"),
        ({"include": ["*.md"]}, "matches --include"),
        ({"tokenizer": Path("missing.model"), "vocab_size": None}, "missing.model cannot be read"),
    ],
)
def test_refused_with_the_way_out_and_without_a_manifest(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as refused:
        _run(_corpus(tmp_path / "corpus"), tmp_path / "out", **changes)
    assert "\n" not in str(refused.value)
    assert not list((tmp_path / "out").rglob("manifest.json"))


def test_no_text_and_no_input_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UserError, match="1 documents are empty"):
        _run(tmp_path / "empty.txt", tmp_path / "out")
    with pytest.raises(UserError, match="does not exist"):
        _run(tmp_path / "nowhere", tmp_path / "out")


def test_a_finished_split_is_not_overwritten_and_an_unfinished_one_is(tmp_path: Path) -> None:
    corpus = _corpus(tmp_path / "corpus")
    _run(corpus, tmp_path / "out")
    before = _tree(tmp_path / "out")
    with pytest.raises(UserError, match="a split is never changed"):
        _run(corpus, tmp_path / "out", sequence_length=8)
    assert _tree(tmp_path / "out") == before
    for split in ("train", "heldout"):
        (tmp_path / "out" / split / "manifest.json").unlink()
        (tmp_path / "out" / split / "shard-00000.tar").write_bytes(b"half a sh")
    _run(corpus, tmp_path / "out")
    assert _tree(tmp_path / "out") == before


def test_progress_is_plain_lines_without_a_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    report = _run(_corpus(tmp_path / "corpus"), tmp_path / "out", progress=None)
    lines = capfd.readouterr().err.splitlines()
    stages = ["tokenizer", "tokenizer", "train", "train", "heldout", "heldout"]
    assert [line.split(":")[0] for line in lines] == stages, "a line when a stage begins and when it ends"
    assert [line.split(":")[0] for line in lines if line.endswith("tokens/s")] == ["train", "heldout"]
    assert "\x1b" not in "".join(lines)
    assert report.seconds > 0
