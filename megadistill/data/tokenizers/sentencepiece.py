"""SentencePiece tokenizers: training, loading, and writing one for Hugging Face.

A model trained here is lossless: decode(encode(text)) == text to the byte, with newlines, tabs and runs of spaces. The
one exception is SentencePiece's own: U+2581 (▁) is its mark for a space, and comes back as one.

Legend: L tokens of a text, V ids of the vocabulary.
"""

import hashlib
import io
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, normalizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from megadistill.data.shards.packing import Ids
from megadistill.errors import UserError

MODEL_FILE: Final = "tokenizer.model"
SPACE: Final = "▁"

MAX_LINE_CHARACTERS = 8192
MAX_LINE_BYTES = 4 * MAX_LINE_CHARACTERS


class SentencePieceTokenizer:
    """A SentencePiece model: text to ids and back. It has no rule that would put an id before a text."""

    kind: Final = "sentencepiece"
    file: Final = MODEL_FILE
    bos: Final = None

    def __init__(self, model: bytes, *, name: str) -> None:
        """`model` is the content of a `.model` file, `name` its name in errors.

        Raises:
            UserError: it is not a SentencePiece model, or it has no end-of-sentence piece.
        """
        try:
            self._processor = SentencePieceProcessor(model_proto=model)
        except RuntimeError:
            raise UserError(
                f"{name} is not a SentencePiece model: give the .model file that SentencePiece wrote"
            ) from None
        self._name = name
        self.model = model
        self.sha256 = hashlib.sha256(model).hexdigest()
        self.vocab_size: int = self._processor.vocab_size()
        self.eos: int = self._processor.eos_id()
        if self.eos < 0:
            raise UserError(f"{name} has no end-of-sentence piece to put between documents: train it with eos_id")

    @classmethod
    def load(cls, path: Path) -> "SentencePieceTokenizer":
        """The model in the file `path`.

        Raises:
            UserError: there is none.
        """
        try:
            return cls(path.read_bytes(), name=str(path))
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}): give a SentencePiece .model file") from None

    def encode(self, text: str) -> Ids:
        """[L] int32, without BOS or EOS; control pieces such as `</s>` in the text are text."""
        ids: Ids = self._processor.encode(text, out_type="numpy")
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Ids) -> str:
        text: str = self._processor.decode(ids.tolist())
        return text

    @cached_property
    def piece_bytes(self) -> NDArray[np.int64]:
        """[V]: UTF-8 bytes of text that each id stands for; 0 for control pieces and the unknown piece."""
        return np.array([self._bytes_of(id) for id in range(self.vocab_size)], dtype=np.int64)

    def _bytes_of(self, id: int) -> int:
        if self._processor.is_byte(id):
            return 1
        if self._processor.is_control(id) or self._processor.is_unknown(id):
            return 0
        return len(self._processor.id_to_piece(id).replace(SPACE, " ").encode())

    def write(self, folder: Path) -> None:
        """Writes tokenizer.model, and tokenizer.json and its config for `AutoTokenizer.from_pretrained(folder)`.

        The ids of both are exactly the same.

        Raises:
            UserError: the written form cannot repeat the model exactly.
        """
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MODEL_FILE).write_bytes(self.model)
        _refuse_inexact(ModelProto.FromString(self.model), self._name)
        _huggingface(self.model, self._processor).save_pretrained(folder)


def train_tokenizer(lines: Iterable[str], *, vocab_size: int) -> SentencePieceTokenizer:
    """A BPE model with byte fallback; the same lines give the same bytes.

    Lines hold no newline: each newline of a text is one byte piece. Digits stay single, runs of spaces become pieces.

    Raises:
        UserError: the text cannot fill, or does not fit into, `vocab_size` pieces.
    """
    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=(part for line in lines for part in _parts(line)),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            character_coverage=0.9995,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            max_sentence_length=MAX_LINE_BYTES,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        # Without file and line: `INTERNAL: file.cc(1) [condition] Vocabulary size ...`.
        reason = re.sub(r"^.*\.cc\(\d+\) \[.*\] ", "", " ".join(str(error).split()))
        raise UserError(f"--vocab-size {vocab_size} does not fit the text: {reason}") from None
    return SentencePieceTokenizer(model.getvalue(), name="the trained tokenizer")


def _huggingface(model: bytes, processor: SentencePieceProcessor) -> PreTrainedTokenizerFast:
    """The same BPE for `tokenizers`.

    SentencePiece joins the adjacent pair whose union scores best; `tokenizers` the pair that its list names first. So
    the list has, best piece first, every cut of a piece into two pieces. Byte and control pieces are left out: the
    characters `<0x0A>` in a text are not a newline, and `</s>` does not end it (`split_special_tokens`).
    """
    proto = ModelProto.FromString(model)
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == piece.NORMAL}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in sorted(scores, key=lambda piece: -scores[piece])
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    unknown = processor.id_to_piece(processor.unk_id())
    vocab = {piece.piece: id for id, piece in enumerate(proto.pieces)}
    backend = Backend(BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    spaces = normalizers.Replace(" ", SPACE)
    text = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if proto.normalizer_spec.add_dummy_prefix:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces])
        backend.decoder = decoders.Sequence([*text, decoders.Strip(" ", 1, 0)])
    else:
        backend.normalizer = spaces
        backend.decoder = decoders.Sequence(text)
    bos = processor.bos_id()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token=unknown,
        bos_token=processor.id_to_piece(bos) if bos >= 0 else None,
        eos_token=processor.id_to_piece(processor.eos_id()),
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )


def _refuse_inexact(proto: ModelProto, name: str) -> None:
    trained, normalizer = proto.trainer_spec, proto.normalizer_spec
    reasons = {
        "it is not a BPE model": trained.model_type != trained.BPE,
        "it has no byte fallback": not trained.byte_fallback,
        "it rewrites text before it encodes it": bool(normalizer.precompiled_charsmap),
        "it removes spaces": normalizer.remove_extra_whitespaces,
        "it marks spaces in its own way": trained.treat_whitespace_as_suffix or not normalizer.escape_whitespaces,
        "it has user-defined or unused pieces": any(
            piece.type in (piece.USER_DEFINED, piece.UNUSED) for piece in proto.pieces
        ),
    }
    problems = [reason for reason, holds in reasons.items() if holds]
    if problems:
        raise UserError(
            f"{name} cannot be written as a Hugging Face tokenizer with exactly its ids: {', '.join(problems)}; "
            "use a BPE model with byte fallback and the identity normalisation, or train one with --vocab-size"
        )


def _parts(line: str) -> list[str]:
    """A line in pieces that are not too long for the trainer."""
    return [line[start : start + MAX_LINE_CHARACTERS] for start in range(0, len(line), MAX_LINE_CHARACTERS)]
