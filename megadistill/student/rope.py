"""The student's rotary embeddings where they change during a run: its config with others, and its buffers."""

import copy
from typing import Any

import torch
from torch.nn import Module

from megadistill.errors import UserError, nearest
from megadistill.models.config_bounds import refuse_extreme_numbers
from megadistill.models.families import build_decoder, decoder, family, head_dim
from megadistill.models.model_keys import TRANSFORMERS_REFUSES, refuse_rope, refused_by_transformers

ROPE_KEYS = (
    "rope_type", "rope_theta", "factor", "original_max_position_embeddings", "attention_factor", "beta_fast",
    "beta_slow", "mscale", "mscale_all_dim", "truncate", "low_freq_factor", "high_freq_factor", "short_factor",
    "long_factor", "partial_rotary_factor", "alpha", "type", "llama_4_scaling_beta",
)  # fmt: skip
"""Keys of `rope_parameters`: transformers keeps others in silence."""


def with_rope(config: Any, rope: float | dict[str, Any] | None, *, what: str) -> Any:
    """A copy of a config with other rotary embeddings; None: the same ones.

    Args:
        rope: rope_theta, or rope_parameters. Of these, rope_theta and the part of a head that is turned are those of
            the config where they are not given. A model whose kinds of layers have embeddings of their own takes
            rope_parameters by kind, and kinds that are not named keep theirs.
        what: name of the source in messages.

    Raises:
        UserError: the model has no rotary embeddings, or cannot have these.
    """
    changed = copy.deepcopy(config)
    if rope is None:
        return changed
    before = getattr(config, "rope_parameters", None)
    if not before:
        raise UserError(f"{what}: a {config.model_type} model has no rotary embeddings: leave it out")
    kinds = [kind for kind, values in before.items() if isinstance(values, dict)]
    if not kinds:
        changed.rope_parameters = _merged(before, rope, what)
    elif not isinstance(rope, dict):
        raise UserError(
            f"{what}: the layers of this {config.model_type} model have rotary embeddings by kind: give "
            f"rope_parameters of {' or '.join(kinds)}, as in {{{kinds[-1]}: {{rope_theta: {rope:g}}}}}"
        )
    else:
        for kind in rope:
            if kind not in kinds:
                raise UserError(f"{what}: this model has no layers of kind {kind}{nearest(kind, kinds)}")
        changed.rope_parameters = {
            kind: _merged(values, rope[kind], what) if kind in rope else values for kind, values in before.items()
        }
    try:
        width, partial = head_dim(changed), family(changed).partial_rope
        refuse_rope(changed, what, head=width, partial=partial, keys=family(changed).rope_keys)
        rotary = build_decoder(changed, layers=range(1)).rotary_emb
        with torch.device("meta"):
            type(rotary)(config=copy.deepcopy(changed))
    except UserError:
        raise
    except TRANSFORMERS_REFUSES as error:
        raise refused_by_transformers(error, changed.model_type, what) from None
    return changed


def turn_rotary(model: Module, config: Any) -> None:
    """Gives a model the rotary embeddings of a config, in place and in float32.

    The module stays: hooks know it, and compiled layers get its cosines and sines as inputs.
    """
    rotary: Any = decoder(model).rotary_emb
    device = next(rotary.buffers()).device
    with torch.device("cpu"):
        fresh = type(rotary)(config=config)
    for name, value in vars(fresh).items():
        if not name.startswith("_") and name != "training":
            setattr(rotary, name, value)
    for name, buffer in fresh.named_buffers(recurse=False):
        setattr(rotary, name, buffer.to(device))


def _merged(before: dict[str, Any], rope: float | dict[str, Any], what: str) -> dict[str, Any]:
    if not isinstance(rope, dict):
        return {**before, "rope_theta": float(rope)}
    for key in rope:
        if key not in ROPE_KEYS:
            raise UserError(f"{what}: rope_parameters has no key {key}{nearest(key, ROPE_KEYS)}")
    refuse_extreme_numbers(rope, what)
    unchanged: dict[str, Any] = {key: before[key] for key in ("rope_theta", "partial_rotary_factor") if key in before}
    merged: dict[str, Any] = {"rope_type": "default", **unchanged, **rope}
    numbers = {key: float(merged[key]) for key in ("rope_theta", "factor") if isinstance(merged.get(key), int)}
    return {**merged, **numbers}
