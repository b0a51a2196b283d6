"""What a run asks of the loss at each step: weights, truncation, draws. It knows no model and no ranks.

Legend: B sequences, S tokens of a sequence, N = B·S, M draws of a token.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megadistill.config import LossSection, TargetsSection
from megadistill.loss import Divergence, DivergenceKind, Elementwise
from megadistill.loss.sparse.targets import Sampled, Selection, Threshold, TopK, TopP
from megadistill.rng import keyed_generator
from megadistill.train.schedule import scheduled
from megadistill.types import LogitTransform, Tail


@dataclass(frozen=True)
class Objective:
    """The recipe's loss section over a run, and what it draws from."""

    loss: LossSection
    steps: int
    """Of the whole run: what a schedule is stretched over."""
    seed: int
    """Of the draws of sampled targets."""
    student_logits: LogitTransform = LogitTransform()

    def divergence(self, step: int) -> Divergence:
        """The loss of optimizer step `step`.

        The label's cross-entropy takes what the divergence gives up, so that both weights together stay the same.
        """
        loss, share = self.loss, 1.0
        if loss.schedule is not None:
            share = scheduled(1.0, step=step, steps=self.steps, schedule=loss.schedule)
        return Divergence(
            kind=DivergenceKind(loss.divergence),
            temperature=loss.temperature,
            temperature_squared=loss.temperature_squared,
            beta=loss.beta,
            alpha=loss.alpha,
            kd_weight=loss.kd_weight * share,
            ce_weight=loss.ce_weight + loss.kd_weight * (1.0 - share),
            z_loss=loss.z_loss,
            label_fraction=loss.label_fraction if share > 0 else 0.0,  # else every token learns from the label
        )

    def moving_weights(self, step: int) -> dict[str, float] | None:
        """`kd_weight` and `ce_weight` of step `step`; None where they are the recipe's at every step."""
        if self.loss.schedule is None:
            return None
        divergence = self.divergence(step)
        return {"kd_weight": divergence.kd_weight, "ce_weight": divergence.ce_weight}

    def diagnoses(self, step: int) -> bool:
        """Whether step `step` takes the closer look."""
        return self.loss.diagnostics_every > 0 and step % self.loss.diagnostics_every == 0

    @property
    def logit_memory(self) -> int:
        """Bytes."""
        return self.loss.logit_memory_mb << 20

    @property
    def elementwise(self) -> Elementwise:
        return Elementwise(self.loss.elementwise)


def selection(targets: TargetsSection) -> tuple[Selection, Tail]:
    """Which ids the recipe keeps of the teacher's distribution, and what becomes of the rest."""
    if targets.select == "sampled":
        assert targets.draws is not None
        return Sampled(targets.draws), Tail.RENORMALISED
    tail = Tail(targets.tail)
    if targets.select == "top_k":
        assert targets.k is not None
        return TopK(targets.k), tail
    if targets.select == "threshold":
        assert targets.epsilon is not None
        return Threshold(targets.epsilon), tail
    assert targets.p is not None
    assert targets.max_ids is not None
    return TopP(targets.p, targets.max_ids), tail


def uniforms(slots_B: Tensor, *, sequence: int, draws: int, seed: int) -> Tensor:
    """[N, M] float64 in [0, 1), on the CPU: those of a sequence depend on (seed, slot) alone.

    So every number of ranks, every micro-batch and every resume draws the same.
    """
    rows = [keyed_generator(seed, f"draws/{slot}").random((sequence, draws)) for slot in slots_B.tolist()]
    return torch.from_numpy(np.concatenate(rows))
