"""Room `train`: what of the teacher a rank holds, as the recipe places it. It runs no step.

Colocated: a stage on each rank of the student's. Disaggregated: stages on ranks of the teacher's own, which serve.
Stored: none at all, its targets lie on disk. The head's rows lie on the student's ranks wherever the stages are.
"""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

from megadistill.data.targets.target_manifest import TargetKey
from megadistill.data.targets.target_reader import TargetReader
from megadistill.data.targets.target_writer import TargetWriter, finish_targets
from megadistill.distributed.collectives import barrier
from megadistill.distributed.topology import Topology
from megadistill.distributed.vocab import VocabSlice
from megadistill.models.families import logit_transform
from megadistill.models.fingerprint import teacher_fingerprint
from megadistill.precision import torch_dtype
from megadistill.teacher import (
    ActivationCodec,
    RemoteTeacher,
    RequestCodec,
    TeacherPipeline,
    TeacherServer,
    TeacherStage,
    head_rows,
    unknown_bias,
)
from megadistill.train.resilience.sdc import FrozenWeights
from megadistill.train.setup.setup import Setup
from megadistill.train.teacher.targets import StoredTeacher, Teacher


def pipeline_of(setup: Setup, topology: Topology) -> TeacherPipeline | RemoteTeacher | None:
    """What answers this rank's micro-batches: its stage and its group's, or ranks of the teacher's own."""
    teacher = setup.recipe.teacher
    if teacher is None or teacher.source == "stored":
        return None
    if topology.bridge is None:
        stage = stage_of(setup, topology, topology.group_rank, topology.group_size)
        return TeacherPipeline(stage, topology)
    return RemoteTeacher(topology.bridge, *forms_of(setup), queue=teacher.queue, device=topology.device)


def teacher_of(
    setup: Setup, pipeline: TeacherPipeline | RemoteTeacher | None, vocab: VocabSlice, topology: Topology
) -> Teacher | StoredTeacher | None:
    """The teacher of a rank that computes the loss on `vocab`.

    Raises:
        UserError: the stored targets belong to another run.
    """
    section, ids = setup.recipe.teacher, setup.vocab_map
    if section is None:
        return None
    if pipeline is None:
        assert section.targets is not None
        return StoredTeacher(TargetReader(section.targets, target_key(setup)), str(topology.device))
    assert section.path is not None
    dtype, device = torch_dtype(setup.recipe.train.precision), topology.device
    return Teacher(
        pipeline=pipeline,
        head=head_rows(Path(section.path), vocab, dtype=dtype, device=device, ids=ids),
        bias=None if ids is None else unknown_bias(vocab, ids, device=device),
        logits=logit_transform(setup.teacher_config),
        ids=ids,
    )


def keeping(setup: Setup, teacher: Teacher, topology: Topology) -> Teacher:
    """The same, storing the targets that it makes where `teacher.save_targets` says. Collective.

    Raises:
        UserError: the folder holds other targets, or finished ones.
    """
    section = setup.recipe.teacher
    if section is None or section.save_targets is None:
        return teacher
    if teacher.store is not None:
        teacher.store.flush()
    store = TargetWriter(Path(section.save_targets), target_key(setup), rank=topology.rank)
    barrier(topology.world_group)  # nobody stores before all have seen what is stored
    return replace(teacher, store=store)


def serve(setup: Setup, topology: Topology) -> None:
    """A rank of the teacher's own, until the student's ranks need no more.

    Raises:
        OperatorFault: its weights changed in memory, looked at every `resilience.teacher_hash_every` steps of its
            clients.
    """
    teacher, bridge, every = setup.recipe.teacher, topology.bridge, setup.recipe.resilience.teacher_hash_every
    assert teacher is not None
    assert bridge is not None
    stage = stage_of(setup, topology, topology.rank % topology.group_size, topology.group_size)
    frozen = FrozenWeights.of(stage.weights()) if every else None
    a_step = setup.accumulation * len(bridge.roles.clients(0))  # as many in every replica
    for answered in TeacherServer(stage, bridge, *forms_of(setup), queue=teacher.queue).answers():
        if frozen is not None and answered % (every * a_step) == 0:
            frozen.require_unchanged(topology)


def stage_of(setup: Setup, topology: Topology, stage: int, stages: int) -> TeacherStage:
    section = setup.recipe.teacher
    assert section is not None
    assert section.path is not None
    dtype = torch_dtype(setup.recipe.train.precision)
    return TeacherStage.load(Path(section.path), stage=stage, stages=stages, dtype=dtype, device=topology.device)


def forms_of(setup: Setup) -> tuple[RequestCodec, ActivationCodec]:
    """How micro-batches and hidden states travel between the student's ranks and the teacher's."""
    recipe = setup.recipe
    assert recipe.teacher is not None
    assert setup.teacher_config is not None
    form = RequestCodec(recipe.train.micro_batch, setup.data.sequence_length, recipe.data.document_mask)
    width, dtype = int(setup.teacher_config.hidden_size), torch_dtype(recipe.train.precision)
    return form, ActivationCodec(width, dtype, float8=recipe.teacher.transfer_dtype == "float8")


def ahead_of(setup: Setup, teacher: Teacher) -> str:
    """One line: how far the teacher runs ahead, and what that holds."""
    pipeline, rows = teacher.pipeline, setup.recipe.train.micro_batch
    held = pipeline.bytes_in_flight(rows, setup.data.sequence_length)
    return (
        f"the teacher runs {pipeline.ahead} micro-batches ahead; a rank holds {held / (1 << 20):.1f} MiB of hidden "
        "states in flight"
    )


def target_key(setup: Setup) -> TargetKey:
    """What targets that this run makes, or learns from, belong to."""
    recipe = setup.recipe
    section, targets = recipe.teacher, recipe.loss.targets
    assert section is not None
    assert targets is not None
    ids = setup.vocab_map
    return TargetKey(
        tokenizer=setup.data.tokenizer.sha256,
        order=json.dumps(setup.data.order(recipe.data.seed).description, sort_keys=True),
        teacher=None if section.path is None else teacher_fingerprint(Path(section.path)),
        vocab_map=None if ids is None else hashlib.sha256(ids.numpy().tobytes()).hexdigest(),
        targets=targets,
        temperature=recipe.loss.temperature,
        seed=recipe.run.seed,
        sequence_length=setup.data.sequence_length,
        vocab_size=setup.data.vocab_size,
        document_mask=recipe.data.document_mask,
    )


def finish(setup: Setup) -> str:
    """Makes what all ranks kept one target set; a line that says so. One process, when all have flushed."""
    section = setup.recipe.teacher
    assert section is not None
    assert section.save_targets is not None
    found = finish_targets(Path(section.save_targets), target_key(setup))
    return f"{section.save_targets}: targets of {found.slots:,} sequences, {found.bytes_per_token:.1f} bytes a token"
