"""The kinds of tokenizers, and loading one from a file or a folder."""

from pathlib import Path
from tempfile import TemporaryDirectory

from megadistill.config.paths import wrong_path
from megadistill.data.shards.manifest import TokenizerRecord
from megadistill.data.tokenizers.data_files import hashes_in
from megadistill.data.tokenizers.folder_files import MODEL_FILE, RANK_FILES, TOKENIZER_FILE
from megadistill.data.tokenizers.huggingface import HuggingFaceTokenizer, canonical_sha256, read_json
from megadistill.data.tokenizers.rank_vocabulary import is_rank_file
from megadistill.data.tokenizers.sentencepiece import SentencePieceTokenizer
from megadistill.data.tokenizers.tokenizer_file import Kind, TokenizerFile, no_tokenizer_files, tokenizer_files
from megadistill.errors import UserError

Tokenizer = SentencePieceTokenizer | HuggingFaceTokenizer
"""Text to ids and back. `vocab_size` is the highest id, plus one; `largest_text_id` the highest one that a document can
have, added tokens that no text gives left out; `bos` and `eos` are the ids before and after each
document, `bos` None where the tokenizer's own rules put none there; `sha256` is the hash that manifests record of
`file`, one of the files of `write`, with which `load_tokenizer` and `AutoTokenizer.from_pretrained` give the same ids.
"""


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer at `path`: a SentencePiece `.model` file, a `tokenizer.json`, a vocabulary of ranks (`tekken.json`
    or a file of tiktoken), or a folder with one of them.

    A folder with several is read by its `tokenizer.json`, unless that was written from the model: a data set that is
    tokenized with the tokenizer of another one records the same original.

    Raises:
        UserError: there is none, it is unusable, or it names no id that ends a document.
    """
    file = path
    if path.is_dir():
        file = next((path / name for name in (TOKENIZER_FILE, *RANK_FILES) if (path / name).is_file()), path)
        if file == path:
            raise UserError(
                wrong_path(path, "tokenizer") or f"{no_tokenizer_files(path)}: give the folder of a tokenizer"
            )
        if file.name == TOKENIZER_FILE and (path / MODEL_FILE).is_file() and _written_from_model(path):
            file = path / MODEL_FILE
    elif reason := wrong_path(path, "tokenizer"):
        raise UserError(reason)
    is_huggingface = file.suffix == ".json" or is_rank_file(file)
    return HuggingFaceTokenizer(file) if is_huggingface else SentencePieceTokenizer.load(file)


def _written_from_model(folder: Path) -> bool:
    """Whether a folder's `tokenizer.json` is the one that `SentencePieceTokenizer.write` makes of its model."""
    try:
        with TemporaryDirectory() as made:
            SentencePieceTokenizer.load(folder / MODEL_FILE).write(Path(made))
            shas = [canonical_sha256(read_json(place / TOKENIZER_FILE)) for place in (folder, Path(made))]
    except UserError:
        return False
    return shas[0] == shas[1]


def tokenizer_record(tokenizer: Tokenizer, folder: str, written: Path | None = None) -> TokenizerRecord:
    """The manifest's record of a tokenizer; `folder` is where it lies, relative to the manifest.

    `written`: the folder with its files, which are hashed; None: they are not there yet.
    """
    return TokenizerRecord(
        kind=tokenizer.kind,
        file=f"{folder}/{tokenizer.file}",
        sha256=tokenizer.sha256,
        files={} if written is None else hashes_in(written),
    )


def tokenizer_sha256(path: Path, *, prefer: Kind) -> tuple[Kind, str] | None:
    """Kind and sha256 of the tokenizer at `path`, a file or a folder, as a manifest records them; None: there is none.

    A folder may hold one of each kind; then the kind `prefer` is taken.

    Raises:
        UserError: the file cannot be read, or is not a tokenizer.
    """
    present = tokenizer_files(path)
    if not present:
        return None
    kind = prefer if prefer in present else next(iter(present))
    return kind, TokenizerFile.read(kind, present[kind]).sha256
