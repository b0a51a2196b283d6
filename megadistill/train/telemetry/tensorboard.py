"""The live view of a run: what TensorBoard shows, in which group, and on which chart. It knows no model and no ranks.

The first part of a tag is its group. The page "Custom Scalars" has charts of what belongs together.
"""

from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from torch.utils.tensorboard import SummaryWriter

from megadistill.config import Recipe
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
"""What stands in none of them is a diagnostic, and brings its group along."""

_GROUP_OF = {name: group for group, names in GROUPS.items() for name in names}

LABELS_LAYOUT = {
    "Training": {
        "loss and cross-entropy": ["Multiline", ["^loss/loss$", "^loss/student_ce$"]],
        "gradient norm": ["Multiline", ["^optimizer/grad_norm$"]],
        "learning rate": ["Multiline", ["^optimizer/learning_rate$"]],
    },
    "System": {
        "tokens a second": ["Multiline", ["^throughput/tokens_per_second$"]],
        "seconds: the step, and what of it waited": ["Multiline", ["^throughput/seconds$", "^waiting/.*"]],
    },
}

DISTILLATION_LAYOUT = {
    "Distillation": {
        "cross-entropy: student and teacher": ["Multiline", ["^loss/student_ce$", "^teacher/teacher_ce$"]],
        "KL of the teacher against the student": ["Multiline", ["^loss/kl$", "^loss/divergence$"]],
        "entropy: student and teacher": ["Multiline", ["^student/student_entropy$", "^teacher/teacher_entropy$"]],
        "agreement and acceptance": ["Multiline", ["^teacher/agreement$", "^diagnostics/acceptance$"]],
    },
    "Closer look": {
        "KL by decile of the teacher's entropy": ["Multiline", ["^diagnostics/kl_entropy_decile_.*"]],
        "the teacher's mass in its top k": ["Multiline", ["^diagnostics/top_.*_mass$"]],
        "reverse KL and JSD": ["Multiline", ["^diagnostics/reverse_kl$", "^diagnostics/jsd$"]],
    },
}


def tag_of(name: str) -> str:
    """`GROUP/NAME` of a number of a step."""
    return name if name.startswith("diagnostics/") else f"{_GROUP_OF.get(name, 'other')}/{name}"


class Board:
    """Writes a run's TensorBoard folder. A full disk costs the picture, not the run."""

    def __init__(self, folder: Path, recipe: Recipe, *, start_step: int) -> None:
        self._writer = SummaryWriter(str(folder), purge_step=start_step + 1)
        layout = LABELS_LAYOUT if recipe.objective == "labels" else {**DISTILLATION_LAYOUT, **LABELS_LAYOUT}
        with suppress(OSError):
            self._writer.add_custom_scalars(layout)
            self._writer.add_text("recipe", _as_markdown(recipe.snapshot()), start_step)

    def numbers(self, step: int, values: dict[str, float | None]) -> None:
        """The numbers of a step, by name; what is None is not known, and left out."""
        with suppress(OSError):
            for name, value in values.items():
                if name != "step" and value is not None:
                    self._writer.add_scalar(tag_of(name), value, step)

    def histograms(self, step: int, found: dict[str, Histogram]) -> None:
        """Distributions over a tensor's elements, by tag."""
        with suppress(OSError):
            for tag, each in found.items():
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
    """TensorBoard shows text as Markdown, which leaves an indented block as it is."""
    return "".join(f"    {without_secrets(line)}\n" for line in yaml.safe_dump(recipe, sort_keys=False).splitlines())
