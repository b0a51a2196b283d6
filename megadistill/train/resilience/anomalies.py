"""Checks of each step's loss and of the teacher's numbers: non-finite values, loss spikes, teacher drift."""

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from megadistill.config.recipe import ResilienceSection
from megadistill.errors import OperatorFault

TEACHER_TERMS = ("teacher_ce", "teacher_entropy")

NORMAL_MAD = 1.4826
"""Standard deviation over median absolute deviation, of a normal distribution."""

LOSS_FLOOR, TEACHER_FLOOR = 0.01, 0.001
"""Lower bound of a window's standard deviation as a fraction of its median, so that a small move after a flat stretch
is no spike; smaller for the frozen teacher."""


DRIFT_STEPS = 3
"""Consecutive steps outside the window before teacher drift is reported: one odd batch is none."""


DIVERGED_STEPS = 5
"""Consecutive steps above the limit before a student counts as diverged."""

EXCESS_NATS, EXCESS_FACTOR = 0.5, 1.5
"""A cross-entropy (nats) this far above that of a uniform guess and of the first step, or in the first steps this many
times that of the first step, is that of a student which unlearns."""


def finite(metrics: Mapping[str, float]) -> bool:
    return all(math.isfinite(value) for value in metrics.values())


def require_sound_teacher(step: int, metrics: Mapping[str, float]) -> None:
    """Checks that the teacher's terms in `metrics`, which are reduced over ranks, are finite.

    Raises:
        OperatorFault: one is not. The teacher is frozen, so a later step cannot recover.
    """
    for name in TEACHER_TERMS:
        if name in metrics and not math.isfinite(metrics[name]):
            raise OperatorFault(
                f"step {step}: {name} is {metrics[name]}, so the teacher is broken; the step was skipped and "
                "not saved. Check its weights (another copy, bfloat16 instead of float16) before the next start"
            )


def not_finite(metrics: Mapping[str, float], grad_norm: float) -> str:
    """The first non-finite number of a skipped step, as in `loss is nan`."""
    values = {**metrics, "grad_norm": grad_norm}
    name = next(name for name, value in values.items() if not math.isfinite(value))
    return f"{name} is {values[name]}"


class RobustWindow:
    """Detects outliers among successive values by a robust z-score over a sliding window.

    z = (value - median) / s, with s = 1.4826 · median |x - median|, at least `floor` · |median|. An outlier does not
    enter the window, so that a spike does not hide the next one. Nothing is detected before the window is half full. An
    early, falling loss lies below its median, and its fall widens s. Non-finite values are ignored: their steps are
    skipped.
    """

    def __init__(self, window: int, zscore: float, *, floor: float, values: Iterable[float] = ()) -> None:
        self._values = deque(filter(math.isfinite, values), maxlen=window)
        self._window = window
        self._zscore = zscore
        self._floor = floor

    @property
    def median(self) -> float:
        """Median of the window; NaN where it is empty."""
        return median(self._values) if self._values else math.nan

    def outlier(self, value: float, *, either_way: bool = False) -> float | None:
        """The z-score of a value that is too high (or too low, `either_way`); None for one that enters the window."""
        if not math.isfinite(value):
            return None
        if len(self._values) >= max(2, self._window // 2):
            middle = self.median
            spread = NORMAL_MAD * median(abs(each - middle) for each in self._values)
            z = (value - middle) / max(spread, self._floor * abs(middle), math.ulp(1.0))
            if z > self._zscore or (either_way and z < -self._zscore):
                return z
        self._values.append(value)
        return None

    def restart(self, values: Iterable[float] = ()) -> None:
        """Replaces the window, after a lasting change of the level."""
        self._values.clear()
        self._values.extend(filter(math.isfinite, values))


@dataclass(frozen=True)
class Anomaly:
    """An anomaly of a step's numbers: the name and values of its event, and a log line."""

    event: str
    line: str
    values: dict[str, Any]


class DivergedStudentMonitor:
    """Detects a student that diverges, by its cross-entropy on the labels, which every loss has in nats.

    It needs no window: a learning rate that is far too high shows within a few steps. After a step the limit is
    `EXCESS_NATS` above a uniform guess, or above the first step of a student that began worse. In the first
    `first_steps`, which `RobustWindow` does not judge, a student that began well must not lose half as much again.
    """

    def __init__(
        self, vocab_size: int, *, first_steps: int, first_ce: float | None = None, reported: bool = False
    ) -> None:
        """`first_ce`, `reported`: of the steps before a resume, of which the last `DIVERGED_STEPS` follow."""
        self._uniform = math.log(vocab_size)
        self._first_steps = first_steps
        self._first_ce = first_ce
        self._above: list[float] = []
        self.reported = reported
        """Whether it has diverged, which is reported once a run."""

    def update(self, step: int, student_ce: float) -> Anomaly | None:
        """Takes a step's cross-entropy in nats. Non-finite ones are ignored: their steps are skipped."""
        if not math.isfinite(student_ce):
            return None
        if self._first_ce is None:
            self._first_ce = student_ce
        first = self._first_ce
        limit = max(first, self._uniform) + EXCESS_NATS
        if step <= self._first_steps:
            limit = min(limit, max(EXCESS_FACTOR * first, first + EXCESS_NATS))
        if student_ce <= limit:
            self._above.clear()
            return None
        self._above.append(student_ce)
        if self.reported or len(self._above) < DIVERGED_STEPS:
            return None
        self.reported = True
        line = (
            f"step {step}: the student diverges: cross-entropy {student_ce:.4g} after {DIVERGED_STEPS} steps above "
            f"{limit:.4g}; {first:.4g} at its first step, {self._uniform:.4g} by a uniform guess. Lower "
            "train.optimizer.learning_rate or lengthen train.schedule.warmup_steps, and start in another run.folder"
        )
        return Anomaly("student_diverged", line, {"student_ce": student_ce, "limit": limit, "first_ce": first})


class LossMonitor:
    """Detects spikes of the loss, and drift of the teacher's cross-entropy, which should be constant."""

    def __init__(
        self, section: ResilienceSection, *, losses: Iterable[float], teacher_ces: Iterable[float], entry: int = 1
    ) -> None:
        """`losses`, `teacher_ces`: values of the last steps before a resume, all of one curriculum entry, `entry`."""
        self._entry = entry
        window = section.spike_window
        self._losses = RobustWindow(window, section.spike_zscore, floor=LOSS_FLOOR, values=losses)
        self._teacher = RobustWindow(window, section.teacher_zscore, floor=TEACHER_FLOOR, values=teacher_ces)
        self._high: deque[float] = deque(maxlen=window)
        self._drifted: list[float] = []

    def begin_entry(self, entry: int) -> None:
        """Starts new windows where a curriculum entry whose steps have another shape begins: its losses are others."""
        if entry == self._entry:
            return
        self._entry = entry
        self._losses.restart()
        self._teacher.restart()
        self._high.clear()
        self._drifted.clear()

    def spike(self, step: int, loss: float) -> Anomaly | None:
        """A spike that begins with this step. A loss that stays high is reported once, and becomes the new level."""
        z = self._losses.outlier(loss)
        if z is None:
            self._high.clear()
            return None
        middle = self._losses.median
        self._high.append(loss)
        if len(self._high) > 1:
            if len(self._high) == self._high.maxlen:
                self._losses.restart(self._high)
            return None
        line = f"step {step}: loss spike: {loss:.4f}, {z:.1f} robust standard deviations above the median {middle:.4f}"
        return Anomaly("loss_spike", line, {"loss": loss, "median": middle, "zscore": round(z, 2)})

    def teacher_drift(self, step: int, teacher_ce: float, slots: tuple[int, int]) -> Anomaly | None:
        """Drift of the teacher's cross-entropy over `DRIFT_STEPS` steps; reported once, then a new window starts."""
        z = self._teacher.outlier(teacher_ce, either_way=True)
        if z is None:
            self._drifted.clear()
            return None
        self._drifted.append(teacher_ce)
        if len(self._drifted) < DRIFT_STEPS:
            return None
        middle = self._teacher.median
        self._teacher.restart(self._drifted)
        self._drifted.clear()
        line = (
            f"step {step}: teacher drift: cross-entropy {teacher_ce:.4f}, median {middle:.4f} ({z:+.1f} robust "
            f"standard deviations, {DRIFT_STEPS} consecutive steps). The teacher is frozen, so its input has changed: "
            f"check the tokens of slots {slots[0]} to {slots[1]} (tokenizer, source, curriculum), the packing, and "
            "its weights"
        )
        values = {"teacher_ce": teacher_ce, "median": middle, "zscore": round(z, 2), "slots": list(slots)}
        return Anomaly("teacher_drift", line, values)
