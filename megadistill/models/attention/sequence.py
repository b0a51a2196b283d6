"""Sequence parallelism in attention: each rank computes some heads over the whole sequences that it has tokens of.

As in DeepSpeed-Ulysses (Jacobs et al., 2309.14509): outside of attention a rank has a part of each sequence's tokens,
and all heads; an all-to-all before attention gives it all tokens of some heads, and one after it brings back its own
tokens. Masks are those of whole sequences, so that each implementation of attention computes as it does on one rank.

Legend: B sequences, n ranks that share them, S tokens of a sequence, s = S / n of this rank, H query heads, G key
heads, c copies of each of them, D and V columns of a query's and of a value's head.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from megadistill.errors import UserError
from megadistill.types import SequencePart

SHARED = "megadistill_sequence"
"""transformers' name of the attention function of a model whose sequences are shared."""

Exchange = Callable[[Tensor], Tensor]
"""All-to-all over the ranks that share sequences: [n, ...], block i for rank i -> [n, ...], block i from rank i."""

_ROPE_BY_LENGTH = ("dynamic", "longrope")
"""Rotary embeddings whose frequencies depend on the largest position that a rank has."""


@dataclass(frozen=True)
class _SharedAttention:
    """How the attention of one layer is shared."""

    part: SequencePart
    exchange: Exchange
    implementation: str
    """transformers' name of the function that computes it."""

    def heads(self, tensor_BHsD: Tensor) -> Tensor:
        """[B, H, s, D] -> [B, H / n, S, D]: this rank's heads of all tokens."""
        B, H, s, D = tensor_BHsD.shape
        n = self.part.parts
        blocks = tensor_BHsD.reshape(B, n, H // n, s, D).transpose(0, 1)
        return self.exchange(blocks).permute(1, 2, 0, 3, 4).reshape(B, H // n, n * s, D)

    def tokens(self, tensor_BShV: Tensor) -> Tensor:
        """[B, S, H / n, V] -> [B, s, H, V]: all heads of this rank's tokens."""
        B, S, h, V = tensor_BShV.shape
        n = self.part.parts
        blocks = tensor_BShV.reshape(B, n, S // n, h, V).transpose(0, 1)
        return self.exchange(blocks).permute(1, 2, 0, 3, 4).reshape(B, S // n, n * h, V)


def share_sequences(decoder: Any, part: SequencePart, exchange: Exchange) -> None:
    """Makes a decoder read this rank's part of each sequence: tokens [B, s], with the positions of whole sequences.

    `forward_inputs` makes masks and positions accordingly. Call it before the layers are compiled. Collective from then
    on: the ranks run the same forward and backward passes.
    """
    implementation = decoder.config._attn_implementation
    assert implementation != "eager", "see refuse_shared_heads"
    decoder.sequence_part = part
    for module in decoder.modules():
        if not isinstance(getattr(module, "is_causal", None), bool) or not hasattr(module, "config"):
            continue
        # Masks are still made for the implementation that the decoder's own config names.
        module.config = copy.copy(module.config)
        module.config._attn_implementation = SHARED
        module.shared_attention = _SharedAttention(part, exchange, implementation)
        if groups := getattr(module, "num_key_value_groups", None):  # sdpa repeats keys by it
            heads = decoder.config.num_attention_heads
            module.num_key_value_groups = groups // key_copies(heads, heads // groups, part.parts)


def key_copies(heads: int, key_heads: int, ranks: int) -> int:
    """c: copies of each key head, the fewest with which every rank has the same number, and those of its queries.

    `ranks` divides `heads`, and `key_heads` does.
    """
    queries = heads // key_heads
    return next(c for c in range(1, queries + 1) if queries % c == 0 and key_heads * c % ranks == 0)


def shared_attention_forward(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **inputs: Any
) -> tuple[Tensor, None]:
    """query [B, H, s, D], key [B, G, s, D], value [B, G, s, V] -> [B, s, H, V]. The mask is of whole sequences."""
    shared: _SharedAttention = module.shared_attention
    ranks = shared.part.parts
    copies = key_copies(query.shape[1], key.shape[1], ranks)
    if copies > 1:
        key, value = key.repeat_interleave(copies, dim=1), value.repeat_interleave(copies, dim=1)
    if (sinks := inputs.get("s_aux")) is not None:  # one number for each query head
        inputs["s_aux"] = sinks.chunk(ranks)[shared.part.place]
    compute = ALL_ATTENTION_FUNCTIONS[shared.implementation]
    own = (shared.heads(each) for each in (query, key, value))
    output_BShV, _ = compute(module, *own, attention_mask, **inputs)
    return shared.tokens(output_BShV), None


def refuse_shared_heads(config: Any, ranks: int, attention: str, *, what: str, key: str) -> None:
    """Refuses a model whose attention `ranks` ranks cannot share.

    Args:
        attention: its implementation, as `choose_attention` has it.
        what: the key of the config; `key`: that of its attention.

    Raises:
        UserError: one line.
    """
    name = f"distributed.sequence is {ranks}"
    heads = config.num_attention_heads
    if heads % ranks:
        fits = [each for each in range(1, heads + 1) if heads % each == 0]
        raise UserError(
            f"{name}, and the model of {what} has {heads} attention heads, of which every rank takes as many: give a "
            f"number that divides them, {', '.join(map(str, fits))}"
        )
    refuse_rope_by_length(config, ranks, what=what)
    if attention == "eager":
        raise UserError(
            f"{name}, and {key} is eager, which transformers has inside each family's model: set {key} to auto or flex"
        )


def refuse_rope_by_length(config: Any, ranks: int, *, what: str) -> None:
    """Refuses rotary embeddings that ranks with a part of each sequence would each compute otherwise.

    `what`: name of their source.

    Raises:
        UserError: one line.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {each.get("rope_type") for each in (rope, *rope.values()) if isinstance(each, dict)}
    if by_length := [kind for kind in _ROPE_BY_LENGTH if kind in kinds]:
        raise UserError(
            f"distributed.sequence is {ranks}, and rotary embeddings of type {by_length[0]} in {what} depend on the "
            "length that a rank sees: set distributed.sequence to 1, or give rope_parameters of another type, such as "
            "yarn"
        )


def register_shared_attention() -> None:
    """Makes transformers' layers find the function by its name."""
    AttentionInterface.register(SHARED, shared_attention_forward)
