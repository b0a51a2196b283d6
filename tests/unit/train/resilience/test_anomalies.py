"""Checks of a step's numbers: a broken teacher, skipped steps, loss spikes, teacher drift."""

import math
import random
from statistics import median

import pytest

from megadistill.config.recipe import ResilienceSection
from megadistill.errors import OperatorFault
from megadistill.train.resilience.anomalies import (
    DIVERGED_STEPS,
    DRIFT_STEPS,
    EXCESS_FACTOR,
    EXCESS_NATS,
    Anomaly,
    DivergedStudentMonitor,
    LossMonitor,
    RobustWindow,
    finite,
    not_finite,
    require_sound_teacher,
)
from megadistill.types import METRIC_NAMES

FINE = dict.fromkeys(METRIC_NAMES, 1.0)
BAD = [math.nan, math.inf, -math.inf]
WINDOW = 16


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("name", METRIC_NAMES)
def test_one_bad_number_is_named_and_a_teachers_stops_the_run(name: str, value: float) -> None:
    spoiled = {**FINE, name: value}
    assert not finite(spoiled)
    assert not_finite(spoiled, 1.0) == f"{name} is {value}"
    if not name.startswith("teacher_"):
        require_sound_teacher(7, spoiled)
        return
    with pytest.raises(OperatorFault, match=rf"^step 7: {name} is -?(nan|inf), so the teacher is broken") as caught:
        require_sound_teacher(7, spoiled)
    assert "\n" not in str(caught.value)


def test_finite_numbers_pass() -> None:
    assert finite(FINE)
    require_sound_teacher(3, FINE)
    require_sound_teacher(3, {"loss": math.nan})  # a run from labels has no teacher


def test_a_bad_gradient_is_named_where_all_else_is_fine() -> None:
    assert not_finite(FINE, math.inf) == "grad_norm is inf"


def _window(values: list[float], *, zscore: float = 10.0, floor: float = 0.01) -> RobustWindow:
    return RobustWindow(WINDOW, zscore, floor=floor, values=values)


def test_the_zscore_is_that_of_the_definition() -> None:
    values = _noisy([3.0] * WINDOW, share=0.07)
    middle = median(values)
    spread = 1.4826 * median(abs(value - middle) for value in values)
    far = middle + 12 * spread
    assert _window(values).outlier(far) == pytest.approx(12.0)
    assert _window(values).outlier(middle + 9.9 * spread) is None
    assert _window(values).outlier(middle - 12 * spread) is None, "a loss that falls is no spike"
    assert _window(values).outlier(middle - 12 * spread, either_way=True) == pytest.approx(-12.0)


def test_where_nothing_moves_the_floor_is_the_measure() -> None:
    still = [2.0] * WINDOW
    assert _window(still).outlier(2.19) is None
    assert _window(still).outlier(2.21) == pytest.approx(10.5)
    assert _window([0.0] * WINDOW).outlier(1.0) is not None, "a median of zero divides nothing by zero"


def test_half_a_window_tells_nothing() -> None:
    for known in range(WINDOW // 2):
        assert _window([1.0, 1.1] * (known // 2) + [1.0] * (known % 2)).outlier(1e9) is None
    assert _window([1.0, 1.1] * (WINDOW // 4)).outlier(1e9) is not None


def test_what_left_does_not_enter_and_what_stays_does() -> None:
    window = _window([1.0, 1.1] * (WINDOW // 2))
    before = window.median
    for _ in range(3 * WINDOW):
        assert window.outlier(50.0) is not None
    assert window.median == before
    for _ in range(WINDOW):
        assert window.outlier(1.1) is None
    assert window.median == 1.1


@pytest.mark.parametrize("value", BAD)
def test_a_number_that_is_not_finite_never_enters(value: float) -> None:
    """A NaN is neither above nor below anything: inside, it would spoil every median after it."""
    window = _window([1.0, value, 1.1] * WINDOW)
    assert window.median == pytest.approx(1.05)
    window.restart([2.0, 2.1, value] * WINDOW)
    assert window.median == pytest.approx(2.05)
    for _ in range(WINDOW):
        assert window.outlier(value, either_way=True) is None
    assert window.median == pytest.approx(2.05)
    assert window.outlier(1e9) is not None


def _monitor(losses: list[float] | None = None, teacher_ces: list[float] | None = None) -> LossMonitor:
    section = ResilienceSection(spike_window=WINDOW)
    return LossMonitor(section, losses=losses or [], teacher_ces=teacher_ces or [])


def _spikes(losses: list[float], monitor: LossMonitor | None = None) -> list[int]:
    monitor = monitor or _monitor()
    return [step for step, loss in enumerate(losses, start=1) if monitor.spike(step, loss) is not None]


def _noisy(level: list[float], share: float = 0.02) -> list[float]:
    noise = random.Random(7)
    return [value * (1 + noise.gauss(0.0, share)) for value in level]


def test_a_curve_that_falls_as_young_ones_do_has_no_spike() -> None:
    fast = [2.0 + 9.0 * math.exp(-step / 20) for step in range(600)]
    power = [1.5 + 8.0 * (step + 1) ** -0.4 for step in range(600)]
    for curve in (fast, power, _noisy(fast), _noisy(power), [3.0] * 600, _noisy([3.0] * 600)):
        assert _spikes(curve) == []


def test_a_spike_is_reported_with_its_step_and_its_numbers() -> None:
    curve = _noisy([2.0 + 9.0 * math.exp(-step / 20) for step in range(200)])
    curve[149] *= 3
    monitor, results = _monitor(), []
    for step, loss in enumerate(curve, start=1):
        results.append(monitor.spike(step, loss))
    (anomaly,) = [each for each in results if each is not None]
    assert results.index(anomaly) == 149
    assert anomaly.event == "loss_spike"
    assert anomaly.line.startswith(f"step 150: loss spike: {curve[149]:.4f}, ")
    assert anomaly.values["loss"] == curve[149]
    assert anomaly.values["median"] == median(curve[149 - WINDOW : 149])
    assert anomaly.values["zscore"] > 10


def test_each_of_two_spikes_is_reported() -> None:
    curve = _noisy([3.0] * 100)
    curve[40] = curve[42] = 9.0
    assert _spikes(curve) == [41, 43]


def test_a_lasting_rise_is_reported_once_and_becomes_the_level() -> None:
    curve = _noisy([3.0] * 60 + [6.0] * 200)
    curve[200] = 30.0
    assert _spikes(curve) == [61, 201]


def test_a_resume_knows_the_losses_before_it() -> None:
    assert _spikes([9.0], _monitor(losses=_noisy([3.0] * WINDOW))) == [1]
    assert _spikes([9.0], _monitor(losses=[math.nan] * WINDOW)) == [], "a log may say NaN of a step without a teacher"


def _drifts(ces: list[float], monitor: LossMonitor | None = None) -> list[tuple[int, Anomaly]]:
    monitor = monitor or _monitor()
    each_step = (
        (step, monitor.teacher_drift(step, ce, (8 * step, 8 * step + 7))) for step, ce in enumerate(ces, start=1)
    )
    return [(step, anomaly) for step, anomaly in each_step if anomaly is not None]


@pytest.mark.parametrize("drift", [1.5, 0.5])
def test_teacher_drift_is_reported_once_whichever_way(drift: float) -> None:
    ces = _noisy([3.0] * 40 + [3.0 * drift] * 100)
    ((step, anomaly),) = _drifts(ces)
    assert step == 40 + DRIFT_STEPS
    assert anomaly.event == "teacher_drift"
    assert "slots 344 to 351" in anomaly.line
    assert anomaly.values["slots"] == [344, 351]
    assert anomaly.values["median"] == pytest.approx(3.0, rel=0.05)
    assert (anomaly.values["zscore"] > 0) == (drift > 1)
    assert f"({anomaly.values['zscore']:+.1f} robust" in anomaly.line


def test_a_second_drift_is_reported_too() -> None:
    assert [step for step, _ in _drifts(_noisy([3.0] * 40 + [6.0] * 40 + [1.0] * 40))] == [43, 83]


def test_one_odd_batch_of_the_teachers_is_none() -> None:
    ces = _noisy([3.0] * 100)
    ces[40] = ces[41] = 9.0
    ces[60] = 1.0
    assert _drifts(ces) == []


SMOKE_VOCABULARY = 2000
HEALTHY = {  # cross-entropies of the runs of `make smoke`: the first 24 steps, then every 25th
    "teacher": "7.6 7.6 7.5 7.4 7.3 7.2 7.1 7.0 6.9 6.8 6.7 6.4 6.4 6.3 6.1 6.1 6.1 6.0 5.8 6.0 5.8 6.0 5.8 5.7 6.0 "
    "5.1 5.0 4.7 4.5 4.2 3.9 4.1 3.8 4.1 3.9 3.8 3.3 3.4 3.8 3.5 3.4 3.3 3.6 2.9",
    "labels": "7.6 7.6 7.6 7.5 7.4 7.3 7.3 7.1 7.1 7.0 6.9 6.8 6.7 6.4 6.5 6.4 6.2 6.2 6.0 6.2 6.0 6.1 5.8 5.8 6.0 5.7 "
    "5.2 4.9 5.0 4.9 4.4 4.5 4.5 4.3 3.8 4.0 3.8 3.9 3.8 3.8",
    "distill": "7.6 7.6 7.6 7.5 7.3 7.3 7.2 7.1 7.0 6.9 6.8 6.7 6.6 6.3 6.3 6.2 6.1 6.2 5.9 6.1 5.8 6.0 5.6 5.7 5.9 "
    "5.4 4.7 4.4 4.5 4.6 3.9 4.1 4.0 3.7 3.4 3.6 3.4 3.5 3.2 3.4",
    "a learning rate of 0.03, whose second gradient norm is 6": "7.6 7.2 7.1 6.6 6.7 6.7 7.0 6.3 6.6 6.5 6.5 6.6 6.4",
    "pretrained weights, warmed up again": "2.3 2.3 2.4 2.5 2.6 2.7 2.7 2.8 2.7 2.6 2.6 2.5 2.4 2.4 2.3 2.2",
    "a pruned student, worse than uniform at first": "11.9 11.2 9.9 10.4 9.1 8.8 8.4 8.0 7.5 6.9 6.4 5.9 5.5 5.1",
    "one bad batch": "7.6 7.4 7.2 9.9 9.9 9.8 9.9 7.1 6.9 9.9 9.9 9.9 9.9 6.8",
}
DIVERGING = {
    "a learning rate of 10": ("7.6 3611 1884 1406 1627 1889 1700", 6, math.log(SMOKE_VOCABULARY) + EXCESS_NATS),
    "pretrained weights, a learning rate of 0.1": (
        "4.3 11.4 12.6 13.0 9.5 10.0 10.6 9.1 8.7 8.1 7.7 7.8",
        6,
        4.3 * EXCESS_FACTOR,
    ),
    "pretrained weights that fall to unigrams": ("2.3 3.1 4.4 5.2 6.0 6.4 6.6 6.7 6.7 6.6", 7, 2.3 * EXCESS_FACTOR),
}


def _reports(ces: str, *, first_steps: int = 64, resume_at: int = 0) -> list[tuple[int, Anomaly]]:
    """Steps at which a student is reported as diverged; `resume_at`: by a monitor made anew from the steps before."""
    monitor, reports = DivergedStudentMonitor(SMOKE_VOCABULARY, first_steps=first_steps), []
    values = [float(ce) for ce in ces.split()]
    for step, ce in enumerate(values, start=1):
        if step == resume_at:
            monitor = DivergedStudentMonitor(SMOKE_VOCABULARY, first_steps=first_steps)
            for earlier, before in enumerate(values[: step - 1], start=1):
                monitor.update(earlier, before)
        anomaly = monitor.update(step, ce)
        reports += [] if anomaly is None else [(step, anomaly)]
    return reports


@pytest.mark.parametrize("ces", HEALTHY.values(), ids=HEALTHY)
def test_a_student_that_learns_does_not_diverge(ces: str) -> None:
    assert _reports(ces) == []


@pytest.mark.parametrize(("ces", "at", "limit"), DIVERGING.values(), ids=DIVERGING)
def test_a_student_that_unlearns_diverges_within_a_few_steps_and_is_reported_once(
    ces: str, at: int, limit: float
) -> None:
    ((step, anomaly),) = _reports(ces)
    assert step == at
    assert anomaly.event == "student_diverged"
    assert anomaly.values == {
        "student_ce": float(ces.split()[at - 1]),
        "limit": pytest.approx(limit),
        "first_ce": float(ces.split()[0]),
    }
    assert "Lower train.optimizer.learning_rate or lengthen train.schedule.warmup_steps" in anomaly.line
    assert "\n" not in anomaly.line
    assert _reports(ces, resume_at=at + 1)[1:] == [], "a resume does not report it again"
    assert [step for step, _ in _reports(ces, resume_at=at - 1)] == [at], "nor forget the steps before it"


def test_later_a_student_diverges_only_above_a_uniform_guess() -> None:
    """So that other data, with twice the cross-entropy of the first, are no alarm."""
    well = "1.2 " * 20
    assert _reports(well + "2.6 " * 20, first_steps=16) == []
    assert len(_reports(well + "2.6 " * 20, first_steps=64)) == 1
    above = math.log(SMOKE_VOCABULARY) + EXCESS_NATS + 0.01
    ((step, _),) = _reports(well + f"{above} " * 20, first_steps=16)
    assert step == 20 + DIVERGED_STEPS


def test_skipped_steps_count_neither_way() -> None:
    assert [step for step, _ in _reports("7.6 90 nan 90 inf 90 90 90")] == [8]


def test_another_entry_of_the_curriculum_begins_new_windows() -> None:
    """Its losses are others: a jump there is no spike, and the steps before it judge none."""
    monitor = _monitor(losses=[1.0, 1.1, 0.9, 1.0] * 40, teacher_ces=[2.0, 2.1, 1.9, 2.0] * 40)
    monitor.begin_entry(1)
    assert monitor.spike(161, 50.0) is not None, "within an entry it is one"
    monitor.begin_entry(2)
    assert monitor.spike(162, 50.0) is None
    assert all(monitor.teacher_drift(step, 9.0, (0, 1)) is None for step in range(162, 190))
