"""A validation: the student's measures on held-out splits, with the models and the loss of the run as they are.

Legend: N tokens of a micro-batch, n of them with a label; D student width, E teacher width; K splits.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from megadistill import timeline
from megadistill.distributed.collectives import all_reduce_sum
from megadistill.distributed.topology import Topology
from megadistill.events import ALL
from megadistill.heldout.accumulator import COLUMNS, Accumulator, Totals
from megadistill.heldout.measures import measures_of
from megadistill.loss import Head, token_terms
from megadistill.student.engine import StudentEngine
from megadistill.train.objective import Objective
from megadistill.train.teacher.targets import Target
from megadistill.train.validation.held_out_batches import HeldOutBatch, HeldOutBatches
from megadistill.types import IGNORED_LABEL
from megadistill.units import count


@dataclass(frozen=True)
class Measured:
    """Results of a validation, the same on every rank."""

    splits: Mapping[str, Mapping[str, float]]
    """Measures by name, of `ALL` and of each split: the fields of `Measures`, and `teacher_cross_entropy`. Those that
    are unknown or not finite are left out; a split without a readable token has its `tokens`, 0, alone."""
    masked: Mapping[str, int]
    """Damaged sequences of each split that has any."""


@torch.no_grad()
def measure(
    student: StudentEngine,
    targeted: Iterable[tuple[HeldOutBatch, Target | None]],
    held_out: HeldOutBatches,
    *,
    objective: Objective,
    topology: Topology,
) -> Measured:
    """Measures the student on the micro-batches of `held_out`, each with its target. Collective over the world.

    The measures are those of `megadistill evaluate`: at temperature 1, against the teacher's complete distribution
    where the target has it. No state of the student changes but what ZeRO-3 has gathered.
    """
    accumulator = Accumulator(len(held_out.splits), keeps_tokens=False)
    with_teacher: set[int] = set()  # the splits for which it answers: the same on every rank
    for each, target in targeted:
        micro = each.batch.to(topology.device)
        labels = micro.labels.flatten()
        labelled = labels != IGNORED_LABEL
        with timeline.span(timeline.COMPUTE, "student forward"):
            hidden_ND = student.hidden(micro.tokens, micro.positions)
        teacher = None if target is None else target.complete()
        if teacher is not None:
            with_teacher.add(each.split)
        with timeline.span(timeline.COMPUTE, "measures"):
            terms = token_terms(
                Head(hidden_ND[labelled], student.head.weight(), transform=objective.student_logits),
                labels[labelled],
                vocab=student.head.vocab,
                teacher=None if teacher is None else replace(teacher, hidden=teacher.hidden[labelled]),
                options=objective.options(),
            )
            accumulator.add(terms, each.split)
    return Measured(
        _by_split(accumulator.totals(None, topology), held_out, with_teacher=with_teacher),
        _masked(held_out, topology),
    )


def describe(measured: Measured, *, step: int, steps: int, seconds: float) -> str:
    """A log line: the measures over all splits, and each split's cross-entropy."""
    parts = [f"validation at step {step}/{steps}"]
    for name, (title, form) in _TITLES.items():
        values = {split: each[name] for split, each in measured.splits.items() if name in each}
        if ALL in values:
            by_split = ", ".join(f"{split} {value:{form}}" for split, value in values.items() if split != ALL)
            of_splits = f" ({by_split})" if name in _BY_SPLIT and len(measured.splits) > 2 else ""
            parts.append(f"{title} {values[ALL]:{form}}{of_splits}")
    tokens = int(measured.splits[ALL]["tokens"])
    parts.append(f"{count(tokens)} tokens in {seconds:.1f} s")
    return " | ".join(parts)


_TITLES = {
    "cross_entropy": ("ce", ".4f"),
    "teacher_cross_entropy": ("teacher ce", ".4f"),
    "kl": ("kl", ".4f"),
    "agreement": ("agree", ".1%"),
    "acceptance": ("acceptance", ".1%"),
    "calibration_error": ("calibration error", ".2%"),
}
"""Measures of a log line, with their titles and formats."""

_BY_SPLIT = ("cross_entropy", "kl")
"""Those that it has for each split too."""


def _by_split(totals: Totals, held_out: HeldOutBatches, *, with_teacher: set[int]) -> dict[str, dict[str, float]]:
    counts, all_splits = totals.by_source_KC[:, 0].tolist(), range(len(held_out.splits))
    measures: dict[str, dict[str, float]] = {}
    parts = {ALL: list(all_splits), **{held_out.splits[number].name: [number] for number in all_splits}}
    for name, numbers in parts.items():
        sums_C, bins_B3 = totals.by_source_KC[numbers].sum(axis=0), totals.by_bin_KB3[numbers].sum(axis=0)
        if not sums_C[0]:
            measures[name] = {"tokens": 0}
            continue
        splits, tokens = [held_out.splits[number] for number in numbers], [counts[number] for number in numbers]
        has_teacher = with_teacher.issuperset(numbers)
        values: dict[str, Any] = measures_of(sums_C, bins_B3, splits, tokens, with_teacher=has_teacher)
        if has_teacher:
            values["teacher_cross_entropy"] = float(sums_C[COLUMNS.index("teacher_cross_entropy")] / sums_C[0])
        measures[name] = {key: value for key, value in values.items() if value is not None and math.isfinite(value)}
    return measures


def _masked(held_out: HeldOutBatches, topology: Topology) -> dict[str, int]:
    """Damaged sequences by split, over all ranks. Collective."""
    own_K = torch.zeros(len(held_out.splits), dtype=torch.int64, device=topology.device)
    if topology.sequence_part.place == 0:  # the ranks that share sequences meet the same ones
        for split, _ in held_out.faults:
            own_K[split] += 1
    counts = all_reduce_sum(own_K, topology.world_group).tolist()
    return {split.name: count for split, count in zip(held_out.splits, counts, strict=True) if count}
