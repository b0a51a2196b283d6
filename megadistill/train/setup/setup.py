"""Set-up of a run: everything that its recipe names, read and checked before the first process group exists."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch import Tensor

from megadistill.config.auto import Choice
from megadistill.config.recipe import Recipe
from megadistill.data import Mixture
from megadistill.data.stream.segments import segment_index, slots_after
from megadistill.data.targets.target_writer import refuse_other_content
from megadistill.distributed.launch import Launch, SeparateReplica
from megadistill.distributed.roles import Roles
from megadistill.distributed.topology import Topology
from megadistill.errors import UserError
from megadistill.heldout.splits import Split
from megadistill.models.attention.recipe_choices import recipe_choices
from megadistill.models.attention.sequence import refuse_rope_by_length
from megadistill.models.attention.shared_sequences import check_shared_sequences
from megadistill.models.families import load_config, refuse_as_student, refuse_documents
from megadistill.models.fingerprint import sampled_fingerprint
from megadistill.models.weights import check_weights
from megadistill.student.deepspeed_config import active_deepspeed_config, build_engine_config
from megadistill.teacher.local_copy import copy_folder, make_copy
from megadistill.train.setup.held_out import held_out_splits, refuse_unknown_ids
from megadistill.train.setup.jit_locks import extensions_of, refuse_stale_jit_locks
from megadistill.train.setup.parent_checkpoint import Parent, check_parent, find_parent
from megadistill.train.setup.preflight import (
    check_compiler,
    check_fit,
    check_start,
    check_tokenizers,
    model_rows,
)
from megadistill.train.setup.ranks_and_files import replica_of, require_ranks_and_files, students_of
from megadistill.train.setup.run_folder import has_saved, refuse_other_deepspeed, refuse_other_recipe
from megadistill.train.setup.step_shape import (
    StepShape,
    step_shapes,
    student_config_of_entry,
    with_steps,
)
from megadistill.train.setup.teacher_files import TeacherFiles, keys_of_teacher, of_teacher, read_teacher
from megadistill.train.setup.telemetry_checks import refuse_telemetry
from megadistill.units import number_of

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
    ranks: int
    """The student's ranks, of all replicas."""
    replicas: int
    """Copies of the student, each on as many of its ranks."""
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
    held_out: tuple[Split, ...] = ()
    """The splits of `validation.data`."""
    separate: SeparateReplica | None = None
    """This one of the replicas that are launches of their own, and may come and go; None: they are one launch."""
    teacher_copy: Path | None = None
    """Copy of the teacher on this node, which the ranks that hold its stages read; None: they read teacher.path."""
    teachers: Mapping[str, "Setup"] = field(default_factory=dict)
    """Setup of a run with each of several teachers alone, by name: its `recipe.teacher` is that one's section."""
    teacher_name: str | None = None
    """Name of the teacher in such a setup; None in others."""
    teaches: Mapping[str, float] = field(default_factory=dict)
    """Sources that the teacher of such a setup teaches, and its share in the divergence of their rows."""

    def attention(self, model: Literal["student", "teacher"]) -> Choice:
        """Implementation of a model's attention on this device, and why; of a live teacher."""
        return self.choices()[f"{model}.attention"]

    def compiles(self, model: Literal["student", "teacher"]) -> bool:
        """Whether a model's layers are compiled on this device; of a live teacher."""
        choice = self.choices().get(f"{model}.compile")
        return choice is not None and choice.value == "compiled"

    def choices(self) -> dict[str, Choice]:
        """Value in force and its reason, of each key of the recipe that may be `auto`, on this device."""
        choices = recipe_choices(
            self.recipe,
            self.student_config,
            self.teacher_config,
            accelerator=torch.accelerator.is_available(),
            sequence_length=self.data.sequence_length,
        )
        for name, each in self.teachers.items():
            own = {key: choice for key, choice in each.choices().items() if key.startswith("teacher.")}
            choices |= {of_teacher(key, name): choice for key, choice in own.items()}
        return choices

    def teacher_shares(self) -> dict[str, float]:
        """Fraction of the run's tokens that each of several teachers reads."""
        slots = slots_after([shape.pace for shape in self.shapes], self.recipe.train.steps)
        sequences = self.data.order(self.recipe.data.seed).sequences_read(slots)
        tokens = {source: number * self.data.sources[source].sequence_length for source, number in sequences.items()}
        total = sum(tokens.values())
        return {name: sum(tokens[source] for source in each.teaches) / total for name, each in self.teachers.items()}

    @cached_property
    def shapes(self) -> tuple[StepShape, ...]:
        """The shape of the steps of each segment of the data, in order; one where no curriculum entry has its own."""
        return step_shapes(self.recipe, self.data, self.ranks)

    @property
    def data_world(self) -> int:
        """Ranks that read different sequences."""
        return self.ranks // self.recipe.distributed.sequence

    def rows_at(self, slot: int) -> int:
        """Rows of each rank in a step that reads a slot, surplus ones included."""
        shape = self.shape_at(slot)
        return shape.accumulation * shape.micro_batch

    def with_replicas(self, replicas: int) -> "Setup":
        """The set-up of the same run on another number of replicas of the student, each of as many ranks as before."""
        assert self.roles is None or replicas == self.replicas, "the teacher's own ranks serve a fixed number of ranks"
        ranks = self.ranks // self.replicas * replicas
        return replace(
            self,
            ranks=ranks,
            replicas=replicas,
            accumulation=self.recipe.accumulation(ranks),
            teachers={name: each.with_replicas(replicas) for name, each in self.teachers.items()},
        )

    def number_of_replica(self, topology: Topology) -> int | None:
        """Number of this rank's replica of the student, as its launch has it; None where there is one alone."""
        if self.separate is not None:
            return self.separate.replica
        return topology.replica if topology.replicas > 1 else None

    @property
    def has_shapes(self) -> bool:
        """Whether curriculum entries decide the shape of steps: one entry alone may, too."""
        return len(self.shapes) > 1 or self.recipe.has_shaped_entries

    def shape_at(self, slot: int) -> StepShape:
        """The shape of the step that reads a slot."""
        return self.shapes[segment_index([shape.start for shape in self.shapes], slot)]

    @property
    def longest(self) -> StepShape:
        """The shape with the most tokens of a rank's micro-batch, which takes most memory."""
        return max(self.shapes, key=lambda shape: (shape.micro_batch * shape.sequence_length, shape.sequence_length))

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
    launch = launch.of_all_replicas()
    require_ranks_and_files(recipe, launch)
    roles, launch = students_of(recipe, launch)
    accumulation = recipe.accumulation(launch.world)
    replica, group_size = replica_of(recipe, launch)
    replicas = launch.world // replica.world
    deepspeed_config, disabled = active_deepspeed_config(recipe.student.deepspeed)
    build_engine_config(
        deepspeed_config, recipe.train, accumulation, ranks=replica.world, replicas=max(replicas, launch.replicas)
    )
    refuse_telemetry(recipe, deepspeed_config, launch)
    refuse_stale_jit_locks(extensions_of(deepspeed_config))
    data = Mixture.load(recipe.data, global_batch=recipe.train.global_batch)
    source = recipe.student.config
    student_config = load_config(Path(source) if isinstance(source, str) else source, what="student.config")
    refuse_as_student(student_config, "student.config")
    if recipe.data.document_mask:
        refuse_documents(student_config, "student.config", sequence_length=data.sequence_length)
    teacher = read_teacher(recipe, data)
    teachers = {name: read_teacher(recipe.with_teacher(name), data, name=name) for name in recipe.teachers}
    rows = model_rows(recipe, data, student_config, teacher.config)
    for name, each in teachers.items():
        with keys_of_teacher(name):
            rows += model_rows(recipe.with_teacher(name), data, student_config, each.config)
    data = data.for_models(*rows)
    teacher = teacher.for_ids(data.vocab_size)
    stages = group_size if roles is None else roles.stages
    check_fit(recipe, data, student_config, teacher.config, stages=stages, vocab_map=teacher.vocab_map)
    if recipe.teacher is not None and recipe.teacher.save_targets is not None:
        refuse_other_content(Path(recipe.teacher.save_targets))
    check_compiler(recipe)
    student_config.vocab_size = data.vocab_size
    folder = Path(recipe.run.folder)
    parent = find_parent(recipe)
    recipe = with_steps(recipe, data, None if parent is None else parent.checkpoint.manifest)
    if parent is not None:
        check_parent(parent, recipe, student_config, data, rank=launch.rank, world=launch.world)
    refuse_other_recipe(folder, recipe.snapshot())
    refuse_other_deepspeed(folder, deepspeed_config, recipe.train.precision)
    setup = Setup(
        recipe=recipe,
        folder=folder,
        data=data,
        student_config=student_config,
        teacher_config=teacher.config,
        roles=roles,
        ranks=launch.world,
        replicas=replicas,
        group_size=group_size,
        accumulation=accumulation,
        deepspeed_config=deepspeed_config,
        vocab_map=teacher.vocab_map,
        disabled=disabled,
        parent=parent,
        held_out=held_out_splits(recipe, data),
        separate=launch.separate,
    )
    setup = replace(setup, teachers={name: _with_one(setup, name, each) for name, each in teachers.items()})
    setup.choices()  # refuses what cannot run here
    _refuse_stored_lengths(setup)
    _check_entries(setup)
    models = {"student.config": (student_config, setup.attention("student"))}
    if teacher.config is not None:
        models["teacher.path"] = (teacher.config, setup.attention("teacher"))
    lengths = {source: manifest.sequence_length for source, manifest in data.sources.items()}
    check_shared_sequences(recipe, lengths, models)
    if checks_models:
        check_models(setup)
    return setup


def _with_one(setup: Setup, name: str, teacher: TeacherFiles) -> Setup:
    """The setup with one of several teachers, checked as a run with it alone.

    Raises:
        UserError: it does not fit.
    """
    recipe = setup.recipe.with_teacher(name)
    teacher = teacher.for_ids(setup.data.vocab_size)
    of_source = {source: setup.recipe.teachers_of(source) for source in setup.data.names}
    one = replace(
        setup,
        recipe=recipe,
        teacher_config=teacher.config,
        vocab_map=teacher.vocab_map,
        teacher_name=name,
        teaches={source: shares[name] for source, shares in of_source.items() if name in shares},
    )
    with keys_of_teacher(name):
        models = (one.data, one.student_config, teacher.config)
        check_fit(recipe, *models, stages=one.group_size, vocab_map=teacher.vocab_map)
        check_compiler(recipe)
        one.choices()
        _refuse_stored_lengths(one)
    return one


def _refuse_stored_lengths(setup: Setup) -> None:
    teacher, lengths = setup.recipe.teacher, sorted({shape.sequence_length for shape in setup.shapes})
    if teacher is None or len(lengths) == 1:
        return
    if not teacher.is_live or teacher.save_targets is not None:
        key = "teacher.save_targets" if teacher.is_live else f"teacher.source {teacher.source}"
        raise UserError(
            f"{key}: stored targets have one sequence length, and the curriculum's entries have "
            f"{' and '.join(map(str, lengths))} tokens: use a live teacher, or a run for each length (run.begin_from)"
        )


def _check_entries(setup: Setup) -> None:
    """
    Raises:
        UserError: the student cannot have the rotary embeddings of a curriculum entry, or not in this run.
    """
    for shape in setup.shapes:
        config = student_config_of_entry(setup.student_config, shape)
        if shape.rope is None:
            continue
        if setup.recipe.data.document_mask:
            refuse_documents(config, shape.rope_key, sequence_length=shape.sequence_length)
        if (ranks := setup.recipe.distributed.sequence) > 1:
            refuse_rope_by_length(config, ranks, what=shape.rope_key)


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
    if setup.vocab_map is not None:
        refuse_unknown_ids(
            setup.held_out, setup.vocab_map, sources=setup.teaches, document_mask=recipe.data.document_mask
        )
    for name, each in setup.teachers.items():
        with keys_of_teacher(name):
            digests |= {of_teacher(key, name): digest for key, digest in check_models(each).items()}
    begins = setup.teacher_name is None and setup.parent is None and not has_saved(setup.folder)
    if begins and recipe.student.weights is not None:
        check_start(Path(recipe.student.weights), setup.student_config, setup.data)
        digests["the model in student.weights"] = sampled_fingerprint(Path(recipe.student.weights))
    return digests


def check_node(setup: Setup, launch: Launch) -> dict[str, str]:
    """`check_models` for all ranks of a node, and its copy of the teacher, if one of them holds a stage.

    Raises:
        UserError: something does not fit, or cannot be copied; the message is one line.
    """
    digests = check_models(setup)
    first = launch.rank - launch.local_rank
    ranks = range(first, first + launch.local_world)
    if setup.roles is None or not all(map(setup.roles.is_student, ranks)):
        digests |= _make_copy(setup, digests)
        for name, each in setup.teachers.items():
            with keys_of_teacher(name):
                known = {_TEACHER: digests.get(of_teacher(_TEACHER, name), "")}
                digests |= {of_teacher(key, name): digest for key, digest in _make_copy(each, known).items()}
    return digests


def _make_copy(setup: Setup, digests: Mapping[str, str]) -> dict[str, str]:
    """Makes the node's copy of a teacher; its digest, nothing where the recipe wants no copy.

    Raises:
        UserError: it cannot be copied, or the copy is another model.
    """
    teacher = setup.recipe.teacher
    if teacher is None or teacher.local_copy is None:
        return {}
    path, copies = Path(str(teacher.path)), Path(teacher.local_copy)
    made = {"teacher.local_copy": make_copy(path, copies)}
    copy = copy_folder(path, copies)
    if sampled_fingerprint(copy) != digests[_TEACHER]:  # all files may have one time, as in an image
        raise UserError(f"teacher.local_copy: {copy} is another model than {path}: rm -r it, and start again")
    return made


def with_copy(setup: Setup) -> Setup:
    """The setup with the node's copies of the teachers, which its ranks read once the node was checked."""
    teacher = setup.recipe.teacher
    setup = replace(setup, teachers={name: with_copy(each) for name, each in setup.teachers.items()})
    if teacher is None or teacher.local_copy is None:
        return setup
    return replace(setup, teacher_copy=copy_folder(Path(str(teacher.path)), Path(teacher.local_copy)))


def describe_layout(setup: Setup, topology: Topology) -> str:
    """A log line: device, ranks, precision, and what the device lacks."""
    on_cpu = topology.device.type == "cpu"
    name = "cpu" if on_cpu else torch.get_device_module(topology.device).get_device_name(topology.device)
    parts = [f"device: {name}", f"world size {topology.world}"]
    if topology.replicas > 1:
        parts.append(f"{topology.replicas} replicas of {number_of(topology.shard_world, 'rank')}")
    parts.append(f"vocab group {topology.group_size}")
    if setup.roles is not None:
        parts.append(f"teacher ranks {setup.roles.teachers} ({setup.roles.replicas} x {setup.roles.stages} stages)")
    elif setup.teacher_config is not None:
        parts.append(f"teacher stages {topology.group_size}")
    elif setup.teachers:
        parts.append(f"teachers {', '.join(setup.teachers)}, stages {topology.group_size} each")
    if topology.sequence_ranks > 1:
        parts.append(f"sequences shared by {topology.sequence_ranks} ranks")
    parts.append(setup.recipe.train.precision)
    if on_cpu and setup.recipe.train.precision != "float32":
        parts.append("slow: bfloat16 is emulated on a CPU")
    if setup.disabled:
        parts.append(f"disabled on a CPU: {', '.join(setup.disabled)}")
    return "; ".join(parts)
