"""Vocabularies of ranks: the ids of the published algorithm, of tiktoken and of transformers' own conversion."""

import base64
import json
import random
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import regex  # type: ignore[import-untyped]
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.integrations.mistral.tokenizer import MistralConverter

from megadistill.data.prepare.tokenize import tokenize
from megadistill.data.shards.manifest import Manifest
from megadistill.data.tokenizers import rank_vocabulary
from megadistill.data.tokenizers.huggingface import HuggingFaceTokenizer
from megadistill.data.tokenizers.model_tokenizer import tokenizer_difference
from megadistill.data.tokenizers.rank_bpe import tokenizer_json
from megadistill.data.tokenizers.tokenizer import load_tokenizer
from megadistill.data.tokenizers.tokenizer_file import TokenizerFile, tokenizer_files
from megadistill.errors import UserError
from tests.unit.data.conftest import STDLIB

TEKKEN_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""The pattern of tekken.json."""
LLAMA_PATTERN = "|".join(
    [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
"""The pattern in Llama 3's own code."""

HARD = (
    "1234567 3.14159 １２３ ⅷ ²³ 99999999999",
    "天地玄黃，宇宙洪荒。日本語のテキスト 한국어 العربية हिन्दी ไทย",
    "🙂👍🏽 👩‍👩‍👧‍👦 e\u0301 ﬁ ǅ ß ſt",
    " " * 70 + "x" + "\t" * 9 + "\n" * 9 + " \n \r\n\r\n  \u3000\u00a0\u2028\u0085\u200b\ufeff x  ",
    "don't DON'T we'll WE'LL I'm'd 're'Ve 'ſ it’s",
    "<s>[INST] hi [/INST]</s><unk><SPECIAL_20><|begin_of_text|><|eot_id|><|reserved_special_token_9|>",
    "def f(x):\n\treturn  x**2  # \x00\x01\x7f //\n/\n",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa abababababababab ((((((((((((((((",
)

texts = st.one_of(
    st.text(alphabet=st.characters(exclude_categories=["Cs", "Cn"]), max_size=40),
    st.lists(st.sampled_from([*"aebt x\n\r\t'.1é漢🙂", "  ", "'ll", "the", "<s>", "return", "    "]), max_size=40).map(
        "".join
    ),
)


def trained(size: int, pattern: str) -> list[bytes]:
    """Tokens by rank: the bytes, and what BPE learns of a little code."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted((STDLIB / "email").glob("*.py")))[:60_000]
    backend = Backend(BPE())
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([text, *HARD], trainer)
    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    vocab = backend.get_vocab()
    learnt = [bytes(byte_of[c] for c in token) for token in sorted(vocab, key=vocab.__getitem__) if len(token) > 1]
    return [bytes([byte]) for byte in range(256)] + learnt


def published_ids(tokens: Mapping[bytes, int], pattern: str, text: str) -> list[int]:
    """tiktoken's algorithm as it explains it: the adjacent pair whose union has the lowest rank is joined, the first
    such pair of a piece first; a piece that is a token is that token."""
    ids = []
    for piece in regex.findall(pattern, text):
        parts = [bytes([byte]) for byte in piece.encode()]
        if piece.encode() in tokens:
            parts = [piece.encode()]
        while pairs := [
            (tokens[left + right], place)
            for place, (left, right) in enumerate(pairwise(parts))
            if left + right in tokens
        ]:
            place = min(pairs)[1]
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
        ids += [tokens[part] for part in parts]
    return ids


def tiktoken_bytes(tokens: list[bytes]) -> bytes:
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens))


def tekken_values(tokens: list[bytes], **config: Any) -> dict[str, Any]:
    """A tekken.json as mistral-common has it: 1000 special tokens, and more ranks than the default vocabulary takes."""
    vocab = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": token.decode(errors="replace")}
        for rank, token in enumerate(tokens)
    ]
    names = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    return {
        "config": {
            "pattern": TEKKEN_PATTERN,
            "num_vocab_tokens": len(tokens),
            "default_vocab_size": 1000 + len(tokens) - 50,
            "default_num_special_tokens": 1000,
            "version": "v11",
        }
        | config,
        "vocab": vocab,
        "special_tokens": [{"rank": rank, "token_str": name, "is_control": True} for rank, name in enumerate(names)],
    }


@pytest.fixture(scope="module")
def tokens() -> list[bytes]:
    return trained(1500, LLAMA_PATTERN)


@pytest.fixture(scope="module", autouse=True)
def known(tokens: list[bytes]) -> Iterator[None]:
    """Llama 3's rules for a vocabulary of fewer ranks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(rank_vocabulary.KNOWN, len(tokens), rank_vocabulary.KNOWN[128_000])
        yield


@pytest.fixture(scope="module")
def llama(tokens: list[bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama") / "tokenizer.model"
    path.write_bytes(tiktoken_bytes(tokens))
    return path


@pytest.fixture(scope="module")
def tekken(tokens: list[bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tekken") / "tekken.json"
    path.write_text(json.dumps(tekken_values(tokens)))
    return path


@pytest.fixture(scope="module")
def loaded(llama: Path, tekken: Path) -> dict[str, HuggingFaceTokenizer]:
    made = {path.name: load_tokenizer(path) for path in (llama, tekken)}
    assert all(isinstance(one, HuggingFaceTokenizer) for one in made.values())
    return made  # type: ignore[return-value]


@settings(max_examples=150)
@given(text=texts)
@example(text="".join(HARD))
def test_ids_are_those_of_the_published_algorithm(
    tokens: list[bytes], loaded: dict[str, HuggingFaceTokenizer], text: str
) -> None:
    ranks = {token: rank for rank, token in enumerate(tokens)}
    assert loaded["tokenizer.model"].encode(text).tolist() == published_ids(ranks, LLAMA_PATTERN, text)
    ranks = {token: 1000 + rank for rank, token in enumerate(tokens[:-50])}
    assert loaded["tekken.json"].encode(text).tolist() == published_ids(ranks, TEKKEN_PATTERN, text)
    assert all(one.decode(one.encode(text)) == text for one in loaded.values())
    assert all(one.piece_bytes[one.encode(text)].sum() == len(text.encode()) for one in loaded.values())


def test_ids_are_those_of_tiktoken_itself(tokens: list[bytes], loaded: dict[str, HuggingFaceTokenizer]) -> None:
    """mistral-common's are those of tiktoken with its pattern, behind its special tokens."""
    tiktoken = pytest.importorskip("tiktoken", reason="pip install -e '.[oracles]'")
    for name, first, pattern, own in (
        ("tokenizer.model", 0, LLAMA_PATTERN, tokens),
        ("tekken.json", 1000, TEKKEN_PATTERN, tokens[:-50]),
    ):
        ranks = {token: rank for rank, token in enumerate(own)}
        truth = tiktoken.Encoding(name=name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        for text in [*HARD, "".join(HARD), *_random_texts(own, 200)]:
            ids = [first + rank for rank in truth.encode(text, disallowed_special=())]
            assert loaded[name].encode(text).tolist() == ids, (name, text)


def _random_texts(tokens: list[bytes], number: int) -> list[str]:
    """Texts of tokens in random order, and so of all of them."""
    draw = random.Random(0)
    return [b"".join(draw.choices(tokens, k=20)).decode(errors="replace") for _ in range(number)]


def test_ids_of_a_tekken_json_are_those_that_transformers_makes_of_it(
    tokens: list[bytes], tekken: Path, loaded: dict[str, HuggingFaceTokenizer]
) -> None:
    theirs, ours = MistralConverter(str(tekken)).converted(), loaded["tekken.json"]
    theirs.encode_special_tokens = True
    for text in [*HARD, *_random_texts(tokens, 100)]:
        assert ours.encode(text).tolist() == theirs.encode(text, add_special_tokens=False).ids
    assert ours.vocab_size == theirs.get_vocab_size(with_added_tokens=True)
    assert all(ours.id_of(token) == id for token, id in theirs.get_vocab().items())


def test_special_tokens_have_their_ids_and_no_text_gives_them(
    tokens: list[bytes], loaded: dict[str, HuggingFaceTokenizer]
) -> None:
    llama, tekken, ranks = loaded["tokenizer.model"], loaded["tekken.json"], len(tokens)
    names = (
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|start_header_id|>",
        "<|eot_id|>",
        "<|reserved_special_token_247|>",
    )
    assert [llama.id_of(name) for name in names] == [ranks, ranks + 1, ranks + 6, ranks + 9, ranks + 255]
    assert (llama.bos, llama.eos, llama.vocab_size) == (ranks, ranks + 1, ranks + 256)
    assert [tekken.id_of(name) for name in ("<unk>", "[/INST]", "<SPECIAL_5>", "<SPECIAL_999>")] == [0, 4, 5, 999]
    assert (tekken.bos, tekken.eos, tekken.vocab_size) == (1, 2, 1000 + ranks - 50)
    assert llama.largest_text_id == ranks + 1
    assert tekken.largest_text_id == 1000 + ranks - 51
    for one in loaded.values():
        special = [id for id in range(one.vocab_size) if one.piece_bytes[id] == 0]
        assert len(special) in (256, 1000)
        for id in special:
            text = one.decode(np.array([id], dtype=np.int32))
            assert not set(one.encode(f"{text} a{text}").tolist()) & set(special), text


def test_ids_of_any_vocabulary_are_those_of_the_published_algorithm() -> None:
    """Also of one that no training gives: a part of a token may have a higher rank than the token."""
    draw = random.Random(0)
    joined = 0
    for _ in range(40):
        words = sorted({bytes(draw.choices(b"ab", k=draw.randint(2, 6))) for _ in range(12)})
        tokens = [bytes([byte]) for byte in range(256)] + draw.sample(words, len(words))
        ranks = {token: 1000 + rank for rank, token in enumerate(tokens)}
        values = tekken_values(tokens, default_vocab_size=1000 + len(tokens))
        ours = Backend.from_str(json.dumps(tokenizer_json(json.dumps(values).encode(), "tekken.json")[0]))
        for _ in range(20):
            text = "".join(draw.choices("ab", k=12))
            ids = published_ids(ranks, TEKKEN_PATTERN, text)
            assert ours.encode(text, add_special_tokens=False).ids == ids, (words, text)
            joined += len(ids) < len(text)
    assert joined > 500


@pytest.mark.parametrize("name", ["tokenizer.model", "tekken.json"])
def test_what_is_written_is_an_ordinary_tokenizer(
    name: str, llama: Path, tekken: Path, loaded: dict[str, HuggingFaceTokenizer], tmp_path: Path
) -> None:
    source = {"tokenizer.model": llama, "tekken.json": tekken}[name]
    (tmp_path / "given").mkdir()
    (tmp_path / "given" / name).write_bytes(source.read_bytes())
    (tmp_path / "given" / "chat_template.jinja").write_text("{{ messages }}")
    config = {
        "tokenizer_class": "TikTokenTokenizer",
        "auto_map": {"AutoTokenizer": ["code.Own", None]},
        "model_max_length": 9,
    }
    (tmp_path / "given" / "tokenizer_config.json").write_text(json.dumps(config))
    given_one = load_tokenizer(tmp_path / "given")
    given_one.write(tmp_path / "out")
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    own, again = loaded[name], load_tokenizer(tmp_path / "out")
    assert again.sha256 == given_one.sha256 == own.sha256
    assert (again.bos, again.eos, again.vocab_size) == (own.bos, own.eos, own.vocab_size)
    fast = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert fast.model_max_length == 9
    assert (fast.bos_token_id, fast.eos_token_id) == (own.bos, own.eos)
    for text in HARD[:5]:
        assert fast(text).input_ids == [own.bos, *own.encode(text).tolist()]
        assert fast.decode(own.encode(text).tolist()) == text


def test_a_data_set_of_ranks_fits_a_teacher_that_has_the_same_file(
    llama: Path, tekken: Path, tokens: list[bytes], tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("some text of a few words " * 40)
    options: dict[str, Any] = {"vocab_size": None, "sequence_length": 16, "heldout_fraction": 0.0, "processes": 1}
    for path in (llama, tekken):
        out = tmp_path / path.stem
        tokenize([tmp_path / "a.txt"], out, tokenizer=path, progress=lambda *_, **__: None, **options)
        manifest = Manifest.load(out / "train" / "manifest.json")
        assert (manifest.tokenizer.kind, manifest.tokenizer.file) == ("huggingface", "../tokenizer/tokenizer.json")
        assert tokenizer_files(path.parent) == tokenizer_files(path) == {"huggingface": path}
        assert tokenizer_difference(path.parent, manifest) is None
        other = tmp_path / f"other-{path.stem}"
        other.mkdir()
        swapped = [*tokens[:300], tokens[301], tokens[300], *tokens[302:]]
        content = tiktoken_bytes(swapped) if path == llama else json.dumps(tekken_values(swapped)).encode()
        (other / path.name).write_bytes(content)
        assert "2 of " in str(tokenizer_difference(other, manifest))


def test_a_folder_with_a_tokenizer_json_is_read_by_it(llama: Path, tekken: Path, tmp_path: Path) -> None:
    load_tokenizer(llama).write(tmp_path)
    for path in (llama, tekken):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert tokenizer_files(tmp_path) == {"huggingface": tmp_path / "tokenizer.json"}
    assert load_tokenizer(tmp_path).sha256 == load_tokenizer(llama).sha256
    assert TokenizerFile.read("huggingface", llama).sha256 == load_tokenizer(llama).sha256


def _lines(change: Callable[[list[bytes]], list[bytes]]) -> Callable[[bytes], bytes]:
    return lambda content: b"".join(change(content.splitlines(keepends=True)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            _lines(lambda lines: lines[:-1]),
            r"has 1,\d+ ranks: their pattern and special tokens are in no file, and known",
        ),
        (_lines(lambda lines: [*lines[:-1], lines[-2]]), "is no token and rank that is new"),
        (_lines(lambda lines: [*lines[:-1], b"QUFBQQ== 99999\n"]), r"rank 1,?\d+ is missing"),
        (_lines(lambda lines: [b"QUFBQQ== 99999\n", *lines[1:]]), "rank 0 is missing"),
        (_lines(lambda lines: [*lines[:-1], b"QUFBQQ== -1\n"]), "is no token and rank that is new: b'QUFBQQ== -1'"),
        (_lines(lambda lines: [*lines[:-1], b"QUFBQQ== 1e3\n"]), "is no token and rank that is new"),
        (_lines(lambda lines: [*lines[:-1], b"!!!! " + lines[-1].split()[1]]), "is not base64"),
        (
            _lines(lambda lines: [*lines[:-1], lines[300].split()[0] + b" " + lines[-1].split()[1]]),
            "are the same token",
        ),
        (_lines(lambda lines: [b"QUFBQUE= 0\n", *lines[1:]]), r"1 of the 256 bytes are no tokens, such as b'\\x00'"),
        (
            _lines(lambda lines: [*lines[:-1], base64.b64encode(bytes(2000)) + b" " + lines[-1].split()[1]]),
            "a token of 2,000 bytes, not of 1 to 1,024",
        ),
    ],
)
def test_a_damaged_file_of_tiktoken_is_refused(
    change: Callable[[bytes], bytes], message: str, llama: Path, tmp_path: Path
) -> None:
    path = tmp_path / "some.tiktoken"
    path.write_bytes(change(llama.read_bytes()))
    with pytest.raises(UserError, match=message) as refused:
        load_tokenizer(path)
    assert str(refused.value).startswith(str(path))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab": None}, "has no config and vocab"),
        ({"special_tokens": None}, "it has no special_tokens, which version 'v11' needs"),
        ({"special_tokens": [{"rank": 1, "token_str": "<s>"}]}, "no different names with the ranks 0, 1, 2"),
        ({"special_tokens": [{"rank": 0, "token_str": "<s>"}, {"rank": 1, "token_str": "<s>"}]}, "no different names"),
        (
            {"special_tokens": [{"rank": 0, "token_str": "</s>"}, {"rank": 1, "token_str": "the"}]},
            "text gives its special",
        ),
        (
            {"special_tokens": [{"rank": 0, "token_str": "</s>"}, {"rank": 1, "token_str": "Ġqx"}]},
            "text gives its special",
        ),
        ({"special_tokens": [{"rank": 0, "token_str": "<s>"}]}, "its eos_token is '</s>'|its eos_token is missing"),
        ({"config.default_vocab_size": 1100}, "its default_vocab_size is 1100"),
        ({"config.default_vocab_size": 10**9}, "its default_vocab_size is 1000000000"),
        ({"config.default_vocab_size": "x"}, "its default_vocab_size is 'x'"),
        ({"config.default_num_special_tokens": 1}, "its default_num_special_tokens is 1, with 5"),
        ({"config.default_num_special_tokens": 10**9}, "its default_num_special_tokens is 1000000000"),
        ({"config.pattern": 5}, "its config.pattern is no regular expression"),
        ({"config.pattern": "(a"}, r"its pattern is no regular expression \("),
        ({"config.pattern": r"\p{N}{1,3}+|\s+|\S"}, "its pattern has '}.', which a tokenizer.json takes otherwise"),
        ({"config.pattern": r"\s+$|\s+|\S+"}, "its pattern has '.', which"),
        ({"vocab.300": {"rank": 301, "token_bytes": "QUFB", "token_str": ""}}, r"vocab\[300\] is no token of rank 300"),
        ({"vocab.300": 7}, r"vocab\[300\] is no token"),
        ({"vocab.300": {"rank": 300, "token_bytes": "???", "token_str": ""}}, r"vocab\[300\] is not base64"),
        ({"vocab.300": {"rank": 300, "token_bytes": "", "token_str": ""}}, r"vocab\[300\] is a token of 0 bytes"),
    ],
)
def test_a_damaged_tekken_json_is_refused(
    change: dict[str, Any], message: str, tokens: list[bytes], tmp_path: Path
) -> None:
    values = tekken_values(tokens[:600])
    for key, value in change.items():
        outer, _, inner = key.partition(".")
        target: Any = values[outer] if inner else values
        target[int(inner) if inner.isdecimal() else inner or outer] = value
    path = tmp_path / "tekken.json"
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match=message) as refused:
        load_tokenizer(path)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_an_older_tekken_json_has_the_special_tokens_of_its_time(tokens: list[bytes], tmp_path: Path) -> None:
    values = tekken_values(tokens, version="v3")
    del values["special_tokens"]
    (tmp_path / "tekken.json").write_text(json.dumps(values))
    made = load_tokenizer(tmp_path)
    assert isinstance(made, HuggingFaceTokenizer)
    assert [made.id_of(name) for name in ("<pad>", "[TOOL_CONTENT]", "<SPECIAL_20>")] == [11, 19, 20]


@pytest.mark.thorough
def test_the_vocabulary_of_llama_3_has_its_own_ids(tmp_path: Path) -> None:
    draw = random.Random(0)
    words = {bytes(draw.choices(b"abcdefgh ", k=draw.randint(2, 9))) for _ in range(250_000)}
    tokens = [bytes([byte]) for byte in range(256)] + sorted(words, key=lambda word: (len(word), word))
    (tmp_path / "tokenizer.model").write_bytes(tiktoken_bytes(tokens[:128_000]))
    made = load_tokenizer(tmp_path)
    assert isinstance(made, HuggingFaceTokenizer)
    assert (made.bos, made.eos, made.vocab_size) == (128_000, 128_001, 128_256)
    assert made.id_of("<|eot_id|>") == 128_009
    ranks = {token: rank for rank, token in enumerate(tokens[:128_000])}
    text = "".join(draw.choices("abcdefgh ", k=3000))
    assert made.encode(text).tolist() == published_ids(ranks, LLAMA_PATTERN, text)
