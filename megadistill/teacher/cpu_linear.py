"""Linear layers of a compiled stage on a CPU, in float32: by oneDNN, which torch itself uses for 16 bits alone.

Its products are 5 to 13 % faster there than MKL's on an AMD EPYC with AVX-512, of weights as they lie in memory (copies
in oneDNN's own layout would give 4 % more, take the stage's memory again, and be no tensors that can be hashed).
"""

from typing import Any, cast

import torch
from torch import Tensor, nn


@torch.library.custom_op("megadistill::onednn_linear", mutates_args=())
def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[.., K] -> [.., N], for a weight [N, K]. An operator of ours: torch's compiler takes oneDNN's own with constant
    weights alone."""
    return cast(Tensor, torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], ""))


@onednn_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


class OneDnnLinear(nn.Module):
    """`nn.Linear` with the same parameters."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """[.., K] -> [.., N]."""
        return cast(Tensor, onednn_linear(x, self.weight, self.bias))


def use_onednn(decoder: Any) -> None:
    """Replaces the linear layers in float32 on a CPU, where torch has oneDNN; their parameters keep their names."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):  # not public: another torch may have another one
        return
    for name, module in list(decoder.layers.named_modules()):
        if isinstance(module, nn.Linear) and (module.weight.device.type, module.weight.dtype) == ("cpu", torch.float32):
            decoder.layers.set_submodule(name, OneDnnLinear(module))
