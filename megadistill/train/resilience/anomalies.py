"""What must hold of every step's numbers, asked before the optimizer moves. It knows no engine."""

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from megadistill.config import FaultsSection
from megadistill.errors import OperatorFault

TEACHER_TERMS = ("teacher_ce", "teacher_entropy")

NORMAL_MAD = 1.4826
"""Standard deviations in a median absolute deviation, of a normal distribution."""

LOSS_FLOOR, TEACHER_FLOOR = 0.01, 0.001
"""The least standard deviation that a window is taken to have, as a share of its median: where the values hardly move,
the next move is no spike for that. A frozen teacher is held to less."""


ALARM_STEPS = 3
"""Steps in a row after which the teacher's cross-entropy is taken to have moved: one odd batch is none."""


def finite(metrics: Mapping[str, float]) -> bool:
    return all(math.isfinite(value) for value in metrics.values())


def require_sound_teacher(step: int, metrics: Mapping[str, float]) -> None:
    """`metrics` are already reduced over ranks, so every rank decides alike.

    Raises:
        OperatorFault: what the teacher said is not finite. It is frozen: no step of the student's mends it.
    """
    for name in TEACHER_TERMS:
        if name in metrics and not math.isfinite(metrics[name]):
            raise OperatorFault(
                f"step {step}: {name} is {metrics[name]}, so the teacher is broken; this step moved and saved nothing. "
                "Check its weights (another copy, bfloat16 in place of float16) before starting again"
            )


class SkippedSteps:
    """Counts the steps in a row that moved nothing."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._in_a_row = 0

    def count(self, step: int, metrics: Mapping[str, float], grad_norm: float) -> None:
        """Raises OperatorFault: one more than `most` were skipped in a row."""
        if math.isfinite(grad_norm):
            self._in_a_row = 0
            return
        self._in_a_row += 1
        if self._in_a_row > self._most:
            reason = not_finite(metrics, grad_norm)
            raise OperatorFault(
                f"step {step}: {reason}, and {self._in_a_row} steps in a row moved nothing "
                f"(faults.max_skipped_steps is {self._most}), so the student diverged. Look at metrics.jsonl: if it "
                "went wrong earlier, move the checkpoints since then away; then lower train.adamw.learning_rate or "
                "train.clip, or mend what feeds this run"
            )


def not_finite(metrics: Mapping[str, float], grad_norm: float) -> str:
    """What of a skipped step was not finite: `loss is nan`."""
    values = {**metrics, "grad_norm": grad_norm}
    name = next(name for name, value in values.items() if not math.isfinite(value))
    return f"{name} is {values[name]}"


class RobustWindow:
    """Tells a value that leaves the window of the last ones, by its robust z-score.

    z = (value - median) / s, with s = 1.4826 · median |x - median|, at least `floor` · |median|. A value that leaves
    does not enter the window, so that a spike does not hide the next one. While there is less than half a window
    nothing is told. A loss that falls, as a young one does, has its median above it, and its fall widens s. What is not
    finite neither leaves nor enters: a step that has such a number moves nothing, and says so elsewhere.
    """

    def __init__(self, window: int, zscore: float, *, floor: float, values: Iterable[float] = ()) -> None:
        self._values = deque(filter(math.isfinite, values), maxlen=window)
        self._window = window
        self._zscore = zscore
        self._floor = floor

    @property
    def median(self) -> float:
        """Of the window; NaN where it is empty."""
        return median(self._values) if self._values else math.nan

    def leaves(self, value: float, *, either_way: bool = False) -> float | None:
        """The z-score of a value that is too high (or too low, `either_way`); None for one that is not, and stays."""
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
        """The level has changed for good: what was before it tells nothing."""
        self._values.clear()
        self._values.extend(filter(math.isfinite, values))


@dataclass(frozen=True)
class Finding:
    """Something in a step's numbers that a person should know: an event, its values, and a line."""

    event: str
    line: str
    values: dict[str, Any]


class Vigil:
    """Looks at each step's loss and at the teacher's cross-entropy, which a stationary stream leaves constant."""

    def __init__(self, section: FaultsSection, *, losses: Iterable[float], teacher_ces: Iterable[float]) -> None:
        """The values of the last steps that are on record, so that a resume compares with what was before it."""
        window = section.spike_window
        self._losses = RobustWindow(window, section.spike_zscore, floor=LOSS_FLOOR, values=losses)
        self._teacher = RobustWindow(window, section.teacher_zscore, floor=TEACHER_FLOOR, values=teacher_ces)
        self._high: deque[float] = deque(maxlen=window)
        self._off: list[float] = []

    def spike(self, step: int, loss: float) -> Finding | None:
        """The loss left its window upwards with this step. One that stays there is told once, and becomes the level."""
        z = self._losses.leaves(loss)
        if z is None:
            self._high.clear()
            return None
        middle = self._losses.median
        self._high.append(loss)
        if len(self._high) > 1:
            if len(self._high) == self._high.maxlen:
                self._losses.restart(self._high)
            return None
        line = f"step {step}: the loss is {loss:.4f}, {z:.1f} robust deviations above {middle:.4f}"
        return Finding("spike", line, {"loss": loss, "median": middle, "zscore": round(z, 2)})

    def teacher_alarm(self, step: int, teacher_ce: float, slots: tuple[int, int]) -> Finding | None:
        """The teacher's cross-entropy left its window for `ALARM_STEPS` steps; told once, and a new window begins."""
        z = self._teacher.leaves(teacher_ce, either_way=True)
        if z is None:
            self._off.clear()
            return None
        self._off.append(teacher_ce)
        if len(self._off) < ALARM_STEPS:
            return None
        middle = self._teacher.median
        self._teacher.restart(self._off)
        self._off.clear()
        line = (
            f"step {step}: the teacher's cross-entropy is {teacher_ce:.4f} and was {middle:.4f} ({z:+.1f} robust "
            f"deviations, {ALARM_STEPS} steps in a row). The teacher is frozen, so what it reads has changed: look at "
            f"the tokens (tokenizer, source, stage of the data) of slots {slots[0]} to {slots[1]}, at the packing, and "
            "at its weights"
        )
        values = {"teacher_ce": teacher_ce, "median": middle, "zscore": round(z, 2), "slots": list(slots)}
        return Finding("teacher_alarm", line, values)
