"""SentencePiece tokenizers: training, loading, and writing one for Hugging Face.

A model trained here is lossless: decode(encode(text)) == text to the byte, with newlines, tabs and runs of spaces. The
one exception is SentencePiece's own: U+2581 (▁) is its mark for a space, and comes back as one.

Legend: L tokens of a text, V ids of the vocabulary.
"""

import hashlib
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import AddedToken, decoders, normalizers
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from megadistill.data.shards.packing import Ids
from megadistill.data.tokenizers.folder_files import CONFIG_FILE, MAX_FILE_BYTES, MODEL_FILE, SETTINGS, copy_files
from megadistill.data.tokenizers.huggingface import Json
from megadistill.data.tokenizers.sentencepiece_settings import ModelSettings
from megadistill.errors import UserError
from megadistill.io import read_file, read_json, reason_of

SPACE: Final = "▁"

MAX_LINE_CHARACTERS = 8192
MAX_LINE_BYTES = 4 * MAX_LINE_CHARACTERS


class SentencePieceTokenizer:
    """A SentencePiece model, with the settings in the files beside it: text to ids and back."""

    kind: Final = "sentencepiece"
    file: Final = MODEL_FILE

    def __init__(self, model: bytes, *, name: str, beside: Path | None = None) -> None:
        """`model` is the content of a `.model` file, `name` its name in errors, `beside` the folder of its settings.

        Raises:
            UserError: it is not a SentencePiece model, it has no end-of-sentence piece, or the settings do not fit it.
        """
        try:
            self._processor = SentencePieceProcessor(model_proto=model)
            has_pieces = self._processor.vocab_size() > 0  # none in an empty file, which is read without an error
        except RuntimeError:
            has_pieces = False
        if not has_pieces:
            raise UserError(f"{name} is not a SentencePiece model: give the .model file that SentencePiece wrote")
        self._name = name
        self.model = model
        self.sha256 = hashlib.sha256(model).hexdigest()
        self._settings = ModelSettings() if beside is None else ModelSettings.beside(beside, self._processor)
        self.vocab_size: int = self._processor.vocab_size() + len(self._settings.added)
        eos = self._named("eos_token", self._processor.eos_id())
        if eos is None:
            raise UserError(f"{name} has no end-of-sentence piece to put between documents: train it with eos_id")
        self.eos: int = eos
        self.bos: int | None = None
        if self._settings.puts_bos:
            self.bos = self._named("bos_token", self._processor.bos_id())
            if self.bos is None:
                raise UserError(
                    f"{name} has no begin-of-sentence piece, which its tokenizer puts before a text: write "
                    f'"add_bos_token": false into the {CONFIG_FILE} beside it'
                )

    @classmethod
    def load(cls, path: Path) -> "SentencePieceTokenizer":
        """The model in the file `path`, with the settings in its folder.

        Raises:
            UserError: there is none, or the settings do not fit it.
        """
        try:
            return cls(read_file(path, max_bytes=MAX_FILE_BYTES), name=str(path), beside=path.parent)
        except UserError:
            raise
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read ({reason_of(error)}): give a SentencePiece .model file") from None

    def _named(self, name: str, default: int) -> int | None:
        """The id of the token that the settings have as `name`, or else the model's own; None: there is none."""
        token = self._settings.token(name)
        if token is None:
            return default if default >= 0 else None
        id = self.id_of(token)
        if id is None:
            raise UserError(
                f"{self._name}: the files beside it name {token!r} as {name}, which the model does not have: write the "
                f"right one into {CONFIG_FILE}"
            )
        return id

    def id_of(self, token: str) -> int | None:
        """The id of a token by its name; None: there is none."""
        added = next((id for id, one in self._settings.added.items() if one["content"] == token), None)
        id = int(self._processor.piece_to_id(token))
        return id if added is None and self._processor.id_to_piece(id) == token else added

    def encode(self, text: str) -> Ids:
        """[L] int32, without BOS or EOS; control pieces such as `</s>` in the text are text."""
        ids: Ids = self._processor.encode(text, out_type="numpy")
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Ids) -> str:
        size = self._processor.vocab_size()
        if not len(ids) or ids.max() < size:
            return str(self._processor.decode(ids.tolist()))
        parts = groupby(ids.tolist(), key=lambda id: id >= size)
        return "".join(
            "".join(self._piece(id) for id in part) if added else self._processor.decode(part)
            for added, part in ((added, list(part)) for added, part in parts)
        )

    @cached_property
    def piece_bytes(self) -> NDArray[np.int64]:
        """[V]: UTF-8 bytes of text that each id stands for; 0 for control pieces and the unknown piece."""
        return np.array([self._bytes_of(id) for id in range(self.vocab_size)], dtype=np.int64)

    def _bytes_of(self, id: int) -> int:
        if id >= self._processor.vocab_size():
            return 0  # no text gives it
        if self._processor.is_byte(id):
            return 1
        if self._processor.is_control(id) or self._processor.is_unknown(id):
            return 0
        return len(self._processor.id_to_piece(id).replace(SPACE, " ").encode())

    @property
    def largest_text_id(self) -> int:
        return max(self._processor.vocab_size() - 1, self.eos, -1 if self.bos is None else self.bos)

    def write(self, folder: Path) -> None:
        """Writes tokenizer.model, and tokenizer.json and its config for `AutoTokenizer.from_pretrained(folder)`.

        The ids of both are exactly the same. Settings beside the model are written, too.

        Raises:
            UserError: the written form cannot repeat the model exactly.
        """
        folder.mkdir(parents=True, exist_ok=True)
        settings = self._settings
        if settings.folder is not None:
            copy_files(settings.folder, folder, SETTINGS)
        (folder / MODEL_FILE).write_bytes(self.model)
        _refuse_inexact(ModelProto.FromString(self.model), self._name)
        _huggingface(self.model, self._processor, self._rules(), settings.added).save_pretrained(folder)
        path = folder / CONFIG_FILE
        config = {**settings.handed_on, **read_json(path)}
        path.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")

    def _rules(self) -> Json:
        """Arguments of transformers' tokenizer. Without settings that say otherwise, no text is a special token."""
        bos = self._named("bos_token", self._processor.bos_id())
        config = self._settings.config
        rules: Json = {
            "bos_token": None if bos is None else self._piece(bos),
            "eos_token": self._piece(self.eos),
            "split_special_tokens": bool(config.get("split_special_tokens", not config)),
        }
        if self.bos is not None:
            rules["add_bos_token"] = True
            rules["add_eos_token"] = config.get("add_eos_token") is True
        return rules

    def _piece(self, id: int) -> str:
        added = self._settings.added.get(id)
        return str(self._processor.id_to_piece(id) if added is None else added["content"])


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


def _huggingface(
    model: bytes, processor: SentencePieceProcessor, rules: Json, added: Mapping[int, Json]
) -> PreTrainedTokenizerFast:
    """The same BPE for `tokenizers`, with `added` tokens behind it; `rules` are special tokens and where they stand.

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
    backend.add_tokens([_added_token(token) for token in added.values()])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token=unknown, clean_up_tokenization_spaces=False, **rules
    )


def _added_token(token: Json) -> AddedToken:
    flags = {name: token[name] for name in ("lstrip", "rstrip", "single_word") if isinstance(token.get(name), bool)}
    return AddedToken(str(token["content"]), normalized=False, special=token.get("special") is not False, **flags)


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
