"""The loss in bf16 on the device, eager and compiled, against float64 on the same numbers; its memory; its kernels.

The truth is `megadistill.loss.reference` in float64, of the same bf16 hidden states and heads: what is left is the
error of the operator's own arithmetic.

Legend: N tokens, V vocabulary, D student width, E teacher width.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megadistill.distributed.vocab import VocabSlice, block_cyclic_ranges
from megadistill.divergence import Divergence, DivergenceKind
from megadistill.loss import Elementwise, Head, LossOptions, distill_loss, reference
from megadistill.loss.options import LOGIT_MEMORY
from megadistill.types import LogitTransform, LossTerms
from tests.gpu.device import Device
from tests.gpu.results import Record

DIVERGENCES = {
    "forward KL": (Divergence(), None),
    "forward KL, T 2, softcap 30": (Divergence(temperature=2.0), 30.0),
    "0.7 forward KL, 0.3 CE, z-loss": (Divergence(kd_weight=0.7, ce_weight=0.3, z_loss=1e-4), None),
    "reverse KL": (Divergence(DivergenceKind.REVERSE_KL), None),
    "JSD": (Divergence(DivergenceKind.JSD), 30.0),
    "skew KL": (Divergence(DivergenceKind.SKEW_KL), None),
    "TVD": (Divergence(DivergenceKind.TVD), None),
}
"""Divergence and the softcap of both models."""

ARITHMETIC = {"eager": Elementwise.EAGER, "compiled": Elementwise.COMPILED}

COMPILED = ("forward KL", "forward KL, T 2, softcap 30", "JSD")
"""Those that are compiled too: each takes its seconds."""

WORLDS = (1, 512, 2048)
"""Ranks that a slice's rows are spread over, for the count of kernels."""


@dataclass(frozen=True)
class Problem:
    """Random bf16 inputs: student logits of standard deviation 1, teacher logits of 3."""

    student_hidden_ND: Tensor
    student_weight_VD: Tensor
    teacher_hidden_NE: Tensor
    teacher_weight_VE: Tensor
    labels_N: Tensor

    @classmethod
    def random(cls, device: Device, N: int, V: int, D: int, E: int) -> "Problem":
        torch.manual_seed(0)
        return cls(
            device.random(N, D).requires_grad_(),
            device.random(V, D, deviation=D**-0.5).requires_grad_(),
            device.random(N, E),
            device.random(V, E, deviation=3 * E**-0.5),
            torch.randint(V, (N,), device=device.torch_device),
        )

    def heads(self, dtype: torch.dtype, softcap: float | None) -> tuple[Head, Head]:
        """Student and teacher; the student's tensors are new leaves in another dtype than the problem's."""
        transform = LogitTransform(softcap=softcap)
        hidden_ND, weight_VD = (
            t.detach().to(dtype).requires_grad_() for t in (self.student_hidden_ND, self.student_weight_VD)
        )
        hidden_NE, weight_VE = self.teacher_hidden_NE.to(dtype), self.teacher_weight_VE.to(dtype)
        return Head(hidden_ND, weight_VD, transform=transform), Head(hidden_NE, weight_VE, transform=transform)

    def gradients(self, student: Head, terms: LossTerms) -> dict[str, Tensor]:
        """In float64, on the device."""
        both = torch.autograd.grad(terms.loss, (student.hidden, student.weight))
        return {"dX": both[0].double(), "dW": both[1].double()}

    def call(
        self,
        divergence: Divergence,
        elementwise: Elementwise,
        softcap: float | None = None,
        vocab: VocabSlice | None = None,
        logit_memory: int = LOGIT_MEMORY,
    ) -> LossTerms:
        """The operator; backward is the caller's."""
        transform, V = LogitTransform(softcap=softcap), self.student_weight_VD.shape[0]
        return distill_loss(
            Head(self.student_hidden_ND, self.student_weight_VD, transform=transform),
            Head(self.teacher_hidden_NE, self.teacher_weight_VE, transform=transform),
            self.labels_N,
            token_weights=self.weights_N,
            divergence=divergence,
            vocab=vocab or VocabSlice.contiguous(0, V, V),
            options=LossOptions(logit_memory, elementwise),
        )

    def step(self, divergence: Divergence, elementwise: Elementwise, **options: Any) -> tuple[Tensor, ...]:
        """The operator with its gradients dX and dW."""
        leaves = (self.student_hidden_ND, self.student_weight_VD)
        return torch.autograd.grad(self.call(divergence, elementwise, **options).loss, leaves)

    @property
    def weights_N(self) -> Tensor:
        N = len(self.labels_N)
        return torch.full((N,), 1 / N, device=self.labels_N.device)


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """Of the norm; infinite for a result that is not finite."""
    error = float((actual.double() - truth).norm() / truth.norm())
    return error if math.isfinite(error) else math.inf


def _truth(problem: Problem, divergence: Divergence, softcap: float | None) -> tuple[float, dict[str, Tensor]]:
    student, teacher = problem.heads(torch.float64, softcap)
    terms = reference.distill_loss(
        student,
        teacher,
        problem.labels_N,
        token_weights=problem.weights_N.double(),
        divergence=divergence,
        vocab_size=problem.student_weight_VD.shape[0],
    )
    return float(terms.loss.detach()), problem.gradients(student, terms)


def errors(device: Device, record: Record) -> None:
    """Of the loss and of both gradients, each divergence, eager and compiled."""
    N, V, D, E = (device.size(*sizes) for sizes in ((2048, 24), (32_003, 101), (1024, 16), (2048, 32)))
    problem = Problem.random(device, N, V, D, E)
    for name, (divergence, softcap) in DIVERGENCES.items():
        value, gradients = _truth(problem, divergence, softcap)
        for how, elementwise in ARITHMETIC.items():
            if how == "compiled" and name not in COMPILED:
                continue
            case = f"{name}, {how}"
            with record.part(case):
                terms = problem.call(divergence, elementwise, softcap)
                student = Head(problem.student_hidden_ND, problem.student_weight_VD)
                actual = problem.gradients(student, terms)
                record(case, "error of the loss", abs(float(terms.loss.detach()) - value) / abs(value))
                for gradient, truth in gradients.items():
                    record(case, f"error of {gradient}", relative_error(actual[gradient], truth))
        del gradients
        device.free()


def memory(device: Device, record: Record, how: str) -> None:
    """Peak of a call beyond inputs and gradients, to the logit memory that it may take."""
    N, V, D, E = (device.size(*sizes) for sizes in ((8192, 24), (32_000, 101), (1024, 16), (1024, 32)))
    problem = Problem.random(device, N, V, D, E)
    gradients = 4 * (N * D + V * D)  # accumulated in float32
    step = partial(problem.step, Divergence(), ARITHMETIC[how])
    step()  # compiles
    beyond = device.peak_bytes(step) - gradients
    record(how, "peak beyond inputs and gradients", beyond / 2**20, "MiB")
    record(how, "the same, to logit_memory", beyond / LOGIT_MEMORY)


def kernels(device: Device, record: Record, how: str) -> None:
    """Kernels of a chunk, forward and backward: calls of three chunks less calls of two."""
    V, width, chunk = device.size(32_768, 2048), device.size(256, 16), device.size(2048, 8)
    memory_of_chunk = 2 * 4 * chunk * V
    for world in WORLDS:
        vocab = VocabSlice(block_cyclic_ranges(V, world, 1, 0), V)
        counts = []
        for chunks in (2, 3):
            problem = Problem.random(device, chunks * chunk, V, width, width)
            step = partial(problem.step, Divergence(), ARITHMETIC[how], vocab=vocab, logit_memory=memory_of_chunk)
            step()
            counts.append(device.kernels(step))
        record(f"{how}, rows of {world} ranks", "kernels a chunk", counts[1] - counts[0])


def run(device: Device, record: Record) -> None:
    for how in ARITHMETIC:
        with record.part(f"{how}, memory"):
            memory(device, record, how)
        with record.part(f"{how}, kernels"):
            kernels(device, record, how)
        device.free()
    errors(device, record)
