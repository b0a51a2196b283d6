"""Number formats that a model is trained and exported in, by the names of torch's dtypes. Imports torch only on use."""

from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

if TYPE_CHECKING:
    import torch

Precision: TypeAlias = Literal["float32", "bfloat16"]

PRECISIONS: tuple[Precision, ...] = get_args(Precision)


def torch_dtype(precision: Precision) -> "torch.dtype":
    """The dtype of a precision; a number's bytes are its `itemsize`."""
    import torch  # noqa: PLC0415, a recipe is read without it

    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[precision]
