"""Logs a step's metrics, throughput and histograms."""

from megadistill import timeline
from megadistill.distributed.topology import Topology
from megadistill.student.engine import StudentEngine
from megadistill.train.hooks.hook import StepEvent
from megadistill.train.hooks.norm_log import NormLog
from megadistill.train.objective import Objective
from megadistill.train.resilience.recovery import Recovery
from megadistill.train.teacher.several import RowGroups
from megadistill.train.telemetry.histograms import histograms
from megadistill.train.telemetry.metrics import Meter, RunLog


class StepLog:
    """Logs every step that was not skipped."""

    def __init__(
        self,
        log: RunLog,
        meter: Meter,
        objective: Objective,
        recovery: Recovery,
        student: StudentEngine,
        topology: Topology,
        *,
        histograms_every: int,
        norms: NormLog | None,
        has_entries: bool,
        groups: RowGroups | None,
    ) -> None:
        """
        Args:
            norms: None where the recipe takes none.
            groups: those of the rows of several teachers; None for one.
            has_entries: whether steps differ in shape, so that each line has the number of its curriculum entry.
        """
        self._has_entries, self._groups = has_entries, groups
        self._norms = norms
        self._log, self._meter, self._objective = log, meter, objective
        self._recovery, self._student, self._topology = recovery, student, topology
        self._histograms_every = histograms_every

    def after_step(self, event: StepEvent) -> None:
        if event.outcome.skipped:
            return
        norms = None if self._norms is None else self._norms.after_step(event)
        with timeline.span(timeline.HOST, "report"):
            self._recovery.step_done(event.seconds)
            draws_histograms = self._histograms_every > 0 and event.step % self._histograms_every == 0
            experts, load = event.outcome.experts, None
            if experts is not None and (draws_histograms or self._objective.computes_diagnostics(event.step)):
                load = experts.by_layer()
            report = self._meter.report(
                event.step,
                event.outcome.metrics,
                shape=event.shape,
                tokens=self._recovery.tokens,
                seconds=event.seconds,
                learning_rate=event.learning_rate,
                grad_norm=event.outcome.grad_norm,
                data_seconds=event.data_seconds,
                parts=event.parts,
                labels=event.outcome.labels,
                diagnostics=event.outcome.diagnostics,
                experts=None if experts is None else experts.summary(),
                expert_load=load,
                norms=norms,
            )
            weights = self._objective.of_entry(event.shape.loss).scheduled_weights(event.progress)
            entry = {"entry": event.shape.entry} if self._has_entries else {}
            labels = event.outcome.labels
            groups = self._groups.means(event.outcome.by_teacher, labels=labels) if self._groups else {}
            self._log.step(report, tokens_per_step=event.shape.tokens, more={**(weights or {}), **entry, **groups})
            if draws_histograms:
                self._log.histograms(event.step, histograms(self._student.state.distributions(), self._topology))
