"""The gradients dX and dW of the group's loss, accumulated chunk by chunk from dlogits.

Legend: N this rank's tokens, n tokens of a chunk (of the whole group); D student width; w this rank's rows of the
vocabulary, v of them true (not padding).
"""

from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megadistill.distributed.collectives import Pending, group_size, start_reduce_scatter_rows
from megadistill.loss import buffers
from megadistill.loss.heads import multiply
from megadistill.loss.inputs import ChunkPlan, LossInputs
from megadistill.types import WeightGradient


@dataclass(frozen=True)
class Gradients:
    """The gradient of the group's loss with respect to this rank's tokens and its rows of the student's head."""

    hidden_ND: Tensor
    """dX, in the dtype of the hidden states: each token is written once."""
    weight_wD: Tensor
    """dW, in the accumulator's dtype: every chunk adds to it. It is the memory of the head's `weight_gradient`, if that
    has one, with the gradients of former losses in it unless it was empty."""
    _adds: bool
    """Whether the first chunk adds to `weight_wD`, too."""
    bias_w: Tensor | None
    _dlogits_nv: Tensor | None
    """Memory for the dlogits of a chunk, where products take another dtype than that of the logits."""
    _scatters: deque[tuple[slice, Pending]] = field(default_factory=deque)
    """Reduce-scatters of dX in flight, with the tokens that they are for."""

    @classmethod
    def empty(cls, inputs: LossInputs, plan: ChunkPlan) -> "Gradients":
        """Uninitialised memory for what the first chunk writes, and zeros for what no chunk does: padding rows.

        Zeros for the first chunk to add to would be one more pass over a matrix of the head's size.
        """
        head, dtype, student_vD = inputs.student, inputs.dtype, inputs.weights[0]
        bias_w = None if head.bias is None else torch.zeros_like(head.bias, dtype=dtype)
        into = head.weight_gradient or WeightGradient(torch.empty_like(head.weight, dtype=dtype))
        weight_wD, adds, into.empty = into.memory, not into.empty, False
        if not adds:
            weight_wD[inputs.vocab.true_rows if plan.longest > 0 else 0 :] = 0
        dlogits_nv = None
        if student_vD.dtype != dtype:
            n = group_size(inputs.vocab.group) * plan.chunk_tokens
            dlogits_nv = buffers.aligned_rows(n, len(student_vD), student_vD)
        return cls(torch.empty_like(head.hidden), weight_wD, adds, bias_w, dlogits_nv)

    def dlogits_memory(self, logits_nv: Tensor) -> Tensor:
        """[n, v]: where a chunk's dlogits goes: over the student's logits, or to bf16 memory where products take that.

        The rounding to bf16 is at most 2^-8 of each entry, without a bias.
        """
        return logits_nv if self._dlogits_nv is None else self._dlogits_nv[: len(logits_nv)]

    def add(self, dlogits_nv: Tensor, hidden_nD: Tensor, span: slice, inputs: LossInputs) -> None:
        """dW += dlogitsᵀ · X, which needs no collective; dX = dlogits · W starts on its way to the tokens' ranks."""
        student_vD = inputs.weights[0]
        v = len(student_vD)
        if self.bias_w is not None:
            self.bias_w[:v] += dlogits_nv.sum(dim=0, dtype=self.bias_w.dtype)
        multiply(dlogits_nv.T, hidden_nD, out=self.weight_wD[:v], add=self._adds or span.start > 0)
        dX_nD = self.weight_wD.new_empty(hidden_nD.shape)
        multiply(dlogits_nv, student_vD, out=dX_nD)
        self._scatters.append((span, start_reduce_scatter_rows(dX_nD, inputs.vocab.group)))

    def receive(self, *, in_flight: int) -> None:
        """Waits for the oldest reduce-scatters of dX until fewer than `in_flight` are left."""
        while len(self._scatters) >= in_flight:
            span, pending = self._scatters.popleft()
            own_D = self.hidden_ND[span]
            own_D.copy_(pending.wait()[: len(own_D)])  # rows after this rank's last token are padding
