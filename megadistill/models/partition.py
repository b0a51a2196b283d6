"""Room `model`: a model cut by layers into stages. It knows no ranks, and reads no weights."""

import bisect
import itertools
from collections.abc import Sequence
from functools import cache

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from megadistill.errors import UserError
from megadistill.models.families import build_decoder
from megadistill.models.flops import layer_costs


def stage_layers(config: PretrainedConfig, stages: int) -> list[range]:
    """The layers of each stage, cut so that the costliest, which sets a pipeline's pace, costs as little as can be.

    A layer costs its active parameters. Neither the embedding nor the head counts: looking a token up costs next to
    nothing, and the head is no stage's work. The first stage does hold the embedding, so of cuts that are as good the
    one with the larger stages at the end is taken: where all layers are alike, sizes differ by one at most.

    Raises:
        UserError: fewer than one stage, or more stages than layers.
    """
    layers = config.num_hidden_layers
    if not 1 <= stages <= layers:
        raise UserError(f"a model of {layers} layers cannot be cut into {stages} stages: it takes 1 to {layers}")
    ends = [0, *itertools.accumulate(balanced_sizes(layer_costs(config), stages))]
    return [range(start, stop) for start, stop in itertools.pairwise(ends)]


def balanced_sizes(costs: Sequence[int], parts: int) -> list[int]:
    """Sizes of `parts` consecutive, non-empty parts, whose largest sum is as small as can be.

    Of these cuts, one with the least sum of squares (the parts below the largest are even, too), and of these the one
    with the smallest first parts.
    """
    sums = [0, *itertools.accumulate(costs)]
    # The least bound that a greedy filling needs no more than `parts` parts for; a part can always be cut once more.
    bound = bisect.bisect_left(
        range(sums[-1] + 1), True, lo=max(costs), key=lambda limit: _parts_needed(costs, limit) <= parts
    )

    @cache
    def best(start: int, left: int) -> tuple[float, list[int]]:
        """Least sum of squares of the costs from `start` on in `left` parts, and their sizes."""
        if left == 0:
            return (0.0, []) if start == len(costs) else (float("inf"), [])
        found: tuple[float, list[int]] = (float("inf"), [])
        for stop in range(start + 1, len(costs) - left + 2):
            part = sums[stop] - sums[start]
            if part > bound:
                break
            squares, sizes = best(stop, left - 1)
            if part**2 + squares < found[0]:
                found = (part**2 + squares, [stop - start, *sizes])
        return found

    return best(0, parts)[1]


def _parts_needed(costs: Sequence[int], limit: int) -> int:
    """Parts that a greedy filling makes, none above `limit`; no layer alone is above it."""
    parts, filled = 1, 0
    for cost in costs:
        parts, filled = (parts, filled + cost) if filled + cost <= limit else (parts + 1, cost)
    return parts


def stage_decoder(config: PretrainedConfig, *, stage: int, stages: int) -> tuple[PreTrainedModel, dict[str, str]]:
    """One stage on meta, and what its parameters are: name in the whole model -> name in the stage.

    The first stage keeps the embedding and the last one the final norm; nobody has the head. Each stage counts its
    layers from 0, which is what its cut `layer_types` expect.
    """
    layers = stage_layers(config, stages)[stage]
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
