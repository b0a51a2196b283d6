"""Checks of a step's numbers: a broken teacher, skipped steps, loss spikes, teacher drift."""

import math
import random
from statistics import median

import pytest

from megadistill.config.recipe import ResilienceSection
from megadistill.errors import OperatorFault
from megadistill.train.resilience.anomalies import (
    DRIFT_STEPS,
    Anomaly,
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
