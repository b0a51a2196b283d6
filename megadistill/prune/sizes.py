"""Sizes of a pruned model, and its config."""

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from megadistill.errors import UserError
from megadistill.models.families import DROPOUTS, FAMILIES, Family, ModelConfig, family, head_dim, keep_layers


@dataclass(frozen=True)
class Sizes:
    """Sizes that pruning reduces; `heads` are query heads. The size of a head and the vocabulary stay."""

    hidden_size: int
    intermediate_size: int
    heads: int
    layers: int


def sizes_of(config: ModelConfig) -> Sizes:
    """The sizes of a model as it is."""
    return Sizes(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        heads=config.num_attention_heads,
        layers=config.num_hidden_layers,
    )


def pruned_sizes(config: ModelConfig, **given: int | None) -> Sizes:
    """The sizes of the pruned model: the `given` fields of `Sizes`, and the model's own for the others.

    Heads are removed by whole key-value groups, so that the number of heads of a group stays.

    Raises:
        UserError: a family that is not pruned, a size that the model does not have, sizes that do not fit together, or
            none that is smaller; one line that names the option and the values that would do.
    """
    if reason := _reason_not_to_prune(family(config)):
        pruned = ", ".join(name for name, each in FAMILIES.items() if not _reason_not_to_prune(each))
        raise UserError(f"a {config.model_type} model is not pruned: {reason}; families that are: {pruned}")
    own = sizes_of(config)
    chosen = {name: size for name, size in given.items() if size is not None}
    for name, size in chosen.items():
        if not 1 <= size <= getattr(own, name):
            raise UserError(f"{option(name)} {size}: give 1 to {getattr(own, name)}, which the teacher has")
    sizes = replace(own, **chosen)
    if sizes == own:
        raise UserError(f"nothing to prune: give a size below the teacher's, of {', '.join(map(option, asdict(own)))}")
    group = config.num_attention_heads // config.num_key_value_heads
    if sizes.heads % group:
        raise UserError(
            f"--heads {sizes.heads}: the teacher's {own.heads} heads share {config.num_key_value_heads} keys and "
            f"values, and stay or go by groups of {group}: {_nearest(sizes.heads, group, own.heads)}"
        )
    if sizes.hidden_size % sizes.heads:
        raise UserError(
            f"--hidden-size {sizes.hidden_size}: transformers needs a multiple of the {sizes.heads} heads: "
            f"{_nearest(sizes.hidden_size, sizes.heads, own.hidden_size)}"
        )
    width, rope = head_dim(config), getattr(config, "rope_parameters", None) or {}
    has_longrope = config.model_type == "phi3" and rope.get("rope_type") == "longrope"
    if has_longrope and sizes.hidden_size != sizes.heads * width:
        raise UserError(
            f"--hidden-size {sizes.hidden_size} and --heads {sizes.heads}: transformers takes a phi3 model with "
            f"longrope only where the hidden size is {width} for each head, as in the teacher: give "
            f"--hidden-size {sizes.heads * width}"
        )
    return sizes


def _reason_not_to_prune(each: Family) -> str:
    """A clause; empty for a family that is pruned."""
    if each.teacher_only:
        return "it can only teach"
    return "it has experts" if each.experts is not None else each.unpruned


def option(name: str) -> str:
    """The command-line option of a size."""
    return f"--{name.replace('_', '-')}"


def _nearest(size: int, step: int, most: int) -> str:
    below = size // step * step
    fits = [str(value) for value in (below, below + step) if 0 < value <= most]
    return f"the nearest that fit: {' or '.join(fits)}" if fits else "none fits"


def pruned_config(config: ModelConfig, sizes: Sizes, *, layers: Sequence[int]) -> ModelConfig:
    """The config of the pruned model, of the layers `layers` of the whole one, in order."""
    small = copy.deepcopy(config)
    group = config.num_attention_heads // config.num_key_value_heads
    small.head_dim = head_dim(config)  # it would follow from the other sizes
    small.hidden_size = sizes.hidden_size
    small.intermediate_size = sizes.intermediate_size
    small.num_attention_heads = sizes.heads
    small.num_key_value_heads = sizes.heads // group
    keep_layers(small, layers)
    for name in DROPOUTS:
        if hasattr(small, name):
            setattr(small, name, 0.0)  # the pruned model is a student's start, and a student drops nothing
    return small
