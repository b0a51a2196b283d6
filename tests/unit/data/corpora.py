"""Small corpora and a byte-level tokenizer for the tests of tokenizing."""

import hashlib
import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from megadistill.data.prepare.finished_output import RECORD_FILE

BODY = "def hello(name: str) -> str:\n    return f'hello {name}, this is text number {n} of many'\n\n\n"


def document_texts(count: int = 40) -> list[str]:
    return [BODY.replace("{n}", str(i * 7919)) * (1 + i % 5) + "é漢" * (i % 3) for i in range(count)]


def write_texts(folder: Path, texts: list[str]) -> Path:
    """A file a text, in order."""
    folder.mkdir()
    for i, text in enumerate(texts):
        (folder / f"doc{i:05d}.txt").write_bytes(text.encode())
    return folder


def byte_level_tokenizer(folder: Path, text: str, *, eos: str = "<|e|>") -> Path:
    """The folder of a byte-level BPE with the rules of Llama 3: a begin token before a text, an end token behind it."""
    folder.mkdir()
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        [text],
        BpeTrainer(vocab_size=300, special_tokens=["<|b|>", "<|e|>"], initial_alphabet=alphabet, show_progress=False),
    )
    backend.post_processor = processors.TemplateProcessing(single="<|b|> $A", special_tokens=[("<|b|>", 0)])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<|b|>", "eos_token": eos}))
    return folder


def tree(folder: Path) -> dict[str, str]:
    """sha256 of each file, but of a manifest without the names of its inputs, and so without its own.

    The record of the command is left out: it has the names and times of the inputs.
    """
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != RECORD_FILE]
    return {path.relative_to(folder).as_posix(): _sha256(path) for path in files}


def _sha256(path: Path) -> str:
    data = path.read_bytes()
    if path.name == "manifest.json":
        values = json.loads(data)
        del values["source"]["inputs"], values["sha256"]
        data = json.dumps(values).encode()
    return hashlib.sha256(data).hexdigest()
