"""A model cut by layers into pipeline stages."""

import bisect
import itertools
from collections.abc import Sequence
from functools import cache, lru_cache

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from megadistill.errors import UserError
from megadistill.models.configs.unequal_layers import first_layers
from megadistill.models.families import build_decoder, stored_buffers
from megadistill.models.flops import LAYERS, layer_costs
from megadistill.models.forward.hidden_streams import hand_on_streams, hidden_streams
from megadistill.models.forward.per_layer_inputs import has_per_layer_inputs, take_given_inputs


def stage_layers(config: PretrainedConfig, stages: int) -> list[range]:
    """The layers of each stage, cut so that the costliest stage, which sets the pipeline's pace, is as cheap as can be.

    A layer costs its active parameters; the embedding costs next to nothing, and no stage computes the head. The first
    stage holds the embedding, so among equal cuts the larger stages are last: the sizes of equal layers differ by one
    at most.

    Raises:
        UserError: fewer than one stage, or more stages than layers that one may begin with (`first_layers`).
    """
    sizes = stage_sizes(tuple(layer_costs(config)), tuple(first_layers(config)), stages)
    return [range(start, stop) for start, stop in itertools.pairwise(itertools.accumulate(sizes, initial=0))]


def stage_flops(costs: tuple[int, ...], firsts: tuple[int, ...], attention: int, stages: int) -> tuple[int, ...]:
    """FLOPs of one token's forward pass in each stage: those of its layers.

    Args:
        costs: active parameters of each layer, as `layer_costs`.
        firsts: layers that a stage may begin with, as `first_layers`.
        attention: FLOPs of a token's attention in all layers, shared out by their number.

    Raises:
        UserError: fewer than one stage, or more stages than `firsts`.
    """
    ends = itertools.accumulate(stage_sizes(costs, firsts, stages), initial=0)
    return tuple(
        2 * sum(costs[start:stop]) + attention * (stop - start) // len(costs)
        for start, stop in itertools.pairwise(ends)
    )


def stage_sizes(costs: tuple[int, ...], firsts: tuple[int, ...], stages: int) -> tuple[int, ...]:
    """Numbers of layers of each stage, each of which begins with one of `firsts`: see `balanced_sizes`.

    Raises:
        UserError: fewer than one stage, or more than `firsts`.
    """
    if len(firsts) == len(costs):
        return balanced_sizes(costs, stages)
    if not 1 <= stages <= len(firsts):
        raise UserError(
            f"a model of {len(costs)} layers cannot be cut into {stages} stages: some of them take what another one "
            f"computed, and stay in its stage: give 1 to {len(firsts)}"
        )
    edges = (*firsts, len(costs))
    groups = tuple(sum(costs[start:stop]) for start, stop in itertools.pairwise(edges))
    ends = itertools.accumulate(balanced_sizes(groups, stages), initial=0)
    return tuple(edges[stop] - edges[start] for start, stop in itertools.pairwise(ends))


@lru_cache(maxsize=1024)
def balanced_sizes(costs: tuple[int, ...], parts: int) -> tuple[int, ...]:
    """Sizes of `parts` consecutive, non-empty parts of a model's layers, whose largest cost is as small as can be.

    Of these cuts, one with the least sum of squares (the parts below the largest are even, too), and of these the one
    with the smallest first parts.

    Raises:
        UserError: fewer than one part, or more parts than layers.
    """
    layers = len(costs)
    if not 1 <= parts <= layers:
        raise UserError(f"a model of {layers} layers cannot be cut into {parts} stages: give 1 to {layers}")
    sums = [0, *itertools.accumulate(costs)]
    # The least bound that a greedy filling needs no more than `parts` parts for; a part can always be cut once more.
    bound = bisect.bisect_left(
        range(sums[-1] + 1), True, lo=max(costs), key=lambda limit: _parts_needed(costs, limit) <= parts
    )

    @cache
    def best(start: int, left: int) -> tuple[float, tuple[int, ...]]:
        """Least sum of squares of the costs from `start` on in `left` parts, and their sizes."""
        if left == 0:
            return (0.0, ()) if start == layers else (float("inf"), ())
        least: tuple[float, tuple[int, ...]] = (float("inf"), ())
        for stop in range(start + 1, layers - left + 2):
            part = sums[stop] - sums[start]
            if part > bound:
                break
            squares, sizes = best(stop, left - 1)
            if part**2 + squares < least[0]:
                least = (part**2 + squares, (stop - start, *sizes))
        return least

    return best(0, parts)[1]


def _parts_needed(costs: Sequence[int], limit: int) -> int:
    """Parts of a greedy filling, none of which costs more than `limit`; no layer alone does."""
    parts, filled = 1, 0
    for cost in costs:
        parts, filled = (parts, filled + cost) if filled + cost <= limit else (parts + 1, cost)
    return parts


def stage_decoder(
    config: PretrainedConfig, *, stage: int, stages: int, attention: str | None = None
) -> tuple[PreTrainedModel, dict[str, str]]:
    """One stage on meta, and the names of what a checkpoint holds of it: name in the whole model -> in the stage.

    These are its parameters, and buffers of routers.

    The first stage has the embedding, as all have whose layers' own inputs follow from it; the last one has the final
    norm, and no stage the head. Of a parameter with a part for each layer it has those of its layers. Each stage counts
    its layers from 0, as its part of `layer_types` does. `attention`: see `build_causal_lm`.
    """
    layers = stage_layers(config, stages)[stage]
    decoder = build_decoder(config, layers=layers, attention=attention)
    if stage > 0 and has_per_layer_inputs(config):
        take_given_inputs(decoder)
    elif stage > 0:
        decoder.embed_tokens = None
        if hasattr(decoder, "embedding_multiplier"):  # which Granite applies to whatever the layers read
            decoder.embedding_multiplier = 1.0
    if stage < stages - 1:
        decoder.norm = nn.Identity()
    if hidden_streams(config) > 1 and stages > 1:
        hand_on_streams(decoder, is_first=stage == 0, is_last=stage == stages - 1)
    names = [*(name for name, _ in decoder.named_parameters()), *stored_buffers(decoder)]
    return decoder, {whole_name(f"model.{name}", layers): name for name in names}


def whole_name(name: str, layers: Sequence[int]) -> str:
    """The name in the whole model of a parameter of a part that has these layers: `layers[0]` is the part's layer 0."""
    if not name.startswith(LAYERS):
        return name
    index, _, rest = name.removeprefix(LAYERS).partition(".")
    return f"{LAYERS}{layers[int(index)]}.{rest}"
