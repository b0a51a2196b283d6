"""Time of the loss beside its own four products and beside other people's losses, at 8,192 tokens x 128,256 ids x
(4,096 | 8,192), forward and backward, in bf16 on one GPU.

Others are liger-kernel's chunked distillation loss, F.kl_div on whole logits and in chunks, and for labels
cut-cross-entropy and liger-kernel's linear cross-entropy. Ours come first, so that nothing that another package does
can cost their figures; each group is measured in turn with the products alone, medians of rounds.

Legend: N tokens, V vocabulary, D student width, E teacher width, n tokens of a chunk.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megadistill.distributed.vocab import VocabSlice
from megadistill.divergence import Divergence
from megadistill.loss import Elementwise, Head, LossOptions, label_loss
from megadistill.loss.heads import multiply
from megadistill.loss.inputs import ChunkPlan, fitting_tokens
from megadistill.loss.options import LOGIT_MEMORY
from tests.gpu.device import Device, Run
from tests.gpu.loss_numerics import Problem, relative_error
from tests.gpu.results import Record, reason_of

MEMORIES = {"512 MiB": LOGIT_MEMORY, "2 GiB": 2 << 30, "4 GiB": 4 << 30}
"""`logit_memory` of ours: the default, and chunks of four and eight times the tokens, which add to dW less often."""

Losses = dict[str, Callable[[Problem], tuple[Tensor, ...]]]
"""Name -> dX and dW of the mean forward KL, or of the mean cross-entropy."""


class Products:
    """Student logits, teacher logits (where `teacher`), dX and dW in chunks, and nothing between: the floor."""

    def __init__(self, problem: Problem, n: int, *, teacher: bool) -> None:
        self._problem, self._n, self._teacher = problem, n, teacher
        V, D = problem.student_weight_VD.shape
        N = len(problem.labels_N)
        logits = partial(torch.zeros, n, V, device=problem.labels_N.device)
        self._z_s, self._z_t = logits(), logits() if teacher else None
        self._slope = torch.zeros(n, V, device=problem.labels_N.device, dtype=torch.bfloat16)
        self._dX = torch.zeros(N, D, device=problem.labels_N.device)
        self._dW = torch.zeros(V, D, device=problem.labels_N.device)

    def __call__(self) -> None:
        p = self._problem
        X, W = p.student_hidden_ND.detach(), p.student_weight_VD.detach()
        for start in range(0, len(X), self._n):
            tokens = slice(start, min(start + self._n, len(X)))
            rows = tokens.stop - start
            multiply(X[tokens], W.T, out=self._z_s[:rows])
            if self._z_t is not None:
                multiply(p.teacher_hidden_NE[tokens], p.teacher_weight_VE.T, out=self._z_t[:rows])
            multiply(self._slope[:rows], W, out=self._dX[tokens])
            multiply(self._slope[:rows].T, X[tokens], out=self._dW, add=start > 0)


def chunk_tokens(N: int, V: int, logit_memory: int, *, models: int) -> int:
    """n of ours."""
    return ChunkPlan.of(N, fitting_tokens(logit_memory, models=models, itemsize=4, rows=V), 1).chunk_tokens


def _gradients(problem: Problem, loss: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, (problem.student_hidden_ND, problem.student_weight_VD))


def _kl(problem: Problem, tokens: slice) -> Tensor:
    """Σ KL of the tokens, on their whole logits, softmaxes in float32."""
    z_s = problem.student_hidden_ND[tokens] @ problem.student_weight_VD.T
    z_t = problem.teacher_hidden_NE[tokens] @ problem.teacher_weight_VE.T
    log_p_s, log_p_t = F.log_softmax(z_s.float(), dim=1), F.log_softmax(z_t.float(), dim=1)
    return F.kl_div(log_p_s, log_p_t, reduction="sum", log_target=True)


def kl_div(problem: Problem) -> tuple[Tensor, ...]:
    """The usual first implementation."""
    N = len(problem.labels_N)
    return _gradients(problem, _kl(problem, slice(0, N)) / N)


def kl_div_in_chunks(problem: Problem, n: int) -> tuple[Tensor, ...]:
    """The same, n tokens at a time, whose logits are computed once more in the backward pass."""
    N = len(problem.labels_N)
    loss = problem.student_hidden_ND.new_zeros((), dtype=torch.float32)
    for start in range(0, N, n):
        loss = loss + checkpoint(_kl, problem, slice(start, min(start + n, N)), use_reentrant=False)
    return _gradients(problem, loss / N)


def liger_jsd(problem: Problem, *, compiled: bool) -> tuple[Tensor, ...]:
    """liger-kernel's JSD at β = 0, which is forward KL."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=compiled)
    p = problem
    inputs = (p.student_hidden_ND, p.student_weight_VD, p.teacher_hidden_NE, p.teacher_weight_VE, p.labels_N)
    return _gradients(p, loss(*inputs))


def liger_labels(problem: Problem) -> tuple[Tensor, ...]:
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(accum_dtype=torch.float32)
    return _gradients(problem, loss(problem.student_weight_VD, problem.student_hidden_ND, problem.labels_N))


def cut_labels(problem: Problem) -> tuple[Tensor, ...]:
    """cut-cross-entropy, without its filter of small gradients, which would leave out products."""
    from cut_cross_entropy import linear_cross_entropy

    loss = linear_cross_entropy(problem.student_hidden_ND, problem.student_weight_VD, problem.labels_N, filter_eps=None)
    return _gradients(problem, loss)


def our_labels(problem: Problem, elementwise: Elementwise) -> tuple[Tensor, ...]:
    V = problem.student_weight_VD.shape[0]
    head = Head(problem.student_hidden_ND, problem.student_weight_VD)
    terms = label_loss(
        head,
        problem.labels_N,
        token_weights=problem.weights_N,
        vocab=VocabSlice.contiguous(0, V, V),
        options=LossOptions(LOGIT_MEMORY, elementwise),
    )
    return _gradients(problem, terms.loss)


def _ours(elementwise: Elementwise, logit_memory: int) -> Callable[[Problem], tuple[Tensor, ...]]:
    return lambda problem: problem.step(Divergence(), elementwise, logit_memory=logit_memory)


def ours(how: Elementwise) -> Losses:
    """With each of `MEMORIES`."""
    return {f"ours, {how.value}, {name}": _ours(how, memory) for name, memory in MEMORIES.items()}


def others(n: int) -> Losses:
    return {
        "liger-kernel JSD, compiled": partial(liger_jsd, compiled=True),
        "liger-kernel JSD, eager": partial(liger_jsd, compiled=False),
        "F.kl_div in chunks": partial(kl_div_in_chunks, n=n),
        "F.kl_div": kl_div,
    }


OUR_LABELS: Losses = {"labels: ours, compiled": partial(our_labels, elementwise=Elementwise.COMPILED)}

OTHER_LABELS: Losses = {
    "labels: cut-cross-entropy": cut_labels,
    "labels: liger-kernel": liger_labels,
}


def _usable(losses: Losses, small: Problem, truth: tuple[Tensor, ...], record: Record, device: Device) -> Losses:
    """Those that run here, each with the error of its gradients on a small problem."""
    usable: Losses = {}
    for name, loss in losses.items():
        try:
            gradients = loss(small)
        except Exception as error:
            if name.startswith(("ours", "labels: ours")):
                raise
            record.left_out(name, reason_of(error))
            continue
        for gradient, value, true in zip(("dX", "dW"), gradients, truth, strict=True):
            record(name, f"error of {gradient}", relative_error(value, true))
        usable[name] = loss
    device.free()
    return usable


def _truth(small: Problem, *, labels: bool) -> tuple[Tensor, ...]:
    """Gradients in float64."""
    student, teacher = small.heads(torch.float64, None)
    z = student.hidden @ student.weight.T
    if labels:
        loss = F.cross_entropy(z, small.labels_N)
    else:
        log_p_t = F.log_softmax(teacher.hidden @ teacher.weight.T, dim=1)
        loss = F.kl_div(F.log_softmax(z, dim=1), log_p_t, reduction="batchmean", log_target=True)
    return torch.autograd.grad(loss, (student.hidden, student.weight))


def _measure(device: Device, record: Record, problem: Problem, losses: Losses, group: str, *, teacher: bool) -> None:
    """Times, rates, ratios to the floor (the products alone in the largest chunks), and peaks."""
    (N, D), (V, E) = problem.student_hidden_ND.shape, problem.teacher_weight_VE.shape
    flops = 2.0 * N * V * (3 * D + (E if teacher else 0))
    runs: dict[str, Run] = {}
    for name, loss in losses.items():
        run = partial(loss, problem)
        # The whole logits of F.kl_div: both models' in bf16 and float32, their softmaxes, and gradients.
        if name == "F.kl_div" and 0.9 * device.memory_bytes < 30 * N * V:
            record.left_out(name, f"it needs some {30 * N * V >> 30} GiB, the device has {device.memory_bytes >> 30}")
            continue
        try:
            record(name, "peak memory beyond inputs", device.peak_bytes(run) / 2**20, "MiB")
        except Exception as error:
            if name.startswith(("ours", "labels: ours")):
                raise
            record.left_out(name, "out of memory" if isinstance(error, torch.OutOfMemoryError) else reason_of(error))
            device.free()
            continue
        runs[name] = run
    for memory, size in MEMORIES.items():
        n = chunk_tokens(N, V, size, models=2 if teacher else 1)
        floor = f"products alone, {memory}, beside {group}"
        runs[floor] = Products(problem, n, teacher=teacher)
    slow = [name for name in runs if name.startswith(("F.kl_div", "ours, eager"))]
    seconds = device.medians({name: run for name, run in runs.items() if name not in slow}, repeats=9)
    seconds |= device.medians({name: runs[name] for name in slow}, repeats=3, warm_up=1)
    for name, taken in sorted(seconds.items(), key=lambda item: item[1]):
        record(name, "time", 1e3 * taken, "ms")
        record(name, "rate", flops / taken / 1e12, "TFLOP/s")
        record(name, "time to its four products" if teacher else "time to its three products", taken / seconds[floor])


def run(device: Device, record: Record) -> None:
    sizes = ((1024, 16), (32_000, 512), (1024, 16), (2048, 32))
    small = Problem.random(device, *(device.size(*each) for each in sizes))
    truths = {teacher: _truth(small, labels=not teacher) for teacher in (True, False)}
    sizes = ((8192, 16), (128_256, 512), (4096, 16), (8192, 32))
    problem = Problem.random(device, *(device.size(*each) for each in sizes))
    groups: dict[str, tuple[Losses, bool]] = {
        "ours, compiled": (ours(Elementwise.COMPILED), True),
        "ours, eager": (ours(Elementwise.EAGER), True),
        "other losses": (others(device.size(1024, 8)), True),
        "our loss of labels": (OUR_LABELS, False),
        "other losses of labels": (OTHER_LABELS, False),
    }
    for group, (losses, teacher) in groups.items():
        with record.part(group):
            usable = _usable(losses, small, truths[teacher], record, device)
            _measure(device, record, problem, usable, group, teacher=teacher)
        device.free()
