"""One optimizer step of a small model of the recipe's kind, through the code of a run.

Architecture, precision, DeepSpeed's settings, loss, vocab group and stages are the recipe's; widths, depth, vocabulary
and tokens are small. The teacher is written to a folder of each rank's own and read from it as a real one is. A teacher
that has ranks of its own in the recipe is colocated here: the bridge is left out.
"""

import math
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from megadistill.config.recipe import StudentSection
from megadistill.distributed.launch import Launch
from megadistill.distributed.topology import Topology, topology_of_world
from megadistill.distributed.vocab import VocabSlice
from megadistill.doctor.tiny import tiny_config, write_random
from megadistill.errors import OperatorFault
from megadistill.models.experts import RouterCoefs
from megadistill.models.families import load_config, logit_transform
from megadistill.precision import torch_dtype
from megadistill.student.engine import StudentEngine
from megadistill.teacher.pipeline import TeacherPipeline
from megadistill.teacher.stage import TeacherStage, head_rows
from megadistill.train.lookahead import StepBatches
from megadistill.train.objective import Objective
from megadistill.train.setup.setup import Setup
from megadistill.train.step import train_step
from megadistill.train.teacher.live import ColocatedTeacher
from megadistill.train.teacher.placement import several_teachers
from megadistill.train.teacher.protocol import NoTeacher, Teacher
from megadistill.types import Cursor, TokenBatch, token_digest
from megadistill.units import short

VOCAB, SEQUENCE, SEED = 1000, 64, 1
RATE = 1e-3


def dry_run(setup: Setup, topology: Topology, launch: Launch, *, timeout: timedelta) -> str:
    """Takes the step on all ranks of `topology`, whose world is `launch`'s, and describes its outcome. Collective.

    Raises:
        OperatorFault: its loss or its gradient is not finite. Any exception of the run's code.
    """
    began = time.perf_counter()
    group = setup.group_size if launch.world % setup.group_size == 0 else 1
    topology = topology_of_world(launch, vocab_group=group, device=topology.device, timeout=timeout)
    with TemporaryDirectory(prefix="megadistill-doctor-") as folder:
        loss, norm = _step(setup, topology, Path(folder))
    if not math.isfinite(loss) or not math.isfinite(norm):
        raise OperatorFault(f"one small step has loss {loss} and gradient norm {norm}")
    without = "; the teacher's bridge was left out" if setup.roles is not None else ""
    sections = setup.recipe.teacher_sections
    of_teachers = {0: "", 1: ", teacher"}.get(len(sections), f", {len(sections)} teachers")
    parts = f"student{of_teachers} and loss"
    seconds = time.perf_counter() - began
    return f"one small step of {parts}: loss {loss:.3f}, gradient norm {short(norm)}, {seconds:.1f} s{without}"


def _step(setup: Setup, topology: Topology, folder: Path) -> tuple[float, float]:
    recipe = setup.recipe
    config = tiny_config(setup.student_config, vocab_size=VOCAB, min_layers=2)
    # Before the student: a live `zero.Init` would partition them too.
    stages = {name: _teacher_stage(each, topology, folder / name) for name, each in _by_teacher(setup).items()}
    rows = len(setup.data.names) if setup.teachers else 1  # one of each source
    batch = _batch(topology, rows, document_mask=recipe.data.document_mask)
    student = StudentEngine(
        config,
        section=StudentSection(
            config={},
            vocab_multiple=recipe.student.vocab_multiple,
            activation_checkpointing=recipe.student.activation_checkpointing,
            compile=setup.compiles("student"),
        ),
        train=recipe.train.model_copy(update={"micro_batch": len(batch), "global_batch": len(batch) * topology.world}),
        deepspeed_config=setup.deepspeed_config,
        vocab_size=VOCAB,
        accumulation=1,
        topology=topology,
        attention=setup.attention("student").value,
    )
    student.draw_weights(SEED)
    teacher = _teacher(setup, stages, student.head.vocab, topology, folder)
    outcome = train_step(
        student,
        next(StepBatches(iter([(batch, Cursor("", 0))]), teacher, micro_batch=len(batch))),
        step=1,
        learning_rate=RATE,
        objective=Objective(
            loss=recipe.loss,
            length=recipe.train.length,
            seed=SEED,
            student_logits=logit_transform(config),
            router_coefs=RouterCoefs.of(recipe.loss, config),
        ),
        topology=topology,
    )
    return outcome.metrics["loss"], outcome.grad_norm


def _by_teacher(setup: Setup) -> Mapping[str, Setup]:
    """The set-up of each of several teachers by name, or of the one; none for a run from labels."""
    return setup.teachers or ({} if setup.recipe.teacher is None else {"teacher": setup})


def _teacher(
    setup: Setup, stages: Mapping[str, TeacherStage], vocab: VocabSlice, topology: Topology, folder: Path
) -> Teacher:
    """The teachers of `stages`, whose files are in `folder` by name."""
    dtype, device = torch_dtype(setup.recipe.train.precision), topology.device
    pipeline: TeacherPipeline | None = None
    loaded: dict[str, Teacher] = {}
    for name, stage in stages.items():
        pipeline = TeacherPipeline(stage, topology, beside=pipeline)
        loaded[name] = ColocatedTeacher(
            pipeline=pipeline,
            head=head_rows(folder / name, vocab, dtype=dtype, device=device),
            logits=logit_transform(load_config(folder / name, what="teacher")),
        )
    if not setup.teachers:
        return next(iter(loaded.values()), NoTeacher())
    return several_teachers(setup, loaded)


def _teacher_stage(setup: Setup, topology: Topology, folder: Path) -> TeacherStage:
    """A stage of a small teacher in `folder`; for stored targets it has the student's architecture."""
    assert setup.recipe.teacher is not None
    folder.mkdir()
    config: Any = setup.teacher_config if setup.teacher_config is not None else setup.student_config
    write_random(tiny_config(config, vocab_size=VOCAB, min_layers=max(2, topology.group_size)), folder, seed=SEED + 1)
    return TeacherStage.load(
        folder,
        stage=topology.group_rank,
        stages=topology.group_size,
        dtype=torch_dtype(setup.recipe.train.precision),
        device=topology.device,
        precision=setup.recipe.teacher.precision,
        compiled=setup.compiles("teacher"),
        attention=setup.attention("teacher" if setup.teacher_config is not None else "student").value,
    )


def _batch(topology: Topology, rows: int, *, document_mask: bool) -> TokenBatch:
    generator = torch.Generator().manual_seed(SEED + topology.rank)
    sequence = torch.randint(0, VOCAB, (rows, SEQUENCE + 1), generator=generator)
    tokens = sequence[:, :-1].contiguous()
    starts = torch.zeros_like(tokens, dtype=torch.bool)
    starts[:, 0] = starts[:, SEQUENCE // 2] = True
    return TokenBatch(
        tokens=tokens,
        labels=sequence[:, 1:].contiguous(),
        slots=rows * topology.rank + torch.arange(rows),
        digests=token_digest(tokens),
        starts=starts,
        document_mask=document_mask,
        sources=torch.arange(rows),
        peer_sources=torch.arange(rows).unsqueeze(1).expand(rows, topology.group_size),
    )
