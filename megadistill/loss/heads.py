"""A model's head on this rank's slice: what must fit, the products, and the logits that they become.

It knows one model and one slice; it does not know tokens of other ranks, softmaxes or losses.

Legend: N tokens, n of them in a chunk; D the model's width; w this rank's rows of the vocabulary, v of them true (not
padding).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megadistill.distributed.vocab import VocabSlice
from megadistill.types import LogitTransform

DTYPES = (torch.float64, torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Head:
    """What a caller passes of one model. The teacher's padding may be another than the slice's."""

    name: str
    hidden_ND: Tensor
    weight_wD: Tensor
    bias_w: Tensor | None
    transform: LogitTransform

    def require_fit(self, tokens: int, vocab: VocabSlice) -> None:
        """
        Raises:
            ValueError: shapes or dtypes that do not fit the tokens, the slice or each other.
        """
        hidden, weight, bias = self.hidden_ND, self.weight_wD, self.bias_w
        enough = weight.shape[0] == vocab.rows if self.name == "student" else weight.shape[0] >= vocab.true_rows
        if hidden.shape != (tokens, hidden.shape[-1]) or weight.shape[1:] != hidden.shape[1:] or not enough:
            raise ValueError(
                f"{self.name} hidden states {list(hidden.shape)} and head {list(weight.shape)} do not fit {tokens} "
                f"tokens and the slice's {vocab.rows} rows ({vocab.true_rows} without padding); pass "
                f"[{tokens}, width] and [{vocab.rows}, width]"
            )
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(
                f"{self.name} bias {list(bias.shape)} does not fit its head {list(weight.shape)}; pass one a row"
            )
        if hidden.dtype != weight.dtype or hidden.dtype not in DTYPES:
            raise ValueError(
                f"{self.name} hidden states are {hidden.dtype} and the head is {weight.dtype}; cast both to one of "
                "float64, float32 or bfloat16 (float16 underflows with weights of 1/tokens)"
            )

    def rows(self, vocab: VocabSlice, dtype: torch.dtype) -> Tensor:
        """[v, D]: true rows come first, so padding is cut off before any product, and no softmax sees it."""
        return operand(self.weight_wD[: vocab.true_rows], dtype)

    def bias(self, vocab: VocabSlice, dtype: torch.dtype) -> Tensor | None:
        """[v]."""
        return None if self.bias_w is None else self.bias_w[: vocab.true_rows].to(dtype)


def padded(rows: Tensor, length: int, fill: float) -> Tensor:
    """`rows` [m, ...] followed by rows of `fill`, `length` in all."""
    if len(rows) == length:
        return rows
    longer = rows.new_full((length, *rows.shape[1:]), fill)
    longer[: rows.shape[0]] = rows
    return longer


def operand(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """The matrix as a product takes it: in the accumulator's dtype, or bf16 where the device accumulates in float32."""
    accumulates = matrix.device.type != "cpu" and matrix.dtype == torch.bfloat16 and dtype == torch.float32
    return matrix if accumulates else matrix.to(dtype)


def multiply(left: Tensor, right: Tensor, *, out: Tensor, add: bool = False) -> None:
    """out = left @ right, or out += left @ right, in the dtype of `out` from the first partial sum to the last."""
    if left.dtype == out.dtype:
        torch.addmm(out, left, right, beta=int(add), out=out)
    else:
        torch.addmm(out, left, right, out_dtype=out.dtype, beta=int(add), out=out)
