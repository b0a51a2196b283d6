"""The special ids of a tokenizer's folder, as the config of a model beside it has them."""

from pathlib import Path
from typing import Any, Final

from megadistill.data.tokenizers.folder_files import CONFIG_FILE, GENERATION_FILE, SPECIAL_FILE
from megadistill.data.tokenizers.huggingface import Json, content_of, read_optional
from megadistill.data.tokenizers.tokenizer import load_tokenizer

_OF_A_MODEL: Final = ("transformers_version", "_from_model_config")


def generation_settings(folder: Path, *, rows: int) -> Json:
    """The content of generation_config.json for a model of `rows` rows with the tokenizer in `folder`.

    `bos_token_id`, `eos_token_id` (a list, where generation_config.json of the folder has further ones) and
    `pad_token_id` are the tokenizer's; None where it names none, or one without a row. Other settings are the folder's.

    Raises:
        UserError: the folder has no usable tokenizer.
    """
    tokenizer = load_tokenizer(folder)
    given = {key: value for key, value in read_optional(folder / GENERATION_FILE).items() if key not in _OF_A_MODEL}
    names = (read_optional(folder / CONFIG_FILE), read_optional(folder / SPECIAL_FILE))

    def first(kind: str) -> int | None:
        tokens = [token for rules in names if (token := content_of(rules, f"{kind}_token")) is not None]
        ids = [tokenizer.id_of(token) for token in tokens[:1]] + _ids(given.get(f"{kind}_token_id"))
        return next((id for id in ids if id is not None and id < rows), None)

    ends = list(dict.fromkeys(id for id in [tokenizer.eos, *_ids(given.get("eos_token_id"))] if id < rows))
    return {
        **given,
        "bos_token_id": first("bos") if tokenizer.bos is None else tokenizer.bos,
        "eos_token_id": ends if len(ends) > 1 else ends[0] if ends else None,
        "pad_token_id": first("pad"),
    }


def _ids(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [id for id in values if type(id) is int and id >= 0]
