"""The files of a tokenizer: a tokenizer.json, a SentencePiece model, or a folder with one of each.

A vocabulary of ranks (`tekken.json`, or one of tiktoken) stands for the tokenizer.json that is made of it.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal

from megadistill.data.tokenizers.folder_files import MAX_FILE_BYTES, MODEL_FILE, RANK_FILES, TOKENIZER_FILE
from megadistill.data.tokenizers.huggingface import canonical_sha256, rewrite_command
from megadistill.data.tokenizers.rank_bpe import tokenizer_json
from megadistill.data.tokenizers.rank_vocabulary import is_rank_content, is_rank_file
from megadistill.data.tokenizers.token_table import TokenTable
from megadistill.errors import UserError
from megadistill.io import parse_json, read_file, reason_of
from megadistill.redaction import printable

Kind = Literal["sentencepiece", "huggingface"]

FILES: Final[Mapping[Kind, str]] = {"huggingface": TOKENIZER_FILE, "sentencepiece": MODEL_FILE}
"""Name of the file of each kind in a folder."""

_CONVERTIBLE: Final = ("vocab.json", "vocab.txt", "spiece.model")
"""Files of older tokenizers, of which transformers makes a tokenizer.json."""


@dataclass(frozen=True)
class TokenizerFile:
    """The content of a tokenizer.json, a vocabulary of ranks, or a SentencePiece model."""

    kind: Kind
    content: bytes
    name: str
    """Its place, for messages."""

    @classmethod
    def read(cls, kind: Kind, path: Path) -> "TokenizerFile":
        """Raises UserError: it cannot be read."""
        try:
            return cls(kind, read_file(path, max_bytes=MAX_FILE_BYTES), str(path))
        except OSError as error:
            raise UserError(f"{path} cannot be read ({reason_of(error)}): make it readable") from None
        except ValueError as error:
            raise UserError(f"{path} is {error}: this is no tokenizer") from None

    @cached_property
    def sha256(self) -> str:
        """Hash of a model, or of what decides the ids in a tokenizer.json, as manifests record it.

        Raises:
            UserError: it is not a tokenizer.json.
        """
        if self.kind == "huggingface":
            return canonical_sha256(self.values)
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def values(self) -> dict[str, Any]:
        """Content of a tokenizer.json. Raises UserError: it is none."""
        if is_rank_content(self.content, self.name):
            return tokenizer_json(self.content, self.name)[0]
        try:
            values = parse_json(self.content)
        except ValueError as error:
            raise UserError(
                f"the tokenizer: {self.name} cannot be read as JSON: {error}: give a tokenizer.json"
            ) from None
        if not isinstance(values, dict):
            raise UserError(
                f"the tokenizer: {self.name} holds a {type(values).__name__}, not a dict: give a tokenizer.json"
            )
        return values

    @cached_property
    def table(self) -> TokenTable:
        """Raises UserError: it is not a tokenizer."""
        if self.kind == "huggingface":
            return TokenTable.of_json(self.values, self.name)
        return TokenTable.of_model(self.content, self.name)


def no_tokenizer_files(folder: Path) -> str:
    """One line on a folder without such a file, with the command that writes one of the files that are there."""
    there = next((name for name in _CONVERTIBLE if (folder / name).is_file()), None)
    more = f", only {there}, of which {rewrite_command(folder)} writes a tokenizer.json" if there else ""
    return f"{printable(str(folder))} has no {TOKENIZER_FILE} and no {MODEL_FILE}{more}"


def tokenizer_files(path: Path) -> dict[Kind, Path]:
    """The files of the tokenizer at `path`, a file or a folder, by kind. A folder may hold one of each."""
    if path.is_file():
        return {"huggingface" if path.suffix == ".json" or is_rank_file(path) else "sentencepiece": path}
    present = {kind: path / name for kind, name in FILES.items() if (path / name).is_file()}
    ranks = [path / name for name in RANK_FILES if is_rank_file(path / name) and (path / name).is_file()]
    if path / MODEL_FILE in ranks:
        del present["sentencepiece"]
    return {"huggingface": ranks[0], **present} if ranks else present
