"""Names of the language model's tensors in a folder of a multimodal model, as a causal model of its own has them."""

from collections.abc import Collection, Iterable
from typing import Final

from megadistill.errors import UserError
from megadistill.redaction import printable

_HEADS: Final = ("language_model.lm_head.", "lm_head.")
"""Beginnings of the head's names: in folders that older releases of transformers wrote, and in a causal model."""

_BODIES: Final = ("model.language_model.", "language_model.model.", "language_model.", "model.")
"""Beginnings of the names of embedding, layers and norm.

They are those of transformers from 4.52 on, of older releases, of a model that was saved without its head, and of
Qwen 2 and 2.5 VL as published.
"""

_BODY: Final = "model."
_HEAD: Final = "lm_head."

_OTHER_PARTS: Final = tuple(
    f"{outer}{part}."
    for outer in ("", "model.")
    for part in (
        *("vision_tower", "vision_model", "visual", "multi_modal_projector", "embed_vision"),
        *("audio_tower", "embed_audio"),
    )
)
"""Beginnings of the names of what reads images and sound, and of what leads from there to the language model."""


def language_model_names(names: Collection[str], where: str) -> dict[str, str]:
    """Name in a causal model -> stored name, of each tensor of a multimodal model's folder.

    The tensors that read images or sound are left out. Others that the language model does not have keep their names,
    so that they are refused where such tensors of a causal model are.

    Raises:
        UserError: two tensors of the folder `where` have one name in a causal model.
    """
    body = next((each for each in _BODIES if _begin(names, f"{each}embed_tokens.")), _BODY)
    head = next((each for each in _HEADS if _begin(names, each)), _HEAD)
    stored: dict[str, str] = {}
    for name in sorted(names):
        if name.startswith(_OTHER_PARTS):
            continue
        plain = name
        if name.startswith(head):
            plain = _HEAD + name.removeprefix(head)
        elif name.startswith(body):
            plain = _BODY + name.removeprefix(body)
        if plain in stored:
            raise UserError(
                f"{where} has both {printable(stored[plain][:100])!r} and {printable(name[:100])!r}, which are the "
                f"same tensor of its language model: the folder mixes two models; download it again, into an empty one"
            )
        stored[plain] = name
    return stored


def _begin(names: Iterable[str], beginning: str) -> bool:
    return any(name.startswith(beginning) for name in names)
