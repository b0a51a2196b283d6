"""Attention of Gemma 2 at 8,192 tokens: eager, which writes the scores, our function, and torch's own where legal.

Softcap 50; full causal layers, and sliding ones that see 4,096 tokens. The truth is eager attention in float32, a group
of heads at a time. torch's own (sdpa) has no softcap: it is measured without one, as a floor of the causal case.

Legend: H query heads, K key and value heads, S tokens, d head width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Gemma2Config, Gemma2Model
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

from megadistill.models.attention.flex import flex_attention_forward
from megadistill.models.attention.masks import FLEX, attention_inputs
from megadistill.models.families import forward_inputs
from tests.gpu.device import Device
from tests.gpu.loss_numerics import relative_error
from tests.gpu.results import Record

SOFTCAP = 50.0

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q [1, H, S, d], k and v [1, K, S, d] -> [1, H, S, d]."""


@dataclass(frozen=True)
class Shape:
    name: str
    heads: int
    kv_heads: int
    head_dim: int
    scale: float

    def inputs(self, device: Device, S: int) -> tuple[Tensor, ...]:
        """q, k and v that want gradients, and the gradient of the output."""
        torch.manual_seed(0)
        q, grad = (device.random(1, self.heads, S, self.head_dim) for _ in range(2))
        k, v = (device.random(1, self.kv_heads, S, self.head_dim) for _ in range(2))
        return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), grad


SHAPES = (Shape("27B", 32, 16, 128, 144**-0.5), Shape("9B", 16, 8, 256, 256**-0.5))


def _mask(device: Device, S: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """[1, 1, S, S] to add to scores."""
    rows = torch.arange(S, device=device.torch_device)
    seen = rows.unsqueeze(1) >= rows
    if window is not None:
        seen &= rows.unsqueeze(1) - rows < window
    smallest = torch.finfo(dtype).min
    return torch.zeros(S, S, device=device.torch_device, dtype=dtype).masked_fill_(~seen, smallest).view(1, 1, S, S)


def eager(shape: Shape, mask: Tensor, *, training: bool = True) -> Attend:
    """transformers' own function."""
    groups = shape.heads // shape.kv_heads
    module: Any = SimpleNamespace(head_dim=shape.head_dim, num_key_value_groups=groups, training=training)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = eager_attention_forward(module, q, k, v, mask, scaling=shape.scale, softcap=SOFTCAP)[0]
        return out.transpose(1, 2)

    return attend


def flex(device: Device, shape: Shape, S: int, window: int | None) -> Attend:
    """The package's own function: blocks that are masked throughout are left out, the scores stay on the chip."""
    kind = "full_attention" if window is None else "sliding_attention"
    config: Any = SimpleNamespace(_attn_implementation=FLEX, sliding_window=window, layer_types=[kind])
    made = attention_inputs(config, None, (1, S), by_kind=True, dtype=torch.bfloat16, device=device.torch_device)
    module: Any = SimpleNamespace()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = made["attention_mask"][kind]
        return flex_attention_forward(module, q, k, v, mask, scaling=shape.scale, softcap=SOFTCAP)[0].transpose(1, 2)

    return attend


def sdpa(shape: Shape) -> Attend:
    """Without the softcap."""
    return partial(F.scaled_dot_product_attention, is_causal=True, scale=shape.scale, enable_gqa=True)


def _truth(device: Device, shape: Shape, S: int, window: int | None, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Output and gradients of q, k and v, in float32, a key head at a time."""
    mask = _mask(device, S, window, torch.float32)
    group = Shape(shape.name, shape.heads // shape.kv_heads, 1, shape.head_dim, shape.scale)
    parts: list[list[Tensor]] = []
    for head in range(shape.kv_heads):
        queries = slice(head * group.heads, (head + 1) * group.heads)
        q, k, v, grad = (
            t.detach()[:, heads].float()
            for t, heads in zip(inputs, (queries, slice(head, head + 1), slice(head, head + 1), queries), strict=True)
        )
        leaves = [t.requires_grad_() for t in (q, k, v)]
        out = eager(group, mask)(*leaves)
        parts.append([out.detach(), *torch.autograd.grad(out, leaves, grad)])
    return [torch.cat(pieces, dim=1) for pieces in zip(*parts, strict=True)]


def _measure(
    device: Device, record: Record, case: str, attend: Attend, inputs: tuple[Tensor, ...], truth: list[Tensor] | None
) -> None:
    *leaves, grad = inputs
    q, k, v = leaves

    def forward() -> Tensor:
        return attend(q.detach(), k.detach(), v.detach())

    if truth is not None:
        record(case, "error of the output", relative_error(forward(), truth[0]))
    record(case, "forward, peak", device.peak_bytes(forward) / 2**20, "MiB")
    seconds = device.medians({"forward": forward}, repeats=5)
    record(case, "forward", 1e3 * seconds["forward"], "ms")

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(attend(q, k, v), leaves, grad)

    if truth is not None:
        for name, actual, true in zip(("q", "k", "v"), both(), truth[1:], strict=True):
            record(case, f"error of d{name}", relative_error(actual, true))
    record(case, "forward and backward, peak", device.peak_bytes(both) / 2**20, "MiB")
    seconds = device.medians({"both": both}, repeats=5)
    record(case, "forward and backward", 1e3 * seconds["both"], "ms")


def kernels(device: Device, record: Record) -> None:
    """Each shape and kind of layer."""
    S, sliding = device.size(8192, 256), device.size(4096, 128)
    for shape in SHAPES:
        for kind, window in {"full": None, "sliding": sliding}.items():
            inputs = shape.inputs(device, S)
            truth = _truth(device, shape, S, window, inputs)
            of = f"{shape.name}, {kind}"
            torch.compiler.reset()  # torch compiles one function eight times at most, and then runs it eagerly
            with record.part(f"{of}, flex"):
                _measure(device, record, f"{of}, flex", flex(device, shape, S, window), inputs, truth)
            if kind == "full":
                with record.part(f"{of}, sdpa without softcap"):
                    _measure(device, record, f"{of}, sdpa without softcap", sdpa(shape), inputs, None)
            with record.part(f"{of}, eager"):
                try:
                    attend = eager(shape, _mask(device, S, window, torch.bfloat16))
                    _measure(device, record, f"{of}, eager", attend, inputs, truth)
                except torch.OutOfMemoryError:
                    record.left_out(f"{of}, eager", "out of memory")
            del inputs, truth
            device.free()


def model(device: Device, record: Record) -> None:
    """transformers' Gemma 2, eager, with its flex_attention and with our function, against eager in float32."""
    S = device.size(2048, 64)
    config = Gemma2Config(
        vocab_size=1024, hidden_size=512, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=4, head_dim=64, sliding_window=S // 2, query_pre_attn_scalar=64,
        layer_types=["sliding_attention", "full_attention"], max_position_embeddings=S, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    weights = Gemma2Model(config).state_dict()
    tokens = torch.randint(1024, (2, S), device=device.torch_device)
    upstream = device.random(2, S, 512, dtype=torch.float32)

    def out_and_gradient(implementation: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        config._attn_implementation = implementation
        of = Gemma2Model(config)
        of.load_state_dict(weights)
        of = of.to(device.torch_device, torch.bfloat16).to(dtype)
        inputs = forward_inputs(of, tokens, None) if implementation == FLEX else {"input_ids": tokens}
        hidden = of(**inputs).last_hidden_state
        weight = of.layers[0].self_attn.q_proj.weight
        if hidden.requires_grad:
            (hidden.float() * upstream).sum().backward()
        return hidden.detach(), torch.zeros_like(weight) if weight.grad is None else weight.grad

    true_out, true_gradient = out_and_gradient("eager", torch.float32)
    for implementation in ("eager", "flex_attention", FLEX):
        forward_alone = device.stand_in and implementation == "flex_attention"
        case = f"transformers' Gemma 2, two layers, {implementation}"
        with record.part(case):
            with torch.set_grad_enabled(not forward_alone), device.compiling():
                out, gradient = out_and_gradient(implementation, torch.bfloat16)
            record(case, "error of the output", relative_error(out, true_out))
            if not forward_alone:
                record(case, "error of dW of q", relative_error(gradient, true_gradient))


def run(device: Device, record: Record) -> None:
    with record.part("transformers' Gemma 2"):
        model(device, record)
    kernels(device, record)
