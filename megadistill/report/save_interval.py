"""How often a run should have saved, by the saves, restarts and faults that it measured."""

from dataclasses import dataclass

import numpy as np

from megadistill.plan.checkpoint_interval import CheckpointAdvice, SaveCosts
from megadistill.report.run_record import Event, RunRecord
from megadistill.units import number_of, spell


@dataclass(frozen=True)
class MeasuredSaves:
    """The measured costs of a run with faults."""

    advice: CheckpointAdvice
    faults: int

    def __str__(self) -> str:
        costs, advice = self.advice.costs, self.advice
        return (
            f"{number_of(self.faults, 'fault')}, one in {spell(costs.between_faults)}; a restart took "
            f"{spell(costs.restart)}, a save stalled training for {spell(costs.stall)} and was whole "
            f"{spell(costs.write)} later: {advice.key}={advice.every} would have a goodput of "
            f"{advice.goodput(advice.every):.1%}, the recipe's {advice.own} has {advice.goodput(advice.own):.1%}"
        )


def measured_saves(run: RunRecord) -> MeasuredSaves | None:
    """The advice by what a run measured; None before its first fault, or its first save.

    A fault is a start that no stop, last step or person came before. A restart is the time from the last sign of the
    attempt before it to the first step, means over all of them.
    """
    local = run.setting("checkpoint.local.every")
    kind = "local_checkpoint_saved" if isinstance(local, int) else "checkpoint_saved"
    own = local if isinstance(local, int) else run.setting("train.checkpoint_every")
    steps = run.setting("train.steps")
    saves = [event for event in run.events if event.kind == kind]
    restarts, paused = _restarts(run)
    if not saves or not restarts or not isinstance(own, int) or not isinstance(steps, int) or not run.has("seconds"):
        return None
    wall = run.events[-1].time - run.events[0].time - paused
    costs = SaveCosts(
        stall=float(np.mean([event.seconds("stall_seconds") for event in saves])),
        write=float(np.mean([event.seconds("write_seconds") for event in saves])),
        restart=float(np.mean(restarts)),
        between_faults=max(wall / len(restarts), 1.0),
    )
    key = "checkpoint.local.every" if isinstance(local, int) else "train.checkpoint_every"
    step = float(np.nanmedian(run.series["seconds"]))
    if step <= 0:
        return None
    return MeasuredSaves(CheckpointAdvice(costs, {}, step, key, own, steps), len(restarts))


def _restarts(run: RunRecord) -> tuple[list[float], float]:
    """Seconds of each restart after a fault, and of all pauses together."""
    times = run.series["time"]
    ends = np.sort(times[np.isfinite(times)])
    restarts, paused = [], 0.0
    before: Event | None = None
    began, has_stopped = 0.0, False
    for event in run.events:
        if event.kind == "attempt_started" and before is not None:
            steps = int(np.searchsorted(ends, event.time))
            began = max(before.time, float(ends[steps - 1]) if steps else 0.0)
            if has_stopped:
                paused, began, has_stopped = paused + event.time - before.time, 0.0, False
        elif event.kind in ("stopped", "completed") or event.values.get("requested"):
            has_stopped = True
        elif event.kind == "resumed" and began > 0:
            restarts.append(event.time - began)
            began = 0.0
        before = event
    return restarts, paused
