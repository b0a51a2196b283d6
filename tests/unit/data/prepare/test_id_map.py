"""Maps of ids that `vocab-map` makes: exact for the same tokens at other places, refused for another segmentation."""

import json
import random
import shutil
from pathlib import Path

import pytest

from megadistill.cli.main import run_command
from megadistill.data import Manifest
from megadistill.data.prepare.id_map import make_vocab_map
from megadistill.data.tokenizers.sentencepiece import train_tokenizer
from megadistill.errors import UserError
from tests.unit.data.corpora import BODY, byte_level_tokenizer


def _folder(data_set: Path, folder: Path) -> Path:
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(data_set / "tokenizer" / name, folder)
    return folder


def _renumbered(folder: Path, places: list[int], *, without: int = 0) -> Path:
    """The tokenizer with id i at places[i]; the `without` highest ones are left out, and merges that need them."""
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    vocab = values["model"]["vocab"]
    present = {token: id for token, id in vocab.items() if id < len(vocab) - without}
    values["model"]["vocab"] = {token: places[id] for token, id in present.items()}
    values["model"]["merges"] = [m for m in values["model"]["merges"] if {*m, "".join(m)} <= present.keys()]
    for token in values["added_tokens"]:
        token["id"] = places[token["id"]]
    path.write_text(json.dumps(values), encoding="utf-8")
    return folder


@pytest.fixture
def places(manifest: Manifest) -> list[int]:
    order = list(range(manifest.vocab_size))
    random.Random(3).shuffle(order)
    return order


def test_the_same_tokens_at_other_places_are_mapped(
    data_set: Path, manifest: Manifest, places: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = _renumbered(_folder(data_set, tmp_path / "teacher"), places)
    data = str(data_set / "train" / "manifest.json")
    arguments = ["--student", str(data_set / "tokenizer"), "--teacher", str(teacher), "--data", data]
    assert run_command(["vocab-map", *arguments, "--output", str(tmp_path / "map.json")]) == 0
    assert json.loads((tmp_path / "map.json").read_text()) == places
    out = capsys.readouterr().out
    assert f"{manifest.vocab_size} of the student's {manifest.vocab_size} ids (100.00%)" in out
    assert "100.0000% of the tokens of the data" in out
    assert "teacher.vocab_map=" in out


def test_tokens_that_the_teacher_lacks_are_counted(data_set: Path, places: list[int], tmp_path: Path) -> None:
    """A teacher whose vocabulary is a little smaller: `-1` for the others, with what that means for the KL."""
    teacher = _renumbered(_folder(data_set, tmp_path / "teacher"), list(range(len(places))), without=3)
    student = data_set / "tokenizer"
    made = make_vocab_map(student, teacher, tmp_path / "map.json", data=None)
    assert made.ids == [*range(len(places) - 3), -1, -1, -1]
    assert made.tokens_mapped is None
    assert any("renormalized" in line for line in made.lines())


def test_ends_of_documents_are_mapped_whatever_their_names(data_set: Path, tmp_path: Path) -> None:
    teacher = _folder(data_set, tmp_path / "teacher")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (teacher / name).read_text(encoding="utf-8")
        (teacher / name).write_text(text.replace('"</s>"', '"<|end|>"'), encoding="utf-8")
    made = make_vocab_map(data_set / "tokenizer", teacher, tmp_path / "map.json", data=None)
    assert made.ids == list(range(len(made.ids)))


def test_tokenizers_that_cut_text_differently_are_refused(data_set: Path, tmp_path: Path) -> None:
    other = byte_level_tokenizer(tmp_path / "other", BODY)
    smaller = tmp_path / "smaller"
    train_tokenizer([BODY] * 3, vocab_size=310).write(smaller)
    for teacher in (other, smaller):
        with pytest.raises(UserError, match=r"differently, so a map .* tokenize \.\.\. --tokenizer") as refused:
            make_vocab_map(data_set / "tokenizer", teacher, tmp_path / "map.json", data=None)
        assert "\n" not in str(refused.value)
    assert not (tmp_path / "map.json").exists()


def test_data_of_another_tokenizer_is_refused(data_set: Path, tmp_path: Path) -> None:
    other = byte_level_tokenizer(tmp_path / "other", BODY)
    with pytest.raises(UserError, match="was made with 600 ids, the student's tokenizer has 300"):
        make_vocab_map(other, other, tmp_path / "map.json", data=str(data_set / "train" / "manifest.json"))
