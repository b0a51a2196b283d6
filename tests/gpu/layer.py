"""One decoder layer of Gemma 2 27B at 8,192 tokens: its products in bf16 and in float8, and the layer as it runs.

Rates count the layer's matrix products (2 FLOPs a parameter and token forward, three times that with the backward
pass), attention's scores aside, so that what surrounds the products shows as a lower rate.
"""

from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig
from transformers.models.gemma2.modeling_gemma2 import Gemma2DecoderLayer, Gemma2RotaryEmbedding

from tests.gpu.device import Device
from tests.gpu.loss_numerics import relative_error
from tests.gpu.results import Record

CONFIG = Path(__file__).resolve().parents[2] / "recipes/models/gemma-2-27b"
FLOAT8 = torch.float8_e4m3fn


def _sizes(config: object) -> dict[str, tuple[int, int]]:
    """[out, in] of each product of a layer."""
    heads, kv_heads, d, width, inner = (
        getattr(config, name)
        for name in ("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size", "intermediate_size")
    )
    return {
        "q": (heads * d, width),
        "k": (kv_heads * d, width),
        "v": (kv_heads * d, width),
        "o": (width, heads * d),
        "gate": (inner, width),
        "up": (inner, width),
        "down": (width, inner),
    }


def quantized(rows: Tensor) -> tuple[Tensor, Tensor]:
    """[m, k] as float8 with a float32 scale a row, [m, 1]."""
    scale = rows.abs().amax(dim=1, keepdim=True).float().clamp_min(1e-12) / torch.finfo(FLOAT8).max
    return (rows.float() / scale).to(FLOAT8), scale


def float8_product(x: Tensor, weight8: Tensor, weight_scale: Tensor) -> Tensor:
    """x [m, k] · weightᵀ [n, k]: the activations are quantized here, the weight was before."""
    x8, x_scale = quantized(x)
    return scaled_product(x8, x_scale, weight8, weight_scale)


def scaled_product(x8: Tensor, x_scale: Tensor, weight8: Tensor, weight_scale: Tensor) -> Tensor:
    """With the tensor cores' own sums, as the field's float8 layers use in the forward pass."""
    return torch._scaled_mm(
        x8, weight8.T, scale_a=x_scale, scale_b=weight_scale.T, out_dtype=torch.bfloat16, use_fast_accum=True
    )


def products(device: Device, record: Record, sizes: dict[str, tuple[int, int]], S: int) -> None:
    """All products of a layer, one after another."""
    torch.manual_seed(0)
    flops = 2.0 * S * sum(out * width for out, width in sizes.values())
    pairs = {name: (device.random(S, k), device.random(n, k, deviation=k**-0.5)) for name, (n, k) in sizes.items()}

    def forward() -> None:
        for x, weight in pairs.values():
            torch.mm(x, weight.T)

    def both() -> None:
        for x, weight in pairs.values():
            y = torch.mm(x, weight.T)
            torch.mm(y, weight)
            torch.mm(y.T, x)

    runs = {"forward, bf16": forward, "forward and backward, bf16": both}
    weights8 = {name: quantized(weight) for name, (_, weight) in pairs.items()}

    def forward8() -> None:
        for name, (x, _) in pairs.items():
            float8_product(x, *weights8[name])

    quantized_pairs = {name: (quantized(x), weights8[name]) for name, (x, _) in pairs.items()}

    def forward8_alone() -> None:
        for (x8, x_scale), (weight8, weight_scale) in quantized_pairs.values():
            scaled_product(x8, x_scale, weight8, weight_scale)

    try:
        x, weight = pairs["down"]
        error = relative_error(float8_product(x, *weights8["down"]), x.double() @ weight.double().T)
        record("products: forward, float8", "error of one of them", error)
        runs |= {"forward, float8": forward8, "forward, float8, quantized before": forward8_alone}
    except (RuntimeError, NotImplementedError) as error:
        record.left_out("products: forward, float8", str(error).splitlines()[0])
    for name, seconds in device.medians(runs, repeats=7).items():
        factor = 3 if "backward" in name else 1
        record(f"products: {name}", "time", 1e3 * seconds, "ms")
        record(f"products: {name}", "rate", factor * flops / seconds / 1e12, "TFLOP/s")


def whole(device: Device, record: Record, config: object, S: int, flops: float) -> None:
    """transformers' layer, with eager attention, and with sdpa in its place, which leaves the softcap out."""
    x = device.random(1, S, config.hidden_size)  # type: ignore[attr-defined]
    upstream = torch.randn_like(x)
    for implementation in ("eager", "sdpa"):
        config._attn_implementation = implementation  # type: ignore[attr-defined]
        if implementation == "sdpa":
            config.attn_logit_softcapping = None  # type: ignore[attr-defined]
        rotary = Gemma2RotaryEmbedding(config).to(device.torch_device)
        with device.torch_device:  # its weights are drawn there, not by the host
            layer = Gemma2DecoderLayer(config, 1).to(torch.bfloat16)
        positions = torch.arange(S, device=device.torch_device).unsqueeze(0)
        embeddings = tuple(each.to(torch.bfloat16) for each in rotary(x, positions))
        mask = None
        if implementation == "eager":
            smallest = torch.finfo(torch.bfloat16).min
            mask = torch.full((S, S), smallest, device=x.device, dtype=torch.bfloat16).triu_(1).view(1, 1, S, S)
        call = partial(layer, position_embeddings=embeddings, attention_mask=mask, position_ids=positions)

        def forward(call: partial[Tensor] = call) -> object:
            with torch.no_grad():
                return call(x)

        def both(call: partial[Tensor] = call, layer: torch.nn.Module = layer) -> object:
            return torch.autograd.grad(call(x), list(layer.parameters()), upstream)

        for name, run, factor in (("forward", forward, 1), ("forward and backward", both, 3)):
            case = f"layer, {implementation}{' without softcap' * (implementation == 'sdpa')}: {name}"
            try:
                record(case, "peak memory", device.peak_bytes(run) / 2**20, "MiB")
                seconds = device.medians({name: run}, repeats=5)[name]
            except torch.OutOfMemoryError:
                record.left_out(case, "out of memory")
                continue
            record(case, "time", 1e3 * seconds, "ms")
            record(case, "rate", factor * flops / seconds / 1e12, "TFLOP/s")
        del layer, call, forward, both
        device.free()


def run(device: Device, record: Record) -> None:
    config = AutoConfig.from_pretrained(CONFIG)
    if device.stand_in:
        for name, value in {"hidden_size": 32, "intermediate_size": 64, "head_dim": 16}.items():
            setattr(config, name, value)
        config.num_attention_heads, config.num_key_value_heads = 2, 1
    S, sizes = device.size(8192, 64), _sizes(config)
    with record.part("products"):
        products(device, record, sizes, S)
    device.free()
    whole(device, record, config, S, 2.0 * S * sum(out * width for out, width in sizes.values()))
