"""A model's tokenizer against a data set's: equal where every text gets the same ids, whatever files it lies in."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from megadistill.data import Manifest, tokenize, tokenizer_difference
from megadistill.data.tokenizers.huggingface import HuggingFaceTokenizer
from megadistill.errors import UserError
from tests.unit.data.conftest import STDLIB
from tests.unit.data.corpora import BODY, byte_level_tokenizer, document_texts, write_texts


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """A data set whose tokenizer is a tokenizer.json alone. Not to be written to."""
    folder = tmp_path_factory.mktemp("byte-level")
    tokenizer = byte_level_tokenizer(folder / "tokenizer", BODY + STDLIB.joinpath("email/message.py").read_text())
    return _tokenized(write_texts(folder / "corpus", document_texts()), folder / "set", tokenizer)


def _tokenized(corpus: Path, output: Path, tokenizer: Path) -> Manifest:
    tokenize(
        [corpus],
        output,
        tokenizer=tokenizer,
        vocab_size=None,
        sequence_length=16,
        heldout_fraction=0,
        progress=lambda stage, **numbers: None,
    )
    return Manifest.load(output / "train" / "manifest.json")


def _copied(manifest: Manifest, folder: Path, *names: str) -> Path:
    """A model's folder with these files of the data's tokenizer."""
    folder.mkdir()
    for name in names:
        shutil.copy(Path(manifest.folder.location).parent / "tokenizer" / name, folder / name)
    return folder


def _changed(folder: Path, change: Callable[[dict[str, Any]], None], name: str = "tokenizer.json") -> Path:
    values = json.loads((folder / name).read_text(encoding="utf-8"))
    change(values)
    (folder / name).write_text(json.dumps(values), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    "names", [("tokenizer.json",), ("tokenizer.model",), ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")]
)
def test_any_file_of_the_same_tokenizer_is_the_same(manifest: Manifest, names: tuple[str, ...], tmp_path: Path) -> None:
    assert tokenizer_difference(_copied(manifest, tmp_path / "model", *names), manifest) is None


def _more_special_tokens(values: dict[str, Any]) -> None:
    values["added_tokens"].append({**values["added_tokens"][0], "id": 300, "content": "<|pad|>"})


def _as_of_old(values: dict[str, Any]) -> None:
    values["model"]["merges"] = [" ".join(merge) for merge in values["model"]["merges"]]
    values["padding"] = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0}
    values["padding"] |= {"pad_type_id": 0, "pad_token": "<|b|>"}


def _without_begin_rule(values: dict[str, Any]) -> None:
    values["post_processor"] = None


def _renamed_reserved(values: dict[str, Any]) -> None:
    """Reserved tokens renamed, which later releases of a model family do."""
    values["post_processor"] = None
    values["added_tokens"][0]["content"] = "<|reserved|>"
    values["model"]["vocab"] = {"<|reserved|>" if t == "<|b|>" else t: i for t, i in values["model"]["vocab"].items()}


@pytest.mark.parametrize("change", [_more_special_tokens, _as_of_old, _without_begin_rule])
def test_what_changes_no_ids_is_no_difference(
    change: Callable[[dict[str, Any]], None], byte_level: Manifest, tmp_path: Path
) -> None:
    folder = _changed(_copied(byte_level, tmp_path / "model", "tokenizer.json"), change)
    assert tokenizer_difference(folder, byte_level) is None


def test_reserved_tokens_may_have_other_names_but_for_those_that_the_data_uses(
    byte_level: Manifest, tmp_path: Path
) -> None:
    folder = _changed(_copied(byte_level, tmp_path / "model", "tokenizer.json"), _renamed_reserved)
    unused = byte_level.model_copy(update={"packer": byte_level.packer.model_copy(update={"bos": None})})
    assert tokenizer_difference(folder, unused.lying_in(byte_level.folder)) is None
    difference = tokenizer_difference(folder, byte_level)
    assert difference is not None
    assert "1 of 300 ids stand for other tokens, such as id 0: '<|b|>' in" in difference
    assert "'<|reserved|>' in" in difference


def _permuted(values: dict[str, Any]) -> None:
    vocab = values["model"]["vocab"]
    values["model"]["vocab"] = {token: id if id < 2 else 301 - id for token, id in vocab.items()}


def _other_merges(values: dict[str, Any]) -> None:
    values["model"]["merges"] = values["model"]["merges"][::-1]


def _one_merge_less(values: dict[str, Any]) -> None:
    values["model"]["merges"].pop()


def _lower_case(values: dict[str, Any]) -> None:
    values["normalizer"] = {"type": "Lowercase"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_permuted, "298 of 300 ids stand for other tokens, such as id 2: "),
        (_other_merges, "they cut text differently: "),
        (_one_merge_less, "they cut text differently: "),
        (_lower_case, "they cut text differently: 'T"),
    ],
)
def test_what_changes_ids_is_named(
    change: Callable[[dict[str, Any]], None], says: str, byte_level: Manifest, tmp_path: Path
) -> None:
    difference = tokenizer_difference(
        _changed(_copied(byte_level, tmp_path / "model", "tokenizer.json"), change), byte_level
    )
    assert difference is not None
    assert says in difference
    assert "\n" not in difference


def test_other_scores_of_the_same_pieces_are_named(manifest: Manifest, tmp_path: Path) -> None:
    folder = _copied(manifest, tmp_path / "model", "tokenizer.model")
    proto = ModelProto.FromString((folder / "tokenizer.model").read_bytes())
    normal = [piece for piece in proto.pieces if piece.type == piece.NORMAL]
    for piece, score in zip(normal, [piece.score for piece in reversed(normal)], strict=True):
        piece.score = score
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString())
    difference = tokenizer_difference(folder, manifest)
    assert difference is not None
    assert "they cut text differently" in difference


def test_another_trainer_record_of_the_same_model_is_no_difference(manifest: Manifest, tmp_path: Path) -> None:
    folder = _copied(manifest, tmp_path / "model", "tokenizer.model")
    proto = ModelProto.FromString((folder / "tokenizer.model").read_bytes())
    proto.trainer_spec.model_prefix = "elsewhere"
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString())
    assert tokenizer_difference(folder, manifest) is None


def test_tokenizers_of_two_kinds_are_compared_by_what_they_do(
    manifest: Manifest, byte_level: Manifest, tmp_path: Path
) -> None:
    model = _copied(manifest, tmp_path / "model", "tokenizer.model")
    difference = tokenizer_difference(model, byte_level)
    assert difference is not None
    assert "ids stand for other tokens" in difference
    only_json = tmp_path / "json"
    shutil.copytree(manifest.folder.location, only_json / "train")
    shutil.copytree(Path(manifest.folder.location).parent / "tokenizer", only_json / "tokenizer")
    (only_json / "tokenizer" / "tokenizer.model").unlink()
    record = manifest.tokenizer.model_copy(
        update={
            "kind": "huggingface",
            "file": "../tokenizer/tokenizer.json",
            "sha256": HuggingFaceTokenizer(only_json / "tokenizer" / "tokenizer.json").sha256,
        }
    )
    described = manifest.model_dump(mode="json") | {"tokenizer": record.model_dump()}
    Manifest.model_validate_json(json.dumps(described)).write(only_json / "train")
    assert tokenizer_difference(model, Manifest.load(only_json / "train" / "manifest.json")) is None


def test_a_folder_whose_files_give_different_ids_is_refused(
    manifest: Manifest, byte_level: Manifest, tmp_path: Path
) -> None:
    """The result of copying one file of another tokenizer there."""
    folder = _copied(byte_level, tmp_path / "model", "tokenizer.json")
    shutil.copy(Path(manifest.folder.location).parent / "tokenizer" / "tokenizer.model", folder)
    for data in (manifest, byte_level):
        with pytest.raises(UserError, match=r"tokenizer files of .* contradict each other: .* keep the one") as refused:
            tokenizer_difference(folder, data)
        assert "\n" not in str(refused.value)


def test_added_tokens_of_the_config_must_be_those_of_the_tokenizer(manifest: Manifest, tmp_path: Path) -> None:
    folder = _copied(manifest, tmp_path / "model", "tokenizer.json", "tokenizer_config.json")
    _changed(
        folder,
        lambda values: values["added_tokens"].append({**values["added_tokens"][0], "id": 600} | {"content": "<a>"}),
    )
    assert tokenizer_difference(folder, manifest) is None

    def rename(values: dict[str, Any]) -> None:
        values["added_tokens_decoder"] = {"600": {"content": "<b>"}, "601": {"content": "<c>"}}

    _changed(folder, rename, "tokenizer_config.json")
    with pytest.raises(UserError, match=r"contradict each other: id 600 is '<a>' in .*, '<b>' in .*tokenizer_config"):
        tokenizer_difference(folder, manifest)


@pytest.mark.parametrize("key", ["9" * 5000, "-1", "\u0663", "", "600 "])
def test_a_key_that_is_no_id_is_no_added_token(key: str, manifest: Manifest, tmp_path: Path) -> None:
    folder = _copied(manifest, tmp_path / "model", "tokenizer.json", "tokenizer_config.json")
    _changed(
        folder, lambda values: values.update(added_tokens_decoder={key: {"content": "<x>"}}), "tokenizer_config.json"
    )
    _changed(folder, lambda values: values["added_tokens"].pop())  # so that hashes alone do not decide
    assert tokenizer_difference(folder, manifest) is None


def test_a_folder_without_a_tokenizer_is_refused(manifest: Manifest, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no tokenizer\.json and no tokenizer\.model"):
        tokenizer_difference(tmp_path, manifest)


def test_without_the_datas_own_files_only_hashes_are_compared(manifest: Manifest, tmp_path: Path) -> None:
    shutil.copytree(manifest.folder.location, tmp_path / "set" / "train")
    alone = Manifest.load(tmp_path / "set" / "train" / "manifest.json")
    assert tokenizer_difference(_copied(manifest, tmp_path / "same", "tokenizer.model"), alone) is None
    difference = tokenizer_difference(_copied(manifest, tmp_path / "other", "tokenizer.json"), alone)
    assert difference is not None
    assert "the shards were made with" in difference
