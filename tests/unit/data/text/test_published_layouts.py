"""Corpora in the layouts in which they are published, and one corpus in every form: the same shards."""

import gzip
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from backports import zstd

from megadistill.cli.main import run_command
from megadistill.data.shards.manifest import Manifest
from megadistill.data.text.corpus import Corpus
from megadistill.data.text.input_files import find_files
from megadistill.data.tokenizers.sentencepiece import train_tokenizer
from tests.documented import every_command
from tests.unit.data.text.tars import write_tar
from tests.unit.data.text.test_arrow_rows import save_to_disk

TEXTS = [f"Page {i}: it was the {i}th of its kind, and \u00e9 {'so ' * (i % 7)}on.\n" * 5 for i in range(60)]


def _jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def fineweb(folder: Path) -> None:
    """`data/CC-MAIN-*/000_00000.parquet` with the columns of FineWeb, and the README that is downloaded with them."""
    rows = [
        {
            "text": text, "id": f"<urn:uuid:{i:032x}>", "dump": "CC-MAIN-2024-10", "url": f"https://example.org/{i}",
            "date": "2024-02-25T00:00:00Z", "file_path": "s3://commoncrawl/crawl-data/x.warc.gz", "language": "en",
            "language_score": 0.97, "token_count": len(text) // 4,
        }
        for i, text in enumerate(TEXTS)
    ]  # fmt: skip
    for number, part in enumerate((rows[:40], rows[40:])):
        path = folder / "data" / "CC-MAIN-2024-10" / f"000_{number:05d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(part), path, row_group_size=15, compression="zstd")
    (folder / "README.md").write_text("# FineWeb")


def dclm(folder: Path) -> None:
    """`global-shard_*/local-shard_*/shard_*_processed.jsonl.zst` with the fields of DCLM, and one as `.jsonl.gz`."""
    rows = [
        {
            "bff_contained_ngram_count_before_dedupe": i, "language_id_whole_page_fasttext": {"en": 0.98},
            "metadata": {"WARC-Type": "response", "Content-Length": "9", "WARC-Truncated": None},
            "previous_word_count": 9, "text": text, "url": f"https://example.org/{i}",
            "warcinfo": "software: Apache Nutch\r\n",
            "fasttext_openhermes_reddit_eli5_vs_rw_v2_bigram_200k_train_prob": 0.2,
        }
        for i, text in enumerate(TEXTS)
    ]  # fmt: skip
    place = folder / "global-shard_01_of_10" / "local-shard_0_of_10"
    place.mkdir(parents=True)
    (place / "shard_00000000_processed.jsonl.zst").write_bytes(zstd.compress(_jsonl(rows[:25])))
    (place / "shard_00000001_processed.jsonl.gz").write_bytes(gzip.compress(_jsonl(rows[25:])))


def webdataset(folder: Path) -> None:
    for number, part in enumerate((TEXTS[:30], TEXTS[30:])):
        members: dict[str, bytes] = {}
        for i, text in enumerate(part):
            record = json.dumps({"text": text, "url": "x"}).encode()
            form = {".txt": text.encode(), ".json": record, ".txt.gz": gzip.compress(text.encode())}
            suffix = [*form][i % 3]
            members |= {f"{number}/{i:06d}{suffix}": form[suffix], f"{number}/{i:06d}.cls": b"1"}
        write_tar(folder / f"shard-{number:06d}.tar", members)


def datasets_folder(folder: Path) -> None:
    save_to_disk(folder / "train", TEXTS, files=3)
    save_to_disk(folder / "validation", ["Other text. " * 20], files=1)
    (folder / "dataset_dict.json").write_text('{"splits": ["train", "validation"]}')


def json_lines(folder: Path) -> None:
    (folder / "a.jsonl").write_bytes(_jsonl([{"text": text} for text in TEXTS]))


LAYOUTS: dict[str, Callable[[Path], None]] = {
    "fineweb": fineweb, "dclm": dclm, "tars": webdataset, "saved": datasets_folder
}  # fmt: skip
"""Names of folders in docs/data.md -> what writes them."""


def _documented(name: str) -> list[str]:
    """The words of the documented command for a layout."""
    lines = [command.line for command in every_command() if command.line.startswith(f"megadistill tokenize {name}/")]
    return shlex.split(lines[0])[1:]


@pytest.mark.parametrize("name", LAYOUTS)
def test_documents_are_the_texts_of_a_published_layout(name: str, tmp_path: Path) -> None:
    LAYOUTS[name](tmp_path)
    words = _documented(name)
    include = words[words.index("--include") + 1]
    read = Corpus(find_files([tmp_path], [include], [], output=Path("nowhere")), text_field="text")
    assert [document.text for document in read] == TEXTS
    assert not read.left_out


def test_the_documented_commands_give_the_same_shards_for_every_layout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("teacher").mkdir()
    Path("teacher", "tokenizer.model").write_bytes(train_tokenizer(TEXTS, vocab_size=300).model)
    Path("lines").mkdir()
    json_lines(Path("lines"))
    made: set[tuple[Any, ...]] = set()
    smaller = ["--sequence-length", "64", "--heldout-fraction", "0.2", "--shard-mb", "0.004", "--processes", "1"]
    lines = ["tokenize", "lines", "--tokenizer", "teacher/", "--output", "data/lines", "--sequence-length", "64"]
    for name, words in {"lines": lines, **{name: _documented(name) for name in LAYOUTS}}.items():
        if name in LAYOUTS:
            Path(name).mkdir()
            LAYOUTS[name](Path(name))
        assert run_command([*words, *smaller]) == 0
        assert "left out: nothing" in capsys.readouterr().out
        manifests = [Manifest.load(Path("data", name, split, "manifest.json")) for split in ("train", "heldout")]
        assert sum(manifest.documents or 0 for manifest in manifests) == len(TEXTS)
        shards = [shard.sha256 for manifest in manifests for shard in manifest.shards]
        assert len(shards) > 3
        made.add((*shards, *(manifest.text_bytes for manifest in manifests)))
    assert len(made) == 1
