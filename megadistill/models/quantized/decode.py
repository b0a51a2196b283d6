"""Quantised numbers as float32: float8 e4m3 with scales, and MXFP4. Shapes and types are checked before any is read.

Legend: N rows, K columns of a weight; n of the rows, from `first_row` on; G groups of 32 columns.
"""

from typing import Final, NamedTuple

import torch
from torch import Size, Tensor

from megadistill.models.quantized.layout import Quantisation

GROUP: Final = 32
"""Numbers of MXFP4 that share a scale; two of them are a byte."""
_E2M1: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""Value of each of the sixteen codes."""
_E8M0_NAN: Final = 255
_CHUNK: Final = 1 << 18
"""Groups that are decoded at a time: a table is read by indices of eight bytes, 64 MiB of them."""

_TYPES: Final = {"float8": ("F8_E4M3",), "mxfp4": ("U8",)}
_SCALE_TYPES: Final = {"float8": ("F32", "F16", "BF16", "F8_E8M0"), "mxfp4": ("U8", "F8_E8M0")}


class Header(NamedTuple):
    """Type and shape of a stored tensor, by the names of safetensors."""

    type: str
    shape: Size


def decoded_shape(quantisation: Quantisation, values: Header, scales: Header) -> Size | None:
    """The shape of the decoded tensor; None where types or shapes do not fit each other."""
    kind = quantisation.format
    if values.type not in _TYPES[kind] or scales.type not in _SCALE_TYPES[kind] or not values.shape:
        return None
    if kind == "float8":
        return values.shape if _scale_block(quantisation, values.shape, scales.shape) is not None else None
    *lead, groups = scales.shape or (0,)
    by_group, packed = Size([*lead, groups, GROUP // 2]), Size([*lead, groups * GROUP // 2])
    return Size([*lead, groups * GROUP]) if scales.shape and values.shape in (by_group, packed) else None


def decode_rows(quantisation: Quantisation, values: Tensor, scales: Tensor, shape: Size, first_row: int) -> Tensor:
    """Float32: rows of the tensor of this `shape`. A scale that is NaN makes its numbers so.

    Args:
        values: the rows, from `first_row` on, as they are stored.
        scales: those of the whole tensor.
    """
    if quantisation.format == "mxfp4":
        return _mxfp4(values, scales.view(torch.uint8)[first_row : first_row + len(values)])
    block = _scale_block(quantisation, shape, scales.shape)
    assert block is not None, "the headers were checked"
    return _float8(values, scales, block, first_row)


def _scale_block(quantisation: Quantisation, values: Size, scales: Size) -> tuple[int, int] | None:
    """Rows and columns of values [N, K] that share a scale; None where the shapes do not fit."""
    if len(values) != 2 or 0 in values:
        return None
    N, K = values
    if quantisation.block is not None:
        rows, columns = quantisation.block
        return quantisation.block if scales == (-(-N // rows), -(-K // columns)) else None
    if scales.numel() == 1:
        return N, K
    return (1, K) if scales in ((N, 1), (N,)) else None


def _float8(values_nK: Tensor, scales: Tensor, block: tuple[int, int], first_row: int) -> Tensor:
    rows, columns = block
    n, K = values_nK.shape
    out_nK = values_nK.float()
    scales_n = scales.float().reshape(-1, -(-K // columns))[torch.arange(first_row, first_row + n) // rows]
    for place, start in enumerate(range(0, K, columns)):
        out_nK[:, start : start + columns] *= scales_n[:, place : place + 1]
    return out_nK


def _mxfp4(values: Tensor, scales: Tensor) -> Tensor:
    """[.., 32·G] of values [.., G, 16] or [.., 16·G] and scales [.., G]: the first of two numbers in the low bits."""
    table = torch.tensor(_E2M1)
    codes, exponents = values.reshape(-1, GROUP // 2), scales.reshape(-1)
    out = torch.empty(len(codes), GROUP)
    for start in range(0, len(codes), _CHUNK):
        part = slice(start, start + _CHUNK)
        pairs = torch.stack([codes[part] & 0x0F, codes[part] >> 4], dim=-1).flatten(1)
        out[part] = torch.ldexp(table[pairs.long()], exponents[part].int().unsqueeze(1) - 127)
    out[exponents == _E8M0_NAN] = torch.nan
    return out.view(*scales.shape[:-1], GROUP * scales.shape[-1])
