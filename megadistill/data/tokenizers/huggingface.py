"""Hugging Face tokenizers: `tokenizer.json` and the files beside it, or a vocabulary of ranks that is made one.

Legend: L tokens of a text, V ids of the vocabulary.
"""

import hashlib
import json
import shlex
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer as Backend

from megadistill.data.shards.packing import Ids
from megadistill.data.tokenizers.folder_files import (
    ADDED_FILE,
    CONFIG_FILE,
    GENERATION_FILE,
    MAX_FILE_BYTES,
    NAMES,
    SETTINGS,
    SPECIAL_FILE,
    TOKENIZER_FILE,
    copy_files,
)
from megadistill.data.tokenizers.rank_bpe import tokenizer_json
from megadistill.data.tokenizers.rank_vocabulary import is_rank_file
from megadistill.errors import UserError
from megadistill.io import read_file, read_given_json, reason_of
from megadistill.redaction import printable

SPACE: Final = "▁"

_OF_CODE: Final = ("tokenizer_class", "auto_map", "added_tokens_decoder")
"""Settings beside a vocabulary of ranks that are for the code which reads it, and not for a tokenizer.json."""

Json = dict[str, Any]


class HuggingFaceTokenizer:
    """A `tokenizers` tokenizer: text to ids and back."""

    kind: Final = "huggingface"
    file: Final = TOKENIZER_FILE

    def __init__(self, path: Path) -> None:
        """The tokenizer in the file `path`, a tokenizer.json or a vocabulary of ranks, with the rules beside it.

        Raises:
            UserError: there is none, or no id that ends a document is named.
        """
        self._path = path
        self._config, special = (read_optional(path.parent / name) for name in (CONFIG_FILE, SPECIAL_FILE))
        self._of_ranks = is_rank_file(path)
        if self._of_ranks:
            self._values, made = tokenizer_json(_content(path), str(path))
            beside = {key: value for key, value in self._config.items() if key not in _OF_CODE}
            self._config = {**made, **beside}
        else:
            self._values = read_json(path)
        try:
            self._backend = Backend.from_str(json.dumps(self._values))
        except Exception as error:  # the library raises nothing more special
            raise UserError(f"{path} is not a tokenizer.json: {' '.join(str(error).split())[:200]}") from None
        self._backend.encode_special_tokens = True
        self._backend.no_truncation()
        self._backend.no_padding()
        if getattr(self._backend.model, "dropout", None):
            self._backend.model.dropout = None  # merges at random
        self.sha256 = canonical_sha256(self._values)
        self.vocab_size: int = max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        named = [content_of(rules, "eos_token") for rules in (self._config, special)]
        eos: Any = next((token for token in named if token is not None), None)
        if eos is None:
            ids = read_optional(path.parent / GENERATION_FILE).get("eos_token_id")
            eos = ids[0] if isinstance(ids, list) and ids else ids
        self.eos = self._token_id(eos, "eos_token")
        self.bos = self._bos()

    def encode(self, text: str) -> Ids:
        """[L] int32, without BOS or EOS; the names of special tokens in the text are text."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        encoded = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(one.ids, dtype=np.int32) for one in encoded]

    def decode(self, ids: Ids) -> str:
        text: str = self._backend.decode(ids.tolist(), skip_special_tokens=False)
        return text

    @cached_property
    def piece_bytes(self) -> NDArray[np.int64]:
        """[V]: UTF-8 bytes of text that each id stands for; 0 for special tokens and ids without a piece."""
        decoder = json.dumps(self._values.get("decoder"))
        sizes = np.zeros(self.vocab_size, dtype=np.int64)
        for piece, id in self._backend.get_vocab(with_added_tokens=False).items():
            sizes[id] = _size(piece, byte_level='"ByteLevel"' in decoder, byte_fallback='"ByteFallback"' in decoder)
        for id, token in self._backend.get_added_tokens_decoder().items():
            sizes[id] = 0 if token.special else len(token.content.encode())
        unknown = getattr(self._backend.model, "unk_token", None)
        if unknown is not None:
            sizes[self._backend.token_to_id(unknown)] = 0
        return sizes

    def id_of(self, token: str) -> int | None:
        """The id of a token by its name; None: there is none."""
        return self._backend.token_to_id(token)

    @property
    def largest_text_id(self) -> int:
        special = {id for id, token in self._backend.get_added_tokens_decoder().items() if token.special}
        given = set(self._backend.get_vocab(with_added_tokens=True).values()) - special
        return max(*given, self.eos, -1 if self.bos is None else self.bos)

    def write(self, folder: Path) -> None:
        """Writes all files of the tokenizer's folder; adds the token that ends a document to a config without it."""
        folder.mkdir(parents=True, exist_ok=True)
        copy_files(self._path.parent, folder, SETTINGS if self._of_ranks else NAMES)
        content = (
            json.dumps(self._values, ensure_ascii=False).encode()
            if self._of_ranks
            else read_file(self._path, max_bytes=MAX_FILE_BYTES)
        )
        (folder / TOKENIZER_FILE).write_bytes(content)
        eos = {} if content_of(self._config, "eos_token") else {"eos_token": self._backend.id_to_token(self.eos)}
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **self._config, **eos}
        config.pop("auto_map", None)  # names code that is not copied
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def _token_id(self, token: str | int | None, name: str) -> int:
        id = self._backend.token_to_id(token) if isinstance(token, str) else token
        if type(id) is int and 0 <= id < self.vocab_size and self._backend.id_to_token(id) is not None:
            return id
        problem = "is missing" if token is None else f"is {token!r}, which the vocabulary does not have"
        way_out = f"write the token as {name} into {CONFIG_FILE} there"
        if token in _added_beside(self._path.parent):
            problem = f"is {token!r}, which only the files beside it add to the vocabulary"
            way_out = f"{rewrite_command(self._path.parent)} writes one that has it"
        raise UserError(f"{self._path}: its {name} {problem}: {way_out}")

    def _bos(self) -> int | None:
        """The id that the tokenizer puts before a text, by its post-processor or else by its config."""
        plain = self._backend.encode("a", add_special_tokens=False).ids
        whole = self._backend.encode("a", add_special_tokens=True).ids
        before = next(i for i in range(len(whole) + 1) if whole[i : i + len(plain)] == plain)
        if before > 1:
            raise UserError(f"{self._path} puts {before} ids before a text: this release supports one, or none")
        if before:
            return int(whole[0])
        has_bos = self._config.get("add_bos_token")
        return self._token_id(content_of(self._config, "bos_token"), "bos_token") if has_bos else None


def rewrite_command(folder: Path) -> str:
    """The command that writes a tokenizer.json of all that transformers reads in a tokenizer's folder, in backticks."""
    script = "import sys, transformers as t; t.AutoTokenizer.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[1])"
    return f"`python -c {shlex.quote(script)} {shlex.quote(printable(str(folder)))}`"


def _content(path: Path) -> bytes:
    try:
        return read_file(path, max_bytes=MAX_FILE_BYTES)
    except (OSError, ValueError) as error:
        raise UserError(f"the tokenizer: {path} cannot be read ({reason_of(error)}): get it again") from None


def read_json(path: Path) -> Json:
    """The object in a file of a tokenizer. Raises UserError: there is none."""
    way_out = "give a tokenizer.json, or its folder"
    return read_given_json(path, dict, what="the tokenizer", way_out=way_out, max_bytes=MAX_FILE_BYTES)


def canonical_sha256(values: Json) -> str:
    """sha256 of what decides the ids: the same after loading and saving, by any release of `tokenizers`.

    Truncation and padding are left out, and values that are null or false: later releases add options that are off. A
    merge was "a b" once and is ["a", "b"] now.
    """
    parts = {name: value for name, value in values.items() if name not in ("truncation", "padding")}
    model = values.get("model")
    if isinstance(model, dict) and isinstance(model.get("merges"), list):
        merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        parts["model"] = {**model, "merges": merges}
    canonical = json.dumps(_without_off(parts), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _without_off(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_off(one) for key, one in value.items() if one is not None and one is not False}
    return [_without_off(one) for one in value] if isinstance(value, list) else value


def read_optional(path: Path) -> Json:
    """The object in a file of a tokenizer, empty where there is no file. Raises UserError: it holds something else."""
    return read_json(path) if path.is_file() else {}


def token_id(text: Any) -> int | None:
    """The id that a key of a JSON object stands for; None where it stands for none."""
    return int(text) if isinstance(text, str) and text.isascii() and text.isdecimal() and len(text) < 10 else None


def _added_beside(folder: Path) -> list[str | None]:
    """Tokens that the files beside a tokenizer.json add to it when transformers loads the folder."""
    decoder = read_optional(folder / CONFIG_FILE).get("added_tokens_decoder")
    rules = decoder if isinstance(decoder, dict) else {}
    return [*(content_of(rules, id) for id in rules), *read_optional(folder / ADDED_FILE)]


def content_of(rules: Json, name: str) -> str | None:
    """A token of a config: a string, or an object with a string in `content`."""
    token = rules.get(name)
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _size(piece: str, *, byte_level: bool, byte_fallback: bool) -> int:
    """UTF-8 bytes of text: a byte-level piece has a character for each byte; others mark spaces."""
    if byte_level:
        return len(piece)
    if byte_fallback and len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return 1
    return len(piece.replace(SPACE, " ").encode())
