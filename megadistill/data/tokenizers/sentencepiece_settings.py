"""Settings in the files beside a SentencePiece model: BOS, added tokens, and others that are only handed on."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from sentencepiece import SentencePieceProcessor
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

from megadistill.data.tokenizers.folder_files import ADDED_FILE, CONFIG_FILE, SPECIAL_FILE
from megadistill.data.tokenizers.huggingface import Json, content_of, read_optional, rewrite_command, token_id
from megadistill.errors import UserError

CLASSES_WITH_BOS: Final = ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer", "CohereTokenizer")
"""Classes that document `add_bos_token` as true where a tokenizer_config.json is silent. transformers 4 followed that,
and so did the training of the models; transformers 5 puts none."""

_OF_A_CLASS: Final = (
    "tokenizer_class", "backend", "auto_map", "legacy", "sp_model_kwargs", "add_prefix_space", "vocab_file",
    "tokenizer_file", "name_or_path", "is_local", "local_files_only", "init_inputs",
)  # fmt: skip
"""Settings of the class that read the model, which mean nothing to the tokenizer.json that is written."""


@dataclass(frozen=True)
class ModelSettings:
    """The settings beside a model; nothing but the model where there are no files."""

    folder: Path | None = None
    config: Json = field(default_factory=dict)
    """Content of tokenizer_config.json, and below it of special_tokens_map.json."""
    puts_bos: bool = False
    """Whether BOS stands before a text."""
    added: Mapping[int, Json] = field(default_factory=dict)
    """Tokens beyond the model's own, by id: `content`, and flags of an AddedToken."""

    @classmethod
    def beside(cls, folder: Path, processor: SentencePieceProcessor) -> "ModelSettings":
        """The settings in `folder`. Raises UserError: they cannot be read, or do not fit the model."""
        config = {**read_optional(folder / SPECIAL_FILE), **read_optional(folder / CONFIG_FILE)}
        puts_bos = config.get("add_bos_token")
        if not isinstance(puts_bos, bool):
            name = config.get("tokenizer_class")
            if not isinstance(name, str):
                name = TOKENIZER_MAPPING_NAMES.get(str(read_optional(folder / "config.json").get("model_type"))) or ""
            puts_bos = name.removesuffix("Fast") in CLASSES_WITH_BOS
        return cls(folder, config, puts_bos, _added(folder, config, processor))

    @property
    def handed_on(self) -> Json:
        """Settings of the config that are written as they are."""
        return {key: value for key, value in self.config.items() if key not in _OF_A_CLASS}

    def token(self, name: str) -> str | None:
        """The token that the config has as `name`, such as `eos_token`."""
        return content_of(self.config, name)


def _added(folder: Path, config: Json, processor: SentencePieceProcessor) -> dict[int, Json]:
    decoder = config.get("added_tokens_decoder")
    tokens: dict[Any, Any] = dict(decoder) if isinstance(decoder, dict) else {}
    if not tokens:
        tokens = {str(id): {"content": token} for token, id in read_optional(folder / ADDED_FILE).items()}
    size = processor.vocab_size()
    added = {}
    for text, token in tokens.items():
        id, content = token_id(text), content_of({"token": token}, "token")
        if id is None or content is None or (id < size and content != processor.id_to_piece(id)):
            raise _unfit(folder, f"its token {str(text)[:40]!r} is {str(content)[:40]!r}, which is no added token")
        if id >= size:
            added[id] = {**token, "content": content} if isinstance(token, dict) else {"content": content}
    if sorted(added) != list(range(size, size + len(added))):
        raise _unfit(folder, f"its added tokens do not follow the {size} pieces of the model")
    return dict(sorted(added.items()))


def _unfit(folder: Path, problem: str) -> UserError:
    return UserError(
        f"{folder}: the files beside its SentencePiece model do not fit it: {problem}: "
        f"{rewrite_command(folder)} writes a tokenizer.json of them"
    )
