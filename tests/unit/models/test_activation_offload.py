"""Layer inputs in host memory: those alone, once a layer, and the same gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor
from typing_extensions import override

from megadistill.models import layers as module
from megadistill.models.attention.masks import omit_empty_masks
from megadistill.models.families import decoder, forward_inputs
from megadistill.models.layers import checkpoint_layers, offload_layer_inputs
from tests.unit.models.cases import LAYERS, VOCAB, whole_model

TOKENS = torch.randint(0, VOCAB, (2, 8), generator=torch.Generator().manual_seed(1))


def _gradients(model: Any) -> dict[str, Tensor]:
    inner = decoder(model)
    inner(**forward_inputs(inner, TOKENS, None)).last_hidden_state.square().sum().backward()
    return {name: parameter.grad for name, parameter in inner.named_parameters()}


def test_the_backward_pass_reads_the_inputs_of_layers_from_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    copied, restored = [], []

    class Watched(module._OnHost):
        @classmethod
        @override
        def of(cls, tensor: Tensor) -> "Watched":
            copied.append(tensor.shape)
            return super().of(tensor)  # type: ignore[return-value]

        @override
        def restored(self) -> Tensor:
            restored.append(self.copy.shape)
            return super().restored()

    monkeypatch.setattr(module, "_OnHost", Watched)
    plain, offloaded = whole_model("llama"), whole_model("llama")
    for model in (plain, offloaded):
        omit_empty_masks(decoder(model))
        checkpoint_layers(decoder(model), "full")
    offload_layer_inputs(decoder(offloaded))
    expected = _gradients(plain)
    assert not copied
    gradients = _gradients(offloaded)
    assert copied == restored == LAYERS * [torch.Size([2, 8, 64])]
    assert all(torch.equal(gradients[name], gradient) for name, gradient in expected.items())


def test_a_copy_is_not_the_tensor() -> None:
    """What is written into the tensor's memory afterwards, as an allocator does, changes nothing."""
    tensor = torch.arange(6.0)
    packed = module._OnHost.of(tensor)
    tensor.zero_()
    assert packed.restored().tolist() == [0, 1, 2, 3, 4, 5]
