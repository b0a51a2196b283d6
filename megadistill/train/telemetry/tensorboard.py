"""TensorBoard log of a run: scalars in groups, charts on the page "Custom Scalars", histograms, the recipe."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from torch.utils.tensorboard import SummaryWriter

from megadistill.config.recipe import Recipe
from megadistill.redaction import without_secrets
from megadistill.train.telemetry.histograms import Histogram

GROUPS = {
    "loss": ("loss", "divergence", "kl", "student_ce", "kd_weight", "ce_weight"),
    "teacher": ("teacher_ce", "teacher_entropy", "agreement"),
    "student": ("student_entropy", "log_z"),
    "optimizer": ("learning_rate", "grad_norm"),
    "throughput": ("tokens", "tokens_per_second", "mfu", "seconds"),
    "waiting": ("data_seconds", "teacher_seconds"),
    "memory": ("memory_bytes",),
}
"""Names of each group, the first part of a tag; those of diagnostics have theirs in the name."""

_GROUP_OF = {name: group for group, names in GROUPS.items() for name in names}

LABELS_LAYOUT = {
    "Training": {
        "loss and cross-entropy": ["Multiline", ["^loss/loss$", "^loss/student_ce$"]],
        "gradient norm": ["Multiline", ["^optimizer/grad_norm$"]],
        "learning rate": ["Multiline", ["^optimizer/learning_rate$"]],
    },
    "System": {
        "tokens a second": ["Multiline", ["^throughput/tokens_per_second$"]],
        "seconds of a step, and of waiting": ["Multiline", ["^throughput/seconds$", "^waiting/.*"]],
    },
}

DISTILLATION_LAYOUT = {
    "Distillation": {
        "cross-entropy: student and teacher": ["Multiline", ["^loss/student_ce$", "^teacher/teacher_ce$"]],
        "KL of the teacher against the student": ["Multiline", ["^loss/kl$", "^loss/divergence$"]],
        "entropy: student and teacher": ["Multiline", ["^student/student_entropy$", "^teacher/teacher_entropy$"]],
        "agreement and acceptance": ["Multiline", ["^teacher/agreement$", "^diagnostics/acceptance$"]],
    },
    "Diagnostics": {
        "KL by decile of the teacher's entropy": ["Multiline", ["^diagnostics/kl_entropy_decile_.*"]],
        "the teacher's mass in its top k": ["Multiline", ["^diagnostics/top_.*_mass$"]],
        "reverse KL and JSD": ["Multiline", ["^diagnostics/reverse_kl$", "^diagnostics/jsd$"]],
    },
}


def tag_of(name: str) -> str:
    """The tag `GROUP/NAME` of a number of a step."""
    return name if name.startswith("diagnostics/") else f"{_GROUP_OF.get(name, 'other')}/{name}"


class TensorBoardLog:
    """Writes a run's TensorBoard folder. Errors of the disk are ignored."""

    def __init__(self, folder: Path, recipe: Recipe, *, start_step: int) -> None:
        self._writer = SummaryWriter(str(folder), purge_step=start_step + 1)
        layout = LABELS_LAYOUT if recipe.objective == "labels" else {**DISTILLATION_LAYOUT, **LABELS_LAYOUT}
        with suppress(OSError):
            self._writer.add_custom_scalars(layout)
            self._writer.add_text("recipe", _as_markdown(recipe.snapshot()), start_step)

    def numbers(self, step: int, values: dict[str, float | None]) -> None:
        """Writes the numbers of a step by name; None is not known, and left out."""
        with suppress(OSError):
            for name, value in values.items():
                if name not in ("step", "time") and value is not None:
                    self._writer.add_scalar(tag_of(name), value, step)

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
        with suppress(OSError):
            self._writer.close()


def _as_markdown(recipe: dict[str, Any]) -> str:
    """The recipe as an indented block of Markdown, which TensorBoard renders unchanged."""
    return "".join(f"    {without_secrets(line)}\n" for line in yaml.safe_dump(recipe, sort_keys=False).splitlines())
