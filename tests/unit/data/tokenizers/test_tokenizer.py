"""Tokenizers of both kinds: nothing is lost, training gives the same twice, and Hugging Face gives the same ids."""

import hashlib
import io
import json
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceTrainer
from tokenizers import AddedToken, decoders, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import AutoTokenizer, LlamaConfig

from megadistill.data.tokenizers.huggingface import HuggingFaceTokenizer
from megadistill.data.tokenizers.sentencepiece import SentencePieceTokenizer, train_tokenizer
from megadistill.data.tokenizers.tokenizer import Tokenizer, load_tokenizer, tokenizer_record, tokenizer_sha256
from megadistill.errors import UserError
from tests.unit.data.conftest import STDLIB

CODE = "\n".join(path.read_text(encoding="utf-8") for path in sorted((STDLIB / "email").glob("*.py")))

# Any text, and text made of what code is made of; U+2581 is SentencePiece's mark for a space.
anything = st.text(alphabet=st.characters(exclude_characters="▁", exclude_categories=["Cs"]), max_size=60)
code_like = st.lists(
    st.sampled_from(
        [*"abex_(): \t\n\r=#.-0159é漢🙂", "    ", "def ", "return", "self.", "</s>", "<s>", "<unk>", "<0x0A>"]
    ),
    max_size=60,
).map("".join)
texts = st.one_of(anything, code_like)

AWKWARD = "  def f(x):\n\treturn  x\r\n\n\n  # é 漢字 🙂\x00\x01 \u2028\ufeff <s> </s> <unk> <0x0A> 12345  "


@pytest.fixture(scope="module")
def tokenizer() -> SentencePieceTokenizer:
    return train_tokenizer(CODE.split("\n"), vocab_size=1000)


@pytest.fixture(scope="module")
def folder(tokenizer: SentencePieceTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("tokenizer")
    tokenizer.write(made)
    return made


@settings(max_examples=150)
@given(text=texts)
@example(text=AWKWARD)
@example(text=CODE)
@example(text="")
@example(text=" " * 100)
def test_decode_of_encode_is_the_text(tokenizer: SentencePieceTokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.piece_bytes[ids].sum() == len(text.encode())
    assert tokenizer.eos not in ids


def test_training_is_deterministic_and_digits_stay_single(tokenizer: SentencePieceTokenizer) -> None:
    assert train_tokenizer(CODE.split("\n"), vocab_size=1000).sha256 == tokenizer.sha256
    assert tokenizer.vocab_size == 1000
    assert len(tokenizer.encode("x = 1234567")) >= 7
    assert len(tokenizer.encode(" " * 8)) == 1


def test_a_line_beyond_the_trainers_limit_is_not_left_out() -> None:
    letters = "".join(chr(ord("a") + i * i % 26) for i in range(40_000))
    tokenizer = train_tokenizer([letters, "hello"], vocab_size=300)
    assert len(tokenizer.encode(letters)) < len(letters), "its letters and pairs were learnt"


@settings(max_examples=150)
@given(text=texts)
@example(text=AWKWARD)
@example(text=CODE)
@example(text="")
@example(text="▁ ▁")
def test_huggingface_gives_the_same_ids_and_text(tokenizer: SentencePieceTokenizer, folder: Path, text: str) -> None:
    fast = _auto(folder)
    ids = fast(text).input_ids
    assert ids == tokenizer.encode(text).tolist()
    assert fast.decode(ids) == tokenizer.decode(tokenizer.encode(text))


_loaded: dict[Path, AutoTokenizer] = {}


def _auto(folder: Path) -> AutoTokenizer:
    if folder not in _loaded:
        _loaded[folder] = AutoTokenizer.from_pretrained(folder)
    return _loaded[folder]


def test_the_folder_of_a_model_gives_the_same_tokenizer(
    tokenizer: SentencePieceTokenizer, folder: Path, tmp_path: Path
) -> None:
    """Beside a Llama config, AutoTokenizer must not rebuild a LlamaTokenizer with its own rules."""
    SentencePieceTokenizer.load(folder / "tokenizer.model").write(tmp_path)
    LlamaConfig(vocab_size=1000, hidden_size=8, num_attention_heads=1, num_hidden_layers=1).save_pretrained(tmp_path)
    fast = AutoTokenizer.from_pretrained(tmp_path)
    assert fast(AWKWARD).input_ids == tokenizer.encode(AWKWARD).tolist()
    assert len(fast) == tokenizer.vocab_size
    assert (fast.unk_token_id, fast.bos_token_id, fast.eos_token_id) == (0, 1, 2)
    assert (tmp_path / "tokenizer.model").read_bytes() == tokenizer.model
    assert SentencePieceTokenizer.load(tmp_path / "tokenizer.model").sha256 == tokenizer.sha256


def _train_foreign(text: str = CODE[:60_000], **options: Any) -> bytes:
    model = io.BytesIO()
    rules: dict[str, Any] = {
        "model_type": "bpe",
        "vocab_size": 600,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
    }
    rules |= {"remove_extra_whitespaces": False, "minloglevel": 2, "num_threads": 1} | options
    SentencePieceTrainer.train(sentence_iterator=iter(text.split("\n")), model_writer=model, **rules)
    return model.getvalue()


def test_a_model_with_a_dummy_prefix_is_written_exactly(tmp_path: Path) -> None:
    """The rules of the Llama-2 tokenizer."""
    foreign = SentencePieceTokenizer(_train_foreign(), name="external")
    foreign.write(tmp_path)
    fast = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("hello world", " hello", "  \n", "", AWKWARD, CODE):
        assert fast(text).input_ids == foreign.encode(text).tolist()
        assert fast.decode(fast(text).input_ids) == foreign.decode(foreign.encode(text))


def test_names_of_byte_and_control_pieces_in_a_text_are_text(tmp_path: Path) -> None:
    """A model whose pieces are the halves of `<0x0A>`: joining them must not make a newline."""
    words = "x<0x0Ay\n<0x0A\nA>\nB>\nC>\n</\n" * 99
    joined = {"split_by_unicode_script": False, "split_by_number": False, "add_dummy_prefix": False}
    foreign = SentencePieceTokenizer(_train_foreign(words, vocab_size=273, **joined), name="external")
    assert len(foreign.encode("<0x0A>")) == 2
    foreign.write(tmp_path)
    fast = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("<0x0A>", "</s>", "a</s><0x0A>\n"):
        assert fast(text).input_ids == foreign.encode(text).tolist()
        assert foreign.decode(foreign.encode(text)) == text


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"model_type": "unigram"}, "not a BPE model"),
        ({"byte_fallback": False}, "no byte fallback"),
        ({"normalization_rule_name": "nmt_nfkc"}, "rewrites text"),
        ({"remove_extra_whitespaces": True}, "removes spaces"),
        ({"user_defined_symbols": ["\n"]}, "user-defined or unused pieces"),
    ],
)
def test_what_cannot_be_written_exactly_is_refused(options: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=reason):
        SentencePieceTokenizer(_train_foreign(**options), name="external").write(tmp_path)


def test_bad_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a SentencePiece model"):
        SentencePieceTokenizer(b"junk", name="x.model")
    with pytest.raises(UserError, match="cannot be read"):
        SentencePieceTokenizer.load(tmp_path / "none.model")
    with pytest.raises(UserError, match="no end-of-sentence piece"):
        SentencePieceTokenizer(_train_foreign(eos_id=-1), name="x.model")
    with pytest.raises(UserError, match=r"--vocab-size 5000 does not fit the text: Vocabulary size too high"):
        train_tokenizer(["hello world"] * 9, vocab_size=5000)


# Hugging Face tokenizers

BEGIN, END = "<|begin|>", "<|end|>"


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Byte-level BPE with the rules of Llama 3: a begin token by its post-processor, an end token in its config."""
    made = tmp_path_factory.mktemp("byte_level")
    backend = Backend(BPE(ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=600, special_tokens=[BEGIN, END], initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([CODE], trainer)
    backend.add_tokens([AddedToken("<tool>", normalized=False)])
    begin = (BEGIN, backend.token_to_id(BEGIN))
    backend.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[begin])
    backend.enable_truncation(5)
    backend.save(str(made / "tokenizer.json"))
    _configure(made, bos_token=BEGIN, eos_token=END, tokenizer_class="PreTrainedTokenizerFast")
    return made


@pytest.fixture
def copy(byte_level: Path, tmp_path: Path) -> Path:
    """To be changed."""
    return Path(shutil.copytree(byte_level, tmp_path / "copy"))


def _configure(folder: Path, **config: Any) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def _change(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values, indent=3))


@settings(max_examples=100)
@given(text=texts)
@example(text=AWKWARD)
@example(text=CODE)
@example(text=f"a{END}b{BEGIN}<tool>")
@example(text="")
def test_a_byte_level_tokenizer_loses_nothing_and_takes_names_of_special_tokens_as_text(
    byte_level: Path, text: str
) -> None:
    tokenizer = _loaded_once(byte_level)
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert tokenizer.decode(ids) == text
    assert tokenizer.piece_bytes[ids].sum() == len(text.encode())
    assert not {tokenizer.eos, tokenizer.bos} & set(ids.tolist())


_tokenizers: dict[Path, Tokenizer] = {}


def _loaded_once(path: Path) -> Tokenizer:
    if path not in _tokenizers:
        _tokenizers[path] = load_tokenizer(path)
    return _tokenizers[path]


def test_begin_end_size_and_bytes_are_the_tokenizers_own(byte_level: Path) -> None:
    tokenizer = load_tokenizer(byte_level / "tokenizer.json")
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    assert (tokenizer.bos, tokenizer.eos) == (0, 1)
    assert tokenizer.vocab_size == 601, "the added token has the highest id"
    assert tokenizer.piece_bytes[[0, 1, 600]].tolist() == [0, 0, len("<tool>")]
    text = "é漢🙂"
    assert [len(ids) for ids in tokenizer.encode_batch(["", text, "a"])] == [0, len(text.encode()), 1]
    record = tokenizer_record(tokenizer, "../tokenizer")
    assert (record.kind, record.file, record.sha256) == (
        "huggingface",
        "../tokenizer/tokenizer.json",
        tokenizer.sha256,
    )


def test_what_is_written_gives_the_same_ids_to_transformers(byte_level: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(byte_level)
    tokenizer.write(tmp_path / "out")
    fast = AutoTokenizer.from_pretrained(tmp_path / "out")
    again = load_tokenizer(tmp_path / "out")
    for text in ("hello world", AWKWARD.replace("</s>", ""), CODE[:5000]):
        ids = fast(text, truncation=False, add_special_tokens=False).input_ids
        assert ids == tokenizer.encode(text).tolist() == again.encode(text).tolist()
    assert (again.sha256, again.bos, again.eos) == (tokenizer.sha256, tokenizer.bos, tokenizer.eos)
    assert (fast.bos_token_id, fast.eos_token_id) == (tokenizer.bos, tokenizer.eos)


def test_an_end_that_only_the_generation_config_names_is_written_into_the_config(copy: Path, tmp_path: Path) -> None:
    (copy / "tokenizer_config.json").unlink()
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 600]}))
    tokenizer = load_tokenizer(copy)
    assert tokenizer.eos == 1
    tokenizer.write(tmp_path / "out")
    assert load_tokenizer(tmp_path / "out").eos == 1
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token == END


@pytest.mark.parametrize(
    ("config", "special", "eos"),
    [
        ({"eos_token": END}, None, 1),
        ({"eos_token": {"content": END, "lstrip": False}}, {"eos_token": BEGIN}, 1),
        ({"eos_token": None}, {"eos_token": {"content": END}}, 1),
    ],
)
def test_where_the_end_is_looked_for(
    copy: Path, config: dict[str, Any], special: dict[str, Any] | None, eos: int
) -> None:
    _configure(copy, **config)
    if special:
        (copy / "special_tokens_map.json").write_text(json.dumps(special))
    assert load_tokenizer(copy).eos == eos


def test_a_begin_id_comes_from_the_post_processor_or_from_the_config(copy: Path) -> None:
    _change(copy, lambda values: values.pop("post_processor"))
    assert load_tokenizer(copy).bos is None
    _configure(copy, bos_token=BEGIN, eos_token=END, add_bos_token=True)
    assert load_tokenizer(copy).bos == 0
    _configure(copy, eos_token=END, add_bos_token=True)
    with pytest.raises(UserError, match="its bos_token is missing"):
        load_tokenizer(copy)


def test_an_end_id_behind_a_text_is_no_begin_id(copy: Path) -> None:
    backend = Backend.from_file(str(copy / "tokenizer.json"))
    backend.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, 1)])
    backend.save(str(copy / "tokenizer.json"))
    assert load_tokenizer(copy).bos is None
    backend.post_processor = processors.TemplateProcessing(single=f"{END} {END} $A", special_tokens=[(END, 1)])
    backend.save(str(copy / "tokenizer.json"))
    with pytest.raises(UserError, match="puts 2 ids before a text"):
        load_tokenizer(copy)


def test_random_splits_are_turned_off(copy: Path) -> None:
    expected = load_tokenizer(copy).encode(CODE).tolist()

    def drop(values: dict[str, Any]) -> None:
        values["model"] |= {"dropout": 0.9, "ignore_merges": False}

    _change(copy, drop)
    assert load_tokenizer(copy).encode(CODE).tolist() == load_tokenizer(copy).encode(CODE).tolist()
    assert load_tokenizer(copy).encode(CODE).tolist() == expected


def test_the_hash_is_of_what_makes_the_ids(copy: Path, tmp_path: Path) -> None:
    expected = ("huggingface", load_tokenizer(copy).sha256)

    def hashed(folder: Path = copy) -> Any:
        return tokenizer_sha256(folder, prefer="sentencepiece")

    AutoTokenizer.from_pretrained(copy).save_pretrained(tmp_path / "saved")
    backend = Backend.from_file(str(copy / "tokenizer.json"))
    backend.no_truncation()
    backend.enable_padding(length=9)
    backend.save(str(tmp_path / "saved" / "padded.json"), pretty=False)
    assert hashed() == hashed(tmp_path / "saved") == hashed(tmp_path / "saved" / "padded.json") == expected

    def as_of_old(values: dict[str, Any]) -> None:
        values["model"]["merges"] = [" ".join(merge) for merge in values["model"]["merges"]]
        del values["model"]["byte_fallback"], values["model"]["dropout"]

    _change(copy, as_of_old)
    assert hashed() == expected
    _change(copy, lambda values: values["model"]["merges"].pop())
    assert hashed() != expected
    _change(copy, lambda values: values.pop("post_processor"))
    assert len({hashed(), expected, hashed(tmp_path / "saved")}) == 2


def test_the_hash_of_a_folder_with_both_kinds_is_of_the_preferred_one(folder: Path, tmp_path: Path) -> None:
    sentencepiece = hashlib.sha256((folder / "tokenizer.model").read_bytes()).hexdigest()
    assert tokenizer_sha256(folder, prefer="sentencepiece") == ("sentencepiece", sentencepiece)
    assert tokenizer_sha256(folder, prefer="huggingface") == (
        "huggingface",
        load_tokenizer(folder / "tokenizer.json").sha256,
    )
    assert tokenizer_sha256(folder / "tokenizer.model", prefer="huggingface") == ("sentencepiece", sentencepiece)
    assert tokenizer_sha256(tmp_path, prefer="huggingface") is None


def test_a_folder_is_read_by_its_original(folder: Path, byte_level: Path, tmp_path: Path) -> None:
    """A tokenizer.json that was written of the model beside it is a copy; any other one counts."""
    assert load_tokenizer(folder).kind == "sentencepiece"
    assert load_tokenizer(folder / "tokenizer.json").kind == "huggingface"
    both = Path(shutil.copytree(byte_level, tmp_path / "both"))
    shutil.copy(folder / "tokenizer.model", both)
    assert load_tokenizer(both).sha256 == load_tokenizer(byte_level).sha256
    shutil.copy(folder / "tokenizer.model", tmp_path)
    alone = load_tokenizer(tmp_path)
    assert (alone.kind, alone.bos) == ("sentencepiece", None)
    assert tokenizer_record(alone, "../tokenizer").file == "../tokenizer/tokenizer.model"


@settings(max_examples=60)
@given(text=texts)
@example(text=AWKWARD)
def test_what_is_written_of_a_model_of_sentencepiece_is_read_as_the_same_tokenizer(
    tokenizer: SentencePieceTokenizer, folder: Path, text: str
) -> None:
    read = _loaded_once(folder / "tokenizer.json")
    assert read.encode(text).tolist() == tokenizer.encode(text).tolist()
    assert read.piece_bytes.tolist() == tokenizer.piece_bytes.tolist()
    assert (read.vocab_size, read.eos) == (tokenizer.vocab_size, tokenizer.eos)


def test_a_tokenizer_that_marks_spaces_counts_bytes_of_text(copy: Path) -> None:
    vocab = {"<unk>": 0, "</s>": 1, "▁": 2, "▁é": 3, "<0xC3>": 4, "é": 5}
    backend = Backend(BPE(vocab=vocab, merges=[("▁", "é")], unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.save(str(copy / "tokenizer.json"))
    _configure(copy, eos_token="</s>")
    assert load_tokenizer(copy).piece_bytes.tolist() == [0, 4, 1, 3, 1, 2]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{", "tokenizer.json cannot be read as JSON"),
        ("tokenizer.json", "[" * 100_000, "tokenizer.json cannot be read as JSON"),
        ("tokenizer.json", "[]", "holds a list, not a dict"),
        ("tokenizer.json", "{}", "is not a tokenizer.json"),
        ("tokenizer.json", '{"model": {"type": "Other"}}', "is not a tokenizer.json"),
        ("tokenizer_config.json", "{}", "its eos_token is missing"),
        ("tokenizer_config.json", "junk", "tokenizer_config.json cannot be read as JSON"),
        ("tokenizer_config.json", '{"eos_token": "<nowhere>"}', "'<nowhere>', which the vocabulary does not have"),
        ("generation_config.json", '{"eos_token_id": -1}', "is -1, which the vocabulary does not have"),
        ("generation_config.json", '{"eos_token_id": "no"}', "is 'no', which the vocabulary does not have"),
        ("generation_config.json", '{"eos_token_id": []}', "its eos_token is"),
    ],
)
def test_a_tokenizer_that_cannot_be_used_is_refused(copy: Path, name: str, content: str, message: str) -> None:
    if name == "generation_config.json":
        _configure(copy)
    (copy / name).write_text(content)
    with pytest.raises(UserError, match=message) as refused:
        load_tokenizer(copy)
    assert "\n" not in str(refused.value)


def test_a_tokenizer_in_older_files_is_refused_with_the_command_that_writes_a_tokenizer_json(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = json.loads((copy / "tokenizer.json").read_text())["model"]
    (copy / "tokenizer.json").unlink()
    (copy / "vocab.json").write_text(json.dumps(model["vocab"]))
    (copy / "merges.txt").write_text("".join(" ".join(merge) + "\n" for merge in model["merges"]))
    _configure(copy, eos_token=END, tokenizer_class="GPT2Tokenizer")
    with pytest.raises(UserError, match=r"no tokenizer\.json and no tokenizer\.model, only vocab\.json") as refused:
        load_tokenizer(copy)
    _run_the_command(str(refused.value), monkeypatch)
    assert load_tokenizer(copy).eos == model["vocab"].get(END, len(model["vocab"]))


def test_an_end_that_only_the_config_adds_is_refused_with_the_command_that_adds_it(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = load_tokenizer(copy).vocab_size
    token = {"content": "<|im_end|>", "special": True}
    _configure(
        copy,
        eos_token="<|im_end|>",
        tokenizer_class="PreTrainedTokenizerFast",
        added_tokens_decoder={str(new): token},
    )
    with pytest.raises(UserError, match="which only the files beside it add") as refused:
        load_tokenizer(copy)
    _run_the_command(str(refused.value), monkeypatch)
    assert load_tokenizer(copy).eos == new


def _run_the_command(message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the `python -c` in backticks in this process, which has transformers already."""
    python, option, script, *arguments = shlex.split(message.split("`")[1])
    assert (python, option) == ("python", "-c")
    monkeypatch.setattr(sys, "argv", [option, *arguments])
    exec(script, {})


def test_no_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no tokenizer\.json and no tokenizer\.model"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match=r"none\.json does not exist"):
        load_tokenizer(tmp_path / "none.json")
