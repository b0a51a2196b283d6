"""A check that the teacher's token ids are those of the data, for commands that read no `teacher.vocab_map`."""

from pathlib import Path
from typing import Any

from megadistill.data import Mixture, tokenizer_sha256
from megadistill.errors import UserError


def require_same_ids(teacher: Path, config: Any, data: Mixture) -> None:
    """Checks the model folder `teacher`, whose model config is `config`, against the data.

    Raises:
        UserError: it has fewer ids than the data, or another tokenizer.
    """
    if config.vocab_size < data.vocab_size:
        raise UserError(
            f"the teacher in {teacher} has {config.vocab_size} ids, the data {data.vocab_size}: tokenize the text with "
            "the teacher's own tokenizer"
        )
    if tokenizer_sha256(teacher, prefer=data.tokenizer.kind) != (data.tokenizer.kind, data.tokenizer.sha256):
        raise UserError(
            f"the tokenizer in {teacher} is missing, or not that of the data (sha256 {data.tokenizer.sha256[:12]}…): "
            "tokenize the text with the teacher's own, or copy there the one that it was trained with (no "
            "teacher.vocab_map is read here)"
        )
