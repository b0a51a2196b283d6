"""Reports a student that diverges, once a run."""

from megadistill.train.hooks.hook import StepEvent
from megadistill.train.resilience.anomalies import DivergedStudentMonitor
from megadistill.train.resilience.recovery import Recovery


class DivergedStudentCheck:
    """Monitors the student's cross-entropy on the labels, in every step that was not skipped."""

    def __init__(self, recovery: Recovery, monitor: DivergedStudentMonitor) -> None:
        self._recovery, self._monitor = recovery, monitor

    def after_step(self, event: StepEvent) -> None:
        if event.outcome.skipped:
            return
        anomaly = self._monitor.update(event.step, event.outcome.metrics["student_ce"])
        if anomaly is not None:
            self._recovery.events.warn(anomaly.event, anomaly.line, step=event.step, **anomaly.values)
