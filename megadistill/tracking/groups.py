"""Groups of the numbers of a step, the same in TensorBoard and in every other tracker."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from megadistill.events.reading import is_number

GROUPS = {
    "loss": ("loss", "divergence", "targets_kl", "kl", "cross_entropy", "kd_weight", "ce_weight"),
    "predictions": ("entropy", "agreement", "log_z"),
    "optimizer": ("learning_rate", "grad_norm"),
    "throughput": (
        "tokens",
        "labels",
        "tokens_per_second",
        "mfu",
        "student_mfu",
        "teacher_mfu",
        "seconds",
        "student_seconds",
        "loss_seconds",
    ),
    "waiting": ("data_seconds", "teacher_seconds", "wait_seconds"),
    "memory": ("memory_bytes",),
}
"""Names of each group, the first part of a tag; those of diagnostics, experts and norms have theirs in the name."""

_GROUP_OF = {name: group for group, names in GROUPS.items() for name in names}

OF_BOTH_MODELS = {
    "student_ce": ("student", "cross_entropy"),
    "teacher_ce": ("teacher", "cross_entropy"),
    "student_entropy": ("student", "entropy"),
    "teacher_entropy": ("teacher", "entropy"),
}
"""Metrics of one model -> the model, and the name that both share."""

STEP = "step"
"""Tag of the optimizer step, the x axis of the others."""

MAX_TAG, MAX_TAGS = 200, 5000
"""Maximum letters of a tag, and tags of a line: a line of metrics.jsonl with more was not written by a run."""


def tag_of(name: str) -> str:
    """The tag `GROUP/NAME` of a number of a step, by the name that both models share."""
    if "/" in name:
        return name
    name = OF_BOTH_MODELS.get(name, ("", name))[1]
    return f"{_GROUP_OF.get(name, 'other')}/{name}"


def tagged(values: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a line of metrics.jsonl by tag, for a tracker with one run: `loss/teacher_cross_entropy`.

    Nested ones are `GROUP/NAME`, and those of lists are left out, as are `step` and `time`.
    """
    tags: dict[str, float] = {}
    for name, value in _numbers(values):
        if name in ("step", "time"):
            continue
        tag = tag_of(name)
        if OF_BOTH_MODELS.get(name, ("",))[0] == "teacher":
            group, _, shared = tag.partition("/")
            tag = f"{group}/teacher_{shared}"
        if len(tag) <= MAX_TAG and tag.isprintable() and len(tags) < MAX_TAGS:
            tags[tag] = value
    return tags


def _numbers(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, dict):
            if len(prefix) < MAX_TAG:  # a deeper one has no tag, but takes the stack
                yield from _numbers(value, f"{prefix}{name}/")
        elif is_number(value) and math.isfinite(value):
            yield f"{prefix}{name}", value
