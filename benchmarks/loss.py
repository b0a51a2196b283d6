"""What the loss costs: time against its own matrix products, memory beyond them, and what a user would pick instead.

python -m benchmarks.loss            # everything, some minutes
python -m benchmarks.loss --only speed --repeats 9
"""

import argparse
import csv
import os
import platform
from collections.abc import Mapping
from datetime import date
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.contenders import CONTENDERS, OURS, Inputs, Products, Shape, estimated_peak, ours
from benchmarks.measure import Run, Spread, available_memory, in_fresh_process, peak, rounds, seconds, two_ranks
from megadistill.comm.topology import Topology
from megadistill.loss import Elementwise, VocabSlice
from megadistill.loss.vocab_parallel import LOGIT_MEMORY

RESULTS = Path(__file__).parent / "results" / "loss.csv"
NARROW, WIDE = Shape(2048, 32768, 256, 512), Shape(2048, 32768, 1024, 2048)
LARGE = Shape(1024, 262144, 256, 512)


def speed(shape: Shape, names: list[str], repeats: int) -> dict[str, tuple[Spread, Spread]]:
    """Seconds of each contender, and their ratios to the floor: the faster of the products in chunks and at one go."""
    inputs = Inputs.random(shape)
    floors = {
        "products, in chunks": Products(inputs, shape.chunk_tokens(LOGIT_MEMORY)),
        "products, at one go": Products(inputs, shape.tokens),
    }
    runs: dict[str, Run] = {**floors, **{name: partial(CONTENDERS[name], inputs) for name in names}}
    for run in runs.values():
        run()
    times = rounds({name: partial(seconds, run) for name, run in runs.items()}, repeats)
    floor = min(floors, key=lambda name: Spread.of(times[name]).median)
    return {name: (Spread.of(taken), Spread.of_ratios(taken, times[floor])) for name, taken in times.items()}


def ranks_runs(topology: Topology, shape: Shape) -> Mapping[str, Run]:
    rows = shape.vocab // 2
    vocab = VocabSlice.contiguous(topology.rank * rows, (topology.rank + 1) * rows, shape.vocab, topology.vocab_group)
    mine = Inputs.random(shape).share(topology.rank, 2, vocab)
    run = partial(ours, mine, Elementwise.COMPILED)
    run()
    return {"two processes": run}


def two_processes(shape: Shape, repeats: int) -> dict[str, tuple[Spread, Spread]]:
    """One process of two threads against two processes of one, the same total work."""
    torch.set_num_threads(2)
    one = partial(ours, Inputs.random(shape), Elementwise.COMPILED)
    one()
    with two_ranks(ranks_runs, shape) as slower:
        slower("two processes")
        times = rounds(
            {"one process": partial(seconds, one), "two processes": partial(slower, "two processes")}, repeats
        )
    return {name: (Spread.of(taken), Spread.of_ratios(taken, times["one process"])) for name, taken in times.items()}


def memory(shape: Shape, name: str, logit_memory: int) -> int:
    """Bytes beyond inputs and outputs, in a process of its own."""
    inputs = Inputs.random(shape)
    few = Inputs.random(Shape(4, 64, shape.student_width, shape.teacher_width))
    run: Run = partial(CONTENDERS[name], inputs)
    if name in OURS:
        elementwise = Elementwise.COMPILED if name == "ours, compiled" else Elementwise.EAGER
        run = partial(ours, inputs, elementwise, logit_memory)
    CONTENDERS[name](few)  # imports, threads and kernels are not the call's
    return peak(run) - shape.output_bytes


def keep(rows: list[dict[str, object]]) -> None:
    """Appends to the CSV, with where and when."""
    where = {"date": date.today().isoformat(), "cpu": platform.processor() or platform.machine()}
    where |= {"cores": str(os.cpu_count()), "torch": torch.__version__, "python": platform.python_version()}
    RESULTS.parent.mkdir(exist_ok=True)
    new = not RESULTS.exists()
    with open(RESULTS, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(
            file, [*where, "question", "shape", "contender", "median", "low", "high", "ratio", "unit"]
        )
        if new:
            writer.writeheader()
        writer.writerows([where | row for row in rows])


def show(console: Console, question: str, shape: Shape, found: Mapping[str, tuple[Spread, Spread]]) -> None:
    table = Table(title=f"{question}: {shape}", title_justify="left")
    for heading in ("", "seconds", "low", "high", "ratio"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, (taken, ratio) in found.items():
        table.add_row(name, f"{taken.median:.3f}", f"{taken.low:.3f}", f"{taken.high:.3f}", f"{ratio.median:.3f}")
    console.print(table)
    rows: list[dict[str, object]] = []
    for name, (taken, ratio) in found.items():
        numbers = {key: f"{getattr(taken, key):.4f}" for key in ("median", "low", "high")}
        rows.append(
            {"question": question, "shape": str(shape), "contender": name, "unit": "s", "ratio": f"{ratio.median:.4f}"}
            | numbers
        )
    keep(rows)


def show_memory(console: Console, shape: Shape) -> None:
    table = Table(title=f"memory beyond inputs and outputs: {shape}", title_justify="left")
    table.add_column("")
    table.add_column("MiB", justify="right")
    questions = [(name, LOGIT_MEMORY) for name in CONTENDERS] + [("ours, compiled", LOGIT_MEMORY // 4)]
    for name, logit_memory in questions:
        label = f"{name}, {logit_memory >> 20} MiB of logits" if name in OURS else name
        if estimated_peak(name, shape) > 0.8 * available_memory():
            table.add_row(label, "not enough memory here")
            continue
        try:
            found = in_fresh_process(memory, shape, name, logit_memory)
        except RuntimeError as error:
            table.add_row(
                label, "not installed" if "ImportError" in str(error) or "ModuleNotFound" in str(error) else "failed"
            )
            continue
        table.add_row(label, f"{found / 2**20:,.0f}")
        keep([{"question": "memory", "shape": str(shape), "contender": label, "median": found, "unit": "bytes"}])
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("speed", "others", "ranks", "memory"), help="one question alone")
    parser.add_argument("--repeats", type=int, default=7, help="paired rounds of each timing (default: 7)")
    asked = parser.parse_args()
    console = Console()
    for question in (asked.only,) if asked.only else ("speed", "others", "ranks", "memory"):
        if question == "speed":
            for shape in (NARROW, WIDE):
                show(console, "speed", shape, speed(shape, list(OURS), asked.repeats))
        elif question == "others":
            names = [name for name in CONTENDERS if not name.startswith("liger")]
            show(console, "others", NARROW, speed(NARROW, names, asked.repeats))
        elif question == "ranks":
            show(console, "ranks", NARROW, two_processes(NARROW, asked.repeats))
        else:
            for shape in (Shape(1024, 32768, 256, 512), LARGE):
                show_memory(console, shape)


if __name__ == "__main__":
    main()
