"""The tokenizer loses nothing, trains the same twice, and Hugging Face gives its ids."""

import io
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceTrainer
from transformers import AutoTokenizer, LlamaConfig

from megadistill.data.tokenizer import Tokenizer, train_tokenizer
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
def tokenizer() -> Tokenizer:
    return train_tokenizer(CODE.split("\n"), vocab_size=1000)


@pytest.fixture(scope="module")
def folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("tokenizer")
    tokenizer.write(made)
    return made


@settings(max_examples=150, deadline=None)
@given(text=texts)
@example(text=AWKWARD)
@example(text=CODE)
@example(text="")
@example(text=" " * 100)
def test_decode_of_encode_is_the_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.piece_bytes[ids].sum() == len(text.encode())
    assert tokenizer.eos not in ids


def test_training_is_deterministic_and_digits_stay_single(tokenizer: Tokenizer) -> None:
    assert train_tokenizer(CODE.split("\n"), vocab_size=1000).sha256 == tokenizer.sha256
    assert tokenizer.vocab_size == 1000
    assert len(tokenizer.encode("x = 1234567")) >= 7
    assert len(tokenizer.encode(" " * 8)) == 1


def test_a_line_beyond_the_trainers_limit_is_not_left_out() -> None:
    letters = "".join(chr(ord("a") + i * i % 26) for i in range(40_000))
    tokenizer = train_tokenizer([letters, "hello"], vocab_size=300)
    assert len(tokenizer.encode(letters)) < len(letters), "its letters and pairs were learnt"


@settings(max_examples=150, deadline=None)
@given(text=texts)
@example(text=AWKWARD)
@example(text=CODE)
@example(text="")
@example(text="▁ ▁")
def test_huggingface_gives_the_same_ids_and_text(tokenizer: Tokenizer, folder: Path, text: str) -> None:
    fast = _auto(folder)
    ids = fast(text).input_ids
    assert ids == tokenizer.encode(text).tolist()
    assert fast.decode(ids) == tokenizer.decode(tokenizer.encode(text))


_loaded: dict[Path, AutoTokenizer] = {}


def _auto(folder: Path) -> AutoTokenizer:
    if folder not in _loaded:
        _loaded[folder] = AutoTokenizer.from_pretrained(folder)
    return _loaded[folder]


def test_the_folder_of_a_model_gives_the_same_tokenizer(tokenizer: Tokenizer, folder: Path, tmp_path: Path) -> None:
    """Beside a Llama config, AutoTokenizer must not rebuild a LlamaTokenizer with its own rules."""
    Tokenizer.load(folder / "tokenizer.model").write(tmp_path)
    LlamaConfig(vocab_size=1000, hidden_size=8, num_attention_heads=1, num_hidden_layers=1).save_pretrained(tmp_path)
    fast = AutoTokenizer.from_pretrained(tmp_path)
    assert fast(AWKWARD).input_ids == tokenizer.encode(AWKWARD).tolist()
    assert len(fast) == tokenizer.vocab_size
    assert (fast.unk_token_id, fast.bos_token_id, fast.eos_token_id) == (0, 1, 2)
    assert (tmp_path / "tokenizer.model").read_bytes() == tokenizer.model
    assert Tokenizer.load(tmp_path / "tokenizer.model").sha256 == tokenizer.sha256


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
    foreign = Tokenizer(_train_foreign(), name="foreign")
    foreign.write(tmp_path)
    fast = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("hello world", " hello", "  \n", "", AWKWARD, CODE):
        assert fast(text).input_ids == foreign.encode(text).tolist()
        assert fast.decode(fast(text).input_ids) == foreign.decode(foreign.encode(text))


def test_names_of_byte_and_control_pieces_in_a_text_are_text(tmp_path: Path) -> None:
    """A model whose pieces are the halves of `<0x0A>`: joining them must not make a newline."""
    words = "x<0x0Ay\n<0x0A\nA>\nB>\nC>\n</\n" * 99
    joined = {"split_by_unicode_script": False, "split_by_number": False, "add_dummy_prefix": False}
    foreign = Tokenizer(_train_foreign(words, vocab_size=273, **joined), name="foreign")
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
        Tokenizer(_train_foreign(**options), name="foreign").write(tmp_path)


def test_bad_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a SentencePiece model"):
        Tokenizer(b"junk", name="x.model")
    with pytest.raises(UserError, match="cannot be read"):
        Tokenizer.load(tmp_path / "none.model")
    with pytest.raises(UserError, match="no end-of-sentence piece"):
        Tokenizer(_train_foreign(eos_id=-1), name="x.model")
    with pytest.raises(UserError, match=r"--vocab-size 5000 does not fit the text: Vocabulary size too high"):
        train_tokenizer(["hello world"] * 9, vocab_size=5000)
