"""Tokenizers from their published folder through data and run to an export, over a table of odd folders."""

import io
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from transformers import AutoTokenizer, GenerationConfig

from megadistill.data import Manifest, Mixture, tokenize
from megadistill.data.tokenizers.tokenizer import load_tokenizer
from megadistill.export.export_run import _tokenizer
from megadistill.models.families import load_config, parameter_shapes
from megadistill.models.hf_export import export_model
from megadistill.train.setup.run_folder import copy_tokenizer, write_description
from tests.unit.data.corpora import BODY, byte_level_tokenizer
from tests.unit.train.cases import MODEL

TABLE = yaml.safe_load(Path(__file__).with_name("tokenizer_folders.yaml").read_text(encoding="utf-8"))
CHAT = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "world"}]


@pytest.fixture(scope="module")
def pieces() -> bytes:
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(BODY.split("\n") * 9), model_writer=model, model_type="bpe", vocab_size=360,
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
        num_threads=1,
    )  # fmt: skip
    return model.getvalue()


def _published(folder: Path, files: dict[str, Any], pieces: bytes) -> Path:
    """The folder of a tokenizer as the table describes it."""
    kind = files["vocabulary"]
    if kind == "byte-level":
        byte_level_tokenizer(folder, BODY)
        (folder / "tokenizer_config.json").unlink()
    else:
        folder.mkdir()
        (folder / "tokenizer.model").write_bytes(pieces)
    for name, content in files.items():
        if name != "vocabulary":
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    if kind == "both":
        AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    return folder


def _exported(source: Path, folder: Path) -> Path:
    """The folder of a student whose data were tokenized with the tokenizer in `source`."""
    corpus = folder / "corpus"
    corpus.mkdir(parents=True)
    for number in range(4):
        (corpus / f"{number}.txt").write_text(f"{number}: {BODY[number * 400 :][:400]}", encoding="utf-8")
    tokenize(
        [corpus],
        folder / "data",
        tokenizer=source,
        vocab_size=None,
        sequence_length=16,
        heldout_fraction=0,
        progress=lambda stage, **numbers: None,
    )
    data = Mixture.of(Manifest.load(folder / "data" / "train" / "manifest.json"))
    run = folder / "run"
    run.mkdir()
    write_description(run, {}, {}, tokenizer=copy_tokenizer(run, data))
    config = load_config({**MODEL, "vocab_size": data.vocab_size, "eos_token_id": 5, "pad_token_id": 9}, what="test")
    export_model(
        folder / "student",
        config=config,
        tensors=[(name, shape, partial(torch.zeros, shape)) for name, shape in parameter_shapes(config).items()],
        dtype=torch.float32,
        true_vocab=data.vocab_size,
        max_shard_bytes=10**9,
        tokenizer=_tokenizer(run, rows=data.vocab_size),
    )
    return folder / "student"


@pytest.mark.parametrize("name", TABLE["folders"])
def test_a_tokenizer_survives_from_its_folder_to_an_export(name: str, pieces: bytes, tmp_path: Path) -> None:
    files = TABLE["folders"][name]
    source = _published(tmp_path / "source", files, pieces)
    student = _exported(source, tmp_path)
    before, after = AutoTokenizer.from_pretrained(source), AutoTokenizer.from_pretrained(student)
    own = SentencePieceProcessor(model_proto=pieces)
    for text in TABLE["texts"]:
        expected = before(text).input_ids
        if files["vocabulary"] == "sentencepiece":  # transformers' conversion of a model is not exact
            bos = load_tokenizer(source).bos
            expected = [*([] if bos is None else [bos]), *own.encode(text)]
        assert after(text).input_ids == expected, text
        assert files["vocabulary"] == "sentencepiece" or after.decode(expected) == before.decode(expected), text
    for kind in ("bos", "eos", "pad", "unk"):
        assert getattr(after, f"{kind}_token") == getattr(before, f"{kind}_token"), kind
        assert getattr(after, f"{kind}_token_id") == getattr(before, f"{kind}_token_id"), kind
    assert after.get_added_vocab().items() >= before.get_added_vocab().items()
    assert after.chat_template == before.chat_template
    if before.chat_template is not None:
        assert after.apply_chat_template(CHAT, tokenize=False) == before.apply_chat_template(CHAT, tokenize=False)
    settings, given = GenerationConfig.from_pretrained(student), files.get("generation_config.json", {})
    ends = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
    assert before.eos_token_id in ends
    assert {key: getattr(settings, key) for key in given if key != "pad_token_id"} == {
        key: value for key, value in given.items() if key != "pad_token_id"
    }


def test_bos_of_a_model_is_as_the_files_beside_it_say(pieces: bytes, tmp_path: Path) -> None:
    bos = {}
    for number, (name, files) in enumerate(TABLE["folders"].items()):
        if files["vocabulary"] == "sentencepiece":
            bos[name] = load_tokenizer(_published(tmp_path / str(number), files, pieces)).bos
    assert bos == {
        "a model of Llama 2 whose config is silent on BOS": 1,
        "a model with an added padding token": 1,
        "a model whose config wants no BOS": None,
        "a model of T5's class, which puts no BOS": None,
    }
