"""Memory for logits: the buffer that chunks share, dlogits in bf16, and the blocks of eager arithmetic.

An accelerator's allocator keeps what is freed. A CPU's gives large pieces back to the system, and each call would have
the system clear them again, page by page: 0.08 s for 256 MiB, a fourteenth of the products' time at D 256. So on a CPU
one buffer is reused from call to call; one caller has it at a time.
"""

import math

from torch import Tensor

BLOCK_ELEMENTS = 1 << 18
"""Logits of a block on a CPU, about: the temporaries of eager arithmetic stay small, and in its cache."""

ACCELERATOR_BLOCK_ELEMENTS = 1 << 24
"""Logits of a block of float64 arithmetic on an accelerator, where a block is a kernel launch: 128 MiB."""

ROW_BYTES = 16
"""Rows of a matrix that a product of an accelerator takes begin at multiples of so many bytes; its matrix units are
several times slower on others."""

_spare: list[Tensor] = []


def row_blocks(z_nv: Tensor, elements: int) -> list[slice]:
    """The rows in order, in ranges of about so many elements each."""
    n, v = z_nv.shape
    step = max(1, elements // max(1, v))
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


def take(elements: int, like: Tensor) -> Tensor:
    """[elements], uninitialised, of the dtype and device of `like`. Return it with `give` when nothing reads it."""
    if like.device.type != "cpu":
        return like.new_empty(elements)
    buffer = _spare.pop() if _spare else None
    if buffer is None or buffer.dtype != like.dtype or buffer.numel() < elements:
        return like.new_empty(elements)
    return buffer[:elements]


def give(memory: Tensor) -> None:
    """Makes the memory available to the next `take`."""
    if memory.device.type == "cpu" and not _spare:
        _spare.append(memory if memory._base is None else memory._base)


def aligned_rows(rows: int, columns: int, like: Tensor) -> Tensor:
    """[rows, columns], uninitialised, of the dtype and device of `like`; each row begins at a multiple of ROW_BYTES."""
    return like.new_empty(rows, aligned(columns, like))[:, :columns]


def aligned(elements: int, like: Tensor) -> int:
    """`elements` of the dtype of `like`, rounded up to a multiple of ROW_BYTES: what lies behind them begins at one.

    A compiled kernel would copy a matrix that does not, at each call and without a word.
    """
    unit = ROW_BYTES // like.itemsize
    return math.ceil(elements / unit) * unit
