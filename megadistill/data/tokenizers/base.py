"""The tokenizer: what every kind of it can do, and which kind lies in a folder. It knows no shards and no documents.

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
        """Name of the file that `sha256` is of, in the folder that `write` wrote."""
        ...

    @property
    def sha256(self) -> str: ...

    @property
    def vocab_size(self) -> int:
        """V: the highest id, and one."""
        ...

    @property
    def bos(self) -> int | None:
        """What stands before each document, where the tokenizer's own rules put something there."""
        ...

    @property
    def eos(self) -> int:
        """What stands behind each document."""
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

    A folder with both is read by its `tokenizer.json`, unless that is what was written of the model: a data set that is
    tokenized with another one's tokenizer records the same original.

    Raises:
        UserError: there is none, it cannot be used, or nothing says which id ends a document.
    """
    file = path
    if path.is_dir():
        file = next((path / name for name in (TOKENIZER_FILE, MODEL_FILE) if (path / name).is_file()), path)
        if file == path:
            raise UserError(f"{path} holds no {TOKENIZER_FILE} and no {MODEL_FILE}: give the folder of a tokenizer")
        if file.name == TOKENIZER_FILE and (path / MODEL_FILE).is_file() and _written_of_model(path):
            file = path / MODEL_FILE
    return HuggingFaceTokenizer.load(file) if file.suffix == ".json" else SentencePieceTokenizer.load(file)


def _written_of_model(folder: Path) -> bool:
    """Whether a folder's `tokenizer.json` is what `SentencePieceTokenizer.write` makes of its `tokenizer.model`."""
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
    """What a manifest says of a tokenizer; `folder` is where it was written, as seen from the manifest's."""
    return TokenizerRecord(kind=tokenizer.kind, file=f"{folder}/{tokenizer.file}", sha256=tokenizer.sha256)


def tokenizer_sha256(path: Path, *, prefer: Kind) -> tuple[Kind, str] | None:
    """Kind and sha256 of the tokenizer at `path`, a file or a folder, as a manifest records them; None: there is none.

    A folder may hold one of each kind; then the one that is `prefer`red counts.

    Raises:
        UserError: the file cannot be read, or is no tokenizer.
    """
    files: dict[Kind, Path] = {"huggingface": path / TOKENIZER_FILE, "sentencepiece": path / MODEL_FILE}
    if path.is_file():
        files = {"huggingface" if path.suffix == ".json" else "sentencepiece": path}
    found = {kind: file for kind, file in files.items() if file.is_file()}
    if not found:
        return None
    kind = prefer if prefer in found else next(iter(found))
    if kind == "huggingface":
        return kind, huggingface_tokenizer.canonical_sha256(huggingface_tokenizer.read_json(found[kind]))
    try:
        return kind, hashlib.sha256(found[kind].read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"{found[kind]} cannot be read ({error.strerror}): make it readable") from None
