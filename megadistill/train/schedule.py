"""Schedules: a number as a pure function of the run's progress (the learning rate, the weight of a loss term).

Progress is the optimizer step or, in a run with `train.tokens`, the tokens of all steps up to this one.
"""

import math

from megadistill.config.recipe import LossSection, ScheduleSection, TrainSection


def progress(train: TrainSection, *, step: int, tokens: int) -> int:
    """The progress at optimizer step `step`, with which the run has read `tokens`."""
    return step if train.tokens is None else tokens


def learning_rate(train: TrainSection, progress: int) -> float:
    """The learning rate at this progress."""
    return scheduled(train.optimizer.learning_rate, step=progress, steps=train.length, schedule=train.schedule)


def divergence_share(loss: LossSection, progress: int, *, length: int) -> float:
    """The share of `loss.kd_weight` that the divergence has, in a run of `length`; 1 without a schedule."""
    return 1.0 if loss.schedule is None else scheduled(1.0, step=progress, steps=length, schedule=loss.schedule)


def scheduled(peak: float, *, step: int, steps: int, schedule: ScheduleSection) -> float:
    """The value at optimizer step `step` (1 to `steps`) of a number with this peak; all lengths may be tokens.

    Linear warm-up from 0 over the first `warmup_steps`. Then `cosine`: half a cosine down to `final_ratio` of the peak
    at the last step (Loshchilov and Hutter, 2017). Or `wsd`: constant, then linear down to it over the last
    `decay_steps` (Hu et al., 2404.06395).
    """
    warmup = schedule.warmup
    if step <= warmup:
        return peak * step / warmup
    if schedule.kind == "cosine":
        progress = (step - warmup) / max(1, steps - warmup)
        share = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    else:
        assert schedule.decay is not None
        share = max(0.0, min(1.0, (steps - step) / schedule.decay))  # the last step may pass train.tokens
    return peak * (schedule.final_ratio + (1.0 - schedule.final_ratio) * share)
