"""The implementation that computes a model's attention, and why."""

import re
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

from megadistill.config.auto import NO_TRITON, Choice, has_triton, install_for_triton, missing_for_triton
from megadistill.config.recipe import AttentionSetting, Recipe
from megadistill.errors import UserError
from megadistill.models.attention.masks import INDEXED_KINDS
from megadistill.models.configs.unequal_layers import layer_configs

FLASH_WIDTH = 256
"""Widest head of the flash-attn kernels."""

FLEX_WIDTH = 16
"""Narrowest head of flex_attention's kernels."""

_SOFTCAPPED = ("gemma2",)
"""Families whose layers bound their scores by the config's `attn_logit_softcapping`; others ignore the key."""

_SINKS = ("gpt_oss",)
"""Families whose heads have attention sinks: one more score in the softmax, which torch's own attention and the
flash-attn packages below do not have."""

_WINDOWS_UNSAID = ("qwen2_moe",)
"""Families whose layers say their windows in masks alone, which flash-attn does not take."""

_FLASH_PACKAGES = {"flash_attention_3": ("flash-attn-3", (0,)), "flash_attention_2": ("flash-attn", (2, 7))}
"""transformers' name -> distribution, and its first version that compiled layers can call, with softcapped scores. The
first that is there is used."""


def has_indexers(config: Any) -> bool:
    """Whether layers attend to the keys that an indexer chooses, which reads and gives dense masks."""
    return bool(set(getattr(config, "layer_types", None) or ()) & set(INDEXED_KINDS))


def score_softcap(config: Any) -> float | None:
    """Bound of a model's attention scores, c · tanh(score / c); None: they have none."""
    if config.model_type not in _SOFTCAPPED or config.attn_logit_softcapping is None:
        return None
    return float(config.attn_logit_softcapping)


def has_sdpa(config: Any) -> bool:
    """Whether transformers computes the family with torch's attention, which has neither softcap nor sinks."""
    return config.model_type not in (*_SOFTCAPPED, *_SINKS)


def has_sinks(config: Any) -> bool:
    """Whether the heads have attention sinks."""
    return config.model_type in _SINKS


def widest_head(config: Any) -> int:
    """Columns of a query's head in the layers with the widest ones."""
    return max(map(query_width, layer_configs(config)))


def query_width(config: Any) -> int:
    """Columns of a query's head; of latent attention, those that are turned and those that are not.

    `config`: as a layer reads it (`layer_config`).
    """
    width = getattr(config, "qk_head_dim", None) or getattr(config, "head_dim", None)
    return int(width or config.hidden_size // config.num_attention_heads)


def value_width(config: Any) -> int:
    """Columns of a value's head."""
    return int(getattr(config, "v_head_dim", None) or query_width(config))


def has_window(config: Any, sequence_length: int | None) -> bool:
    """Whether a layer's window or chunk is shorter than the sequence, which no causal flag expresses.

    None: any length.
    """
    chunk = getattr(config, "attention_chunk_size", None)
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()) and chunk is not None:
        return sequence_length is None or chunk < sequence_length
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    slides = "sliding_attention" in kinds if kinds else window is not None
    return bool(slides and window is not None and (sequence_length is None or window < sequence_length))


def flash_implementation() -> str | None:
    """transformers' name of the installed flash-attn that compiled layers can call; None: there is none."""
    for name, (distribution, first) in _FLASH_PACKAGES.items():
        try:
            installed = tuple(int(part) for part in re.findall(r"\d+", version(distribution))[:2])
        except PackageNotFoundError:
            continue
        if installed >= first:
            return name
    return None


def choose_attention(
    setting: AttentionSetting,
    config: Any,
    *,
    accelerator: bool,
    precision: str,
    documents: bool,
    sequence_length: int | None = None,
    flash: bool | None = None,
    triton: bool | None = None,
    key: str = "attention",
) -> Choice:
    """`eager`, `sdpa`, `flex` or `flash` for a model, with the reason. `auto` never builds scores [S, S].

    Args:
        accelerator: whether the model is on one, not on a CPU.
        precision: of its activations, `float32` or `bfloat16`.
        documents: whether attention is limited to documents (`data.document_mask`).
        sequence_length: tokens of a sequence; None: any.
        flash: whether flash-attn is installed; None: look for it here.
        triton: likewise, Triton.
        key: the recipe's, for messages.

    Raises:
        UserError: the recipe names one that cannot compute this model here.
    """
    flash = flash_implementation() is not None if flash is None else flash
    no_flash = _beyond_flash(config)
    triton = has_triton() if triton is None else triton
    sdpa = has_sdpa(config)
    width = widest_head(config)
    if has_indexers(config):
        if setting in ("flex", "flash"):
            raise UserError(
                f"{key} is {setting}, which has no dense masks, and this family's indexer needs them: set {key} to auto"
            )
        return Choice(setting if setting == "eager" else "sdpa", "dense masks, as its indexers read and give them")
    if setting != "auto":
        _refuse_unable(setting, key, accelerator, precision, sdpa=sdpa, flash=flash, triton=triton, width=width)
        if no_flash and setting == "flash":
            raise UserError(f"{key} is flash, and flash-attn {no_flash}: set {key} to auto")
        return Choice(setting, "by the recipe")
    needs = [
        *([] if sdpa else [_beyond_sdpa(config)]),
        *(["documents"] if documents else []),
        *(["sliding windows"] if has_window(config, sequence_length) else []),
    ]
    if not accelerator:
        if needs:
            return Choice("flex", f"{' and '.join(needs)}: blockwise on a CPU")
        return Choice("sdpa", "causal alone, which needs no mask")
    if flash and not no_flash and not documents and precision != "float32" and width <= FLASH_WIDTH:
        return Choice("flash", "flash-attn is installed")
    if not needs:
        return Choice("sdpa", "causal alone, which needs no mask")
    missing = _missing_for_flex(triton=triton, width=width)
    if missing is None:
        return Choice("flex", " and ".join(needs))
    return Choice("sdpa" if sdpa else "eager", f"{' and '.join(needs)}, by dense masks, as flex cannot run: {missing}")


def _beyond_flash(config: Any) -> str | None:
    """Reason why the flash-attn packages cannot compute a family; None: they can."""
    if has_sinks(config):
        return "has no attention sinks, which this family has"
    # SmolLM 3 says the windows of its `layer_types` in masks alone as well, where `use_sliding_window` is not set.
    unsaid = config.model_type in _WINDOWS_UNSAID or not getattr(config, "use_sliding_window", True)
    if unsaid and has_window(config, None):
        return "is not told of this family's sliding windows"
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        return "is not told of this family's chunks"
    if any(value_width(each) != query_width(each) for each in layer_configs(config)):
        return "has one width for queries and values, which differ in this family"
    if {"linear_attention", "hybrid"} & {*(getattr(config, "layer_types", None) or ())}:
        return "is given the lengths of rows, which this family's recurrent layers would take, too"
    return None


def _beyond_sdpa(config: Any) -> str:
    """Name of a part of a family's attention that torch's own lacks."""
    if has_sinks(config):
        return "attention sinks"
    return "softcapped scores" if score_softcap(config) else f"{config.model_type}, which has no sdpa"


def recipe_attention(
    recipe: Recipe,
    model: Literal["student", "teacher"],
    config: Any,
    *,
    accelerator: bool,
    sequence_length: int | None,
    flash: bool | None = None,
    triton: bool | None = None,
) -> Choice:
    """`choose_attention` for a model of a run, by its recipe and its config.

    Raises:
        UserError: as there.
    """
    section = recipe.student if model == "student" else recipe.teacher
    assert section is not None
    return choose_attention(
        section.attention,
        config,
        accelerator=accelerator,
        precision=recipe.train.precision,
        documents=recipe.data.document_mask,
        sequence_length=sequence_length,
        flash=flash,
        triton=triton,
        key=f"{model}.attention",
    )


def _missing_for_flex(*, triton: bool, width: int) -> str | None:
    """The reason why flex_attention has no kernels on an accelerator; None: it has."""
    if not triton:
        return missing_for_triton() or NO_TRITON
    if width < FLEX_WIDTH:
        return f"heads have {width} columns, and its kernels at least {FLEX_WIDTH}"
    return None


def _refuse_unable(
    setting: str,
    key: str,
    accelerator: bool,
    precision: str,
    *,
    sdpa: bool,
    flash: bool,
    triton: bool,
    width: int,
) -> None:
    way_out = f"set {key} to auto"
    if setting == "sdpa" and not sdpa:
        raise UserError(f"{key} is sdpa, which has no softcap and no sinks, and this family's attention may: {way_out}")
    if setting == "flex" and accelerator and (missing := _missing_for_flex(triton=triton, width=width)):
        if triton:
            raise UserError(f"{key} is flex, and {missing}: {way_out}")
        raise UserError(
            f"{key} is flex, which needs Triton on an accelerator, and {missing}: {install_for_triton(missing)}, or "
            f"{way_out}"
        )
    if setting != "flash":
        return
    if not accelerator:
        raise UserError(f"{key} is flash, which runs on accelerators alone, and this is a CPU: {way_out}")
    if not flash:
        raise UserError(
            f"{key} is flash, and neither flash-attn (2.7 or newer) nor flash-attn-3 is installed: install one, or "
            f"{way_out}"
        )
    if precision == "float32":
        raise UserError(f"{key} is flash, which computes in 16 bits, and train.precision is float32: {way_out}")
    if width > FLASH_WIDTH:
        raise UserError(
            f"{key} is flash, whose heads have at most {FLASH_WIDTH} columns, and the model's {width}: {way_out}"
        )
