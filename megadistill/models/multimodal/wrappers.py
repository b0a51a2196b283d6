"""Multimodal models whose language model is read from their folder."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Wrapper:
    """Place and family of the language model of a multimodal `model_type`."""

    text_type: str
    """`model_type` of its language model's config."""
    any_type: bool = False
    """Whether that config may name another one."""
    family: str = ""
    """The supported family that computes the same on text. Empty: the one of that name."""
    turns_experts: bool = False
    """Whether its experts may be stored by columns."""
    always: tuple[tuple[str, bool], ...] = ()
    """Keys and values of the family's config that its own has not: its model has no choice."""
    is_flat: bool = False
    """Whether published configs have the language model's keys beside the others, not in `text_config`."""


WRAPPERS: Final[Mapping[str, Wrapper]] = {
    "gemma3": Wrapper("gemma3_text"),
    "gemma3n": Wrapper("gemma3n_text"),
    "gemma4": Wrapper("gemma4_text"),
    "llama4": Wrapper("llama4_text"),
    "mistral3": Wrapper("mistral", any_type=True),
    "qwen2_5_vl": Wrapper("qwen2_5_vl_text", family="qwen2", is_flat=True),
    "qwen2_vl": Wrapper("qwen2_vl_text", family="qwen2", is_flat=True),
    "qwen3_5": Wrapper("qwen3_5_text"),
    "qwen3_5_moe": Wrapper("qwen3_5_moe_text"),
    "qwen3_vl": Wrapper("qwen3_vl_text", family="qwen3"),
    "qwen3_vl_moe": Wrapper(
        "qwen3_vl_moe_text", family="qwen3_moe", turns_experts=True, always=(("norm_topk_prob", True),)
    ),
}
"""Every other multimodal model is refused: its language model may see ahead (PaliGemma), or take more than tokens."""

NOT_READ: Final[Mapping[str, str]] = {
    "gemma4_unified": "its language model is not that of gemma4, and no test holds it against transformers",
}
"""`model_type`s with the reason why their language model is not read."""
