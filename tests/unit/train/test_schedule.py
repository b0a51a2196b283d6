"""Scheduled numbers: their corners by hand, the shape of every schedule that a recipe may ask for."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megadistill.config.recipe import ScheduleSection
from megadistill.train.schedule import scheduled

PEAK = 3e-4


def rates(steps: int, schedule: ScheduleSection) -> list[float]:
    """The rates of steps 1 to `steps`."""
    return [scheduled(PEAK, progress=step, length=steps, schedule=schedule) for step in range(1, steps + 1)]


def test_cosine_by_hand() -> None:
    values = rates(12, ScheduleSection(kind="cosine", warmup_steps=4, final_ratio=0.1))
    expected = [0.25, 0.5, 0.75, 1.0, *(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * k / 8)) for k in range(1, 9))]
    assert values == pytest.approx([PEAK * share for share in expected], rel=1e-12)
    assert values[7] == pytest.approx(PEAK * 0.55, rel=1e-12), "half-way down in the middle"
    assert values[-1] == PEAK * 0.1


def test_warmup_stable_decay_by_hand() -> None:
    values = rates(10, ScheduleSection(kind="wsd", warmup_steps=2, decay_steps=4, final_ratio=0.2))
    expected = [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2]
    assert values == pytest.approx([PEAK * share for share in expected], rel=1e-12)
    assert values[-1] == PEAK * 0.2


@pytest.mark.parametrize("kind", ["cosine", "wsd"])
def test_without_warmup_and_down_to_nothing(kind: str) -> None:
    decay = 5 if kind == "wsd" else None
    values = rates(5, ScheduleSection.model_validate({"kind": kind, "decay_steps": decay, "final_ratio": 0.0}))
    assert values[0] < PEAK, "the first step is one step down already: there is no step 0"
    assert values[-1] == 0.0


@st.composite
def schedules(draw: st.DrawFn) -> tuple[int, ScheduleSection]:
    steps = draw(st.integers(1, 60))
    warmup = draw(st.integers(0, steps - 1))
    decay = draw(st.none() | st.integers(1, steps - warmup))
    return steps, ScheduleSection(
        kind="cosine" if decay is None else "wsd",
        warmup_steps=warmup,
        decay_steps=decay,
        final_ratio=draw(st.floats(0, 1)),
    )


@given(schedules())
def test_up_to_the_peak_then_never_up_again(case: tuple[int, ScheduleSection]) -> None:
    steps, schedule = case
    values = rates(steps, schedule)
    tiny = 1e-12 * PEAK
    warmup = schedule.warmup_steps
    assert warmup is not None
    rising, falling = values[:warmup], values[max(0, warmup - 1) :]
    assert all(later > earlier for earlier, later in itertools.pairwise(rising))
    assert all(later <= earlier + tiny for earlier, later in itertools.pairwise(falling))
    if rising:
        assert rising[-1] == pytest.approx(PEAK, rel=1e-12)
    assert values[-1] == PEAK * schedule.final_ratio
    assert min(falling) >= PEAK * schedule.final_ratio - tiny
    assert max(values) <= PEAK + tiny
