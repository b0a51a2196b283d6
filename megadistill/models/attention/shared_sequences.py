"""Checks of recipes in which several ranks share each sequence (`distributed.sequence`)."""

from collections.abc import Mapping
from typing import Any

from megadistill.config.auto import Choice
from megadistill.config.recipe import Recipe
from megadistill.errors import UserError
from megadistill.models.attention.choice import has_indexers
from megadistill.models.attention.sequence import refuse_shared_heads


def check_shared_sequences(
    recipe: Recipe, lengths: Mapping[str, int], models: Mapping[str, tuple[Any, Choice]]
) -> None:
    """Checks that `distributed.sequence` ranks can share the sequences. One rank alone can.

    Args:
        lengths: source -> tokens of its sequences.
        models: key of each model's config -> the config, and the implementation of its attention.

    Raises:
        UserError: one line.
    """
    ranks, teacher = recipe.distributed.sequence, recipe.teacher
    if ranks == 1:
        return
    name = f"distributed.sequence is {ranks}"
    for source, length in lengths.items():
        if length % ranks:
            where = f"those of source {source}" if len(lengths) > 1 else "sequences"
            raise UserError(
                f"{name}, and {where} have {length} tokens, which do not divide into {ranks} parts: give a number that "
                f"divides them, or tokenize with --sequence-length {max(1, length // ranks) * ranks}"
            )
    if teacher is not None and teacher.placement == "disaggregated":
        raise UserError(
            f"{name}, and a teacher on ranks of its own answers with whole sequences: set teacher.placement to "
            "colocated, whose stages share them as the student does, or distributed.sequence to 1"
        )
    if teacher is not None and teacher.save_targets is not None:
        raise UserError(
            f"{name}, and targets are saved by whole sequences, of which a rank has a part: leave teacher.save_targets "
            "out, or store them before the run (megadistill store-targets) with distributed.sequence 1"
        )
    for what, (config, attention) in models.items():
        if {"linear_attention", "hybrid"} & {*(getattr(config, "layer_types", None) or ())}:
            raise UserError(
                f"{name}, and recurrent layers of the {config.model_type} model of {what} carry a state from token to "
                "token, which is not passed between ranks: set distributed.sequence to 1"
            )
        if reason := _reason_for_whole_sequences(config):
            raise UserError(f"{name}, and in the {config.model_type} model of {what} {reason}: set it to 1")
        refuse_shared_heads(config, ranks, attention.value, what=what, key=f"{what.partition('.')[0]}.attention")


def _reason_for_whole_sequences(config: Any) -> str | None:
    """Why a family's layers need whole sequences, or have no test on parts of them; None: they can be shared."""
    if has_indexers(config):
        return "indexers choose keys of whole sequences"
    if getattr(config, "attn_temperature_tuning", False):
        return "queries are scaled by their place in a whole sequence"
    if getattr(config, "is_heterogeneous", False):
        return "layers have heads of different widths, which no test holds on parts of sequences"
    if getattr(config, "num_kv_shared_layers", 0) or getattr(config, "hidden_size_per_layer_input", 0):
        return "layers share keys and values, or read inputs of their own, which no test holds on parts of sequences"
    return None
