"""Memory for logits. It knows no shapes but sizes.

An accelerator's allocator keeps what is freed. A CPU's gives large pieces back to the system, and each call would have
the system clear them again, page by page: 0.08 s for 256 MiB, a fourteenth of what the products take at D 256. So there
one piece is kept from call to call, and whoever takes it has it alone.
"""

from torch import Tensor

LOGIT_MEMORY = 512 << 20
"""Bytes of logits that exist at a time, by default: two models' of 2048 tokens, at a slice of 32,768 ids. With half of
it the products of such chunks are some 4 % slower on a CPU."""

_spare: list[Tensor] = []


def take(elements: int, like: Tensor) -> Tensor:
    """[elements] of anything, of the dtype and device of `like`. Give it back with `give` when nothing reads it."""
    if like.device.type != "cpu":
        return like.new_empty(elements)
    kept = _spare.pop() if _spare else None
    if kept is None or kept.dtype != like.dtype or kept.numel() < elements:
        return like.new_empty(elements)
    return kept[:elements]


def give(memory: Tensor) -> None:
    """The next `take` may have it."""
    if memory.device.type == "cpu" and not _spare:
        _spare.append(memory if memory._base is None else memory._base)
