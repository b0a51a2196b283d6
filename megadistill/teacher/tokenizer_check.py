"""A check that the teacher's token ids are those of the data, for commands that read no `teacher.vocab_map`."""

from pathlib import Path
from typing import Any

from megadistill.data import Mixture, tokenizer_difference
from megadistill.errors import UserError


def require_same_ids(teacher: Path, config: Any, data: Mixture) -> None:
    """Checks the model folder `teacher`, whose model config is `config`, against the data.

    Raises:
        UserError: it has fewer ids than the data, no tokenizer, or another one.
    """
    way_out = (
        "tokenize the text with the teacher's own tokenizer (megadistill tokenize ... --tokenizer "
        f"{teacher}); no teacher.vocab_map is read here"
    )
    if config.vocab_size < data.vocab_size:
        raise UserError(f"the teacher in {teacher} has {config.vocab_size} ids, the data {data.vocab_size}: {way_out}")
    difference = tokenizer_difference(teacher, data.first)
    if difference is not None:
        raise UserError(f"the tokenizer in {teacher} is not that of the data: {difference}: {way_out}")
