"""Builds the teacher of a run on this rank, by the recipe's `teacher.source` and `teacher.placement`.

Colocated: a stage of its layers on each of the student's ranks. Disaggregated: stages on ranks of their own, which
serve. Stored: only its targets, on disk. The rows of its head are on the student's ranks wherever the stages are.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

from megadistill.config.recipe import TeacherSection
from megadistill.data.targets.target_manifest import TargetKey
from megadistill.data.targets.target_reader import TargetReader
from megadistill.distributed.broadcast_reader import BroadcastReader, read_by_first
from megadistill.distributed.topology import Topology
from megadistill.distributed.vocab import VocabSlice
from megadistill.models.families import logit_transform
from megadistill.models.fingerprint import teacher_fingerprint
from megadistill.precision import torch_dtype
from megadistill.teacher.codec import ActivationCodec
from megadistill.teacher.disaggregated import RemoteTeacher, RequestCodec, TeacherServer
from megadistill.teacher.pipeline import TeacherPipeline
from megadistill.teacher.stage import TeacherStage, head_rows, unknown_bias
from megadistill.train.resilience.sdc import FrozenWeights
from megadistill.train.setup.setup import Setup
from megadistill.train.teacher.live import ColocatedTeacher, LiveTeacher
from megadistill.train.teacher.protocol import NoTeacher, Teacher
from megadistill.train.teacher.saved_targets import SavedTargets
from megadistill.train.teacher.several import Member, SeveralTeachers
from megadistill.train.teacher.stored import StoredTeacher

TeacherOnSlice = Callable[[VocabSlice], Teacher]
"""The second half of loading a teacher: rows of its head, for this rank's slice of the vocabulary."""


def load_teacher(setup: Setup, topology: Topology) -> TeacherOnSlice:
    """Loads this rank's part of the recipe's teacher.

    In two halves: the layers at once, since a live `zero.Init` would partition them as it does the student's; the
    returned function loads the rest when the student's slice of the vocabulary is known.

    Raises:
        UserError: stored targets belong to another run.
    """
    section = setup.recipe.teacher
    if setup.teachers:
        return _several_teachers(setup, topology)
    return TEACHERS["none" if section is None else section.source](setup, topology)


def live_teacher(
    setup: Setup, topology: Topology, *, pipeline: TeacherPipeline | RemoteTeacher | None = None
) -> Callable[[VocabSlice], LiveTeacher]:
    """See `load_teacher`: a teacher that runs on this rank, or is served from ranks of its own.

    `pipeline`: its layers, where they are loaded.
    """
    pipeline, ids = load_pipeline(setup, topology) if pipeline is None else pipeline, setup.vocab_map
    dtype, device = torch_dtype(setup.recipe.train.precision), topology.device
    save_targets = _section(setup).save_targets

    def on_slice(vocab: VocabSlice) -> LiveTeacher:
        kind = ColocatedTeacher if topology.bridge is None else LiveTeacher
        folder, reader = _source(setup, topology)
        return kind(
            pipeline=pipeline,  # type: ignore[arg-type]  # a TeacherPipeline where there is no bridge
            head=head_rows(folder, vocab, dtype=dtype, device=device, ids=ids, reader=reader),
            bias=None if ids is None else unknown_bias(vocab, ids, device=device),
            logits=logit_transform(setup.teacher_config),
            ids=ids,
            topology=topology,
            saved=None if save_targets is None else SavedTargets(Path(save_targets), _key(setup, topology), topology),
        )

    return on_slice


def _several_teachers(setup: Setup, topology: Topology) -> TeacherOnSlice:
    loaded: dict[str, TeacherOnSlice] = {}
    first: TeacherPipeline | None = None
    for name, each in setup.teachers.items():
        if _section(each).is_live:
            stage = load_stage(each, topology, topology.group_rank, topology.group_size)
            pipeline = TeacherPipeline(stage, topology, beside=first)
            first = first or pipeline
            loaded[name] = live_teacher(each, topology, pipeline=pipeline)
        else:
            loaded[name] = TEACHERS[_section(each).source](each, topology)
    return lambda vocab: several_teachers(setup, {name: on_slice(vocab) for name, on_slice in loaded.items()})


def several_teachers(setup: Setup, loaded: Mapping[str, Teacher]) -> SeveralTeachers:
    """The teachers of `setup.teachers`, which are loaded, with the sources that each teaches."""
    numbers = {source: number for number, source in enumerate(setup.data.names)}
    members = []
    for name, each in setup.teachers.items():
        weights = {numbers[source]: share for source, share in each.teaches.items()}
        members.append(Member(name, loaded[name], weights, each))
    return SeveralTeachers(members, len(numbers))


def _stored_teacher(setup: Setup, topology: Topology) -> TeacherOnSlice:
    reader = TargetReader(str(_section(setup).targets), _key(setup, topology))
    return lambda vocab: StoredTeacher(reader, str(topology.device))


TEACHERS: dict[str, Callable[[Setup, Topology], TeacherOnSlice]] = {
    "none": lambda setup, topology: lambda vocab: NoTeacher(),
    "live": live_teacher,
    "stored": _stored_teacher,
}
"""Loaders of the kinds of teacher, by `teacher.source`; "none" for a recipe without a teacher."""


def load_pipeline(setup: Setup, topology: Topology) -> TeacherPipeline | RemoteTeacher:
    """Source of hidden states: this rank's stage and those of its group, or ranks of the teacher's own."""
    if topology.bridge is None:
        return TeacherPipeline(load_stage(setup, topology, topology.group_rank, topology.group_size), topology)
    queue = _section(setup).queue
    return RemoteTeacher(topology.bridge, *transfer_codecs(setup), queue=queue, device=topology.device)


def load_stage(setup: Setup, topology: Topology, stage: int, stages: int) -> TeacherStage:
    folder, reader = _source(setup, topology)
    return TeacherStage.load(
        folder,
        stage=stage,
        stages=stages,
        dtype=torch_dtype(setup.recipe.train.precision),
        device=topology.device,
        precision=_section(setup).precision,
        compiled=setup.compiles("teacher"),
        attention=setup.attention("teacher").value,
        reader=reader,
        sequence=topology,
    )


def _source(setup: Setup, topology: Topology) -> tuple[Path, BroadcastReader]:
    """The folder from which weights are loaded, and its reader, for one loading.

    Of the ranks with the same stage, and with the same rows of the head, one reads `teacher.path`. A rank that holds a
    stage reads the node's copy itself, where there is one.
    """
    if setup.teacher_copy is not None and (setup.roles is None or topology.role == "teacher"):
        return setup.teacher_copy, BroadcastReader(topology)
    return Path(str(_section(setup).path)), BroadcastReader(topology, group=topology.stage_group)


def run_teacher_server(setup: Setup, topology: Topology) -> None:
    """Serves hidden states from a rank of the teacher's own, until the student's ranks close it.

    Raises:
        OperatorFault: its weights changed in memory, compared every `resilience.teacher_hash_every` steps.
    """
    bridge, every = topology.bridge, setup.recipe.resilience.teacher_hash_every
    assert bridge is not None
    stage = load_stage(setup, topology, topology.rank % topology.group_size, topology.group_size)
    frozen = FrozenWeights.of(stage.weights()) if every else None
    if frozen is not None:
        frozen.require_same_replicas(topology)
    accumulation = max(shape.accumulation for shape in setup.shapes)
    per_step = accumulation * len(bridge.roles.clients(0))  # micro-batches; as many in every replica
    server = TeacherServer(stage, bridge, *transfer_codecs(setup), queue=_section(setup).queue)
    for served in server.serve():
        if frozen is not None and served % (every * per_step) == 0:
            frozen.require_unchanged(topology)


def transfer_codecs(setup: Setup) -> tuple[RequestCodec, ActivationCodec]:
    """Formats of micro-batches and hidden states between the student's ranks and the teacher's."""
    recipe = setup.recipe
    (B, S), *more = dict.fromkeys((shape.micro_batch, shape.sequence_length) for shape in setup.shapes)
    requests = RequestCodec(B, S, recipe.data.document_mask, tuple(more))
    width, dtype = int(setup.teacher_config.hidden_size), torch_dtype(recipe.train.precision)  # type: ignore[union-attr]
    return requests, ActivationCodec(width, dtype, float8=_section(setup).transfer_dtype == "float8")


def _key(setup: Setup, topology: Topology) -> TargetKey:
    """`target_key`, for which one rank reads the headers and some rows of the teacher. Collective over the students."""
    return read_by_first(topology, lambda: target_key(setup))


def target_key(setup: Setup) -> TargetKey:
    """The identity of targets that this run makes, or learns from."""
    recipe, section = setup.recipe, _section(setup)
    targets = recipe.loss.targets
    assert targets is not None
    ids = setup.vocab_map
    return TargetKey(
        tokenizer=setup.data.tokenizer.sha256,
        order=json.dumps(setup.data.order(recipe.data.seed).description, sort_keys=True),
        teacher=None if section.path is None else teacher_fingerprint(Path(section.path)),
        teacher_precision=section.precision,
        vocab_map=None if ids is None else hashlib.sha256(ids.numpy().tobytes()).hexdigest(),
        targets=targets,
        temperature=recipe.loss.temperature,
        seed=recipe.run.seed,
        sequence_length=setup.data.sequence_length,
        vocab_size=setup.data.vocab_size,
        document_mask=recipe.data.document_mask,
        insert_bos=setup.data.insert_bos,
    )


def _section(setup: Setup) -> TeacherSection:
    section = setup.recipe.teacher
    assert section is not None, "the recipe has a teacher"
    return section
