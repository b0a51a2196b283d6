"""The objective of a run: the loss of each step, the truncation of the teacher's distribution, its random draws.

Legend: B sequences, S tokens of a sequence, N = B·S, M random numbers of a token.
"""

from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from megadistill.config.recipe import LossSection, TargetsSection
from megadistill.divergence import Divergence
from megadistill.loss import Elementwise, LossOptions
from megadistill.loss.sparse import Sampled, SampledDistinct, Selection, Threshold, TopK, TopP
from megadistill.models.experts import RouterCoefs
from megadistill.rng import keyed_generator
from megadistill.train.schedule import divergence_share
from megadistill.types import LogitTransform, Tail


@dataclass(frozen=True)
class Objective:
    """The recipe's loss section over the steps of a run."""

    loss: LossSection
    length: int
    """Length of the whole run and of `loss.schedule`: optimizer steps, or with `train.tokens` tokens."""
    seed: int
    """Seed of the draws of sampled targets."""
    entries_have_weights: bool = False
    """Whether curriculum entries have weights of their own."""
    student_logits: LogitTransform = LogitTransform()
    router_coefs: RouterCoefs = field(default_factory=RouterCoefs)
    """Weights of the losses of a student's routers."""

    def of_entry(self, loss: LossSection) -> "Objective":
        """The objective of a curriculum entry, with its `loss`."""
        return replace(self, loss=loss)

    def divergence(self, progress: int) -> Divergence:
        """The loss at a progress of the run: the optimizer step, or tokens (`train.schedule.progress`).

        Where a schedule lowers `kd_weight`, `ce_weight` rises as much: their sum is constant.
        """
        loss, share = self.loss, divergence_share(self.loss, progress, length=self.length)
        return Divergence(
            kind=loss.divergence,
            temperature=loss.temperature,
            temperature_squared=loss.temperature_squared,
            parameter=loss.parameter,
            kd_weight=loss.kd_weight * share,
            ce_weight=loss.ce_weight + loss.kd_weight * (1.0 - share),
            z_loss=loss.z_loss,
            label_fraction=loss.label_fraction if share > 0 else 0.0,  # else every token learns from the label
        )

    def scheduled_weights(self, progress: int) -> dict[str, float] | None:
        """`kd_weight` and `ce_weight` at a progress of the run; None in a run in which they are constant."""
        if self.loss.schedule is None and not self.entries_have_weights:
            return None
        divergence = self.divergence(progress)
        return {"kd_weight": divergence.kd_weight, "ce_weight": divergence.ce_weight}

    def computes_diagnostics(self, step: int) -> bool:
        """Whether step `step` computes diagnostics."""
        return self.loss.diagnostics_every > 0 and step % self.loss.diagnostics_every == 0

    def options(self, *, diagnostics: bool = False) -> LossOptions:
        """How the loss is computed."""
        return LossOptions(self.loss.logit_memory_mb << 20, Elementwise(self.loss.elementwise), diagnostics)


def selection(targets: TargetsSection) -> tuple[Selection, Tail]:
    """The rule that selects ids of the teacher's distribution, and the treatment of the rest."""
    if targets.select == "sampled":
        assert targets.draws is not None
        return Sampled(targets.draws), Tail.RENORMALISED
    if targets.select == "sampled_distinct":
        assert targets.k is not None
        return SampledDistinct(targets.k), Tail.RENORMALISED
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


def uniforms(slots_B: Tensor, *, sequence: int, per_token: int, seed: int) -> Tensor:
    """[N, M] float64 in [0, 1), on the CPU; a sequence's numbers depend on (seed, slot) alone.

    So they are the same for any number of ranks, any micro-batch size and after a resume.
    """
    rows = [keyed_generator(seed, f"draws/{slot}").random((sequence, per_token)) for slot in slots_B.tolist()]
    return torch.from_numpy(np.concatenate([np.empty((0, per_token)), *rows]))
