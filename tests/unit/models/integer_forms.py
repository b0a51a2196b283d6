"""Writers of weights in 2 to 8 bits, number by number as the programs that publish them pack them.

Each gives a tensor's stored parts, and the numbers that they stand for: float32 [N, K], exact.
"""

import json
from typing import Any

import numpy as np
import torch
from torch import Tensor

Parts = dict[str, Tensor]

NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
"""Quantiles of a normal distribution, as bitsandbytes has them."""
FP4 = [0, 1 / 192, 2 / 3, 1, 1 / 3, 1 / 2, 1 / 6, 1 / 4, -0.0, -1 / 192, -2 / 3, -1, -1 / 3, -1 / 2, -1 / 6, -1 / 4]

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Row of a word of eight -> that comes next, from the lowest bits on."""


def packed(numbers: Tensor, bits: int, order: tuple[int, ...] = ()) -> Tensor:
    """[r, w] int32 of [r, c] integers: each word from its lowest bits on, the last one filled up with zeros."""
    per = 32 // bits
    words = np.zeros((numbers.shape[0], -(-numbers.shape[1] // per)), dtype=np.uint32)
    for word in range(words.shape[1]):
        for place in range(per):
            column = word * per + (order[place] if order else place)
            if column < numbers.shape[1]:
                words[:, word] |= numbers[:, column].numpy().astype(np.uint32) << np.uint32(bits * place)
    return torch.from_numpy(words.view(np.int32))


def grouped(
    weight: Tensor, groups: Tensor, bits: int, dtype: torch.dtype, *, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Integers from 0 on [N, K], scales [N, G] and zero points [N, G] of a weight whose columns have `groups` [K]."""
    N, top = len(weight), (1 << bits) - 1
    G = int(groups.max()) + 1
    scales, zeros = torch.empty(N, G, dtype=dtype), torch.empty(N, G, dtype=torch.int64)
    integers = torch.empty(weight.shape, dtype=torch.int64)
    for g in range(G):
        part = weight[:, groups == g]
        low, high = part.amin(dim=1).clamp(max=0), part.amax(dim=1).clamp(min=0)
        if symmetric:
            scales[:, g], zeros[:, g] = (2 * torch.maximum(-low, high) / top).to(dtype), (top + 1) // 2
        else:
            scales[:, g] = ((high - low) / top).to(dtype)
            zeros[:, g] = (-low / scales[:, g].float()).round().clamp(0, top).long()
        exact = part / scales[:, g : g + 1].float() + zeros[:, g : g + 1]
        integers[:, groups == g] = exact.round().clamp(0, top).long()
    return integers, scales, zeros


def _numbers(integers: Tensor, scales: Tensor, zeros: Tensor, groups: Tensor) -> Tensor:
    return (integers - zeros[:, groups]).float() * scales[:, groups].float()


def column_groups(K: int, size: int, *, shuffled: bool) -> Tensor:
    """[K] the group of each column: ranges of `size`, or columns in an order by activations."""
    order = torch.randperm(K, generator=torch.Generator().manual_seed(K)) if shuffled else torch.arange(K)
    groups = torch.empty(K, dtype=torch.int64)
    groups[order] = torch.arange(K) // size
    return groups


def gptq(
    name: str,
    weight: Tensor,
    *,
    bits: int = 4,
    size: int = 16,
    ordered: bool = False,
    symmetric: bool = False,
    version: int = 1,
    listed: bool = True,
) -> tuple[Parts, Tensor]:
    """GPTQ; `ordered`: by activations; `listed`: with the groups of the columns."""
    module, K = name.removesuffix(".weight"), weight.shape[1]
    groups = column_groups(K, size, shuffled=ordered)
    integers, scales, zeros = grouped(weight, groups, bits, torch.float16, symmetric=symmetric)
    words = packed(zeros.T, bits).numpy().view(np.uint32)
    if version == 1:  # as gptqmodel: the words, not their numbers
        words = words - np.uint32(sum(1 << place for place in range(0, 32, bits)))
    parts = {
        f"{module}.qweight": packed(integers, bits).T,
        f"{module}.qzeros": torch.from_numpy(words.view(np.int32)),
        f"{module}.scales": scales.T,
    }
    if listed:
        parts[f"{module}.g_idx"] = groups.int()
    return parts, _numbers(integers, scales, zeros, groups)


def awq(name: str, weight: Tensor, *, size: int = 16) -> tuple[Parts, Tensor]:
    module, groups = name.removesuffix(".weight"), column_groups(weight.shape[1], size, shuffled=False)
    integers, scales, zeros = grouped(weight, groups, 4, torch.float16, symmetric=False)
    parts = {
        f"{module}.qweight": packed(integers.T, 4, AWQ_ORDER),
        f"{module}.qzeros": packed(zeros.T, 4, AWQ_ORDER),
        f"{module}.scales": scales.T,
    }
    return parts, _numbers(integers, scales, zeros, groups)


def packed_integers(
    name: str,
    weight: Tensor,
    *,
    bits: int = 4,
    size: int | None = 16,
    ordered: bool = False,
    symmetric: bool = True,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[Parts, Tensor]:
    """compressed-tensors, pack-quantized; `size` None: by channel."""
    K = weight.shape[1]
    groups = column_groups(K, size or K, shuffled=ordered)
    integers, scales, zeros = grouped(weight, groups, bits, dtype, symmetric=symmetric)
    parts = {
        f"{name}_packed": packed(integers, bits),
        f"{name}_scale": scales,
        f"{name}_shape": torch.tensor(weight.shape),
    }
    if not symmetric:
        parts[f"{name}_zero_point"] = packed(zeros.T, bits).T
    if ordered:
        parts[f"{name}_g_idx"] = groups.int()
    return parts, _numbers(integers, scales, zeros, groups)


def integers(name: str, weight: Tensor, *, symmetric: bool = True, whole: bool = False) -> tuple[Parts, Tensor]:
    """compressed-tensors, int-quantized, by channel or `whole`."""
    source = weight.reshape(1, -1) if whole else weight
    groups = torch.zeros(source.shape[1], dtype=torch.int64)
    numbers, scales, zeros = grouped(source, groups, 8, torch.bfloat16, symmetric=symmetric)
    numbers = numbers.view(weight.shape)
    parts = {name: (numbers - 128).to(torch.int8), f"{name}_scale": scales.flatten() if whole else scales}
    if not symmetric:
        parts[f"{name}_zero_point"] = (zeros - 128).to(torch.int8)
    return parts, (numbers - zeros).float() * scales.float()


def llm_int8(name: str, weight: Tensor) -> tuple[Parts, Tensor]:
    largest = weight.abs().amax(dim=1)
    values = (weight * (127 / largest.unsqueeze(1))).round().to(torch.int8)
    module = name.removesuffix(".weight")
    parts = {name: values, f"{module}.SCB": largest, f"{module}.weight_format": torch.tensor(0, dtype=torch.uint8)}
    return parts, values.float() * largest.unsqueeze(1) * 7.874015718698502e-3


def four_bits(
    name: str,
    weight: Tensor,
    *,
    kind: str = "nf4",
    nested: bool = False,
    block: int = 64,
    storage: torch.dtype = torch.uint8,
) -> tuple[Parts, Tensor]:
    """bitsandbytes in 4 bits; `nested`: its scales in 8 bits, blocks of 4."""
    code, flat = torch.tensor(NF4 if kind == "nf4" else FP4), weight.flatten()
    blocks = torch.arange(flat.numel()) // block
    scales = torch.stack([part.abs().max() for part in torch.split(flat, block)])
    state: dict[str, Any] = {"quant_type": kind, "blocksize": block, "dtype": "bfloat16", "shape": list(weight.shape)}
    parts: Parts = {f"{name}.absmax": scales, f"{name}.quant_map": code}
    if nested:
        table, offset = torch.linspace(-1, 1, 256), float(scales.mean())
        largest = torch.stack([part.abs().max() for part in torch.split(scales - offset, 4)])
        by_scale = largest.repeat_interleave(4)[: len(scales)]
        places = (((scales - offset) / by_scale).unsqueeze(1) - table).abs().argmin(dim=1)
        scales = table[places] * by_scale + offset
        parts |= {f"{name}.absmax": places.to(torch.uint8), f"{name}.nested_absmax": largest}
        parts[f"{name}.nested_quant_map"] = table
        state |= {"nested_blocksize": 4, "nested_dtype": "float32", "nested_offset": offset}
    codes = ((flat / scales[blocks]).unsqueeze(1) - code).abs().argmin(dim=1)
    values = code[codes] * scales[blocks]
    pairs = torch.cat([codes, codes.new_zeros(len(codes) % 2)]).view(-1, 2)
    parts[name] = (pairs[:, 0] * 16 + pairs[:, 1]).to(torch.uint8).view(storage).unsqueeze(1)
    text = json.dumps(state).encode()
    parts[f"{name}.quant_state.bitsandbytes__{kind}"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return parts, values.view(weight.shape)
