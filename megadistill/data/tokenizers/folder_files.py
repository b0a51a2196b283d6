"""The files of a folder that belong to a tokenizer: all that transformers reads with `AutoTokenizer`, and the ids that
`generate` uses."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from megadistill.io import read_file

TOKENIZER_FILE: Final = "tokenizer.json"
MODEL_FILE: Final = "tokenizer.model"
RANK_FILES: Final = ("tekken.json", "tiktoken.model", MODEL_FILE)
"""Names of vocabularies of ranks; a MODEL_FILE is one of Llama 3, or SentencePiece's."""
CONFIG_FILE: Final = "tokenizer_config.json"
SPECIAL_FILE: Final = "special_tokens_map.json"
ADDED_FILE: Final = "added_tokens.json"
GENERATION_FILE: Final = "generation_config.json"
TEMPLATES: Final = "additional_chat_templates"
"""Folder of further chat templates, beside `chat_template.jinja`."""

SETTINGS: Final = (CONFIG_FILE, SPECIAL_FILE, ADDED_FILE, "chat_template.jinja", GENERATION_FILE)
"""Files beside either kind of tokenizer."""

VOCABULARIES: Final = (
    TOKENIZER_FILE, MODEL_FILE, "vocab.json", "merges.txt", "vocab.txt", "spiece.model", "sentencepiece.bpe.model",
    "tiktoken.model", "tekken.json",
)  # fmt: skip
"""Files with tokens: those of the two kinds that are read here, and what transformers makes a tokenizer of."""

NAMES: Final = (*VOCABULARIES, *SETTINGS)
MAX_FILE_BYTES: Final = 1 << 27
"""The largest tokenizer.json have 35 MB."""

_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")  # one that a manifest can hold


def files_in(folder: Path, names: Iterable[str] = NAMES) -> dict[str, Path]:
    """The tokenizer's files in `folder` by their paths there: those of `names`, and further chat templates."""
    templates = [path for path in sorted((folder / TEMPLATES).glob("*.jinja")) if _PLAIN_NAME.fullmatch(path.name)]
    present = [name for name in names if (folder / name).is_file()]
    return {name: folder / name for name in [*present, *(f"{TEMPLATES}/{path.name}" for path in templates)]}


def copy_files(source: Path, target: Path, names: Iterable[str] = NAMES) -> None:
    """Copies the tokenizer's files of one folder to another. Raises OSError, ValueError: one cannot be read."""
    for name, path in files_in(source, names).items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_bytes(read_file(path, max_bytes=MAX_FILE_BYTES))
