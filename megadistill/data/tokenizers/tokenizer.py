"""Interface of the tokenizers, and loading one from a file or a folder.

Legend: L tokens of a text, V ids of the vocabulary.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from megadistill.data.shards.manifest import TokenizerRecord
from megadistill.data.shards.packing import Ids
from megadistill.data.tokenizers import huggingface as huggingface_tokenizer
from megadistill.data.tokenizers.huggingface import TOKENIZER_FILE, HuggingFaceTokenizer
from megadistill.data.tokenizers.sentencepiece import MODEL_FILE, SentencePieceTokenizer
from megadistill.errors import UserError

Kind = Literal["sentencepiece", "huggingface"]


class Tokenizer(Protocol):
    """Text to ids and back."""

    @property
    def kind(self) -> Kind: ...

    @property
    def file(self) -> str:
        """Name of the file that `sha256` hashes, in the folder of `write`."""
        ...

    @property
    def sha256(self) -> str: ...

    @property
    def vocab_size(self) -> int:
        """V: the highest id, plus one."""
        ...

    @property
    def bos(self) -> int | None:
        """The id before each document; None where the tokenizer's own rules put none there."""
        ...

    @property
    def eos(self) -> int:
        """The id after each document."""
        ...

    @property
    def piece_bytes(self) -> NDArray[np.int64]:
        """[V]: UTF-8 bytes of text that each id stands for; 0 for special ones."""
        ...

    def encode(self, text: str) -> Ids:
        """[L] int32, without BOS or EOS; the names of special ids in the text are text."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]: ...

    def decode(self, ids: Ids) -> str: ...

    def write(self, folder: Path) -> None:
        """Writes the files with which `load_tokenizer` and `AutoTokenizer.from_pretrained` give the same ids."""
        ...


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer at `path`: a SentencePiece `.model` file, a `tokenizer.json`, or a folder with one of them.

    A folder with both is read by its `tokenizer.json`, unless that was written from the model: a data set that is
    tokenized with the tokenizer of another one records the same original.

    Raises:
        UserError: there is none, it is unusable, or it names no id that ends a document.
    """
    file = path
    if path.is_dir():
        file = next((path / name for name in (TOKENIZER_FILE, MODEL_FILE) if (path / name).is_file()), path)
        if file == path:
            raise UserError(f"{path} holds no {TOKENIZER_FILE} and no {MODEL_FILE}: give the folder of a tokenizer")
        if file.name == TOKENIZER_FILE and (path / MODEL_FILE).is_file() and _written_from_model(path):
            file = path / MODEL_FILE
    return HuggingFaceTokenizer.load(file) if file.suffix == ".json" else SentencePieceTokenizer.load(file)


def _written_from_model(folder: Path) -> bool:
    """Whether a folder's `tokenizer.json` is the one that `SentencePieceTokenizer.write` makes of its model."""
    try:
        with TemporaryDirectory() as made:
            SentencePieceTokenizer.load(folder / MODEL_FILE).write(Path(made))
            shas = [
                huggingface_tokenizer.canonical_sha256(huggingface_tokenizer.read_json(place / TOKENIZER_FILE))
                for place in (folder, Path(made))
            ]
    except UserError:
        return False
    return shas[0] == shas[1]


def tokenizer_record(tokenizer: Tokenizer, folder: str) -> TokenizerRecord:
    """The manifest's record of a tokenizer; `folder` is where it was written, relative to the manifest."""
    return TokenizerRecord(kind=tokenizer.kind, file=f"{folder}/{tokenizer.file}", sha256=tokenizer.sha256)


def tokenizer_sha256(path: Path, *, prefer: Kind) -> tuple[Kind, str] | None:
    """Kind and sha256 of the tokenizer at `path`, a file or a folder, as a manifest records them; None: there is none.

    A folder may hold one of each kind; then the kind `prefer` is taken.

    Raises:
        UserError: the file cannot be read, or is not a tokenizer.
    """
    files: dict[Kind, Path] = {"huggingface": path / TOKENIZER_FILE, "sentencepiece": path / MODEL_FILE}
    if path.is_file():
        files = {"huggingface" if path.suffix == ".json" else "sentencepiece": path}
    present = {kind: file for kind, file in files.items() if file.is_file()}
    if not present:
        return None
    kind = prefer if prefer in present else next(iter(present))
    if kind == "huggingface":
        return kind, huggingface_tokenizer.canonical_sha256(huggingface_tokenizer.read_json(present[kind]))
    try:
        return kind, hashlib.sha256(present[kind].read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"{present[kind]} cannot be read ({error.strerror}): make it readable") from None
