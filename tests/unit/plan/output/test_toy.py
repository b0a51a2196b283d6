"""A recipe whose kernels take longer to launch than to run: a plan without a forecast, and the border on both sides."""

import io
from functools import cache
from typing import Any

from rich.console import Console

from megadistill.plan.latency import micro_step_latency
from megadistill.plan.output.plan_json import to_json
from megadistill.plan.output.plan_tables import render
from megadistill.plan.search import Plan, plan
from megadistill.plan.throughput import MfuAssumption
from tests.unit.plan.tiny import SLOWER, cluster, plan_input


@cache
def _plan(slower: float) -> Plan:
    """The tiny recipe on GPUs that are slower than usual ones by a factor."""
    return plan(plan_input(), cluster(2, 4, slower=slower), MfuAssumption())


def _printed(slower: float) -> str:
    out = io.StringIO()
    Console(file=out, width=80, highlight=False).print(render(_plan(slower), law=None, price=2.0))
    return out.getvalue()


def test_a_toy_has_memory_and_no_forecast() -> None:
    text = _printed(1.0)
    assert all(len(line) <= 80 for line in text.splitlines())
    summary = " ".join(text.split("\n\n")[0].split())
    assert "a toy: at this size kernel launches and network latency set the time, not arithmetic" in summary
    assert "no forecast of days" in summary
    for part in ("Memory of a GPU", "Bytes that a GPU receives", "valid layouts", "--set ", "On disk"):
        assert part in text, part
    times = ("tokens/s", "tok/s", "GPU-hours", "price", "A micro-step:", "assumed", "The best of")
    assert [part for part in times if part in text] == []
    assert [part for part in times if part not in _printed(SLOWER)] == []


def test_one_gpu_has_no_table_of_links() -> None:
    alone = plan(plan_input(), cluster(1, 1), MfuAssumption())
    out = io.StringIO()
    Console(file=out, width=80, highlight=False).print(render(alone, law=None, price=None))
    assert "valid layout" in out.getvalue()
    assert "Bytes that a GPU receives" not in out.getvalue()


def test_the_border_is_where_latency_takes_as_long_as_what_is_counted() -> None:
    main = _plan(1.0).main
    assert main is not None
    border = micro_step_latency(main.sharding) / main.times.without_latency.micro_step
    assert _plan(0.99 * border).no_forecast is not None
    assert _plan(1.01 * border).no_forecast is None


def test_the_json_has_null_for_times_and_the_reason() -> None:
    toy, real = (to_json(_plan(slower), law=None, price=2.0) for slower in (1.0, SLOWER))
    assert str(toy["no_forecast"]).startswith("a toy: ")
    assert real["no_forecast"] is None
    times = ("micro_step_seconds", "step_seconds", "hiding_tokens", "tokens_per_second", "days", "gpu_hours", "price")
    layouts: list[tuple[dict[str, Any], bool]] = [(toy["own"], True), (toy["best"][0], True), (real["own"], False)]
    for layout, empty in layouts:
        assert [layout[name] is None for name in times] == [empty] * len(times)
    assert toy["own"]["memory_bytes"] == real["own"]["memory_bytes"]
