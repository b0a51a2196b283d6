"""Adds each step's parts to the profile that is under way."""

from megadistill.train.hooks.hook import StepEvent
from megadistill.train.telemetry.profile_capture import ProfileCapture


class ProfiledSteps:
    """Ends a step of the profile: before the step is saved, or validated behind."""

    def __init__(self, capture: ProfileCapture) -> None:
        self._capture = capture

    def after_step(self, event: StepEvent) -> None:
        self._capture.after_step(event.step, event.parts, event.shape)
