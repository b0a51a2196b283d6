"""Masks of our own: bit for bit what transformers computes with its own, without a host-device sync."""

from typing import Any

import pytest
import torch

from megadistill.models.families import build_causal_lm, decoder, forward_inputs, load_config
from megadistill.models.layers import checkpoint_layers
from tests.device_double import DEVICE, DeviceDouble, move
from tests.unit.models.cases import CASES, VOCAB

S = 12
"""Longer than the windows of 6."""

DOCUMENTS = torch.tensor([[*range(7), 0, *range(4)], [*range(S)]])


@pytest.mark.parametrize("case", CASES)
def test_a_forward_pass_is_that_of_transformers_without_a_sync(case: str) -> None:
    torch.manual_seed(0)
    config = load_config({**CASES[case], "hidden_size": 32, "intermediate_size": 16}, what=case)
    inner = decoder(build_causal_lm(config, vocab_size=VOCAB, dtype=torch.float32).eval())
    tokens = torch.randint(VOCAB, (2, S))
    for positions in (None, DOCUMENTS):
        with torch.no_grad():
            theirs = inner(input_ids=tokens, position_ids=positions, use_cache=False).last_hidden_state
            ours = inner(**forward_inputs(inner, tokens, positions)).last_hidden_state
        assert torch.equal(ours, theirs)
    with DeviceDouble() as double, torch.no_grad():
        move(inner)
        inputs = tokens.to(DEVICE), DOCUMENTS.to(DEVICE)
        double.clear()
        for positions in (None, inputs[1]):
            inner(**forward_inputs(inner, inputs[0], positions))
        assert double.counts == {}
        inner(input_ids=inputs[0], use_cache=False)
        assert "read in masking_utils.find_packed_sequence_indices" in double.counts, "what our masks are for"


def test_gradients_through_checkpointed_layers_are_those_of_transformers() -> None:
    """The layers of a family with one mask are called with an empty one, where the attention needs none."""
    config = load_config(CASES["llama"], what="llama")
    model = build_causal_lm(config, vocab_size=VOCAB, dtype=torch.float32).train()
    tokens = torch.arange(S).view(1, S)
    inner: Any = decoder(model)

    def gradients(**inputs: Any) -> list[torch.Tensor]:
        model.zero_grad()
        inner(**inputs).last_hidden_state.square().sum().backward()
        return [parameter.grad.clone() for parameter in inner.parameters() if parameter.grad is not None]

    theirs = gradients(input_ids=tokens, use_cache=False)
    checkpoint_layers(inner, "full")
    ours = gradients(**forward_inputs(inner, tokens, None))
    assert theirs
    assert all(map(torch.equal, ours, theirs))
    assert len(ours) == len(theirs)
