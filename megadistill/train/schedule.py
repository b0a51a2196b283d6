"""Schedules: a number as a pure function of the optimizer step (the learning rate, the weight of a loss term)."""

import math

from megadistill.config.recipe import LossSection, ScheduleSection, TrainSection


def learning_rate(train: TrainSection, step: int) -> float:
    """The learning rate of optimizer step `step`."""
    return scheduled(train.optimizer.learning_rate, step=step, steps=train.steps, schedule=train.schedule)


def divergence_share(loss: LossSection, step: int, *, steps: int) -> float:
    """The share of `loss.kd_weight` that the divergence has at step `step` of `steps`; 1 without a schedule."""
    return 1.0 if loss.schedule is None else scheduled(1.0, step=step, steps=steps, schedule=loss.schedule)


def scheduled(peak: float, *, step: int, steps: int, schedule: ScheduleSection) -> float:
    """The value at optimizer step `step` (1 to `steps`) of a number with this peak.

    Linear warm-up from 0 over the first `warmup_steps`. Then `cosine`: half a cosine down to `final_ratio` of the peak
    at the last step (Loshchilov and Hutter, 2017). Or `wsd`: constant, then linear down to it over the last
    `decay_steps` (Hu et al., 2404.06395).
    """
    warmup = schedule.warmup_steps or 0
    if step <= warmup:
        return peak * step / warmup
    if schedule.kind == "cosine":
        progress = (step - warmup) / max(1, steps - warmup)
        share = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    else:
        assert schedule.decay_steps is not None
        share = min(1.0, (steps - step) / schedule.decay_steps)
    return peak * (schedule.final_ratio + (1.0 - schedule.final_ratio) * share)
