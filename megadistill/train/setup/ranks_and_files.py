"""Ranks and files that a recipe needs and this launch does not have, all in one message."""

from collections.abc import Iterator
from pathlib import Path

from megadistill.config.paths import not_model, wrong_path
from megadistill.config.recipe import Recipe, TeacherSection
from megadistill.distributed.launch import Launch, replica_launch, vocab_group_size
from megadistill.distributed.roles import Roles
from megadistill.errors import UserError, several
from megadistill.redaction import printable
from megadistill.student.deepspeed_config import active_deepspeed_config
from megadistill.train.setup.run_folder import has_saved
from megadistill.units import number_of


def require_ranks_and_files(recipe: Recipe, launch: Launch) -> None:
    """Checks the number of ranks, and that the files that the recipe names are on this machine.

    Raises:
        UserError: names everything that is missing, a line each.
    """
    missing = [*_ranks(recipe, launch), *_files(recipe)]
    if len(missing) == 1:
        raise UserError(missing[0])
    if missing:
        raise several("the recipe cannot start here", [("", each) for each in missing], noun="reasons")


def students_of(recipe: Recipe, launch: Launch) -> tuple[Roles | None, Launch]:
    """Roles of the ranks (None where no rank is the teacher's alone), and the student's part of the launch.

    The teacher's own ranks get a place in the student's part too: they check the same recipe.

    Raises:
        UserError: the ranks cannot be divided as the recipe says.
    """
    teacher = recipe.teacher
    if launch.separate is not None:
        _refuse_with_separate_replicas(recipe)
    if teacher is None or teacher.placement == "colocated":
        return None, launch
    assert teacher.ranks is not None
    if launch.world <= teacher.ranks:
        colocated = TeacherSection.model_fields
        names = ("ranks", "stages", "queue", "transfer_dtype")
        changed = [name for name in names if getattr(teacher, name) != colocated[name].default]
        values = {"placement": "colocated", **{name: colocated[name].default or "null" for name in changed}}
        overrides = " ".join(f"--set teacher.{name}={value}" for name, value in values.items())
        raise UserError(
            f"teacher.ranks is {teacher.ranks}, but this run has {number_of(launch.world, 'process', 'processes')}, "
            f"and the student needs some: start it on more ranks, or, to try it here, {overrides} "
            f"--set distributed.vocab_group={launch.world}"
            + ("" if recipe.distributed.shard is None else " --set distributed.shard=null")
        )
    roles = Roles(launch.world, teacher.ranks, teacher.stages or teacher.ranks)
    local = min(launch.local_world, roles.students)
    return roles, Launch(launch.rank % roles.students, roles.students, launch.local_rank, local)


def _refuse_with_separate_replicas(recipe: Recipe) -> None:
    """Refuses what belongs to fixed ranks, where replicas are launches of their own, which come and go."""
    teacher, reason = recipe.teacher, ""
    if teacher is not None and teacher.placement == "disaggregated":
        reason = "teacher.placement disaggregated: the teacher's own ranks serve a fixed number of the student's"
    elif teacher is not None and teacher.save_targets is not None:
        reason = "teacher.save_targets: each rank stores the targets of its own rows"
    elif recipe.checkpoint.local is not None:
        reason = "checkpoint.local: a lost replica gets its state from a living one, and the ranks of nodes change"
    if reason:
        raise UserError(
            f"{reason}. That is not possible with replicas that are launches of their own (MEGADISTILL_REPLICA): "
            "leave it out, or start all replicas as one launch, with distributed.shard"
        )


def replica_of(recipe: Recipe, students: Launch) -> tuple[Launch, int]:
    """This rank's place in its replica of the student, and the ranks of a vocab group.

    Raises:
        UserError: the ranks cannot be divided as the recipe says.
    """
    distributed = recipe.distributed
    if students.separate is not None and distributed.min_replicas > students.replicas:
        raise UserError(
            f"distributed.min_replicas is {distributed.min_replicas}, and MEGADISTILL_REPLICAS {students.replicas}: "
            "the run could not begin; lower the first, or launch more replicas"
        )
    replica = replica_launch(distributed.shard, students)
    of = "this run" if replica.world == students.world else "a replica of the student (distributed.shard)"
    return replica, vocab_group_size(distributed.vocab_group, replica, sequence=distributed.sequence, of=of)


def _ranks(recipe: Recipe, launch: Launch) -> Iterator[str]:
    try:
        _, students = students_of(recipe, launch)
    except UserError as error:
        yield str(error)
        return
    try:
        recipe.accumulation(students.world)
        for entry in range(len(recipe.data.curriculum)):
            recipe.accumulation(students.world, entry)
    except UserError as error:
        yield str(error)
    try:
        replica_of(recipe, students)
    except UserError as error:
        yield str(error)


def _files(recipe: Recipe) -> Iterator[str]:
    manifests = {f"data.sources.{name}": path for name, path in recipe.data.sources.items()}
    if recipe.data.manifest is not None:
        manifests["data.manifest"] = recipe.data.manifest
    if recipe.validation is not None:
        manifests |= {f"validation.data.{name}": path for name, path in recipe.validation.data.items()}
    for key, path in manifests.items():
        if "://" not in path and not Path(path).is_file():
            reason = wrong_path(path, "manifest") or (
                f"{printable(path)} does not exist (paths are relative to {Path.cwd()}): name the manifest.json of a "
                "split, which `megadistill tokenize` writes"
            )
            yield f"{key}: {reason}"
    models = {"student.config": recipe.student.config if isinstance(recipe.student.config, str) else None}
    models |= {f"{key}.path": each.path for key, each in recipe.teacher_sections.items() if each.is_live}
    weights, run = recipe.student.weights, recipe.run
    if weights not in (None, models["student.config"]) and run.begin_from is None and not has_saved(Path(run.folder)):
        models["student.weights"] = weights  # which a resume does not read
    for key, folder in models.items():
        if folder is not None and not (Path(folder) / "config.json").is_file():
            yield not_model(folder, key)
    try:
        active_deepspeed_config(recipe.student.deepspeed)
    except UserError as error:
        yield str(error)
