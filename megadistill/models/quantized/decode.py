"""Quantised tensors as float32, by rows: float8 and MXFP4, and the choice of the format.

Shapes and types of a tensor's parts are checked before any of them is read.

Legend: N rows, K columns of a weight; n of the rows; G groups of 32 columns.
"""

from collections.abc import Callable, Mapping
from typing import Final, Protocol

import torch
from torch import Size, Tensor

from megadistill.models.quantized.codebook import STORAGE_BYTES, Codebook, codebook_shape
from megadistill.models.quantized.integer_weights import IntegerWeights, integer_shape
from megadistill.models.quantized.layout import Quantisation, Role
from megadistill.models.quantized.parts import Header, Place

GROUP: Final = 32
"""Numbers of MXFP4 that share a scale; two of them are a byte."""
_E2M1: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""Value of each of the sixteen codes."""
_E8M0_NAN: Final = 255
_CHUNK: Final = 1 << 18
"""Groups that are decoded at a time: a table is read by indices of eight bytes, 64 MiB of them."""

_FLOAT8_SCALES: Final = ("F32", "F16", "BF16", "F8_E8M0")


class Decoder(Protocol):
    """Rows of one quantised tensor. Its other parts are whole, and are unpacked once."""

    def place(self, start: int, stop: int) -> Place:
        """The range of the stored values with the rows from `start` to `stop`, and at most a few beside them."""

    def rows(self, values: Tensor, start: int, stop: int) -> Tensor:
        """[stop - start, ..] float32, from the `values` of `place(start, stop)`."""


def decoded_shape(
    quantisation: Quantisation, headers: Mapping[Role, Header], read: Callable[[Role], Tensor]
) -> Size | None:
    """The shape of the decoded tensor; None where types or shapes of its parts do not fit each other.

    `read` gives a part that says the shape: its header is checked before.
    """
    values, scales = headers["values"], headers["scales"]
    if quantisation.format == "float8":
        fits = values.type == "F8_E4M3" and scales.type in _FLOAT8_SCALES
        return values.shape if fits and _scale_block(quantisation, values.shape, scales.shape) else None
    if quantisation.format == "mxfp4":
        if values.type != "U8" or scales.type not in ("U8", "F8_E8M0") or len(scales.shape) < 2:
            return None
        *lead, groups = scales.shape
        by_group, packed = Size([*lead, groups, GROUP // 2]), Size([*lead, groups * GROUP // 2])
        if values.shape not in (by_group, packed):
            return None
        turned = quantisation.turned and len(lead) == 2
        return Size([lead[0], groups * GROUP, lead[1]]) if turned else Size([*lead, groups * GROUP])
    if quantisation.format == "bitsandbytes_4bit":
        return codebook_shape(headers, read)
    return integer_shape(quantisation, headers, read)


def decoder(quantisation: Quantisation, parts: Mapping[Role, Tensor], shape: Size, stored: Header) -> Decoder:
    """The decoder of the tensor of this `shape`, with all its `parts` but the values, which are `stored` so.

    Raises:
        ValueError: an index is outside of the table that it belongs to.
    """
    if quantisation.format == "float8":
        return _Float8(quantisation, parts["scales"], shape)
    if quantisation.format == "mxfp4":
        scales = parts["scales"].view(torch.uint8)
        return _Mxfp4(scales, turned=quantisation.turned and scales.ndim == 3)
    if quantisation.format == "bitsandbytes_4bit":
        return Codebook(parts, shape, STORAGE_BYTES[stored.type])
    return IntegerWeights(quantisation, parts, shape)


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


class _Float8:
    def __init__(self, quantisation: Quantisation, scales: Tensor, shape: Size) -> None:
        block = _scale_block(quantisation, shape, scales.shape)
        assert block is not None, "the headers were checked"
        self._block_rows, self._block_columns = block
        self._scales = scales.float().reshape(-1, -(-shape[1] // self._block_columns))

    def place(self, start: int, stop: int) -> Place:
        return Place(0, start, stop)

    def rows(self, values: Tensor, start: int, stop: int) -> Tensor:
        out_nK = values.float()
        scales_n = self._scales[torch.arange(start, stop) // self._block_rows]
        for place, first in enumerate(range(0, out_nK.shape[1], self._block_columns)):
            out_nK[:, first : first + self._block_columns] *= scales_n[:, place : place + 1]
        return out_nK


class _Mxfp4:
    """[.., 32·G] of values [.., G, 16] or [.., 16·G] and scales [.., G]: the first of two numbers in the low bits."""

    def __init__(self, scales: Tensor, *, turned: bool) -> None:
        self._scales, self._turned = scales, turned

    def place(self, start: int, stop: int) -> Place:
        return Place(0, start, stop)

    def rows(self, values: Tensor, start: int, stop: int) -> Tensor:
        """A scale that is NaN makes its numbers so. Matrices of experts are turned, as gpt-oss computes with them."""
        table, scales = torch.tensor(_E2M1), self._scales[start:stop]
        codes, exponents = values.reshape(-1, GROUP // 2), scales.reshape(-1)
        out = torch.empty(len(codes), GROUP)
        for first in range(0, len(codes), _CHUNK):
            part = slice(first, first + _CHUNK)
            pairs = torch.stack([codes[part] & 0x0F, codes[part] >> 4], dim=-1).flatten(1)
            out[part] = torch.ldexp(table[pairs.long()], exponents[part].int().unsqueeze(1) - 127)
        out[exponents == _E8M0_NAN] = torch.nan
        decoded = out.view(*scales.shape[:-1], GROUP * scales.shape[-1])
        return decoded.transpose(1, 2).contiguous() if self._turned else decoded
