"""A check that the teacher's token ids are those of the data, for commands that read no `teacher.vocab_map`."""

from pathlib import Path
from typing import Any

from megadistill.data import Mixture, missing_rows, tokenizer_difference
from megadistill.errors import UserError


def require_same_ids(teacher: Path, config: Any, data: Mixture) -> None:
    """Checks the model folder `teacher`, whose model config is `config`, against the data.

    Raises:
        UserError: it has no row for an id that can occur in the data, no tokenizer, or another one.
    """
    way_out = (
        "tokenize the text with the teacher's own tokenizer (megadistill tokenize ... --tokenizer "
        f"{teacher}); no teacher.vocab_map is read here"
    )
    problem = missing_rows(config.vocab_size, data.sources.values())
    if problem is not None:
        raise UserError(f"the teacher in {teacher}: {problem}: {way_out}")
    difference = tokenizer_difference(teacher, data.first)
    if difference is not None:
        raise UserError(f"the tokenizer in {teacher} is not that of the data: {difference}: {way_out}")
