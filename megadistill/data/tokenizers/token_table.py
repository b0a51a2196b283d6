"""Token tables: what decides the ids of a tokenizer, and whether two tokenizers give a text the same ids.

Files are compared by what they do, not by their bytes: layout, padding, truncation, decoders and names of reserved
tokens may differ.
"""

import json
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer as Backend

from megadistill.errors import UserError

SAMPLE_TEXTS: Final = (
    "The quick brown fox jumps over the lazy dog, doesn't it? It's 3.14159 miles (5,055 m) away.",
    "In 1969, 600 million people watched; by 2024 nobody remembered WHY the co-operation had ended.",
    "def add(first: int, second: int = 10) -> int:\n    return first + second  # the sum\n",
    '{"name": "value", "list": [1, 22, 333, 4444, 55555], "nested": {"empty": null}}',
    "Über den Wolken muß die Freiheit wohl grenzenlos sein – naïve cafés, œuvres, piñatas.",
    "Съешь же ещё этих мягких французских булок; 天地玄黃，宇宙洪荒。 日本語のテキスト 한국어 العربية हिन्दी 🙂👍🏽",
    "e\u0301 is two characters, \u00e9 is one; ﬁ, ①, Ａ and ½ are others.",
    "https://example.org/path?query=1&other=two#part | <b>bold</b> \\frac{a}{b} $x^2$",
    "  leading, trailing and   repeated\tspaces \n\n\n  and newlines  ",
)
"""Texts that different rules for splitting words, digits, spaces and accents cut differently."""

PLAIN_TEXTS: Final = SAMPLE_TEXTS[:2]
"""Texts that both files of one published tokenizer encode alike, whatever they do with spaces and rare characters."""

_WINDOW = 64  # tokens that make one text
_SHUFFLED_TOKENS = 20_000  # at least, to find other merges where the tokens are few
_IDS_IN_MESSAGES = 8


@dataclass(frozen=True)
class TokenTable:
    """The tokens of a tokenizer's file and its encoding. Text never gives an id of `special`."""

    name: str
    """Name of the file, for messages."""
    tokens: Mapping[int, str]
    special: frozenset[int]
    """Ids of control tokens, and of the unknown token."""
    encode: Callable[[Sequence[str]], list[list[int]]]
    """Ids of texts, without BOS or EOS."""
    decode: Callable[[list[int]], str]

    @classmethod
    def of_json(cls, values: Mapping[str, Any], name: str) -> "TokenTable":
        """The table of a tokenizer.json with the content `values`. Raises UserError: it is none."""
        try:
            backend = Backend.from_str(json.dumps(values))
        except Exception as error:  # the library raises nothing more special
            raise UserError(f"{name} is not a tokenizer.json: {' '.join(str(error).split())[:200]}") from None
        backend.encode_special_tokens = True
        backend.no_truncation()
        backend.no_padding()
        if getattr(backend.model, "dropout", None):
            backend.model.dropout = None

        def encode(texts: Sequence[str]) -> list[list[int]]:
            return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]

        added = backend.get_added_tokens_decoder()
        return cls(
            name=name,
            tokens={id: token for token, id in backend.get_vocab(with_added_tokens=True).items()},
            special=frozenset(id for id, token in added.items() if token.special),
            encode=encode,
            decode=lambda ids: str(backend.decode(ids, skip_special_tokens=False)),
        )

    @classmethod
    def of_model(cls, model: bytes, name: str) -> "TokenTable":
        """The table of a SentencePiece model with the content `model`. Raises UserError: it is none."""
        try:
            if not model:
                raise RuntimeError  # sentencepiece takes an empty file for a model without pieces
            processor = SentencePieceProcessor(model_proto=model)
        except RuntimeError:
            raise UserError(
                f"{name} is not a SentencePiece model: give the .model file that SentencePiece wrote"
            ) from None
        ids = range(processor.vocab_size())
        rules = (processor.is_control, processor.is_unknown, processor.is_unused)
        return cls(
            name=name,
            tokens={id: processor.id_to_piece(id) for id in ids},
            special=frozenset(id for id in ids if any(rule(id) for rule in rules)),
            encode=lambda texts: [processor.encode(text) for text in texts],
            decode=lambda some: str(processor.decode(some)),
        )

    def vocabulary_texts(self) -> list[str]:
        """Texts with every token that a text can give, in order of the ids and then shuffled; always the same texts."""
        ids = sorted(self.tokens.keys() - self.special)
        order, shuffle = list(ids), random.Random(0)
        for _ in range(1 + _SHUFFLED_TOKENS // max(1, len(ids))):
            shuffle.shuffle(ids)
            order += ids
        return [self.decode(order[start : start + _WINDOW]) for start in range(0, len(order), _WINDOW)]


def difference(ours: TokenTable, theirs: TokenTable, *, required: Collection[int] = ()) -> str | None:
    """The first difference that changes the ids of a text, in words; None: every text gets the same ids.

    Special tokens may have other names, but for those of `required`: no text contains them. `theirs` may have more.
    """
    return _other_tokens(ours, theirs, required) or _other_cuts(
        ours, theirs, texts=[*SAMPLE_TEXTS, *ours.vocabulary_texts()]
    )


def contradiction(ours: TokenTable, theirs: TokenTable) -> str | None:
    """A difference of two files that describe one tokenizer, in words; None: there is none.

    Only plain text counts: published files of one tokenizer differ in how they treat runs of spaces or rare characters.
    """
    return _other_tokens(ours, theirs, ()) or _other_cuts(ours, theirs, texts=PLAIN_TEXTS)


def _other_tokens(ours: TokenTable, theirs: TokenTable, required: Collection[int]) -> str | None:
    def is_other(id: int) -> bool:
        if id not in required and id in ours.special and (id in theirs.special or id not in theirs.tokens):
            return False
        return theirs.tokens.get(id) != ours.tokens[id]

    other = [id for id in sorted(ours.tokens) if is_other(id)]
    if not other:
        return None
    first = other[0]
    there = repr(theirs.tokens[first]) if first in theirs.tokens else "no token"
    return (
        f"{len(other):,} of {len(ours.tokens):,} ids stand for other tokens, such as id {first}: "
        f"{ours.tokens[first]!r} in {ours.name}, {there} in {theirs.name}"
    )


def _other_cuts(ours: TokenTable, theirs: TokenTable, *, texts: Sequence[str]) -> str | None:
    pairs = zip(texts, ours.encode(texts), theirs.encode(texts), strict=True)
    other = [(text, own, their) for text, own, their in pairs if own != their]
    if not other:
        return None
    text, own, their = other[0]
    at = next(i for i in range(min(len(own), len(their)) + 1) if own[i : i + 1] != their[i : i + 1])
    start, stop = len(ours.decode(own[:at])), at + _IDS_IN_MESSAGES
    return (
        f"they cut text differently: {text[start : start + 20]!r} begins with the ids {own[at:stop]} in {ours.name}, "
        f"{their[at:stop]} in {theirs.name}"
    )
