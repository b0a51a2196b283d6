"""What the loss costs: against its own matrix products, against what a user would pick instead, on two processes, in
memory, and each divergence. Prints tables and appends every number to a CSV file.

    python -m benchmarks.loss --help
"""

import argparse
import os
import time
import warnings
from collections.abc import Callable
from functools import partial

import torch

from benchmarks.contenders import (
    FORWARD_KL,
    LABELS,
    OURS,
    Contenders,
    Inputs,
    NeedsAcceleratorError,
    Outputs,
    Problem,
    Products,
    Shape,
    estimated_peak,
    our_labels,
    ours,
    outputs,
)
from benchmarks.measure import Run, Spread, available_memory, in_fresh_process, peak, ranks, rounds, seconds
from benchmarks.report import Report, cell, parser
from megadistill.distributed.topology import Topology
from megadistill.loss import (
    Divergence,
    DivergenceKind,
    Elementwise,
    LossOptions,
    VocabSlice,
    sparse_distill_loss,
)
from megadistill.loss.options import LOGIT_MEMORY
from megadistill.loss.sparse import Sampled, TopK, sparse_targets
from megadistill.types import SparseTargets, Tail

QUESTIONS = ("speed", "others", "labels", "errors", "ranks", "memory", "divergences")
MEASURED = ("megadistill/loss", "megadistill/distributed", "benchmarks/*.py")

HELP = """\
questions (all of them, when --only does not choose):
  speed        ours, forward and backward, against its own four products: student logits, teacher logits, dX, dW
  others       forward KL beside ours and the floor: F.kl_div, F.linear_cross_entropy, DeepSpeed, liger-kernel
               (pip install -e '.[oracles]'), TRL (pip install trl)
  labels       the same for the cross-entropy of the labels; cut-cross-entropy, too (pip install cut-cross-entropy)
  errors       of value, dX and dW of each contender in float32, against float64; a quarter of the tokens
  ranks        two gloo processes of one thread each against one process of two threads, the same total work
  memory       peak memory beyond inputs, dX and dW, each contender of forward KL in a process of its own
  divergences  what each divergence costs, against the floor of its own products

how to read it:
  floor    the products alone, in memory that was allocated before the clock started: all tokens at once, or in the
           chunks that ours works in, whichever is faster
  ratio    median over rounds of (seconds of this / seconds of that) in the same round, then the lowest and highest
  beyond   highest resident memory during the call, less what was resident before it, less the bytes of dX and dW

on a busy machine the ratios stay near; the seconds do not, and less so with --cpu-time --threads 1. A first look at all
questions: python -m benchmarks.loss --quick"""


def errors_to(results: Outputs, expected: Outputs) -> tuple[float, ...]:
    """Relative errors of the loss, dX and dW."""
    pairs = zip(results, expected, strict=True)
    return tuple(float((a.double() - b.double()).norm() / b.double().norm()) for a, b in pairs)


def called(contenders: Contenders, inputs: Inputs, report: Report) -> dict[str, Outputs]:
    """Outputs of each contender that runs here; the reason why another does not is printed."""
    results: dict[str, Outputs] = {}
    for name, contender in contenders.items():
        start = time.perf_counter()
        try:
            results[name] = contender(inputs)
        except (ImportError, NeedsAcceleratorError) as missing:
            report.console.print(f"  {name} is left out: {missing}", highlight=False)
            continue
        report.console.print(f"  {name}: first call {time.perf_counter() - start:.1f} s", highlight=False)
    return results


def _warm(contenders: Contenders, inputs: Inputs, report: Report) -> dict[str, Run]:
    """The contenders that run here, after one call each; one whose numbers are not ours is an error."""
    results = called(contenders, inputs, report)
    for name, its in results.items():
        error = max(errors_to(its, results["ours, eager"]))
        assert error < 1e-4, f"{name} makes other numbers than ours: relative error {error:.1e}"
    return {name: partial(contenders[name], inputs) for name in results}


def _timed(runs: dict[str, Run], report: Report) -> dict[str, list[float]]:
    return rounds({name: partial(seconds, run, report.clock) for name, run in runs.items()}, report.repeats)


def _floors(inputs: Inputs, shape: Shape, problem: Problem) -> dict[str, Run]:
    """Both, warmed up."""
    chunk = shape.chunk_tokens(LOGIT_MEMORY, models=problem.models)
    floors: dict[str, Run] = {
        "floor, all at once": Products(inputs, shape.tokens, teacher=problem.has_teacher),
        "floor, in chunks": Products(inputs, chunk, teacher=problem.has_teacher),
    }
    for floor in floors.values():
        floor()
    return floors


def speed(shape: Shape, report: Report, *, question: str, problem: Problem, contenders: Contenders) -> None:
    """The contenders of a problem, ours among them, against the faster floor."""
    report.console.print(f"\n[bold]{question}[/bold], {shape}", highlight=False)
    inputs = Inputs.random(shape)
    floors = _floors(inputs, shape, problem)
    times = _timed(floors | _warm(contenders, inputs, report), report)
    floor = min(floors, key=lambda name: Spread.of(times[name]).median)
    table = report.table(f"{question}: {shape}", "", "seconds", f"to the floor ({floor[7:]})", "to ours, compiled")
    for name, own in times.items():
        to_floor = Spread.of_ratios(own, times[floor])
        to_ours = Spread.of_ratios(own, times["ours, compiled"])
        report.add(question, shape, name, Spread.of(own), report.unit, ratio=to_floor, to=floor)
        table.add_row(name, f"{Spread.of(own).median:.3f}", cell(to_floor), cell(to_ours))
    report.console.print(table)


def errors(shape: Shape, report: Report) -> None:
    """The errors of each contender of both problems, on the same inputs."""
    inputs = Inputs.random(shape)
    for question, problem in (("errors, forward KL", FORWARD_KL), ("errors, labels", LABELS)):
        report.console.print(f"\n[bold]{question}[/bold], {shape}", highlight=False)
        truth = problem.truth(inputs)
        table = report.table(f"{question}: {shape}", "", "value", "dX", "dW")
        for name, results in called(problem.contenders, inputs, report).items():
            its = errors_to(results, truth)
            for part, error in zip(("value", "dX", "dW"), its, strict=True):
                report.add(question, shape, f"{name}: {part}", error, "relative")
            table.add_row(name, *(f"{error:.1e}" for error in its))
        report.console.print(table)


def _rank_runs(topology: Topology, shape: Shape) -> dict[str, Run]:
    """Half the tokens and half the vocabulary, warmed up."""
    half = shape.vocab // 2
    rows = slice(topology.rank * half, (topology.rank + 1) * half)
    vocab = VocabSlice.contiguous(rows.start, rows.stop, shape.vocab, topology.vocab_group)
    inputs = Inputs.random(shape).share(topology.rank, 2, vocab)
    runs: dict[str, Run] = {name: partial(contender, inputs) for name, contender in OURS.items()}
    for run in runs.values():
        run()
    return runs


def two_processes(shape: Shape, report: Report) -> None:
    """The ratio of two processes' time to one's."""
    report.console.print(f"\n[bold]ranks[/bold], {shape}", highlight=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    inputs = Inputs.random(shape)
    with ranks(2, _rank_runs, shape) as slower:
        runs: dict[str, Callable[[], float]] = {}
        for name, contender in OURS.items():
            contender(inputs)
            slower(name)
            runs[f"one process: {name}"] = partial(seconds, partial(contender, inputs))
            runs[f"two processes: {name}"] = partial(slower, name)
        times = rounds(runs, report.repeats)
    torch.set_num_threads(threads)
    table = report.table(f"ranks: {shape}", "", "one process, s", "two processes, s", "ratio")
    for name in OURS:
        one, two = times[f"one process: {name}"], times[f"two processes: {name}"]
        ratio = Spread.of_ratios(two, one)
        report.add("ranks", shape, f"one process: {name}", Spread.of(one))
        report.add("ranks", shape, f"two processes: {name}", Spread.of(two), ratio=ratio, to="one process")
        table.add_row(name, f"{Spread.of(one).median:.3f}", f"{Spread.of(two).median:.3f}", cell(ratio))
    report.console.print(table)


def _peak_of(name: str, shape: Shape, logit_memory: int) -> int:
    """Peak bytes of a call, for a fresh process. A small problem goes first, so code and caches are not counted."""
    warnings.simplefilter("ignore")
    contender = FORWARD_KL.contenders[name]
    if name in OURS:
        contender = partial(contender, logit_memory=logit_memory)
    small = Inputs.random(Shape(48, 1000, shape.student_width, shape.teacher_width))
    contender(small)
    inputs = Inputs.random(shape)
    return peak(partial(contender, inputs))


def memory(shape: Shape, report: Report) -> None:
    """Peak memory beyond inputs, dX and dW; ours with the default logit memory and with an eighth of it."""
    report.console.print(f"\n[bold]memory[/bold], {shape}", highlight=False)
    table = report.table(f"memory: {shape}", "", "MiB beyond", "the two logit buffers, MiB", "in [N, V] float32")
    logits = 4 * shape.tokens * shape.vocab
    inputs = 4 * shape.vocab * (shape.student_width + shape.teacher_width)
    for name in FORWARD_KL.contenders:
        needed, free = estimated_peak(name, shape) + 2 * inputs, available_memory()
        if needed > free:
            report.console.print(f"  {name} is left out: it wants some {needed >> 20} MiB, {free >> 20} are free")
            continue
        for budget in (LOGIT_MEMORY, LOGIT_MEMORY // 8) if name in OURS else (LOGIT_MEMORY,):
            shown = f"{name}, logit_memory {budget >> 20} MiB" if name in OURS else name
            try:
                beyond = in_fresh_process(_peak_of, name, shape, budget) - shape.output_bytes
            except RuntimeError as error:
                report.console.print(f"  {shown} is left out: {str(error).splitlines()[-1]}", highlight=False)
                continue
            predicted = 8 * shape.chunk_tokens(budget) * shape.vocab
            report.add("memory", shape, shown, float(beyond), "bytes")
            buffers = f"{predicted / 2**20:.0f}" if name in OURS else ""
            table.add_row(shown, f"{beyond / 2**20:.0f}", buffers, f"{beyond / logits:.2f}")
    report.console.print(table)


DIVERGENCES = {
    "forward KL": Divergence(),
    "forward KL, T = 2": Divergence(temperature=2.0, temperature_squared=True),
    "0.7 forward KL + 0.3 CE + z-loss": Divergence(kd_weight=0.7, ce_weight=0.3, z_loss=1e-4),
    "reverse KL": Divergence(DivergenceKind.REVERSE_KL),
    "JSD, β = 0.5": Divergence(DivergenceKind.JSD),
    "skew KL, α = 0.1": Divergence(DivergenceKind.SKEW_KL),
    "TVD": Divergence(DivergenceKind.TVD),
}


def _from_targets(inputs: Inputs, targets: SparseTargets, elementwise: Elementwise) -> Outputs:
    terms = sparse_distill_loss(
        inputs.student,
        targets,
        inputs.labels,
        token_weights=inputs.token_weights,
        divergence=Divergence(),
        vocab=inputs.vocab,
        options=LossOptions(elementwise=elementwise),
    )
    return outputs(inputs, terms.loss)


def divergences(shape: Shape, report: Report) -> None:
    """Each divergence in its own rounds with its own floor: four products with a teacher, three without."""
    report.console.print(f"\n[bold]divergences[/bold], {shape}", highlight=False)
    inputs = Inputs.random(shape)
    make_targets = partial(sparse_targets, inputs.teacher, vocab=inputs.vocab)
    uniforms = torch.rand(shape.tokens, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    # What a step reads from storage: how long the targets took to make is not in these times.
    targets = {
        "top 64 + other, stored": make_targets(selection=TopK(64), tail=Tail.OTHER),
        "50 draws, stored": make_targets(selection=Sampled(50), tail=Tail.RENORMALISED, uniforms=uniforms),
    }
    with_teacher = {name: partial(ours, divergence=divergence) for name, divergence in DIVERGENCES.items()}
    without: dict[str, Callable[..., Outputs]] = {
        name: partial(_from_targets, targets=stored) for name, stored in targets.items()
    } | {"labels alone": our_labels}
    table = report.table(f"divergences: {shape}", "", "floor, s", "eager, to the floor", "compiled, to the floor")
    for name, loss in (with_teacher | without).items():
        has_teacher = name in with_teacher
        chunk = shape.chunk_tokens(LOGIT_MEMORY, models=2 if has_teacher else 1)
        floors: dict[str, Run] = {
            f"floor, {tokens} tokens": Products(inputs, tokens, teacher=has_teacher) for tokens in (shape.tokens, chunk)
        }
        runs = floors | {kind.value: partial(loss, inputs, elementwise=kind) for kind in Elementwise}
        for run in runs.values():
            run()
        times = _timed(runs, report)
        floor = min(floors, key=lambda candidate: Spread.of(times[candidate]).median)
        ratios = {kind: Spread.of_ratios(times[kind.value], times[floor]) for kind in Elementwise}
        for kind, ratio in ratios.items():
            taken = Spread.of(times[kind.value])
            report.add("divergences", shape, f"{name}, {kind.value}", taken, report.unit, ratio=ratio, to=floor)
        table.add_row(name, f"{Spread.of(times[floor]).median:.3f}", *(cell(ratio) for ratio in ratios.values()))
    report.console.print(table)


def _arguments() -> argparse.Namespace:
    options = parser("loss", __doc__, HELP, QUESTIONS)
    options.add_argument("--tokens", type=int, default=2048, help="N (default %(default)s; memory, divergences: half)")
    options.add_argument("--vocab", type=int, default=32768, help="V of all but memory (default %(default)s)")
    options.add_argument(
        "--widths",
        default="256x512,1024x2048",
        help="DxE, by commas (default %(default)s); the last two take the first",
    )
    options.add_argument("--memory-vocab", default="32768,262144", help="V of memory (default %(default)s)")
    options.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: all cores")
    options.add_argument("--cpu-time", action="store_true", help="CPU seconds of the process; not for ranks")
    options.add_argument("--quick", action="store_true", help="a small shape, three rounds, no CSV: some minutes")
    arguments = options.parse_args()
    if arguments.quick:
        arguments.tokens, arguments.vocab, arguments.memory_vocab = 256, 4096, "4096"
        arguments.widths, arguments.repeats, arguments.no_csv = "64x128", 3, True
    return arguments


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    widths = [tuple(map(int, pair.split("x"))) for pair in arguments.widths.split(",")]
    shapes = [Shape(arguments.tokens, arguments.vocab, D, E) for D, E in widths]
    fewer, (D, E) = arguments.tokens // 2, widths[0]
    report = Report(arguments.threads, arguments.repeats, MEASURED, cpu_time=arguments.cpu_time)
    report.print_machine()
    jobs: dict[str, list[Callable[[], None]]] = {
        "speed": [
            partial(speed, shape, report, question="speed", problem=FORWARD_KL, contenders=OURS) for shape in shapes
        ],
        "others": [
            partial(speed, shape, report, question="others", problem=FORWARD_KL, contenders=FORWARD_KL.contenders)
            for shape in shapes
        ],
        "labels": [
            partial(speed, shape, report, question="labels", problem=LABELS, contenders=LABELS.contenders)
            for shape in shapes
        ],
        "errors": [partial(errors, Shape(arguments.tokens // 4, arguments.vocab, D, E), report)],
        "ranks": [partial(two_processes, shape, report) for shape in shapes],
        "memory": [
            partial(memory, Shape(fewer, int(vocab), D, E), report) for vocab in arguments.memory_vocab.split(",")
        ],
        "divergences": [partial(divergences, Shape(fewer, arguments.vocab, D, E), report)],
    }
    for question in QUESTIONS:
        for job in jobs[question] if question in arguments.only else ():
            job()
            if not arguments.no_csv:
                report.append_to(arguments.csv)
                report.rows.clear()


if __name__ == "__main__":
    main()
