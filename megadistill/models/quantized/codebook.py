"""Weights of bitsandbytes in 4 bits: places in a table of sixteen values, times the largest magnitude of their block.

Blocks and pairs of numbers run over the rows of the flattened weight, the first number of a byte in its high bits.
Scales may be quantised again ("nested"): places in a table of 256 values, times a scale, plus an offset.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

import torch
from torch import Size, Tensor

from megadistill.io import parse_json
from megadistill.models.quantized.layout import MAX_BLOCK, Role
from megadistill.models.quantized.parts import CHUNK, Header, Place

STORAGE_BYTES: Final = {"U8": 1, "I8": 1, "F16": 2, "BF16": 2, "F32": 4, "F64": 8}
"""Type as which bytes are stored (`bnb_4bit_quant_storage`) -> its size."""
_MAX_STATE_BYTES: Final = 4096
"""Largest JSON text beside a weight, which has 200 bytes."""


class _State(NamedTuple):
    """Shape and blocks of a weight, from the JSON text beside it."""

    shape: Size
    block: int
    nested_block: int
    """Scales that share a scale; 0 where they are not quantised again."""
    offset: float


def codebook_shape(headers: Mapping[Role, Header], read: Callable[[Role], Tensor]) -> Size | None:
    """[N, K] of the decoded tensor; None where types or shapes of the parts do not fit each other."""
    values, header = headers["values"], headers.get("state")
    if header is None or header.type != "U8" or len(header.shape) != 1 or header.shape.numel() > _MAX_STATE_BYTES:
        return None
    state = _read_state(read("state"))
    if state is None:
        return None
    numbers, item = state.shape.numel(), STORAGE_BYTES.get(values.type)
    blocks = -(-numbers // state.block)
    if item is None or values.shape != (-(-numbers // (2 * item)), 1):
        return None
    expected: dict[Role, Header] = {"code": Header("F32", Size([16])), "scales": Header("F32", Size([blocks]))}
    if state.nested_block:
        nested = Header("F32", Size([-(-blocks // state.nested_block)]))
        expected |= {"scales": Header("U8", Size([blocks])), "nested_scales": nested}
        expected["nested_code"] = Header("F32", Size([256]))
    return state.shape if all(headers.get(role) == header for role, header in expected.items()) else None


def _read_state(content: Tensor) -> _State | None:
    """The state in a JSON text; None where it is none."""
    try:
        values: Any = parse_json(content.numpy().tobytes())
    except ValueError:
        return None
    if not isinstance(values, dict):
        return None
    shape, offset = values.get("shape"), values.get("nested_offset", 0.0)  # no NaN: `parse_json`
    sizes = [values.get("blocksize"), values.get("nested_blocksize", 0), *(shape if isinstance(shape, list) else [])]
    numbers = [each for each in sizes if type(each) is int and 0 <= each < 1 << 31]
    if len(sizes) != 4 or len(numbers) != 4 or type(offset) is not float:
        return None
    block, nested, N, K = numbers
    sound = N and K and 0 < block <= MAX_BLOCK and nested <= MAX_BLOCK
    return _State(Size([N, K]), block, nested, offset) if sound else None


class Codebook:
    """Decodes a weight [N, K].

    Memory beside the result: the scales in float32, and twice `CHUNK` numbers of float32 at most.
    """

    def __init__(self, parts: Mapping[Role, Tensor], shape: Size, item: int) -> None:
        state = _read_state(parts["state"])
        assert state is not None, "the headers were checked"
        self._item, self._columns, self._block = item, shape[1], state.block
        self._code = parts["code"]
        self._scales = parts["scales"]
        if state.nested_block:
            by_block = parts["nested_scales"].repeat_interleave(state.nested_block)[: len(self._scales)]
            self._scales = parts["nested_code"][self._scales.int()].mul_(by_block).add_(state.offset)

    def place(self, start: int, stop: int) -> Place:
        numbers = 2 * self._item  # of a stored item
        return Place(0, start * self._columns // numbers, -(-stop * self._columns // numbers))

    def rows(self, values: Tensor, start: int, stop: int) -> Tensor:
        low, high = start * self._columns, stop * self._columns
        out = torch.empty(high - low)
        content = values.reshape(-1).view(torch.uint8)
        begin = 2 * self._item * self.place(start, stop).start  # the number that the first byte begins with
        step = max(1, CHUNK // self._block) * self._block
        for aligned in range(low - low % self._block, high, step):
            first, last = max(aligned, low), min(aligned + step, high)
            pairs = content[(first - begin) // 2 : -(-(last - begin) // 2)]
            codes = torch.stack([pairs >> 4, pairs & 0x0F], dim=-1).flatten()[(first - begin) % 2 :][: last - first]
            scales = self._scales[first // self._block : -(-last // self._block)].repeat_interleave(self._block)
            scales = scales[first - aligned :][: last - first]
            torch.mul(self._code[codes.int()], scales, out=out[first - low : last - low])
        return out.view(stop - start, self._columns)
