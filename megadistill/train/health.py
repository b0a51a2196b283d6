"""What must hold of every step's numbers, asked before the optimizer moves. It knows no engine."""

import math
from collections.abc import Mapping

from megadistill.errors import OperatorFault

TEACHER_TERMS = ("teacher_ce", "teacher_entropy")


def require_finite(step: int, metrics: Mapping[str, float]) -> None:
    """`metrics` are already reduced over ranks, so every rank decides alike.

    Raises:
        OperatorFault: a value is not finite; the teacher's are asked first, since they would spoil the others.
    """
    ordered = [*(name for name in TEACHER_TERMS if name in metrics), *metrics]
    for name in ordered:
        if not math.isfinite(metrics[name]):
            culprit = "the teacher is broken" if name in TEACHER_TERMS else "the student diverged"
            raise OperatorFault(
                f"step {step}: {name} is {metrics[name]}, so {culprit}; this step moved and saved nothing. Look at "
                "metrics.jsonl: if it went wrong earlier, move the checkpoints since then away; then lower "
                "train.adamw.learning_rate or train.clip, or mend what feeds this run"
            )
