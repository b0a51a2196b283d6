"""Goodput of a run: the use of its wall time."""

from dataclasses import dataclass
from pathlib import Path

from megadistill.events.reading import LARGEST_COUNT, metrics_from_end, read_metrics, seconds_of
from megadistill.events.totals import Totals, read_history
from megadistill.units import spell


@dataclass(frozen=True)
class Goodput:
    """Time of a run in seconds by its use, over all attempts and the time between them."""

    useful: float = 0.0
    """Time of the steps that count, each once."""
    startup: float = 0.0
    """Time between the start of an attempt and its first step: imports, models, checkpoints."""
    saving: float = 0.0
    """Time that steps waited for checkpoints."""
    validating: float = 0.0
    """Time of validations."""
    repeated: float = 0.0
    """Time of steps that were taken again, since no checkpoint held them."""
    wall: float = 0.0
    """Wall time without `paused`."""
    paused: float = 0.0
    """Time between a stop that was requested, or the last step, and the next start. Neither useful nor lost."""

    @property
    def lost(self) -> float:
        """The rest: hangs, the time from a fault to the next start, and what is between two steps."""
        return max(0.0, self.wall - self.useful - self.startup - self.saving - self.validating - self.repeated)

    @property
    def ratio(self) -> float:
        """Useful step time over wall time."""
        return self.useful / self.wall if self.wall > 0 else 0.0

    def __str__(self) -> str:
        parts = ("startup", "saving", *(["validating"] if self.validating > 0 else []), "repeated", "lost")
        shares = ", ".join(f"{name} {getattr(self, name) / (self.wall or 1.0):.1%}" for name in parts)
        paused = f"; paused for {spell(self.paused)}, not counted" if self.paused > 0 else ""
        return f"goodput {self.ratio:.1%} of {spell(self.wall)} ({shares}{paused})"


def goodput(folder: Path) -> Goodput:
    """The goodput of a run folder, from its first event to its last. Without events the wall time is 0.

    Reads the records back to the last event with `Totals`; those of an earlier release, which has none, as a whole.
    """
    history = read_history(folder, LARGEST_COUNT)
    totals, base = history.totals(), history.base
    if totals is None:
        return Goodput()
    return goodput_of(totals, totals.useful + useful_after(folder, base.step if base else None), until=history.ended)


def goodput_of(totals: Totals, useful: float, *, until: float) -> Goodput:
    """The goodput up to the time `until` (seconds since 1970), with `useful` seconds of steps."""
    return Goodput(
        useful=useful,
        startup=totals.startup,
        saving=totals.saving,
        validating=totals.validating,
        repeated=totals.repeated,
        wall=until - totals.began - totals.paused,
        paused=totals.paused,
    )


def useful_after(folder: Path, step: int | None) -> float:
    """Seconds of the logged steps after `step`; None: of all."""
    if step is None:
        return sum(seconds_of(values, "seconds") for _, values in read_metrics(folder))
    total = 0.0
    for _, values in metrics_from_end(folder):
        if values["step"] <= step:
            break
        total += seconds_of(values, "seconds")
    return total
