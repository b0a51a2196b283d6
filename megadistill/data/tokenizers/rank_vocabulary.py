"""Vocabularies of ranks: `tekken.json` of mistral-common, and tiktoken's lines of base64 (Llama 3, o200k_base).

Such a file has the tokens as bytes, by the rank in which they are merged. A tekken.json also has the pattern that
splits a text, and its special tokens; of tiktoken's form they are code of the model's authors, and known here by the
number of ranks.

Legend: R ranks of the vocabulary.
"""

import base64
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from megadistill.errors import UserError
from megadistill.io import open_regular, parse_json

MAX_TOKEN_BYTES: Final = 1 << 10
"""The longest token of known vocabularies has 128 bytes. The time for merges grows with the square of the length."""
MAX_VOCABULARY_BYTES: Final = 1 << 24
"""Bytes of all tokens; those of 200,000 have 1.5 MB."""

_HEAD_BYTES: Final = 2 * MAX_TOKEN_BYTES
_TIKTOKEN_LINE: Final = re.compile(rb"[A-Za-z0-9+/]+={0,2} [0-9]+\r?\n")
_DEPRECATED_SPECIAL: Final = (
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]",
    "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]",
)  # fmt: skip
"""Special tokens of a tekken.json that lists none: of version 7 and before."""
_VERSIONS_WITHOUT_SPECIAL: Final = ("v1", "v2", "v3", "v7")


@dataclass(frozen=True)
class RankVocabulary:
    """Tokens by rank, special tokens by id, and the pattern whose matches are the pieces of a text."""

    tokens: tuple[bytes, ...]
    """[R]: a token's rank is its place."""
    first_id: int
    """The id of rank 0."""
    special: Mapping[int, str]
    """Names of special tokens, which no text gives."""
    pattern: str
    bos: str | None
    """The special token before a text; None: there is none."""
    eos: str


@dataclass(frozen=True)
class _Rules:
    """The parts of a vocabulary that a file of tiktoken does not have."""

    special: Mapping[int, str]
    pattern: str
    bos: str | None
    eos: str


_LLAMA_3_NAMED: Final = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>", "<|reserved_special_token_2|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eom_id|>", "<|eot_id|>", "<|python_tag|>",
)  # fmt: skip


def _llama_3(ranks: int) -> _Rules:
    """256 special tokens behind the ranks, with the names of Llama 3.1 and later; 3.0 has other names, the same ids."""
    reserved = range(3, 3 + 256 - len(_LLAMA_3_NAMED))
    names = (*_LLAMA_3_NAMED, *(f"<|reserved_special_token_{number}|>" for number in reserved))
    return _Rules(
        special=dict(enumerate(names, ranks)),
        pattern=r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+",
        bos="<|begin_of_text|>",
        eos="<|end_of_text|>",
    )


def _o200k(ranks: int) -> _Rules:
    upper, lower = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    before, behind = r"[^\r\n\p{L}\p{N}]?", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    return _Rules(
        special={ranks + 1: "<|endoftext|>", ranks + 20: "<|endofprompt|>"},
        pattern=f"{before}{upper}*{lower}+{behind}|{before}{upper}+{lower}*{behind}|"
        r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        bos=None,
        eos="<|endoftext|>",
    )


KNOWN: Final = {128_000: _llama_3, 199_998: _o200k}
"""Number of ranks -> the rules of the vocabulary that has so many."""


def is_rank_file(path: Path) -> bool:
    """Whether there is a vocabulary of ranks at `path`, by its name or its first line."""
    if path.suffix == ".json":
        return _is_tekken(path.name)
    try:
        with open_regular(path) as file:
            return is_rank_content(file.read(_HEAD_BYTES), path.name)
    except OSError:
        return False


def is_rank_content(content: bytes, name: str) -> bool:
    """Whether the content of a file, or its beginning, is that of a vocabulary of ranks."""
    return _is_tekken(name.rpartition("/")[2]) or _TIKTOKEN_LINE.match(content) is not None


def _is_tekken(name: str) -> bool:
    return "tekken" in name and name.endswith(".json")  # the rule of mistral-common


def rank_vocabulary(content: bytes, name: str) -> RankVocabulary:
    """The vocabulary in a file of ranks; `name` is the file's in messages.

    Raises:
        UserError: it is damaged, a rank or a byte is missing, or the rules of its ranks are not known.
    """
    return _tekken(content, name) if _is_tekken(name.rpartition("/")[2]) else _tiktoken(content, name)


def _tiktoken(content: bytes, name: str) -> RankVocabulary:
    tokens: dict[int, bytes] = {}
    for number, line in enumerate(content.splitlines(), 1):
        if not line:
            continue
        token, _, rank = line.partition(b" ")
        if not (rank.isdigit() and len(rank) < 10) or int(rank) in tokens:
            raise _refused(name, f"line {number} is no token and rank that is new: {line[:80]!r}")
        tokens[int(rank)] = _bytes_of(token, f"line {number}", name)
    rules = KNOWN.get(len(tokens))
    if rules is None:
        known = " and ".join(f"{ranks:,}" for ranks in KNOWN)
        raise UserError(
            f"{name} has {len(tokens):,} ranks: their pattern and special tokens are in no file, and known here for "
            f"{known} ranks (Llama 3, o200k_base): give the tokenizer.json of the model"
        )
    missing = next((rank for rank in range(len(tokens)) if rank not in tokens), None)
    if missing is not None:
        raise _refused(name, f"rank {missing} is missing")
    made = rules(len(tokens))
    ordered = _checked([tokens[rank] for rank in range(len(tokens))], name)
    return RankVocabulary(ordered, 0, made.special, made.pattern, made.bos, made.eos)


def _tekken(content: bytes, name: str) -> RankVocabulary:
    try:
        values = parse_json(content)
    except ValueError as error:
        raise _refused(name, f"it cannot be read as JSON: {error}") from None
    config = values.get("config") if isinstance(values, dict) else None
    entries = values.get("vocab") if isinstance(values, dict) else None
    if not isinstance(config, dict) or not isinstance(entries, list):
        raise _refused(name, "it has no config and vocab, as a tekken.json has")
    pattern, special = config.get("pattern"), _tekken_special(values, config, name)
    if not isinstance(pattern, str) or not pattern:
        raise _refused(name, "its config.pattern is no regular expression")
    size = config.get("default_vocab_size")
    ranks = len(entries) if size is None else size - len(special) if type(size) is int else -1
    if not 256 <= ranks <= len(entries):
        raise _refused(
            name, f"its default_vocab_size is {size!r}, with {len(special)} special tokens and {len(entries):,} others"
        )
    tokens = []
    for rank, entry in enumerate(entries[:ranks]):  # what is behind belongs to larger vocabularies
        text = entry.get("token_bytes") if isinstance(entry, dict) else None
        if not isinstance(text, str) or entry.get("rank") != rank:
            raise _refused(name, f"vocab[{rank}] is no token of rank {rank} with token_bytes")
        tokens.append(_bytes_of(text.encode(errors="replace"), f"vocab[{rank}]", name))
    return RankVocabulary(
        _checked(tokens, name), len(special), dict(enumerate(special)), pattern, bos="<s>", eos="</s>"
    )


def _tekken_special(values: Mapping[str, Any], config: Mapping[str, Any], name: str) -> list[str]:
    """The names of the special tokens by id: those of the file, and then `<SPECIAL_20>`, `<SPECIAL_21>` ..."""
    entries = values.get("special_tokens")
    if entries is None:
        if config.get("version") not in _VERSIONS_WITHOUT_SPECIAL:
            raise _refused(name, f"it has no special_tokens, which version {config.get('version')!r} needs")
        names: list[Any] = list(_DEPRECATED_SPECIAL)
    else:
        rows = [entry if isinstance(entry, dict) else {} for entry in entries] if isinstance(entries, list) else [{}]
        by_rank = {row.get("rank"): row.get("token_str") for row in rows if type(row.get("rank")) is int}
        names = [by_rank.get(rank) for rank in range(len(rows))]
    number = config.get("default_num_special_tokens", len(names))
    if type(number) is not int or not len(names) <= number <= 100_000:
        raise _refused(name, f"its default_num_special_tokens is {number!r}, with {len(names)} in special_tokens")
    names += [f"<SPECIAL_{rank}>" for rank in range(len(names), number)]
    if not all(isinstance(one, str) and one for one in names) or len(set(names)) != len(names):
        raise _refused(name, "its special_tokens are no different names with the ranks 0, 1, 2 ...")
    return names


def _bytes_of(text: bytes, place: str, name: str) -> bytes:
    try:
        token = base64.b64decode(text, validate=True)
    except ValueError as error:
        raise _refused(name, f"{place} is not base64 ({error}): {text[:80]!r}") from None
    if not 0 < len(token) <= MAX_TOKEN_BYTES:
        raise _refused(name, f"{place} is a token of {len(token):,} bytes, not of 1 to {MAX_TOKEN_BYTES:,}")
    return token


def _checked(tokens: Iterable[bytes], name: str) -> tuple[bytes, ...]:
    """The tokens; all differ, and each byte is one: any text has ids."""
    ranks: dict[bytes, int] = {}
    for rank, token in enumerate(tokens):
        if token in ranks:
            raise _refused(name, f"ranks {ranks[token]} and {rank} are the same token, {token[:40]!r}")
        ranks[token] = rank
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise _refused(name, f"{len(missing)} of the 256 bytes are no tokens, such as {bytes(missing[:1])!r}")
    if (size := sum(map(len, ranks))) > MAX_VOCABULARY_BYTES:
        raise _refused(name, f"its tokens have {size:,} bytes, more than {MAX_VOCABULARY_BYTES:,}")
    return tuple(ranks)


def _refused(name: str, problem: str) -> UserError:
    return UserError(f"{name} is no vocabulary of ranks: {problem}: get it again, or give a tokenizer.json")
