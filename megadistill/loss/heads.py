"""A model's LM head on this rank's slice of the vocabulary, and the matrix products with it.

Legend: N tokens, n of them in a chunk; D the model's width; w this rank's rows of the vocabulary, v of them true (not
padding).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megadistill.distributed.vocab import VocabSlice
from megadistill.types import LogitTransform, WeightGradient

DTYPES = (torch.float64, torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Head:
    """One model of a loss: its final hidden states, and its LM head's rows on this rank."""

    hidden: Tensor
    """[N, D]: float64, float32 or bfloat16. Products accumulate in float32 (float64 for float64)."""
    weight: Tensor
    """[w, D], of the same dtype."""
    bias: Tensor | None = None
    """[w], added to the products; -inf for an id that a teacher does not know."""
    transform: LogitTransform = LogitTransform()
    """Scale and softcap, applied before the softmax."""
    weight_gradient: WeightGradient | None = None
    """Place to which a student's loss adds its gradient with respect to the weight, in its forward pass; autograd then
    has none.

    It is that of the loss itself: what the loss is multiplied with before its backward pass reaches the hidden states
    alone. Without this memory the gradient is autograd's, whose sum over micro-batches takes one more matrix.
    """

    def require_fit(self, name: str, tokens: int, vocab: VocabSlice, *, padding: bool) -> None:
        """Checks shapes and dtypes. With `padding` there must be as many rows as the slice has, padding included.

        Raises:
            ValueError: they do not fit the tokens, the slice or each other.
        """
        hidden, weight, bias = self.hidden, self.weight, self.bias
        enough = weight.shape[0] == vocab.rows if padding else weight.shape[0] >= vocab.true_rows
        if hidden.shape != (tokens, hidden.shape[-1]) or weight.shape[1:] != hidden.shape[1:] or not enough:
            raise ValueError(
                f"{name} hidden states {list(hidden.shape)} and head {list(weight.shape)} do not fit {tokens} "
                f"tokens and the slice's {vocab.rows} rows ({vocab.true_rows} without padding); pass "
                f"[{tokens}, width] and [{vocab.rows}, width]"
            )
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(
                f"{name} bias {list(bias.shape)} does not fit its head {list(weight.shape)}; pass one number a row"
            )
        gradient = self.weight_gradient
        if gradient is not None and (
            gradient.memory.shape != weight.shape or gradient.memory.dtype != self.accumulator
        ):
            raise ValueError(
                f"{name} weight_gradient is {list(gradient.memory.shape)} of {gradient.memory.dtype} for a head "
                f"{list(weight.shape)}; pass that shape, of {self.accumulator}"
            )
        if hidden.dtype != weight.dtype or hidden.dtype not in DTYPES:
            raise ValueError(
                f"{name} hidden states are {hidden.dtype} and the head is {weight.dtype}; cast both to one of "
                "float64, float32 or bfloat16 (float16 underflows with weights of 1/tokens)"
            )

    @property
    def accumulator(self) -> torch.dtype:
        """The dtype of products, statistics and sums: float64 for float64, else float32."""
        return torch.float64 if self.hidden.dtype == torch.float64 else torch.float32

    def rows(self, vocab: VocabSlice, dtype: torch.dtype) -> Tensor:
        """[v, D]: true rows come first, so padding is cut off before any product, and no softmax sees it."""
        return operand(self.weight[: vocab.true_rows], dtype)

    def true_bias(self, vocab: VocabSlice, dtype: torch.dtype) -> Tensor | None:
        """[v]"""
        return None if self.bias is None else self.bias[: vocab.true_rows].to(dtype)


def padded(rows: Tensor, length: int, fill: float) -> Tensor:
    """`rows` [m, ...] followed by rows of `fill`, `length` in all."""
    if len(rows) == length:
        return rows
    longer = rows.new_full((length, *rows.shape[1:]), fill)
    longer[: rows.shape[0]] = rows
    return longer


def operand(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """The matrix as a product that accumulates in `dtype` takes it: bf16 stays bf16 where that is float32."""
    return matrix if matrix.dtype == torch.bfloat16 and dtype == torch.float32 else matrix.to(dtype)


def multiplies_bf16_into_float32(device: torch.device) -> bool:
    """Whether the device has products of bf16 operands with a float32 result: accelerators do, a CPU does not."""
    return device.type != "cpu"


def multiply(left: Tensor, right: Tensor, *, out: Tensor, add: bool = False) -> None:
    """out = left @ right, or out += left @ right, in the dtype of `out` from the first partial sum to the last.

    bf16 operands of a float32 result go as they are to a device that multiplies them. Elsewhere they are widened first,
    which is the same product: two bf16 numbers multiply exactly in float32 (8 bits of mantissa each, of 24), so the two
    ways differ in the order of the additions alone.
    """
    if left.dtype != out.dtype and multiplies_bf16_into_float32(out.device):
        torch.addmm(out, left, right, out_dtype=out.dtype, beta=int(add), out=out)
    else:
        torch.addmm(out, left.to(out.dtype), right.to(out.dtype), beta=int(add), out=out)
