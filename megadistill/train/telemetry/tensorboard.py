"""TensorBoard log of a run: scalars over steps and over tokens, charts, histograms, the recipe."""

import re
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from megadistill.config.recipe import Recipe
from megadistill.redaction import without_secrets
from megadistill.tracking.groups import OF_BOTH_MODELS, tag_of
from megadistill.train.telemetry.histograms import Histogram
from megadistill.types import TOP_K

TEACHER, BY_TOKENS = "teacher", "by_tokens"
"""Folders of the runs beside that of the student: the teacher's numbers, and those whose x axis counts tokens.

TensorBoard has a colour for each run and a chart for each tag, so the teacher's numbers are a run of their own with the
student's tags."""

TOKENS_AXIS = ("loss", "targets_kl", "kl", "student_ce", "agreement")
"""Metrics that are written over tokens too, where runs of different batch sizes compare."""

LAYOUT = {
    "Quality": {
        "cross-entropy: student and teacher": ["loss/cross_entropy"],
        "KL of the teacher against the student": ["loss/kl"],
        "KL of the truncated targets against the student": ["loss/targets_kl"],
        "loss": ["loss/loss"],
        "entropy: student and teacher": ["predictions/entropy"],
        "agreement": ["predictions/agreement"],
    },
    "By tokens": {
        "cross-entropy over tokens": ["by_tokens/cross_entropy"],
        "KL over tokens": ["by_tokens/kl"],
        "loss over tokens": ["by_tokens/loss"],
    },
    "Diagnostics": {
        "KL by decile of the teacher's entropy": [f"diagnostics/kl_entropy_decile_{each}" for each in (1, 4, 7, 10)],
        "the teacher's mass in its top k": [f"diagnostics/top_{k}_mass" for k in TOP_K],
        "reverse KL and JSD": ["diagnostics/reverse_kl", "diagnostics/jsd"],
        "acceptance": ["diagnostics/acceptance"],
    },
    "Experts": {
        "load of the most and of the least used expert, over an even one": ["experts/max_load", "experts/min_load"],
        "entropy of the load; fraction of idle experts": ["experts/entropy", "experts/idle"],
        "losses of the routers, without their weights": ["experts/router_aux_loss", "experts/router_z_loss"],
    },
    "Training": {
        "gradient norm": ["optimizer/grad_norm"],
        "learning rate": ["optimizer/learning_rate"],
        "weights of the loss": ["loss/kd_weight", "loss/ce_weight"],
        "norms of all gradients, before clipping, and of the update": ["norms/gradient/total", "norms/update/total"],
        "norm of all weights": ["norms/weight/total"],
        "fraction of steps that were clipped": ["norms/clipped_steps"],
        "the logit that the student expects": ["norms/expected_logit"],
    },
    "System": {
        "tokens a second": ["throughput/tokens_per_second"],
        "seconds of a step, of student and loss": [
            "throughput/seconds",
            "throughput/student_seconds",
            "throughput/loss_seconds",
        ],
        "seconds of the teacher, and of waiting": [
            "waiting/teacher_seconds",
            "waiting/wait_seconds",
            "waiting/data_seconds",
        ],
    },
}
"""Charts of the page "Custom Scalars": category -> title -> tags."""


def tags_of(name: str) -> list[str]:
    """Every tag under which a number is written: over steps, and perhaps over tokens."""
    tag = tag_of(name)
    return [tag, f"{BY_TOKENS}/{tag.partition('/')[2]}"] if name in TOKENS_AXIS else [tag]


HELD_OUT_CHARTS = {
    "cross-entropy": ("cross_entropy", "teacher_cross_entropy"),
    "KL of the teacher against the student": ("kl",),
    "agreement and acceptance": ("agreement", "acceptance"),
    "calibration error": ("calibration_error",),
}
"""Charts of the category "Validation": title -> measures, each of every split."""


def layout_of(names: Iterable[str]) -> dict[str, dict[str, list[Any]]]:
    """`LAYOUT` as TensorBoard reads it, without charts that would be empty in a run of these numbers.

    A chart is the same in every run that has it: TensorBoard shows one of two equal charts of several runs.
    """
    written = {tag for name in names for tag in tags_of(name)}
    layout: dict[str, dict[str, list[Any]]] = {}
    for title, measures in HELD_OUT_CHARTS.items():
        tags = [tag for each in measures for tag in sorted(written) if tag.startswith(f"validation/{each}/")]
        if tags:
            layout.setdefault("Validation", {})[title] = ["Multiline", [f"^{re.escape(tag)}$" for tag in tags]]
    for category, charts in LAYOUT.items():
        present = {
            title: ["Multiline", [f"^{tag}$" for tag in tags]] for title, tags in charts.items() if written & {*tags}
        }
        if present:
            layout[category] = present
    return layout


class TensorBoardLog:
    """Writes a run's numbers for TensorBoard, which names a run by its folder. Errors of the disk are ignored.

    The student's numbers are in the run folder itself, those of `TEACHER` and `BY_TOKENS` in folders below it. Each has
    steps of its own, and so its own mark that a resume drops the later ones.
    """

    def __init__(
        self, folder: Path, recipe: Recipe, names: Collection[str], *, start_step: int, start_tokens: int
    ) -> None:
        """`names`: the numbers that the run will write. `start_tokens`: tokens of the first `start_step` steps."""
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415  rank 0 alone opens its files

        self._writer = SummaryWriter(str(folder), purge_step=start_step + 1)
        self._by_tokens = SummaryWriter(str(folder / BY_TOKENS), purge_step=start_tokens + 1)
        self._teacher = None
        if any(name.startswith("teacher_") and name in OF_BOTH_MODELS for name in names):
            self._teacher = SummaryWriter(str(folder / TEACHER), purge_step=start_step + 1)
        with suppress(OSError):
            self._writer.add_custom_scalars(layout_of(names))
            self._writer.add_text("recipe", _as_markdown(recipe.snapshot()), start_step)

    def numbers(self, step: int, values: Mapping[str, float | None]) -> None:
        """Writes the numbers of a step by name; None is not known, and left out."""
        known = {name: value for name, value in values.items() if name not in ("step", "time") and value is not None}
        with suppress(OSError):
            for name, value in known.items():
                tag, *over_tokens = tags_of(name)
                of_teacher = OF_BOTH_MODELS.get(name, ("student",))[0] == TEACHER
                writer = self._teacher if self._teacher is not None and of_teacher else self._writer
                writer.add_scalar(tag, value, step)
                for each in over_tokens:
                    self._by_tokens.add_scalar(each, value, int(known["tokens"]))

    def histograms(self, step: int, histograms: dict[str, Histogram]) -> None:
        """Writes distributions of a tensor's elements by tag."""
        with suppress(OSError):
            for tag, each in histograms.items():
                self._writer.add_histogram_raw(
                    tag,
                    min=each.lowest,
                    max=each.highest,
                    num=sum(each.counts),
                    sum=each.sum,
                    sum_squares=each.sum_squares,
                    bucket_limits=each.limits,
                    bucket_counts=each.counts,
                    global_step=step,
                )

    def close(self) -> None:
        for writer in (self._writer, self._by_tokens, self._teacher):
            with suppress(OSError):
                if writer is not None:
                    writer.close()


def _as_markdown(recipe: dict[str, Any]) -> str:
    """The recipe as an indented block of Markdown, which TensorBoard renders unchanged."""
    return "".join(f"    {without_secrets(line)}\n" for line in yaml.safe_dump(recipe, sort_keys=False).splitlines())
