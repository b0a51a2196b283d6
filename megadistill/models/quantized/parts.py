"""Headers of the parts of quantised tensors, and the ranges of them that are read."""

from typing import Final, NamedTuple

from torch import Size

FLOATS: Final = ("F32", "F16", "BF16")
"""Types of scales."""
INDICES: Final = ("I32", "I64")
"""Types of indices and sizes."""

CHUNK: Final = 1 << 22
"""Numbers that are decoded at a time: 16 MiB of float32, and as much for each of their scales and zero points."""


class Header(NamedTuple):
    """Type and shape of a stored tensor, by the names of safetensors."""

    type: str
    shape: Size


class Place(NamedTuple):
    """A range of a stored tensor along one of its axes."""

    axis: int
    start: int
    stop: int
