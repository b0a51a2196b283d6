"""Every setting of a recipe whose `auto` depends on the model and the device, with its value and the reason."""

from typing import Any

from megadistill.config.auto import Choice, choose_compile
from megadistill.config.recipe import Recipe
from megadistill.models.attention.choice import recipe_attention


def recipe_choices(
    recipe: Recipe,
    student: Any,
    teacher: Any | None,
    *,
    accelerator: bool,
    sequence_length: int | None,
    flash: bool | None = None,
    triton: bool | None = None,
) -> dict[str, Choice]:
    """Recipe key -> the value in force, and why. The arguments are those of `choose_attention`.

    `student` and `teacher` are their configs; a teacher that a run does not load is None.

    Raises:
        UserError: an attention that cannot compute a model here.
    """
    of_device: dict[str, Any] = {"accelerator": accelerator, "triton": triton}
    of_attention = {**of_device, "sequence_length": sequence_length, "flash": flash}
    choices = {
        "student.attention": recipe_attention(recipe, "student", student, **of_attention),
        "student.compile": choose_compile(recipe.student.compile, **of_device),
    }
    if recipe.teacher is not None and teacher is not None:
        choices["teacher.attention"] = recipe_attention(recipe, "teacher", teacher, **of_attention)
        choices["teacher.compile"] = choose_compile(recipe.teacher.compile, **of_device)
    elementwise: dict[str, Any] = {"auto": "auto", "eager": False, "compiled": True}
    choices["loss.elementwise"] = choose_compile(elementwise[recipe.loss.elementwise], **of_device)
    return choices
