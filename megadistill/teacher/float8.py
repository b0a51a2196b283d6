"""Products of a frozen stage in float8: weights e4m3 with a scale a row, activations e4m3 with a scale a token.

A weight is rounded once, when it is loaded, and takes 1 byte and 4 a row. An activation is rounded before each product,
its scale computed in float32. Where the device multiplies float8, `torch._scaled_mm` and `torch._scaled_grouped_mm` do
it; elsewhere the same numbers are multiplied in the run's precision, which holds each of them exactly, and scaled
afterwards: the memory is halved there, the time is not.

Embedding, norms, routers and the head's rows stay as they are, as does a matrix with a side that is no multiple of 16.

Legend: T tokens, K values of a row, N rows of a weight; E experts, I their inner width, M pairs of a token and an
expert, sorted by expert.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from megadistill.models.experts import routers

FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max
SMALLEST_ROW = 1e-30
"""A row whose largest number is below it becomes zeros: its scale would not be a normal float32."""
MULTIPLE = 16
"""The sides of a matrix that the devices' float8 products take are multiples of it."""
_CHUNK = 1 << 24
"""Elements of a weight that are in float32 at a time while it is rounded: 64 MiB."""


def to_float8(x: Tensor) -> tuple[Tensor, Tensor]:
    """The rows [.., K] in e4m3, and their scales [.., 1] float32: the largest number of a row becomes the format's.

    A row with a NaN or an infinity becomes NaN, as a product with it would; a row of zeros stays zeros. No number is
    clamped: none is larger than the row's largest, which is 448 to a float32 rounding, and e4m3 rounds up to 464 down.
    """
    scales = x.abs().amax(dim=-1, keepdim=True).float().clamp(min=SMALLEST_ROW) / LARGEST
    return (x.float() / scales).to(FLOAT8), scales


def weight_to_float8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`to_float8` of a weight [.., N, K], with a bounded part of it in float32 at a time."""
    rows = weight.flatten(0, -2)
    rounded = torch.empty_like(rows, dtype=FLOAT8)
    scales = torch.empty(len(rows), 1, dtype=torch.float32, device=weight.device)
    step = max(1, _CHUNK // max(1, rows.shape[1]))
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        rounded[part], scales[part] = to_float8(rows[part])
    return rounded.view(weight.shape), scales.view(*weight.shape[:-1], 1)


@lru_cache(maxsize=8)
def multiplies_float8(device: torch.device) -> bool:
    """Whether the device has row-wise float8 products with a bfloat16 result, and they are right. A sync, once.

    A CPU has them in some releases, where they are no faster than the products in float32 that stand in for them.
    """
    return device.type != "cpu" and scaled_product_is_right(device)


def scaled_product_is_right(device: torch.device) -> bool:
    """Whether `torch._scaled_mm` runs there by rows, and gives what the rounded numbers multiply to."""
    x_TK = torch.linspace(-1.0, 3.0, 16 * 32, device=device).view(16, 32)
    w_NK = torch.linspace(2.0, -1.0, 48 * 32, device=device).view(48, 32)
    x, w = to_float8(x_TK), to_float8(w_NK)
    try:
        products = _device_product(*x, *w, torch.bfloat16)
    except (RuntimeError, NotImplementedError, AttributeError):
        return False
    return torch.allclose(products.float(), _rounded_product(*x, *w, torch.float32), rtol=2**-6, atol=2**-6)


@lru_cache(maxsize=8)
def multiplies_float8_groups(device: torch.device) -> bool:
    """Whether the device also has the products of all experts at once: fewer have them. A sync, once."""
    return multiplies_float8(device) and grouped_product_is_right(device)


def grouped_product_is_right(device: torch.device) -> bool:
    """Whether `torch._scaled_grouped_mm` runs there, and gives what the rounded numbers multiply to."""
    x_MK = torch.linspace(-1.0, 3.0, 32 * 32, device=device).view(32, 32)
    w_ENK = torch.linspace(2.0, -1.0, 2 * 48 * 32, device=device).view(2, 48, 32)
    x, w = to_float8(x_MK), weight_to_float8(w_ENK)
    spans = ((0, 12), (12, 32))
    ends_E = torch.tensor([stop for _, stop in spans], dtype=torch.int32, device=device)
    try:
        products = _device_grouped_product(*x, *w, ends_E, torch.bfloat16)
    except (RuntimeError, NotImplementedError, AttributeError):
        return False
    truth = [
        _rounded_product(x[0][start:stop], x[1][start:stop], w[0][expert], w[1][expert], torch.float32)
        for expert, (start, stop) in enumerate(spans)
    ]
    return torch.allclose(products.float(), torch.cat(truth), rtol=2**-6, atol=2**-6)


def _device_grouped_product(
    x_MK: Tensor, x_M1: Tensor, w_ENK: Tensor, w_EN1: Tensor, ends_E: Tensor, dtype: torch.dtype
) -> Tensor:
    columns, scales = w_ENK.transpose(-2, -1), (x_M1.squeeze(-1), w_EN1.squeeze(-1))
    return torch._scaled_grouped_mm(x_MK, columns, *scales, offs=ends_E, out_dtype=dtype, use_fast_accum=True)


def _device_product(x_TK: Tensor, x_T1: Tensor, w_NK: Tensor, w_N1: Tensor, dtype: torch.dtype) -> Tensor:
    # Fast accumulation, as inference elsewhere: the sums lose less than the operands have lost.
    return torch._scaled_mm(x_TK, w_NK.t(), scale_a=x_T1, scale_b=w_N1.t(), out_dtype=dtype, use_fast_accum=True)


def _rounded_product(x_TK: Tensor, x_T1: Tensor, w_NK: Tensor, w_N1: Tensor, dtype: torch.dtype) -> Tensor:
    products_TN = x_TK.to(dtype) @ w_NK.to(dtype).t()  # every e4m3 number is a bfloat16 number
    return (products_TN.float() * x_T1 * w_N1.t()).to(dtype)


class Float8Module(nn.Module):
    """Rounded weights. They are buffers, so that a stage's parameters have one dtype, the run's."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        """`weights`: name -> the weight that will be loaded, on meta."""
        super().__init__()
        for name, weight in weights.items():
            self.register_buffer(name, torch.empty_like(weight, dtype=FLOAT8))
            scales = torch.empty(*weight.shape[:-1], 1, dtype=torch.float32, device=weight.device)
            self.register_buffer(f"{name}_scales", scales)
        self.names = tuple(weights)
        self.on_device = False
        """Whether the device itself multiplies float8."""

    def parts(self, name: str) -> list[Tensor]:
        """The weight `name` and its scales."""
        return [getattr(self, name), getattr(self, f"{name}_scales")]

    def place(self, name: str, rounded: Tensor, scales: Tensor, *, dtype: torch.dtype) -> None:
        """Sets the rounded weight `name`, whose place is still on meta. `dtype`: of the activations."""
        setattr(self, name, rounded)
        setattr(self, f"{name}_scales", scales)
        self.on_device = dtype == torch.bfloat16 and self.multiplies(rounded.device)

    def multiplies(self, device: torch.device) -> bool:
        """Whether the device has this module's products."""
        return multiplies_float8(device)


class Float8Linear(Float8Module):
    """`nn.Linear` with rounded operands."""

    weight: Tensor
    weight_scales: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__({"weight": linear.weight})
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """[.., K] -> [.., N], in the type of `x`."""
        x_TK, x_T1 = to_float8(x.flatten(0, -2))
        product = _device_product if self.on_device else _rounded_product
        products_TN = product(x_TK, x_T1, self.weight, self.weight_scales, x.dtype)
        if self.bias is not None:
            products_TN = products_TN + self.bias
        return products_TN.view(*x.shape[:-1], -1)


class Float8Experts(Float8Module):
    """The experts of a layer, `gate_up_proj` [E, 2·I, K] and `down_proj` [E, K, I], with rounded operands."""

    gate_up_proj: Tensor
    gate_up_proj_scales: Tensor
    down_proj: Tensor
    down_proj_scales: Tensor

    def __init__(self, experts: Any) -> None:
        super().__init__({"gate_up_proj": experts.gate_up_proj, "down_proj": experts.down_proj})
        self.act_fn = experts.act_fn

    def multiplies(self, device: torch.device) -> bool:
        """Whether the device has this module's products."""
        return multiplies_float8_groups(device)

    def forward(self, hidden_TK: Tensor, expert_Tk: Tensor, weight_Tk: Tensor) -> Tensor:
        """[T, K], with each token's k experts and their weights, as transformers calls it."""
        chosen = expert_Tk.shape[-1]
        expert_M, order_M = torch.sort(expert_Tk.flatten(), stable=True)
        experts_E = torch.arange(len(self.gate_up_proj), device=expert_M.device, dtype=expert_M.dtype)
        ends_E = torch.searchsorted(expert_M, experts_E, right=True, out_int32=True)
        gate, up = self._product("gate_up_proj", hidden_TK[order_M // chosen], expert_M, ends_E).chunk(2, dim=-1)
        out_MK = self._product("down_proj", self.act_fn(gate) * up, expert_M, ends_E)
        out_MK = out_MK * weight_Tk.flatten()[order_M].unsqueeze(-1)
        place_M = torch.empty_like(order_M).scatter_(0, order_M, torch.arange(len(order_M), device=order_M.device))
        out_TkK: Tensor = out_MK[place_M].view(-1, chosen, hidden_TK.shape[-1])
        return out_TkK.sum(dim=1).to(hidden_TK.dtype)

    def _product(self, name: str, x: Tensor, expert_M: Tensor, ends_E: Tensor) -> Tensor:
        """Rows [M, ..] times the weight of their expert."""
        rows, scales_M1 = to_float8(x)
        weight_ENK, scales_EN1 = getattr(self, name), getattr(self, f"{name}_scales")
        if self.on_device:
            return _device_grouped_product(rows, scales_M1, weight_ENK, scales_EN1, ends_E, x.dtype)
        # Both types hold each of them; the compiler takes no other than bfloat16 here.
        dtype = torch.bfloat16 if torch.compiler.is_compiling() else x.dtype
        weight = weight_ENK.to(dtype).transpose(-2, -1)
        products = torch.nn.functional.grouped_mm(rows.to(dtype), weight, offs=ends_E)
        scaled: Tensor = products.float() * scales_M1 * scales_EN1.squeeze(-1)[expert_M]
        return scaled.to(x.dtype)


def use_float8(decoder: Any) -> list[str]:
    """Replaces the products of a decoder's layers, on meta, by those of this module. Names of those that stay.

    Routers and indexers, whose numbers choose experts and keys, stay as they are and are not named.
    """
    native = []
    indexers = [module for name, module in decoder.layers.named_modules() if name.endswith(".indexer")]
    choosing = [*routers(decoder).values(), *indexers]
    excluded = {module for each in choosing for module in each.modules()}
    for name, module in list(decoder.layers.named_modules()):
        replacement: type[Float8Linear | Float8Experts] | None = None
        if isinstance(module, nn.Linear) and module not in excluded:
            replacement, weights = Float8Linear, [module.weight]
        elif isinstance(getattr(module, "up_proj", None), nn.Parameter):  # Nemotron-H's experts, which have no gate
            native.append(f"layers.{name}")
        elif hasattr(module, "gate_up_proj") and isinstance(module.gate_up_proj, nn.Parameter):
            by_rows = module.gate_up_proj.shape[1] == 2 * module.down_proj.shape[2]
            if getattr(module, "has_bias", False) or not by_rows:  # gpt-oss's, with clamped gates; Llama 4's
                native.append(f"layers.{name}")
                continue
            replacement, weights = Float8Experts, [module.gate_up_proj, module.down_proj]
        if replacement is None:
            continue
        if any(side % MULTIPLE for weight in weights for side in weight.shape[-2:]):
            native.append(f"layers.{name}")
        else:
            decoder.layers.set_submodule(name, replacement(module))
    return native


def describe_float8(decoder: Any, native: list[str], device: torch.device) -> str:
    """A log line: how many of the stage's modules are in float8, how they are multiplied, and which are not."""
    modules = [module for module in decoder.modules() if isinstance(module, Float8Module)]
    how = "the device multiplies float8"
    elsewhere = sum(not module.on_device for module in modules)
    if 0 < elsewhere < len(modules):
        how += f", but not {elsewhere} modules of experts: the run's precision does, which saves memory and no time"
    elif elsewhere:
        reason = f"{device.type} has no float8 products by rows"
        if multiplies_float8(device):
            reason = "the device multiplies float8 into bfloat16 alone"
        how = f"multiplied in the run's precision ({reason}), so memory is saved and time is not"
    line = f"teacher.precision float8: {len(modules)} modules of this rank's stage, {how}"
    if native:
        more = f" and {len(native) - 3} more" if len(native) > 3 else ""
        line += (
            f"; {len(native)} stay native, with a side that is no multiple of {MULTIPLE} or with experts that have "
            f"biases, no gate or columns for rows: {', '.join(native[:3])}{more}"
        )
    return line
