"""The implementations to measure: our loss, its matrix products alone, and what a user would pick instead.

Every contender of a problem computes the same: the mean forward KL, or the mean cross-entropy of the labels, with its
dX and dW, from hidden states and heads. Where an implementation takes logits or probabilities, its products and softmax
are part of the price. Those of other projects are named with the function that is called; versions are pinned in the
extra `oracles`, or by name in `PINS`.

Legend: N tokens, D student width, E teacher width, V vocabulary, n tokens of a chunk.
"""

import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from megadistill.loss import Divergence, Elementwise, Head, LossOptions, VocabSlice, distill_loss, label_loss
from megadistill.loss.inputs import ChunkPlan, fitting_tokens
from megadistill.loss.options import LOGIT_MEMORY

Outputs = tuple[Tensor, Tensor, Tensor]
"""The loss, dX [N, D] and dW [V, D]."""

PINS = ("cut-cross-entropy==25.1.1", "trl==1.16.0")
"""Packages that are measured beside those of the extra `oracles`; no part of this project needs them."""


class NeedsAcceleratorError(Exception):
    """Kernels of Triton, which a CPU runs only as an interpreter, for their numbers and not for their speed."""


@dataclass(frozen=True)
class Shape:
    tokens: int
    vocab: int
    student_width: int
    teacher_width: int

    def __str__(self) -> str:
        return f"N {self.tokens}, V {self.vocab}, D {self.student_width}, E {self.teacher_width}"

    @property
    def output_bytes(self) -> int:
        """Bytes of dX and dW in float32."""
        return 4 * self.student_width * (self.tokens + self.vocab)

    def chunk_tokens(self, logit_memory: int, models: int = 2) -> int:
        """n, on one process: as many tokens as `logit_memory` holds the logits of, in chunks of equal size."""
        fitting = fitting_tokens(logit_memory, models=models, itemsize=4, rows=self.vocab)
        return ChunkPlan.of(self.tokens, fitting, group_size=1).chunk_tokens


@dataclass(frozen=True)
class Inputs:
    """float32, of one process or of one rank's share."""

    student_hidden: Tensor
    student_weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    labels: Tensor
    token_weights: Tensor
    vocab: VocabSlice

    @property
    def student(self) -> Head:
        return Head(self.student_hidden, self.student_weight)

    @property
    def teacher(self) -> Head:
        return Head(self.teacher_hidden, self.teacher_weight)

    @classmethod
    def random(cls, shape: Shape) -> "Inputs":
        """Logits of standard deviation 1 (student) and 3 (teacher)."""
        generator = torch.Generator().manual_seed(0)

        def normal(rows: int, width: int, deviation: float) -> Tensor:
            return torch.randn(rows, width, generator=generator).mul_(deviation)

        N, V, D, E = shape.tokens, shape.vocab, shape.student_width, shape.teacher_width
        return cls(
            student_hidden=normal(N, D, 1.0).requires_grad_(),
            student_weight=normal(V, D, D**-0.5).requires_grad_(),
            teacher_hidden=normal(N, E, 1.0),
            teacher_weight=normal(V, E, 3 * E**-0.5),
            labels=torch.randint(V, (N,), generator=generator),
            token_weights=torch.full((N,), 1 / N),
            vocab=VocabSlice.contiguous(0, V, V),
        )

    def share(self, rank: int, ranks: int, vocab: VocabSlice) -> "Inputs":
        """The tokens and the rows of `vocab` that a rank has."""
        per_rank = self.labels.shape[0] // ranks
        tokens, rows = slice(rank * per_rank, (rank + 1) * per_rank), vocab.global_ids()
        return replace(
            self,
            student_hidden=self.student_hidden.detach()[tokens].clone().requires_grad_(),
            student_weight=self.student_weight.detach()[rows].requires_grad_(),
            teacher_hidden=self.teacher_hidden[tokens].clone(),
            teacher_weight=self.teacher_weight[rows],
            labels=self.labels[tokens].clone(),
            token_weights=self.token_weights[tokens].clone(),
            vocab=vocab,
        )


def outputs(inputs: Inputs, loss: Tensor) -> Outputs:
    dX, dW = torch.autograd.grad(loss, (inputs.student_hidden, inputs.student_weight))
    return loss.detach(), dX, dW


def dense(inputs: Inputs, *, teacher: bool) -> Outputs:
    """The truth: whole logits in float64, from the float32 inputs."""
    X = inputs.student_hidden.detach().double().requires_grad_()
    W = inputs.student_weight.detach().double().requires_grad_()
    log_p_s = F.log_softmax(X @ W.T, dim=1)
    if teacher:
        log_p_t = F.log_softmax(inputs.teacher_hidden.double() @ inputs.teacher_weight.double().T, dim=1)
        loss = F.kl_div(log_p_s, log_p_t, reduction="batchmean", log_target=True)
    else:
        loss = F.nll_loss(log_p_s, inputs.labels)
    dX, dW = torch.autograd.grad(loss, (X, W))
    return loss.detach(), dX, dW


class Products:
    """The floor: the products that the gradient cannot do without, and nothing between them.

    Student logits, teacher logits (where there is a teacher), dX and dW, chunk by chunk into memory that is allocated
    once, before the clock starts. What ours does between and around them is what its ratio shows.
    """

    def __init__(self, inputs: Inputs, chunk_tokens: int, *, teacher: bool = True) -> None:
        self._X, self._W = inputs.student_hidden.detach(), inputs.student_weight.detach()
        self._teacher = (inputs.teacher_hidden, inputs.teacher_weight.T) if teacher else None
        self._n = chunk_tokens
        n, V = min(chunk_tokens, self._X.shape[0]), self._W.shape[0]
        self._z_s, self._z_t = torch.zeros(n, V), torch.zeros(n, V) if teacher else None
        self._dX, self._dW = torch.zeros_like(self._X), torch.zeros_like(self._W)

    def __call__(self) -> None:
        for start in range(0, self._X.shape[0], self._n):
            tokens = slice(start, start + self._n)
            X = self._X[tokens]
            z_s = self._z_s[: len(X)]
            torch.mm(X, self._W.T, out=z_s)
            if self._teacher is not None and self._z_t is not None:
                torch.mm(self._teacher[0][tokens], self._teacher[1], out=self._z_t[: len(X)])
            torch.mm(z_s, self._W, out=self._dX[tokens])
            torch.addmm(self._dW, z_s.T, X, beta=0 if start == 0 else 1, out=self._dW)


def ours(
    inputs: Inputs,
    elementwise: Elementwise,
    logit_memory: int = LOGIT_MEMORY,
    divergence: Divergence = Divergence(),  # noqa: B008 - frozen
) -> Outputs:
    terms = distill_loss(
        inputs.student,
        inputs.teacher,
        inputs.labels,
        token_weights=inputs.token_weights,
        divergence=divergence,
        vocab=inputs.vocab,
        options=LossOptions(logit_memory, elementwise),
    )
    return outputs(inputs, terms.loss)


def our_labels(inputs: Inputs, elementwise: Elementwise, logit_memory: int = LOGIT_MEMORY) -> Outputs:
    terms = label_loss(
        inputs.student,
        inputs.labels,
        token_weights=inputs.token_weights,
        vocab=inputs.vocab,
        options=LossOptions(logit_memory, elementwise),
    )
    return outputs(inputs, terms.loss)


def kl_div(inputs: Inputs) -> Outputs:
    """The usual first implementation, on whole logits."""
    log_p_s = F.log_softmax(inputs.student_hidden @ inputs.student_weight.T, dim=1)
    log_p_t = F.log_softmax(inputs.teacher_hidden @ inputs.teacher_weight.T, dim=1)
    return outputs(inputs, F.kl_div(log_p_s, log_p_t, reduction="batchmean", log_target=True))


def linear_cross_entropy(inputs: Inputs, *, with_options: bool) -> Outputs:
    """Torch's own, against the teacher's softmax `[N, V]`, which is part of the price.

    With options torch would work in chunks, but not against soft targets: it warns, and ignores the options.

    Raises:
        ImportError: this torch is older than the function.
    """
    from torch.nn import LinearCrossEntropyOptions  # noqa: PLC0415 - torch 2.11 has none

    options = LinearCrossEntropyOptions() if with_options else None
    p_t = F.softmax(inputs.teacher_hidden @ inputs.teacher_weight.T, dim=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss = F.linear_cross_entropy(inputs.student_hidden, inputs.student_weight, p_t, options=options)
        entropy = -(p_t * p_t.clamp_min(torch.finfo(p_t.dtype).tiny).log()).sum(dim=1).mean()
    return outputs(inputs, loss - entropy)


def liger(inputs: Inputs, *, compiled: bool) -> Outputs:
    """liger-kernel's JSD at β = 0, which is forward KL, in its own chunks of 1024 tokens.

    Raises:
        ImportError: it is not installed.
    """
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss  # noqa: PLC0415 - the extra `oracles`

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=compiled)
    return outputs(
        inputs,
        loss(
            inputs.student_hidden,
            inputs.student_weight,
            inputs.teacher_hidden,
            inputs.teacher_weight,
            inputs.labels,
        ),
    )


def liger_kl_div(inputs: Inputs) -> Outputs:
    """liger-kernel's linear layer fused with the KL to given probabilities `[N, V]`.

    Raises:
        ImportError: it is not installed.
        NeedsAcceleratorError: there is none.
    """
    from liger_kernel.transformers import LigerFusedLinearKLDivLoss  # noqa: PLC0415 - the extra `oracles`

    _require_triton(inputs)
    p_t = F.softmax(inputs.teacher_hidden @ inputs.teacher_weight.T, dim=1)
    return outputs(inputs, LigerFusedLinearKLDivLoss()(inputs.student_hidden, inputs.student_weight, p_t))


def deepspeed_kl_div(inputs: Inputs) -> Outputs:
    """DeepSpeed's KL of vocabulary-parallel logits, which torch's products make, on one process."""
    from deepspeed.sequence.vocab_parallel_ops import vocab_parallel_kl_div  # noqa: PLC0415 - imported where it is measured

    z_s, z_t = inputs.student_hidden @ inputs.student_weight.T, inputs.teacher_hidden @ inputs.teacher_weight.T
    return outputs(inputs, vocab_parallel_kl_div(z_s, z_t).mean())


def trl_chunked(inputs: Inputs) -> Outputs:
    """TRL's chunked divergence at β = 0, which is forward KL, from hidden states and heads.

    Raises:
        ImportError: it, or pandas, is not installed.
    """
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction  # noqa: PLC0415 - imported where it is measured

    student = (inputs.student_hidden, inputs.student_weight, None)
    teacher = (inputs.teacher_hidden, inputs.teacher_weight, None)
    beta, temperature, plain = 0.0, 1.0, (1.0, None)
    value_N, _ = ChunkedDivergenceFunction.apply(*student, *teacher, beta, temperature, *plain, *plain)
    return outputs(inputs, value_N.mean())


def cross_entropy(inputs: Inputs) -> Outputs:
    """The usual first implementation, on whole logits."""
    return outputs(inputs, F.cross_entropy(inputs.student_hidden @ inputs.student_weight.T, inputs.labels))


def linear_cross_entropy_of_labels(inputs: Inputs) -> Outputs:
    """Torch's own, in chunks.

    Raises:
        ImportError: this torch is older than the function.
    """
    from torch.nn import LinearCrossEntropyOptions  # noqa: PLC0415 - torch 2.11 has none

    options = LinearCrossEntropyOptions()
    loss = F.linear_cross_entropy(inputs.student_hidden, inputs.student_weight, inputs.labels, options=options)
    return outputs(inputs, loss)


def deepspeed_linear_cross_entropy(inputs: Inputs) -> Outputs:
    """DeepSpeed's fused vocabulary-parallel linear cross-entropy, on one process."""
    from deepspeed.sequence.linear_cross_entropy import (  # noqa: PLC0415 - imported where it is measured
        vocab_parallel_linear_cross_entropy,
    )

    loss = vocab_parallel_linear_cross_entropy(inputs.student_hidden, inputs.student_weight, inputs.labels)
    return outputs(inputs, loss)


def cut_cross_entropy(inputs: Inputs, *, implementation: str) -> Outputs:
    """Apple's cut-cross-entropy: `cce` in Triton, or `torch_compile`, its fallback.

    Raises:
        ImportError: it is not installed.
        NeedsAcceleratorError: there is none, for `cce`.
    """
    from cut_cross_entropy import linear_cross_entropy as cut  # noqa: PLC0415 - imported where it is measured

    if implementation == "cce" and inputs.student_hidden.device.type == "cpu":
        raise NeedsAcceleratorError("its Triton kernels need an accelerator")
    hidden, weight = inputs.student_hidden, inputs.student_weight
    return outputs(inputs, cut(hidden, weight, inputs.labels, impl=implementation))


def liger_linear_cross_entropy(inputs: Inputs) -> Outputs:
    """liger-kernel's fused linear cross-entropy.

    Raises:
        ImportError: it is not installed.
        NeedsAcceleratorError: there is none.
    """
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss  # noqa: PLC0415 - the extra `oracles`

    _require_triton(inputs)
    loss = LigerFusedLinearCrossEntropyLoss()(inputs.student_weight, inputs.student_hidden, inputs.labels)
    return outputs(inputs, loss)


def _require_triton(inputs: Inputs) -> None:
    if inputs.student_hidden.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise NeedsAcceleratorError("its Triton kernels need an accelerator; TRITON_INTERPRET=1 computes their numbers")


Contenders = Mapping[str, Callable[..., Outputs]]

OURS: Contenders = {
    "ours, eager": partial(ours, elementwise=Elementwise.EAGER),
    "ours, compiled": partial(ours, elementwise=Elementwise.COMPILED),
}

THEIRS: Contenders = {
    "F.kl_div": kl_div,
    "F.linear_cross_entropy": partial(linear_cross_entropy, with_options=False),
    "F.linear_cross_entropy, options": partial(linear_cross_entropy, with_options=True),
    "liger-kernel, eager": partial(liger, compiled=False),
    "liger-kernel, compiled": partial(liger, compiled=True),
    "liger-kernel, FusedLinearKLDiv": liger_kl_div,
    "TRL, chunked divergence": trl_chunked,
    "DeepSpeed, vocab_parallel_kl_div": deepspeed_kl_div,
}

OUR_LABELS: Contenders = {
    "ours, eager": partial(our_labels, elementwise=Elementwise.EAGER),
    "ours, compiled": partial(our_labels, elementwise=Elementwise.COMPILED),
}

THEIR_LABELS: Contenders = {
    "F.cross_entropy": cross_entropy,
    "F.linear_cross_entropy": linear_cross_entropy_of_labels,
    "DeepSpeed, vocab_parallel_linear_cross_entropy": deepspeed_linear_cross_entropy,
    "cut-cross-entropy, torch_compile": partial(cut_cross_entropy, implementation="torch_compile"),
    "cut-cross-entropy, cce": partial(cut_cross_entropy, implementation="cce"),
    "liger-kernel, FusedLinearCrossEntropy": liger_linear_cross_entropy,
}


@dataclass(frozen=True)
class Problem:
    """A loss, and the contenders that compute it."""

    ours: Contenders
    theirs: Contenders
    has_teacher: bool

    @property
    def contenders(self) -> Contenders:
        return {**self.ours, **self.theirs}

    @property
    def models(self) -> int:
        """Models whose logits a chunk has."""
        return 2 if self.has_teacher else 1

    def truth(self, inputs: Inputs) -> Outputs:
        return dense(inputs, teacher=self.has_teacher)


FORWARD_KL = Problem(OURS, THEIRS, has_teacher=True)
LABELS = Problem(OUR_LABELS, THEIR_LABELS, has_teacher=False)

PEAK_LOGITS = {
    "F.kl_div": 8,
    "F.linear_cross_entropy": 7,
    "F.linear_cross_entropy, options": 7,
    "liger-kernel, FusedLinearKLDiv": 4,
    "DeepSpeed, vocab_parallel_kl_div": 9,
    "F.cross_entropy": 4,
    "cut-cross-entropy, torch_compile": 4,
}
"""About how many [N, V] tensors a contender holds at its peak; liger holds some 9 of [1024, V]."""


def estimated_peak(name: str, shape: Shape) -> int:
    """Bytes, generously: enough to tell whether a machine can run it at all."""
    if name in OURS:
        return 2 * LOGIT_MEMORY + 2 * shape.output_bytes
    tokens = shape.tokens if name in PEAK_LOGITS else min(shape.tokens, 2047)
    return PEAK_LOGITS.get(name, 9) * 4 * tokens * shape.vocab + 2 * shape.output_bytes
