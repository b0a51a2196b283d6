"""Hooks that the training loop runs after each step, one class a file."""

from megadistill.train.hooks.checkpoints import Checkpoints
from megadistill.train.hooks.hook import Hook, Request, StepEvent
from megadistill.train.hooks.loss_anomalies import LossAnomalies
from megadistill.train.hooks.non_finite import NonFiniteGuard
from megadistill.train.hooks.step_log import StepLog
from megadistill.train.hooks.stop import StopOnRequest
from megadistill.train.hooks.straggler_check import StragglerCheck
from megadistill.train.hooks.teacher_weights import TeacherWeightsCheck

__all__ = [
    "Checkpoints",
    "Hook",
    "LossAnomalies",
    "NonFiniteGuard",
    "Request",
    "StepEvent",
    "StepLog",
    "StopOnRequest",
    "StragglerCheck",
    "TeacherWeightsCheck",
]
