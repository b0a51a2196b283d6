"""Set-up of a run: everything that its recipe names, read and checked before the first process group exists."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch import Tensor

from megadistill.config.auto import Choice
from megadistill.config.recipe import Recipe
from megadistill.data import Mixture
from megadistill.data.targets.target_writer import refuse_other_content
from megadistill.distributed.launch import Launch, vocab_group_size
from megadistill.distributed.roles import Roles
from megadistill.distributed.topology import Topology
from megadistill.distributed.vocab import block_cyclic_ranges, padded_vocabulary
from megadistill.errors import UserError
from megadistill.models.attention.recipe_choices import recipe_choices
from megadistill.models.families import load_config, refuse_as_student, refuse_documents
from megadistill.models.fingerprint import sampled_fingerprint
from megadistill.models.weights import check_weights
from megadistill.student.deepspeed_config import active_deepspeed_config, build_engine_config
from megadistill.teacher.local_copy import copy_folder, make_copy
from megadistill.train.setup.jit_locks import extensions_of, refuse_stale_jit_locks
from megadistill.train.setup.parent_checkpoint import Parent, check_parent, find_parent
from megadistill.train.setup.preflight import (
    check_compiler,
    check_fit,
    check_shared_sequences,
    check_start,
    check_tokenizers,
    model_rows,
)
from megadistill.train.setup.ranks_and_files import require_ranks_and_files, students_of
from megadistill.train.setup.run_folder import has_saved, refuse_other_deepspeed, refuse_other_recipe
from megadistill.train.setup.telemetry_checks import refuse_telemetry
from megadistill.train.setup.vocab_map import read_vocab_map

_TEACHER: Final = "the teacher in teacher.path"
"""Name of its digest."""


@dataclass(frozen=True)
class Setup:
    """A recipe with the content of the files that it names."""

    recipe: Recipe
    folder: Path
    data: Mixture
    student_config: Any
    teacher_config: Any | None
    roles: Roles | None
    """Roles of the ranks; None where no rank is the teacher's alone."""
    group_size: int
    """Ranks of a vocab group."""
    accumulation: int
    """Micro-batches of a rank in a step."""
    deepspeed_config: dict[str, Any]
    """The DeepSpeed settings in force: on a CPU without those that need a GPU."""
    vocab_map: Tensor | None
    """[data.vocab_size] int64: the teacher's id for each of the student's; None where they are the same."""
    disabled: tuple[str, ...]
    """Settings of the recipe's DeepSpeed file that are disabled on a CPU."""
    parent: Parent | None = None
    """The checkpoint of another run from which this start begins; None where it resumes, or begins at step 0."""
    teacher_copy: Path | None = None
    """Copy of the teacher on this node, which the ranks that hold its stages read; None: they read teacher.path."""

    def attention(self, model: Literal["student", "teacher"]) -> Choice:
        """Implementation of a model's attention on this device, and why; of a live teacher."""
        return self.choices()[f"{model}.attention"]

    def compiles(self, model: Literal["student", "teacher"]) -> bool:
        """Whether a model's layers are compiled on this device; of a live teacher."""
        choice = self.choices().get(f"{model}.compile")
        return choice is not None and choice.value == "compiled"

    def choices(self) -> dict[str, Choice]:
        """Value in force and its reason, of each key of the recipe that may be `auto`, on this device."""
        return recipe_choices(
            self.recipe,
            self.student_config,
            self.teacher_config,
            accelerator=torch.accelerator.is_available(),
            sequence_length=self.data.sequence_length,
        )

    @property
    def tokens_per_step(self) -> int:
        return self.recipe.train.global_batch * self.data.sequence_length

    @property
    def epoch_tokens(self) -> int | None:
        """Tokens of an epoch; None for a mixture, whose sources have epochs of their own."""
        sequences = [manifest.sequences for manifest in self.data.sources.values()]
        return sequences[0] * self.data.sequence_length if len(sequences) == 1 else None


def prepare(recipe: Recipe, launch: Launch, *, checks_models: bool = True) -> Setup:
    """Reads the files that the recipe names and checks that they fit together. Writes nothing; runs on every rank.

    `checks_models`: with `check_models`, which one rank of a node can do for all.

    Raises:
        UserError: something does not fit; the message is one line.
    """
    require_ranks_and_files(recipe, launch)
    roles, launch = students_of(recipe, launch)
    accumulation = recipe.accumulation(launch.world)
    sequence = recipe.distributed.sequence
    group_size = vocab_group_size(recipe.distributed.vocab_group, launch, sequence=sequence)
    deepspeed_config, disabled = active_deepspeed_config(recipe.student.deepspeed)
    build_engine_config(deepspeed_config, recipe.train, accumulation, sequence=sequence)
    refuse_telemetry(recipe, deepspeed_config, launch)
    refuse_stale_jit_locks(extensions_of(deepspeed_config))
    data = Mixture.load(recipe.data)
    source = recipe.student.config
    student_config = load_config(Path(source) if isinstance(source, str) else source, what="student.config")
    refuse_as_student(student_config, "student.config")
    teacher, teacher_config, vocab_map = recipe.teacher, None, None
    if teacher is not None and teacher.is_live:
        teacher_config = load_config(Path(str(teacher.path)), what="teacher.path")
        if recipe.data.document_mask:
            refuse_documents(teacher_config, "teacher.path")
        if teacher.vocab_map is not None:
            ids = {"student_ids": data.vocab_size, "teacher_ids": teacher_config.vocab_size}
            vocab_map = read_vocab_map(Path(teacher.vocab_map), **ids)
    data = data.for_models(*model_rows(recipe, data, student_config, teacher_config))
    vocab_map = None if vocab_map is None else vocab_map[: data.vocab_size]
    stages = group_size if roles is None else roles.stages
    check_fit(recipe, data, student_config, teacher_config, stages=stages, vocab_map=vocab_map)
    if teacher is not None and teacher.save_targets is not None:
        refuse_other_content(Path(teacher.save_targets))
    check_compiler(recipe)
    padded = padded_vocabulary(data.vocab_size, recipe.student.vocab_multiple)
    block_cyclic_ranges(padded, launch.world, group_size, launch.rank)
    student_config.vocab_size = data.vocab_size
    folder = Path(recipe.run.folder)
    parent = find_parent(recipe)
    if parent is not None:
        check_parent(parent, recipe, student_config, data, rank=launch.rank, world=launch.world)
    refuse_other_recipe(folder, recipe.snapshot())
    refuse_other_deepspeed(folder, deepspeed_config, recipe.train.precision)
    setup = Setup(
        recipe=recipe,
        folder=folder,
        data=data,
        student_config=student_config,
        teacher_config=teacher_config,
        roles=roles,
        group_size=group_size,
        accumulation=accumulation,
        deepspeed_config=deepspeed_config,
        vocab_map=vocab_map,
        disabled=disabled,
        parent=parent,
    )
    setup.choices()  # refuses what cannot run here
    models = {"student.config": (student_config, setup.attention("student"))}
    if teacher_config is not None:
        models["teacher.path"] = (teacher_config, setup.attention("teacher"))
    check_shared_sequences(recipe, data, models)
    if checks_models:
        check_models(setup)
    return setup


def check_models(setup: Setup) -> dict[str, str]:
    """Checks the models' folders: headers of every file of weights, and tokenizers. Writes nothing.

    Returns:
        Name -> digest of what must be the same on every node.

    Raises:
        UserError: something does not fit; the message is one line.
    """
    recipe, teacher, config = setup.recipe, setup.recipe.teacher, setup.teacher_config
    digests: dict[str, str] = {}
    check_tokenizers(recipe, setup.data, config)
    if teacher is not None and config is not None:
        check_weights(Path(str(teacher.path)), config)
        digests[_TEACHER] = sampled_fingerprint(Path(str(teacher.path)))
    if setup.parent is None and recipe.student.weights is not None and not has_saved(setup.folder):
        check_start(Path(recipe.student.weights), setup.student_config, setup.data)
        digests["the model in student.weights"] = sampled_fingerprint(Path(recipe.student.weights))
    return digests


def check_node(setup: Setup, launch: Launch) -> dict[str, str]:
    """`check_models` for all ranks of a node, and its copy of the teacher, if one of them holds a stage.

    Raises:
        UserError: something does not fit, or cannot be copied; the message is one line.
    """
    digests, teacher = check_models(setup), setup.recipe.teacher
    first = launch.rank - launch.local_rank
    ranks = range(first, first + launch.local_world)
    stages_here = setup.roles is None or not all(map(setup.roles.is_student, ranks))
    if teacher is not None and teacher.local_copy is not None and stages_here:
        path, copies = Path(str(teacher.path)), Path(teacher.local_copy)
        digests["teacher.local_copy"] = make_copy(path, copies)
        copy = copy_folder(path, copies)
        if sampled_fingerprint(copy) != digests[_TEACHER]:  # all files may have one time, as in an image
            raise UserError(f"teacher.local_copy: {copy} is another model than {path}: rm -r it, and start again")
    return digests


def with_copy(setup: Setup) -> Setup:
    """For the ranks of a node that was checked: with the copy of the teacher that they read."""
    teacher = setup.recipe.teacher
    if teacher is None or teacher.local_copy is None:
        return setup
    return replace(setup, teacher_copy=copy_folder(Path(str(teacher.path)), Path(teacher.local_copy)))


def describe_layout(setup: Setup, topology: Topology) -> str:
    """A log line: device, ranks, precision, and what the device lacks."""
    on_cpu = topology.device.type == "cpu"
    name = "cpu" if on_cpu else torch.get_device_module(topology.device).get_device_name(topology.device)
    parts = [f"device: {name}", f"world size {topology.world}", f"vocab group {topology.group_size}"]
    if setup.roles is not None:
        parts.append(f"teacher ranks {setup.roles.teachers} ({setup.roles.replicas} x {setup.roles.stages} stages)")
    elif setup.teacher_config is not None:
        parts.append(f"teacher stages {topology.group_size}")
    if topology.sequence_ranks > 1:
        parts.append(f"sequences shared by {topology.sequence_ranks} ranks")
    parts.append(setup.recipe.train.precision)
    if on_cpu and setup.recipe.train.precision != "float32":
        parts.append("slow: bfloat16 is emulated on a CPU")
    if setup.disabled:
        parts.append(f"disabled on a CPU: {', '.join(setup.disabled)}")
    return "; ".join(parts)
