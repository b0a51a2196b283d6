"""A vocabulary of ranks as a `tokenizer.json`: byte-level BPE that gives the same ids."""

import re
from typing import Any, Final

from tokenizers import Regex, pre_tokenizers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from megadistill.data.tokenizers.rank_vocabulary import RankVocabulary, rank_vocabulary
from megadistill.errors import UserError

_BYTES: Final[dict[int, str]] = bytes_to_unicode()
_CHARACTERS: Final = {character: byte for byte, character in _BYTES.items()}

_ATOMS: Final = re.compile(r"\\[pP]\{[^}]*\}|\\.|\[(?:\\.|[^\]\\])*\]")
_OTHER_MEANING: Final = re.compile(r"[$^]|\}\+|\(\?[a-z]*[msxuU]|\(\?<?P")
"""Parts of a pattern that mean one thing to tiktoken (fancy-regex) and another one to `tokenizers` (Oniguruma)."""


def tokenizer_json(content: bytes, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The contents of a tokenizer.json and of its tokenizer_config.json for a file of ranks with this content.

    Some 3 s of CPU for 128,000 ranks. `name` is the file's in messages.

    Raises:
        UserError: it is no such file, or `tokenizers` cannot repeat its ids exactly.
    """
    vocabulary = rank_vocabulary(content, name)
    texts = [_text(token) for token in vocabulary.tokens]
    vocab = {text: rank for rank, text in enumerate(texts, vocabulary.first_id)}
    _refuse_inexact(vocabulary, vocab, name)
    special = {name: id for id, name in vocabulary.special.items()}
    values = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(id, vocabulary.special[id]) for id in sorted(vocabulary.special)],
        "normalizer": None,
        "pre_tokenizer": _splitting(vocabulary.pattern),
        "post_processor": _beginning(vocabulary.bos, special),
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,  # as to tiktoken, a piece that is a token is that token, whatever its merges
            "vocab": special | vocab,  # or special tokens with ids of their own would be put behind the others
            "merges": _merges(vocabulary, texts),
        },
    }
    tokens = {"bos_token": vocabulary.bos, "eos_token": vocabulary.eos}
    return values, {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **{role: token for role, token in tokens.items() if token in special},
    }


def _text(token: bytes) -> str:
    """A token as a `tokenizer.json` writes it: a visible character for each byte."""
    return token.decode("latin-1").translate(_BYTES)


def _merges(vocabulary: RankVocabulary, texts: list[str]) -> list[list[str]]:
    """Every cut of a token into two tokens, in the order of the ranks, as transformers' converters have them.

    tiktoken joins the adjacent pair whose union has the lowest rank, `tokenizers` the pair that its list names first.
    """
    ranks = {token: rank for rank, token in enumerate(vocabulary.tokens)}
    merges = []
    for token in vocabulary.tokens:
        cuts = [
            (left, right)
            for cut in range(1, len(token))
            if (left := ranks.get(token[:cut])) is not None and (right := ranks.get(token[cut:])) is not None
        ]
        merges += [[texts[left], texts[right]] for left, right in sorted(cuts)]
    return merges


def _splitting(pattern: str) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [split, level]}


def _beginning(bos: str | None, special: dict[str, int]) -> dict[str, Any] | None:
    """The rule that puts BOS before a text."""
    if bos is None or bos not in special:
        return None
    token = [{"SpecialToken": {"id": bos, "type_id": type_id}} for type_id in (0, 1)]
    first, second = ({"Sequence": {"id": name, "type_id": type_id}} for type_id, name in enumerate("AB"))
    return {
        "type": "TemplateProcessing",
        "single": [token[0], first],
        "pair": [token[0], first, token[1], second],
        "special_tokens": {bos: {"id": bos, "ids": [special[bos]], "tokens": [bos]}},
    }


def _added(id: int, name: str) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": id, "content": name, **flags}


def _refuse_inexact(vocabulary: RankVocabulary, vocab: dict[str, int], name: str) -> None:
    """Raises UserError: the pattern is another one to `tokenizers`, or text gives the id of a special token."""
    way_out = "give the tokenizer.json of the model"
    if other := _OTHER_MEANING.search(_ATOMS.sub("", vocabulary.pattern)):
        raise UserError(
            f"{name}: its pattern has {other[0]!r}, which a tokenizer.json takes otherwise than tiktoken: {way_out}"
        )
    try:
        splitting = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(vocabulary.pattern), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    except Exception as error:  # the library raises nothing more special
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{name}: its pattern is no regular expression ({reason}): {way_out}") from None
    for special in vocabulary.special.values():
        if special in vocab or _is_piece(special, splitting):
            raise UserError(f"{name}: text gives its special token {special[:80]!r}: {way_out}")


def _is_piece(special: str, splitting: pre_tokenizers.Sequence) -> bool:
    """Whether a text has a piece that is written like a special token."""
    if not set(special) <= _CHARACTERS.keys():
        return False
    try:
        text = bytes(_CHARACTERS[character] for character in special).decode()
    except UnicodeDecodeError:
        return False
    return len(splitting.pre_tokenize_str(text)) == 1
