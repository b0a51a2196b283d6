"""Weights of 2 to 8 bits as (integer - zero point) · scale: GPTQ, AWQ, compressed-tensors, and LLM.int8().

GPTQ and AWQ store a weight by its columns: rows are read as a range of each stored line.

Legend: N rows, K columns of a weight; n of the rows; G groups of columns that share a scale and a zero point.
"""

from collections.abc import Callable, Mapping
from typing import Final

import torch
from torch import Size, Tensor

from megadistill.models.quantized.layout import Quantisation, Role
from megadistill.models.quantized.parts import CHUNK, FLOATS, INDICES, Header, Place

_WORD: Final = 32
"""Bits of the integers that numbers are packed into, the first number in the lowest bits."""
_AWQ_PLACES: Final = (0, 4, 1, 5, 2, 6, 3, 7)
"""Place in its word of each of eight rows: AWQ's kernels want the even ones first."""
_AWQ_ROWS: Final = 8
_INT8_STEP: Final = 7.874015718698502e-3
"""1 / 127 in LLM.int8(), where a row's scale is its largest magnitude: the digits of bitsandbytes."""


def integer_shape(
    quantisation: Quantisation, headers: Mapping[Role, Header], read: Callable[[Role], Tensor]
) -> Size | None:
    """[N, K] of the decoded tensor; None where types or shapes of the parts do not fit each other."""
    values, scales = headers["values"], headers["scales"]
    by_type = "I8" if quantisation.format in ("llm_int8", "int-quantized") else "I32"
    if values.type != by_type or scales.type not in FLOATS or len(values.shape) != 2 or 0 in values.shape:
        return None
    if quantisation.format == "llm_int8":
        form = headers.get("form")
        by_rows = form is None or (form == Header("U8", Size([])) and int(read("form")) == 0)
        return values.shape if by_rows and scales == Header("F32", Size([values.shape[0]])) else None
    if quantisation.format in ("gptq", "awq"):
        return _shape_by_columns(quantisation, headers)
    shape: Size = values.shape
    zeros = headers.get("zeros")
    if quantisation.format == "pack-quantized":
        stored = headers.get("shape")
        if stored is None or stored.type not in INDICES or stored.shape != (2,):
            return None
        N, K = read("shape").tolist()  # the last word of a row may be filled up
        if K < 1 or values.shape != (N, _words(K, quantisation.bits)):
            return None
        shape = Size([N, K])
    G = _row_groups(shape, scales.shape)
    if quantisation.format == "int-quantized":
        fits = zeros is None or zeros == Header("I8", scales.shape)
    elif "zeros" in quantisation.parts:
        fits = zeros == Header("I32", Size([_words(shape[0], quantisation.bits), G or 0]))
    else:
        fits = True
    return shape if G is not None and fits and _groups_fit(headers, shape[1]) else None


def _shape_by_columns(quantisation: Quantisation, headers: Mapping[Role, Header]) -> Size | None:
    """The shape of a weight that is stored by its columns, with scales [G, N] and zero points [G, words of N]."""
    lines, width = headers["values"].shape
    if quantisation.format == "gptq":
        N, K = width, lines * _WORD // quantisation.bits
    else:
        N, K = width * _AWQ_ROWS, lines
    size = quantisation.group or K
    G = -(-K // size)
    zeros = Header("I32", Size([G, _words(N, quantisation.bits)]))
    fits = headers["scales"].shape == (G, N) and headers.get("zeros") == zeros and _groups_fit(headers, K)
    return Size([N, K]) if fits and (quantisation.format == "gptq" or K % size == 0) else None


def _row_groups(shape: Size, scales: Size) -> int | None:
    """Groups in a row of [N, K] with scales for the tensor, for rows, or for [N, G] groups; None where none fits."""
    N, K = shape
    if (scales.numel() == 1 and len(scales) < 3) or scales == (N,):
        return 1
    fits = len(scales) == 2 and scales[0] == N and scales[1] > 0 and K % scales[1] == 0
    return scales[1] if fits else None


def _groups_fit(headers: Mapping[Role, Header], K: int) -> bool:
    groups = headers.get("groups")
    return groups is None or (groups.type in INDICES and groups.shape == (K,))


def _words(numbers: int, bits: int) -> int:
    """Words that hold so many numbers."""
    return -(-numbers * bits // _WORD)


class IntegerWeights:
    """Decodes [N, K] integers with scales [N, G] and zero points [N, G].

    Memory beside the result: zero points in a byte each, and four times `CHUNK` numbers of float32 at most.

    Raises:
        ValueError: a column has a group that is none, or all have one of several.
    """

    def __init__(self, quantisation: Quantisation, parts: Mapping[Role, Tensor], shape: Size) -> None:
        N, K = shape
        self._format, self._bits, self._columns = quantisation.format, quantisation.bits, K
        by_columns = quantisation.format in ("gptq", "awq")
        scales = parts["scales"].T if by_columns else parts["scales"]
        self._scales_NG = scales.reshape(-1, 1).expand(N, 1) if scales.ndim < 2 or scales.numel() == 1 else scales
        self._zeros_NG: Tensor | None = None
        if "zeros" in parts:
            self._zeros_NG = self._unpacked_zeros(parts["zeros"], quantisation, N).expand(self._scales_NG.shape)
        # Without zero points the middle of the unsigned range is zero.
        unsigned = quantisation.format == "pack-quantized" and "zeros" not in parts
        self._middle = 1 << quantisation.bits - 1 if unsigned else 0
        G = self._scales_NG.shape[1]
        self._groups_K = _column_groups(parts.get("groups"), K, G, quantisation.group or -(-K // G), own=by_columns)

    def _unpacked_zeros(self, zeros: Tensor, quantisation: Quantisation, N: int) -> Tensor:
        """[N, G] of 8 bits, or one that fits it."""
        if quantisation.format == "int-quantized":
            return zeros.reshape(-1, 1) if zeros.ndim < 2 else zeros
        if quantisation.format == "pack-quantized":
            return _unpack(zeros.T, self._bits)[:, :N].T
        if quantisation.format == "awq":
            return _awq_order(zeros).T
        # Of whole words, as they were made: a zero point of 0 borrows from its neighbour.
        one_each = sum(1 << place for place in range(0, _WORD, self._bits))
        words = zeros + one_each if quantisation.zeros_less_one else zeros
        return _unpack(words, self._bits)[:, :N].T

    def place(self, start: int, stop: int) -> Place:
        if self._format == "gptq":
            return Place(1, start, stop)
        if self._format == "awq":
            return Place(1, start // _AWQ_ROWS, -(-stop // _AWQ_ROWS))
        return Place(0, start, stop)

    def rows(self, values: Tensor, start: int, stop: int) -> Tensor:
        out_nK = torch.empty(stop - start, self._columns)
        step = max(1, CHUNK // self._columns)
        for first in range(start, stop, step):
            last = min(first + step, stop)
            part_nK = out_nK[first - start : last - start]
            part_nK.copy_(self._integers(values, first, last, start))
            self._scale(part_nK, first, last)
        return out_nK

    def _integers(self, values: Tensor, first: int, last: int, start: int) -> Tensor:
        """[last - first, K] of 8 bits, from values that begin at the row `start`."""
        rows = slice(first - start, last - start)
        if self._format == "gptq":
            return _unpack(values[:, rows].T, self._bits)
        if self._format == "awq":
            skipped = start // _AWQ_ROWS
            begin, end = first // _AWQ_ROWS, -(-last // _AWQ_ROWS)
            by_columns = _awq_order(values[:, begin - skipped : end - skipped])
            return by_columns[:, first - begin * _AWQ_ROWS : last - begin * _AWQ_ROWS].T
        if self._format == "pack-quantized":
            return _unpack(values[rows], self._bits)[:, : self._columns]
        return values[rows]

    def _scale(self, part_nK: Tensor, first: int, last: int) -> None:
        """Makes numbers of the integers, in place."""
        scales_nG = self._scales_NG[first:last].float()
        zeros_nG = self._zeros_NG[first:last].float() if self._zeros_NG is not None else None
        if self._groups_K is None:
            part = part_nK.view(len(part_nK), scales_nG.shape[1], -1)
            scales = scales_nG.unsqueeze(-1)
            zeros = zeros_nG.unsqueeze(-1) if zeros_nG is not None else None
        else:
            part, scales = part_nK, scales_nG[:, self._groups_K]
            zeros = zeros_nG[:, self._groups_K] if zeros_nG is not None else None
        if self._middle:
            part.sub_(self._middle)
        if zeros is not None:
            part.sub_(zeros)
        part.mul_(scales)
        if self._format == "llm_int8":
            part.mul_(_INT8_STEP)


def _column_groups(groups: Tensor | None, K: int, G: int, size: int, *, own: bool) -> Tensor | None:
    """[K] int64: the group of each column; None where groups are equal ranges of columns.

    `own`: without `groups` they are ranges of `size` columns, the last of which may be shorter. Elsewhere -1 says that
    no group was ever assigned.
    """
    if groups is None or (not own and bool((groups == -1).any())):
        groups = torch.arange(K) // size
    groups = groups.long()
    low, high = int(groups.min()), int(groups.max())
    if low < 0 or high >= G:
        raise ValueError(f"a column has the group {low if low < 0 else high}, of groups 0 to {G - 1}")
    if low == high and G > 1:  # some programs take it for ranges of columns, others as it is
        raise ValueError(f"all columns have the group {low}, of groups 0 to {G - 1}")
    equal = K % G == 0 and torch.equal(groups, torch.arange(K) // (K // G))
    return None if equal else groups


def _unpack(words: Tensor, bits: int) -> Tensor:
    """[r, 32 / bits · w] uint8 of [r, w] int32: the numbers of a word, from its lowest bits on."""
    # A copy, as only the strides of a new tensor can be counted on; little-endian.
    content = words.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    if bits == 8:
        return content
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    return content.unsqueeze(-1).bitwise_right_shift(shifts).bitwise_and_((1 << bits) - 1).flatten(1)


def _awq_order(words: Tensor) -> Tensor:
    """[r, 8 · w] uint8 of [r, w] int32: the eight numbers of a word in the order of the weight's rows."""
    numbers = _unpack(words, 4)
    return numbers.view(len(words), -1, _AWQ_ROWS)[:, :, list(_AWQ_PLACES)].flatten(1)
