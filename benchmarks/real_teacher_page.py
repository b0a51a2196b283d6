"""The two tables of docs/results/real-teacher.md, and what their runs took."""

import os
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.markdown import put
from benchmarks.report import ROOT, cpu
from megadistill.export.markdown import table

PAGE = ROOT / "docs/results/real-teacher.md"

ROWS = ("SmolLM2-135M, the teacher", "15 of its 30 layers, untrained", "after distillation")
"""The models, in the order of their evaluation."""

STEPS = {
    "convert": "convert two GGUF files",
    "tokenize": "tokenize",
    "prune": "prune",
    "train": "train and export",
    "evaluate-evaluation": "evaluate three models",
    "tokenize-bos": "tokenize for Gemma, six times",
    "evaluate-bos": "evaluate Gemma, six times",
}
"""Job -> its name in the table of costs."""


@dataclass(frozen=True)
class Cost:
    """Time of a job, all attempts together."""

    seconds: float
    cpu_seconds: float


def distillation_table(evaluations: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        (
            name,
            f"{measured['parameters']:,}",
            f"{measured['cross_entropy']:.3f}",
            f"{measured['bits_per_byte']:.3f}",
            f"{measured['kl']:.3f}" if number else "0",
            f"{100 * measured['agreement']:.1f} %" if number else "100 %",
        )
        for number, (name, measured) in enumerate(zip(ROWS, evaluations, strict=True))
    ]
    return table(("model", "parameters", "held-out CE", "bits a byte", "KL", "agreement"), rows, left=1)


def bos_table(evaluation: Mapping[str, Any]) -> str:
    """A row for each length. `evaluation`: of Gemma, with the splits `LENGTH-with` and `LENGTH-without`."""
    splits = {split["source"]: split for split in evaluation["by_source"]}
    lengths = sorted({int(name.partition("-")[0]) for name in splits})
    rows = []
    for length in lengths:
        without, framed = (splits[f"{length}-{which}"] for which in ("without", "with"))
        values = [float(split["cross_entropy"]) for split in (without, framed)]
        tokens = f"{without['tokens']:,}"
        rows.append((f"{length:,}", tokens, *(f"{value:.3f}" for value in values), f"{values[0] - values[1]:.3f}"))
    return table(("sequence, tokens", "predicted tokens", "CE without", "CE with `<bos>`", "difference"), rows, left=0)


def description(
    evaluations: Sequence[Mapping[str, Any]], costs: Mapping[str, Cost], described: Mapping[str, Any]
) -> str:
    """The run, the time of each job, the versions and the machine. `described`: the run's recipe.json."""
    recipe = described["recipe"]
    train = recipe["train"]
    rows = [
        (words, f"{costs[name].seconds / 60:.1f}", f"{costs[name].cpu_seconds / 60:.1f}")
        for name, words in STEPS.items()
    ]
    total = [sum(getattr(costs[name], field) for name in STEPS) / 60 for field in ("seconds", "cpu_seconds")]
    rows.append(("all", f"{total[0]:.1f}", f"{total[1]:.1f}"))
    versions = ", ".join(f"{name} {version}" for name, version in described["versions"].items())
    return "\n".join(
        (
            f"* {train['steps']:,} steps of {train['global_batch']} sequences, learning rate "
            f"{train['optimizer']['learning_rate']}; held out: {evaluations[0]['tokens']:,} tokens.",
            textwrap.fill(f"* {versions}.", width=118, subsequent_indent="  "),
            f"* {cpu()}, {len(os.sched_getaffinity(0))} cores.",
            "",
            table(("step", "minutes", "minutes of CPU"), rows, left=1),
        )
    )


def write_page(
    evaluations: Sequence[Mapping[str, Any]],
    bos: Mapping[str, Any],
    costs: Mapping[str, Cost],
    described: Mapping[str, Any],
) -> str:
    """Writes the tables into the page. Returns the text of both."""
    tables = distillation_table(evaluations), bos_table(bos)
    put(PAGE, "distillation", tables[0])
    put(PAGE, "bos", tables[1])
    put(PAGE, "runs", description(evaluations, costs, described))
    return "\n\n".join(tables)
