"""What a run needs, read and checked before the first process group: bad input costs nothing. It starts nothing."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megadistill.config import Recipe
from megadistill.data import Mixture
from megadistill.data.targets.target_writer import refuse_foreign
from megadistill.distributed.roles import Roles
from megadistill.distributed.topology import Launch, Topology, vocab_group_size
from megadistill.distributed.vocab import block_cyclic_ranges, padded_vocabulary
from megadistill.models.families import load_config
from megadistill.models.weights import check_weights
from megadistill.student.deepspeed_config import deepspeed_config, deepspeed_profile
from megadistill.train.setup.jit_locks import refuse_stale_jit_locks
from megadistill.train.setup.preflight import check_compiler, check_fit, check_start
from megadistill.train.setup.run_folder import has_saved, refuse_other_recipe
from megadistill.train.setup.vocab_map import read_vocab_map


@dataclass(frozen=True)
class Setup:
    """A recipe with everything that it names."""

    recipe: Recipe
    folder: Path
    data: Mixture
    student_config: Any
    teacher_config: Any | None
    roles: Roles | None
    """None where the teacher is colocated, or absent."""
    group_size: int
    accumulation: int
    profile: dict[str, Any]
    """The DeepSpeed settings in force: on a CPU without what only a GPU can do."""
    vocab_map: Tensor | None
    """[data.vocab_size] int64: the teacher's id for each of the student's; None where they are the same."""
    left_out: tuple[str, ...]
    """What the recipe's DeepSpeed file switches on and a CPU does without."""

    @property
    def tokens_per_step(self) -> int:
        return self.recipe.train.global_batch * self.data.sequence_length


def prepare(recipe: Recipe, launch: Launch) -> Setup:
    """Reads what the recipe names and refuses what does not fit together. Every rank does it, and writes nothing.

    Raises:
        UserError: one line.
    """
    refuse_stale_jit_locks()
    roles = roles_of(recipe, launch)
    if roles is not None:
        launch = _students_launch(launch, roles)
    accumulation = recipe.accumulation(launch.world)
    group_size = vocab_group_size(recipe.comm.vocab_group, launch)
    profile, left_out = deepspeed_profile(Path(recipe.student.deepspeed))
    deepspeed_config(profile, recipe.train, accumulation)
    data = Mixture.load(recipe.data)
    padded = padded_vocabulary(data.vocab_size, recipe.student.vocab_multiple)
    block_cyclic_ranges(padded, launch.world, group_size, launch.rank)
    source = recipe.student.config
    student_config = load_config(Path(source) if isinstance(source, str) else source, what="student.config")
    teacher_config = _live_teacher_config(recipe)
    vocab_map = None
    if teacher_config is not None and recipe.teacher is not None and recipe.teacher.vocab_map is not None:
        path, teacher_ids = Path(recipe.teacher.vocab_map), teacher_config.vocab_size
        vocab_map = read_vocab_map(path, student_ids=data.vocab_size, teacher_ids=teacher_ids)
    stages = group_size if roles is None else roles.stages
    check_fit(recipe, data, student_config, teacher_config, stages=stages, vocab_map=vocab_map)
    if teacher_config is not None:
        assert recipe.teacher is not None
        check_weights(Path(str(recipe.teacher.path)), teacher_config)
    if recipe.teacher is not None and recipe.teacher.keep_targets is not None:
        refuse_foreign(Path(recipe.teacher.keep_targets))
    check_compiler(recipe.loss)
    student_config.vocab_size = data.vocab_size
    folder = Path(recipe.run.folder)
    if recipe.student.weights is not None and not has_saved(folder):
        check_start(Path(recipe.student.weights), student_config, data)
    refuse_other_recipe(folder, recipe.snapshot())
    return Setup(
        recipe=recipe,
        folder=folder,
        data=data,
        student_config=student_config,
        teacher_config=teacher_config,
        roles=roles,
        group_size=group_size,
        accumulation=accumulation,
        profile=profile,
        vocab_map=vocab_map,
        left_out=left_out,
    )


def _live_teacher_config(recipe: Recipe) -> Any | None:
    """None where no teacher runs."""
    section = recipe.teacher
    if section is None or section.source == "cache":
        return None
    assert section.path is not None
    return load_config(Path(section.path), what="teacher.path")


def roles_of(recipe: Recipe, launch: Launch) -> Roles | None:
    """Raises UserError: the ranks of the launch cannot be shared out as the recipe says."""
    teacher = recipe.teacher
    if teacher is None or teacher.placement == "colocated":
        return None
    assert teacher.ranks is not None
    return Roles(launch.world, teacher.ranks, teacher.stages or teacher.ranks)


def _students_launch(launch: Launch, roles: Roles) -> Launch:
    """The student's part of the launch, to every rank: the teacher's own ranks check the same recipe."""
    local = min(launch.local_world, roles.students)
    return Launch(launch.rank % roles.students, roles.students, launch.local_rank, local)


def where_it_runs(setup: Setup, topology: Topology) -> str:
    """One line: on what, and what that leaves out."""
    processes = f"{topology.world} {'process' if topology.world == 1 else 'processes'}"
    shared = "vocabulary" if setup.teacher_config is None or setup.roles else "vocabulary and teacher"
    layout = f"{processes}, {shared} over {topology.group_size}, {setup.recipe.train.precision}"
    if setup.roles is not None:
        layout += f"; teacher on {setup.roles.teachers} more, {setup.roles.replicas} x {setup.roles.stages} stages"
    if topology.device.type != "cpu":
        name = torch.get_device_module(topology.device).get_device_name(topology.device)
        return f"running on {name}: {layout}"
    slow = (
        "; bfloat16 products are many times slower than float32 here"
        if setup.recipe.train.precision != "float32"
        else ""
    )
    without = f"; left out: {', '.join(setup.left_out)}" if setup.left_out else ""
    return f"running on a CPU (no accelerator found): {layout}{slow}; MFU unknown{without}"
