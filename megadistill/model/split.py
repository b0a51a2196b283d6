"""Room `model`: a model cut by layers into stages. It knows no ranks, and reads no weights."""

import itertools

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from megadistill.errors import UserError
from megadistill.model.families import build_decoder


def stage_layers(layers: int, stages: int) -> list[range]:
    """The layers of each stage. Sizes differ by one at most, and the last stages are the larger: the first also embeds.

    Raises:
        UserError: fewer than one stage, or more stages than layers.
    """
    if not 1 <= stages <= layers:
        raise UserError(f"a model of {layers} layers cannot be cut into {stages} stages: it takes 1 to {layers}")
    smaller, larger = layers // stages, layers % stages
    ends = [smaller * done + max(0, done - (stages - larger)) for done in range(stages + 1)]
    return [range(start, stop) for start, stop in itertools.pairwise(ends)]


def stage_decoder(config: PretrainedConfig, *, stage: int, stages: int) -> tuple[PreTrainedModel, dict[str, str]]:
    """One stage on meta, and where its weights are: checkpoint name -> parameter name.

    The first stage keeps the embedding and the last one the final norm; nobody has the head. Each stage counts its
    layers from 0, which is what its cut `layer_types` expect.
    """
    layers = stage_layers(config.num_hidden_layers, stages)[stage]
    decoder = build_decoder(config, layers=layers)
    if stage > 0:
        decoder.embed_tokens = None
    if stage < stages - 1:
        decoder.norm = nn.Identity()
    return decoder, {f"model.{_whole_name(name, layers)}": name for name, _ in decoder.named_parameters()}


def _whole_name(name: str, layers: range) -> str:
    """`layers.0.x` of the stage is `layers.<first>.x` of the whole model."""
    if not name.startswith("layers."):
        return name
    _, index, rest = name.split(".", 2)
    return f"layers.{layers[int(index)]}.{rest}"
