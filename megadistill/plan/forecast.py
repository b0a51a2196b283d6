"""What the distillation scaling law says of a plan's student. It knows no hardware."""

from megadistill.errors import UserError
from megadistill.plan.counts.requirements import Needs
from megadistill.plan.scaling_law import Expectation, expectation, supervised_loss


def forecast(needs: Needs, *, teacher_loss: float | None, teacher_tokens: float | None) -> Expectation | None:
    """None where no teacher is in memory, or nothing is said of it.

    Args:
        teacher_loss: its cross-entropy, nats a token.
        teacher_tokens: in its place, the tokens that it was trained on: the law for training from labels gives a loss.

    Raises:
        UserError: a value that is none, or both.
    """
    if teacher_loss is not None and teacher_tokens is not None:
        raise UserError("--teacher-loss and --teacher-tokens both say how good the teacher is: give one")
    for option, value in (("--teacher-loss", teacher_loss), ("--teacher-tokens", teacher_tokens)):
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"{option} {value:g}: give a positive number")
    if len(needs.models) < 2:
        return None
    student, teacher = needs.models
    if teacher_tokens is not None:
        teacher_loss = supervised_loss(teacher.parameters.body, teacher_tokens)
    if teacher_loss is None:
        return None
    return expectation(
        parameters=student.parameters.body,
        tokens=needs.tokens,
        teacher=teacher_loss,
        flops=student.flops,
        teacher_flops=teacher.flops,
    )
