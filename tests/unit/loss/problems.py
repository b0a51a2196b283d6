"""Inputs for the loss tests, and their truth: the reference in float64, differentiated by autograd.

Legend: N tokens, D student width, E teacher width, V rows of the heads, U ≤ V the true vocabulary.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megadistill.loss import (
    Divergence,
    DivergenceKind,
    Head,
    LossOptions,
    VocabSlice,
    distill_loss,
    label_loss,
    reference,
    sparse_distill_loss,
)
from megadistill.types import IGNORED_LABEL, METRIC_NAMES, LogitTransform, LossTerms, SparseTargets, Tail

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}

BF16_ROUNDING = 2.0**-8
"""The largest relative error of a number that is rounded to bf16: half of the last of 8 bits of mantissa."""

DIVERGENCES = {
    "kl": Divergence(),
    "kl at 2": Divergence(temperature=2.0),
    "kl at 2, squared": Divergence(temperature=2.0, temperature_squared=True),
    "kl at 1/2": Divergence(temperature=0.5),
    "reverse kl": Divergence(DivergenceKind.REVERSE_KL),
    "reverse kl at 2": Divergence(DivergenceKind.REVERSE_KL, temperature=2.0),
    "jsd": Divergence(DivergenceKind.JSD),
    "jsd of 0.9 at 2": Divergence(DivergenceKind.JSD, temperature=2.0, temperature_squared=True, parameter=0.9),
    "jsd of 0": Divergence(DivergenceKind.JSD, parameter=0.0),
    "jsd of 1": Divergence(DivergenceKind.JSD, parameter=1.0),
    "skew kl": Divergence(DivergenceKind.SKEW_KL),
    "skew kl of 0.7 at 2": Divergence(DivergenceKind.SKEW_KL, temperature=2.0, parameter=0.7),
    "skew kl of 0": Divergence(DivergenceKind.SKEW_KL, parameter=0.0),
    "tvd": Divergence(DivergenceKind.TVD),
    "tvd at 2": Divergence(DivergenceKind.TVD, temperature=2.0),
    "ce": Divergence(kd_weight=0.0, ce_weight=1.0),
    "z-loss": Divergence(kd_weight=0.0, z_loss=1.0),
    "all": Divergence(temperature=2.0, temperature_squared=True, kd_weight=0.7, ce_weight=0.3, z_loss=0.01),
    "all with jsd": Divergence(DivergenceKind.JSD, parameter=0.3, kd_weight=0.7, ce_weight=0.3, z_loss=0.01),
    "all with tvd at 2": Divergence(DivergenceKind.TVD, temperature=2.0, kd_weight=0.7, ce_weight=0.3, z_loss=0.01),
    "routed": Divergence(label_fraction=0.4),
    "routed, all with skew kl at 2": Divergence(
        DivergenceKind.SKEW_KL, temperature=2.0, kd_weight=0.7, ce_weight=0.3, z_loss=0.01, label_fraction=0.3
    ),
}

TAILS = {
    "sampled": (Tail.RENORMALISED, Divergence()),
    "top-k": (Tail.RENORMALISED, Divergence(temperature=2.0, temperature_squared=True)),
    "top-k and other": (Tail.OTHER, Divergence()),
    "top-k and other, all at 2": (
        Tail.OTHER,
        Divergence(temperature=2.0, kd_weight=0.7, ce_weight=0.3, z_loss=0.01),
    ),
    "dropped": (Tail.DROPPED, Divergence(kd_weight=0.7, ce_weight=0.3)),
}


@dataclass(frozen=True)
class Problem:
    """The whole group's tokens and the whole heads."""

    student_hidden: Tensor
    student_weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    labels: Tensor
    token_weights: Tensor
    size: int
    student_bias: Tensor | None = None
    teacher_bias: Tensor | None = None
    student_logits: LogitTransform = LogitTransform()
    teacher_logits: LogitTransform = LogitTransform()

    @property
    def student(self) -> Head:
        return Head(self.student_hidden, self.student_weight, self.student_bias, self.student_logits)

    @property
    def teacher(self) -> Head:
        return Head(self.teacher_hidden, self.teacher_weight, self.teacher_bias, self.teacher_logits)

    def differentiable(self) -> "tuple[Problem, tuple[Tensor, ...]]":
        """With a student that is a leaf, and its tensors that want gradients."""
        leaves = [self.student_hidden, self.student_weight, *([] if self.student_bias is None else [self.student_bias])]
        leaves = [leaf.clone().requires_grad_() for leaf in leaves]
        bias = leaves[2] if len(leaves) > 2 else None
        p = replace(self, student_hidden=leaves[0], student_weight=leaves[1], student_bias=bias)
        return p, tuple(leaves)

    def cast(self, dtype: torch.dtype) -> "Problem":
        """The same numbers, hidden states and heads in `dtype`; token weights stay as they are."""
        names = ("student_hidden", "student_weight", "teacher_hidden", "teacher_weight", "student_bias", "teacher_bias")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return replace(self, **{name: values.to(dtype) for name, values in given.items()})

    def bent(self) -> "Problem":
        """With everything that a model may do to its logits, and an id that the teacher does not know."""
        generator = torch.Generator().manual_seed(99)
        biases = [torch.randn(len(w), generator=generator).double() for w in (self.student_weight, self.teacher_weight)]
        biases[1][self.size // 2] = -math.inf
        known = torch.where(self.labels == self.size // 2, IGNORED_LABEL, self.labels)
        return replace(
            self,
            labels=known,
            student_bias=biases[0],
            teacher_bias=biases[1],
            student_logits=LogitTransform(softcap=3.0, scale=0.7),
            teacher_logits=LogitTransform(softcap=5.0),
        )


@dataclass(frozen=True)
class Truth:
    terms: LossTerms
    hidden_grad: Tensor
    weight_grad: Tensor
    bias_grad: Tensor | None = None


def problem(
    seed: int, *, tokens: int = 13, D: int = 5, E: int = 7, rows: int = 24, size: int = 21, scale: float = 1.0
) -> Problem:
    """Random, in float64 but exact in float32. Some tokens have no label; some have weight 0."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).double()

    labels = torch.randint(size, (tokens,), generator=generator)
    weights = (torch.rand(tokens, generator=generator) / max(1, tokens)).double()
    labels[2::5] = IGNORED_LABEL
    weights[4::6] = 0
    return Problem(
        student_hidden=normal(tokens, D) * scale,
        student_weight=normal(rows, D),
        teacher_hidden=normal(tokens, E) * scale,
        teacher_weight=normal(rows, E),
        labels=labels,
        token_weights=weights,
        size=size,
    )


def sparse(p: Problem, tail: Tail, *, kept: int, temperature: float = 1.0, seed: int = 0) -> SparseTargets:
    """Random targets: up to `kept` distinct ids a token, some of them none, the rest of the mass in the tail."""
    generator = torch.Generator().manual_seed(seed)
    tokens = len(p.labels)
    kept = min(kept, p.size)
    order = torch.rand(tokens, p.size, generator=generator, dtype=torch.float64)
    ids = order.argsort(dim=1)[:, :kept]
    probs = torch.rand(tokens, kept + 1, generator=generator, dtype=torch.float64).float().double()
    ids[1::3, kept // 2 :] = -1
    probs[:, :-1] *= ids >= 0
    if tail is Tail.RENORMALISED:
        probs[:, -1] = 0
        probs[:, 0] += 1e-3
    if kept == p.size:  # nothing is outside
        probs[(ids >= 0).all(dim=1), -1] = 0
    probs = probs / probs.sum(dim=1, keepdim=True)
    return SparseTargets(ids, probs[:, :-1], probs[:, -1].log(), tail, temperature)


def truth(
    p: Problem,
    divergence: Divergence | None,
    *,
    z_loss: float = 0.0,
    targets: SparseTargets | None = None,
    diagnostics: bool = False,
) -> Truth:
    """In float64; `divergence=None` is the label loss, `targets` those of the sparse one."""
    p, leaves = p.cast(torch.float64).differentiable()
    shared: dict[str, Any] = {"token_weights": p.token_weights, "vocab_size": p.size}
    if divergence is None:
        terms = reference.label_loss(p.student, p.labels, z_loss=z_loss, **shared)
    elif targets is not None:
        terms = reference.sparse_distill_loss(p.student, targets, p.labels, divergence=divergence, **shared)
    else:
        terms = reference.distill_loss(
            p.student, p.teacher, p.labels, divergence=divergence, diagnostics=diagnostics, **shared
        )
    return Truth(terms, *torch.autograd.grad(terms.loss, leaves))


def run(
    p: Problem,
    divergence: Divergence | None,
    *,
    vocab: VocabSlice,
    targets: SparseTargets | None = None,
    upstream: float = 1.0,
    z_loss: float = 0.0,
    **options: Any,
) -> Truth:
    """The operator and its backward on what a rank holds; arguments as in `truth`."""
    p, leaves = p.differentiable()
    shared: dict[str, Any] = {
        "token_weights": p.token_weights,
        "vocab": vocab,
        "options": LossOptions(**options),
    }
    if divergence is None:
        terms = label_loss(p.student, p.labels, z_loss=z_loss, **shared)
    elif targets is not None:
        terms = sparse_distill_loss(p.student, targets, p.labels, divergence=divergence, **shared)
    else:
        terms = distill_loss(p.student, p.teacher, p.labels, divergence=divergence, **shared)
    gradients = torch.autograd.grad(terms.loss * upstream, leaves)
    return Truth(replace(terms, loss=terms.loss.detach()), *gradients)


def scalars(terms: LossTerms) -> dict[str, float]:
    """Every number of the terms, those of the diagnostics too, by name."""
    found = {name: getattr(terms, name).item() for name in METRIC_NAMES}
    for name, values in vars(terms.diagnostics).items() if terms.diagnostics else ():
        found |= {f"{name} {i}": value for i, value in enumerate(values.flatten().tolist())}
    return found


def assert_terms(found: LossTerms, expected: LossTerms, tolerance: float, *, absolute: float | None = None) -> None:
    """Every number within `tolerance`, relative, or within `absolute` (a hundredth of it where nothing is said)."""
    told, true = scalars(found), scalars(expected)
    assert told.keys() == true.keys()
    for name, value in told.items():
        assert value == pytest.approx(true[name], rel=tolerance, abs=absolute or tolerance * 1e-2), name


def assert_same(found: Truth, expected: Truth, tolerance: float) -> None:
    """Values and gradients."""
    assert_terms(found.terms, expected.terms, tolerance)
    assert relative_error(found.hidden_grad, expected.hidden_grad) < tolerance
    assert relative_error(found.weight_grad, expected.weight_grad) < tolerance
    assert (found.bias_grad is None) == (expected.bias_grad is None)
    if found.bias_grad is not None and expected.bias_grad is not None:
        assert relative_error(found.bias_grad, expected.bias_grad) < tolerance


def relative_error(found: Tensor, expected: Tensor) -> float:
    """‖found - expected‖ / ‖expected‖; where nothing is expected, ‖found‖."""
    scale = float(expected.double().norm())
    return float((found.double() - expected.double()).norm()) / (scale if scale > 0 else 1.0)


def dlogits(p: Problem, divergence: Divergence | None, targets: SparseTargets | None = None, **options: Any) -> Tensor:
    """[N, U] float64: the derivative of the loss with respect to the student's products x Wᵀ."""
    p = p.cast(torch.float64)
    products = p.student_hidden @ p.student_weight[: p.size].T
    bias = None if p.student_bias is None else p.student_bias[: p.size]
    as_hidden = replace(
        p, student_hidden=products, student_weight=torch.eye(p.size, dtype=torch.float64), student_bias=bias
    )
    return truth(as_hidden, divergence, targets=targets, **options).hidden_grad


def assert_within_bf16(
    p: Problem,
    result: Truth,
    expected: Truth,
    divergence: Divergence | None,
    targets: SparseTargets | None = None,
    *,
    upstream: float = 1.0,
    **options: Any,
) -> None:
    """Each number of the gradients of bf16 operands, within what rounding can do to it.

    An entry of dlogits is off by BF16_ROUNDING of itself, so dW = Gᵀ X and dX = G W by that much of |G|ᵀ |X| and
    |G| |W|, and once more of themselves where they are written in bf16 (twice where the upstream gradient is not 1).
    The float32 part (logits of about 1, their softmax, sums over tokens and ids) is a thousand times smaller: 1e-5 of
    the same sums.
    """
    G = upstream * dlogits(p, divergence, targets, **options).abs()
    X, W = p.student_hidden.double().abs(), p.student_weight[: p.size].double().abs()
    sums = {"hidden_grad": G @ W, "weight_grad": torch.zeros_like(expected.weight_grad)}
    sums["weight_grad"][: p.size] = G.T @ X
    if expected.bias_grad is not None:
        sums["bias_grad"] = torch.zeros_like(expected.bias_grad)
        sums["bias_grad"][: p.size] = G.sum(dim=0)
    for name, sum_ in sums.items():
        actual, true = getattr(result, name), upstream * getattr(expected, name)
        written = (1 if upstream == 1 else 2) * BF16_ROUNDING if actual.dtype == torch.bfloat16 else 0.0
        bound = ((BF16_ROUNDING + 1e-5) * sum_ + written * true.abs()) * (1 + 2 * BF16_ROUNDING)
        worst = ((actual.double() - true).abs() - bound).max()
        assert worst <= 0, f"{name} is off by {worst:.2e} more than bf16 allows"


class LargeStorages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps every storage of at least `bytes_` that an operation returns."""

    def __init__(self, bytes_: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes_ = bytes_
        self.kept: dict[int, torch.UntypedStorage] = {}

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().nbytes() >= self.bytes_:
                self.kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return result
