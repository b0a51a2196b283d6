"""One optimizer step of a small model of the recipe's kind, through the code of a run.

Architecture, precision, DeepSpeed's settings, loss, vocab group and stages are the recipe's; widths, depth, vocabulary
and tokens are small. The teacher is written to a folder of each rank's own and read from it as a real one is. A teacher
that has ranks of its own in the recipe is colocated here: the bridge is left out.
"""

import math
import time
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from megadistill.config.recipe import StudentSection
from megadistill.distributed.launch import Launch
from megadistill.distributed.topology import Topology, topology_of_world
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
    setup = next(iter(setup.teachers.values()), setup)  # the first of several teachers
    group = setup.group_size if launch.world % setup.group_size == 0 else 1
    topology = topology_of_world(launch, vocab_group=group, device=topology.device, timeout=timeout)
    with TemporaryDirectory(prefix="megadistill-doctor-") as folder:
        loss, norm = _step(setup, topology, Path(folder))
    if not math.isfinite(loss) or not math.isfinite(norm):
        raise OperatorFault(f"one small step has loss {loss} and gradient norm {norm}")
    without = "; the teacher's bridge was left out" if setup.roles is not None else ""
    parts = "student, teacher and loss" if setup.recipe.teacher is not None else "student and loss"
    seconds = time.perf_counter() - began
    return f"one small step of {parts}: loss {loss:.3f}, gradient norm {short(norm)}, {seconds:.1f} s{without}"


def _step(setup: Setup, topology: Topology, folder: Path) -> tuple[float, float]:
    recipe = setup.recipe
    config = tiny_config(setup.student_config, vocab_size=VOCAB, min_layers=2)
    stage = _teacher_stage(setup, topology, folder)  # before the student: a live `zero.Init` would partition it too
    batch = _batch(topology, document_mask=recipe.data.document_mask)
    student = StudentEngine(
        config,
        section=StudentSection(
            config={},
            vocab_multiple=math.lcm(recipe.student.vocab_multiple, topology.world),
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
    teacher: Teacher = NoTeacher()
    if stage is not None:
        dtype = torch_dtype(recipe.train.precision)
        teacher = ColocatedTeacher(
            pipeline=TeacherPipeline(stage, topology),
            head=head_rows(folder, student.head.vocab, dtype=dtype, device=topology.device),
            logits=logit_transform(load_config(folder, what="teacher")),
        )
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


def _teacher_stage(setup: Setup, topology: Topology, folder: Path) -> TeacherStage | None:
    """A stage of a small teacher in `folder`; for stored targets it has the student's architecture."""
    if setup.recipe.teacher is None:
        return None
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


def _batch(topology: Topology, *, document_mask: bool) -> TokenBatch:
    generator = torch.Generator().manual_seed(SEED + topology.rank)
    sequence = torch.randint(0, VOCAB, (1, SEQUENCE + 1), generator=generator)
    tokens = sequence[:, :-1].contiguous()
    starts = torch.zeros_like(tokens, dtype=torch.bool)
    starts[:, 0] = starts[:, SEQUENCE // 2] = True
    return TokenBatch(
        tokens=tokens,
        labels=sequence[:, 1:].contiguous(),
        slots=torch.tensor([topology.rank]),
        digests=token_digest(tokens),
        starts=starts,
        document_mask=document_mask,
    )
