"""The questions: each measures, prints a table and adds rows to the report."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import Spread, ranks, rounds
from benchmarks.report import Report, cell
from benchmarks.step.contenders import (
    CALLS,
    OURS,
    PLAIN,
    PRODUCTS,
    SCRIPT,
    SENT,
    device_runs,
    feature_runs,
    memory_runs,
    others,
    replica_runs,
    step_runs,
)
from benchmarks.step.growth_plot import Point
from benchmarks.step.sizes import IN_TURN, SIZES, Size, write_files

LAYOUTS = {
    "1 x 2, vocab groups of 2": {"replicas": 1, "vocab_group": 2},
    "1 x 2, vocab groups of 1": {"replicas": 1, "vocab_group": 1},
    "2 x 1": {"replicas": 2, "vocab_group": 1},
}
"""Two ranks as replicas x ranks of each. A vocab group is within a replica."""
MANY_ROWS_ROUNDS = 3
"""Maximum rounds of the questions with many rows."""


@dataclass(frozen=True)
class Measurement:
    """Folder, report and clock of the measurements."""

    folder: Path
    report: Report
    clock: str

    def files(self, name: str, size: Size) -> Path:
        """The folder with a size's models and data."""
        folder = self.folder / name.replace(" ", "-").replace(",", "")
        return folder if folder.exists() else write_files(folder, size)

    def times(
        self, make: Any, names: tuple[str, ...], name: str, size: Size, *, world: int, repeats: int | None = None
    ) -> dict[str, list[float]]:
        """Seconds of each contender, after one call of each, which compiles."""
        with ranks(world, make, self.files(name, size), size, names, self.clock) as slower:
            for each in names:
                slower(each)
            return rounds({each: partial(slower, each) for each in names}, repeats or self.report.repeats)


def shape_of(size: Size, world: int) -> str:
    return f"{size}, {world} rank{'s' if world > 1 else ''}"


def step(measurement: Measurement, name: str, size: Size, *, world: int) -> None:
    """Our step against its products, and the others against our step."""
    shape, report = shape_of(size, world), measurement.report
    times = measurement.times(step_runs, (OURS, PRODUCTS, PLAIN, *others()), name, size, world=world)
    table = report.table(f"step: {shape}", "", "ms a step", "to its products", "to ours")
    for contender, own in times.items():
        to_products, to_ours = (Spread.of_ratios(own, times[other]) for other in (PRODUCTS, OURS))
        ratio, to = (to_products, PRODUCTS) if contender in (OURS, PRODUCTS, PLAIN) else (to_ours, OURS)
        report.add("step", shape, contender, Spread.of(own), ratio=ratio, to=to)
        table.add_row(contender, f"{Spread.of(own).median * 1e3:.0f}", cell(to_products), cell(to_ours))
    report.console.print(table)


def memory(measurement: Measurement, name: str, size: Size, *, world: int) -> None:
    """Peak memory of ours and of the script."""
    shape, report = f"memory, {shape_of(size, world)}", measurement.report
    files, small = measurement.files(name, size), measurement.files("tiny", SIZES["tiny"])
    peaks = {}
    for contender in (SCRIPT, OURS):
        with ranks(world, memory_runs, files, small, size, contender) as slower:
            peaks[contender] = slower("peak")
    table = report.table(shape, "", "MB a rank", "to the script")
    for contender, peak in peaks.items():
        ratio = peak / peaks[SCRIPT]
        report.add("memory", shape_of(size, world), contender, peak, "bytes", ratio=Spread.of([ratio]), to=SCRIPT)
        table.add_row(contender, f"{peak / 1e6:,.0f}", f"{ratio:.2f}")
    report.console.print(table)


def features(measurement: Measurement, name: str, size: Size, *, world: int) -> None:
    """Our step with one feature more at a time."""
    shape, report = shape_of(size, world), measurement.report
    repeats = min(MANY_ROWS_ROUNDS, report.repeats)
    times = measurement.times(feature_runs, (*IN_TURN, PRODUCTS), name, size, world=world, repeats=repeats)
    table = report.table(f"features: {shape}", "", "ms a step", "to the products", "to the row above")
    above = times["none"]
    for row, own in times.items():
        ratio = Spread.of_ratios(own, times[PRODUCTS])
        report.add("features", shape, row, Spread.of(own), ratio=ratio, to=PRODUCTS)
        table.add_row(row, f"{Spread.of(own).median * 1e3:.0f}", cell(ratio), cell(Spread.of_ratios(own, above)))
        above = own
    report.console.print(table)


def replicas(measurement: Measurement, name: str, size: Size) -> None:
    """Our step on two ranks that share a student, and on two that have a replica each."""
    shape, report, first = shape_of(size, 2), measurement.report, next(iter(LAYOUTS))
    with ExitStack() as stack:
        files = measurement.files(name, size)
        layouts = {
            layout: stack.enter_context(ranks(2, replica_runs, files, size, measurement.clock, **groups))
            for layout, groups in LAYOUTS.items()
        }
        for layout in layouts.values():
            layout(OURS)
        counts = {each: {count: layout(count) for count in (CALLS, SENT)} for each, layout in layouts.items()}
        times = rounds({each: partial(layout, OURS) for each, layout in layouts.items()}, report.repeats)
    table = report.table(
        f"replicas: {shape}", "replicas x ranks", "ms a step", f"to {first}", CALLS, "MB sent by a rank"
    )
    for each, own in times.items():
        ratio, calls, sent = Spread.of_ratios(own, times[first]), counts[each][CALLS], counts[each][SENT]
        report.add("replicas", shape, each, Spread.of(own), ratio=ratio, to=first)
        report.add("replicas", shape, f"{each}: {CALLS}", calls, "calls")
        report.add("replicas", shape, f"{each}: {SENT}", sent, "bytes")
        milliseconds = f"{Spread.of(own).median * 1e3:.0f}"
        table.add_row(each, milliseconds, cell(ratio), f"{calls:.0f}", f"{sent / 1e6:,.1f}")
    report.console.print(table)


def growth(measurement: Measurement, grows: str, sizes: Mapping[int, Size], *, world: int) -> list[Point]:
    """Time a token, of a step and of its products, for each value of the number that grows."""
    report, points = measurement.report, []
    shape = f"by {grows}, {world} ranks"
    table = report.table(f"growth {shape}", "", "us a token", "its products", "to its products")
    for value, size in sizes.items():
        name = f"{grows} {value}"
        times = measurement.times(
            step_runs, (OURS, PRODUCTS), name, size, world=world, repeats=min(MANY_ROWS_ROUNDS, report.repeats)
        )
        medians = []
        for contender, own in times.items():
            spread = Spread.of([seconds / size.tokens for seconds in own])
            ratio = Spread.of_ratios(own, times[PRODUCTS])
            report.add("growth", shape, f"{value:,}: {contender}", spread, "s a token", ratio=ratio, to=PRODUCTS)
            medians.append(spread.median)
        points.append(Point(value, *medians))
        ratio = Spread.of_ratios(times[OURS], times[PRODUCTS])
        table.add_row(f"{value:,}", *(f"{median * 1e6:.1f}" for median in medians), cell(ratio))
    report.console.print(table)
    return points


def device(measurement: Measurement, name: str, size: Size, *, bar: int) -> None:
    """Tokens a second of one accelerator, with a rank on each of this machine's."""
    report = measurement.report
    if not torch.accelerator.is_available():
        report.console.print(
            f"  device, {name}: waits for a machine with accelerators (at least {bar:,} tokens/s each)"
        )
        return
    world = torch.accelerator.device_count()
    times = measurement.times(device_runs, (OURS,), name, size, world=world)
    rates = Spread.of([size.tokens / seconds for seconds in times[OURS]])
    report.add("device", shape_of(size, world), name, rates, "tokens/s")
    table = report.table(f"device: {shape_of(size, world)}", "", "tokens/s of one accelerator", "at least")
    table.add_row(name, f"{rates.median:,.0f}", f"{bar:,}")
    report.console.print(table)
