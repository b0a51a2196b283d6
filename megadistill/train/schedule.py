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
    return scheduled(train.optimizer.learning_rate, progress=progress, length=train.length, schedule=train.schedule)


def divergence_share(loss: LossSection, progress: int, *, length: int) -> float:
    """The share of `loss.kd_weight` that the divergence has, in a run of `length`; 1 without a schedule."""
    return 1.0 if loss.schedule is None else scheduled(1.0, progress=progress, length=length, schedule=loss.schedule)


def scheduled(peak: float, *, progress: int, length: int, schedule: ScheduleSection) -> float:
    """The value of a number with this peak at a progress of 1 to `length`: steps, or tokens.

    Linear warm-up from 0 over the schedule's `warmup`. Then `cosine`: half a cosine down to `final_ratio` of the peak
    at the end (Loshchilov and Hutter, 2017). Or `wsd`: constant, then linear down to it over the last `decay` (Hu et
    al., 2404.06395).
    """
    warmup = schedule.warmup
    if progress <= warmup:
        return peak * progress / warmup
    if schedule.kind == "cosine":
        way = (progress - warmup) / max(1, length - warmup)
        share = 0.5 * (1.0 + math.cos(math.pi * min(1.0, way)))
    else:
        assert schedule.decay is not None
        share = max(0.0, min(1.0, (length - progress) / schedule.decay))  # the last step may pass train.tokens
    return peak * (schedule.final_ratio + (1.0 - schedule.final_ratio) * share)
