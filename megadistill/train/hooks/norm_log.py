"""Norms of gradient, update and weights every n steps, with the share of clipped steps and the scale of the logits."""

from typing import Any

from megadistill.student.norms import StepNorms
from megadistill.train.hooks.hook import StepEvent


class NormLog:
    """Requests the norms of every `every`-th step and reads them after it. Collective on those steps.

    `max_norm`: `train.max_grad_norm`.
    """

    def __init__(self, norms: StepNorms, *, every: int, max_norm: float) -> None:
        self._norms, self._every, self._max_norm = norms, every, max_norm
        self._steps = self._clipped = 0

    def before_step(self, step: int) -> None:
        if step % self._every == 0:
            self._norms.request()

    def after_step(self, event: StepEvent) -> dict[str, Any] | None:
        """The norms of a step that was not skipped; None where it has none."""
        self._steps += 1
        self._clipped += 0 < self._max_norm < event.outcome.grad_norm
        if event.step % self._every:
            return None
        norms = self._norms.reduced()
        if norms is None:
            return None
        metrics, steps, clipped = event.outcome.metrics, self._steps, self._clipped
        self._steps = self._clipped = 0
        numbers = {
            "clipped_steps": clipped / steps,
            "expected_logit": metrics["log_z"] - metrics["student_entropy"],
        }
        return {**numbers, **norms}
