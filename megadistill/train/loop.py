"""The training loop, top to bottom: one page that joins the rooms. It knows no mathematics."""

import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from megadistill.comm.collectives import all_gather_rows, all_reduce_sum, everywhere
from megadistill.comm.topology import Launch, Topology, joined
from megadistill.config import Recipe
from megadistill.data import TokenStream
from megadistill.errors import OperatorFault, RankUserError, UserError
from megadistill.model.families import logit_transform
from megadistill.records import Cursor, TokenBatch
from megadistill.student.engine import PRECISIONS, StudentEngine
from megadistill.teacher import (
    RemoteTeacher,
    RequestForm,
    TeacherPipeline,
    TeacherServer,
    TeacherStage,
    Wire,
    head_rows,
    unknown_bias,
)
from megadistill.train.checkpoint import RNG_KEY, newest_checkpoint, save_checkpoint
from megadistill.train.lookahead import Lookahead
from megadistill.train.metrics import Meter, RunLog
from megadistill.train.objective import Objective
from megadistill.train.run_folder import describe, keep_tokenizer, versions, write_description
from megadistill.train.schedule import scheduled
from megadistill.train.setup import Setup, prepare, where_it_runs
from megadistill.train.step import Teacher, lessons, train_step


@dataclass(frozen=True)
class Outcome:
    """How a run ended: after which step, and whether that was the last one."""

    step: int
    done: bool


def train(recipe: Recipe, *, stop_after: int | None = None) -> Outcome | None:
    """Runs a recipe on the ranks that the launcher started, from the newest checkpoint of its folder if there is one.

    `stop_after`: save and stop after this step; the same command without it goes on. None on a rank of the teacher's
    own.

    Raises:
        UserError: the recipe does not fit the launch, the data, the teacher or the folder; nothing was started.
        OperatorFault, RestartFault: see `errors`.
    """
    launch = Launch.from_environment()
    setup = prepare(recipe, launch)
    minutes = recipe.comm.timeout_minutes
    with joined(launch, vocab_group=setup.group_size, timeout_minutes=minutes, roles=setup.roles) as topology:
        try:
            if topology.role == "teacher":
                serve(setup, topology)
                return None
            return run(setup, topology, stop_after)
        except UserError as error:
            raise RankUserError(f"rank {topology.rank}: {error}") from error


def run(setup: Setup, topology: Topology, stop_after: int | None) -> Outcome:
    """The run of a setup on an initialised world. Collective; see `train`."""
    recipe, section = setup.recipe, setup.recipe.train
    student, teacher = build(setup, topology)
    step, cursor = resume(setup.folder / "checkpoints", student, topology)
    if topology.is_first:
        write_description(setup.folder, describe(recipe.snapshot(), setup.profile))
        keep_tokenizer(setup.folder, setup.data)
    stream = stream_of(setup, topology, start=cursor)
    meter = meter_of(setup, topology)
    objective = objective_of(setup)
    last = min(section.steps, stop_after or section.steps)
    with run_log(setup, topology, start_step=step) as log, ExitStack() as stack:
        log.say(where_it_runs(setup, topology))
        log.say(f"{setup.folder}: {'starting' if step == 0 else f'going on after step {step}'}, {section.steps} steps")
        if teacher is not None:
            log.say(ahead_of(setup, teacher))
        ahead = Lookahead(islice(stream, last - step), micro_batch=section.micro_batch)
        taught = stack.enter_context(closing(lessons(teacher, ahead.micro_batches())))
        while step < last:
            step += 1
            began, read_before = time.perf_counter(), ahead.waited  # a step is everything up to the next one
            batch, cursor = ahead.step()
            if recipe.data.on_fault == "quarantine":
                cursor = stream.with_holes(cursor, holes_of_all(batch, topology))
            rate = scheduled(section.adamw.learning_rate, step=step, steps=section.steps, schedule=section.schedule)
            outcome = train_step(
                student,
                teacher,
                taught,
                step=step,
                accumulation=setup.accumulation,
                valid_tokens=batch.valid_tokens,
                learning_rate=rate,
                objective=objective,
                topology=topology,
            )
            seconds = time.perf_counter() - began  # the step ended in a device sync: the gradient norm was read
            report = meter.report(
                step,
                outcome.metrics,
                rate,
                outcome.grad_norm,
                seconds,
                ahead.waited - read_before,
                outcome.teacher_seconds,
                outcome.diagnostics,
            )
            log.step(report, weights=objective.moving_weights(step))
            if step % section.checkpoint_every == 0 or step == last:
                log.say(f"saved {save(setup, student, step, cursor, topology)}")
    return Outcome(step=step, done=step >= section.steps)


def build(setup: Setup, topology: Topology) -> tuple[StudentEngine, Teacher | None]:
    """Student and teacher of this rank. The teacher's stage comes first: a live `zero.Init` would partition it too."""
    recipe = setup.recipe
    dtype, device = PRECISIONS[recipe.train.precision], topology.device
    pipeline = pipeline_of(setup, topology)
    student = StudentEngine(
        setup.student_config,
        section=recipe.student,
        train=recipe.train,
        profile=setup.profile,
        vocab_size=setup.data.vocab_size,
        seed=recipe.run.seed,
        accumulation=setup.accumulation,
        topology=topology,
    )
    if pipeline is None:
        return student, None
    assert recipe.teacher is not None
    path = Path(recipe.teacher.path)
    vocab, ids = student.head.vocab, setup.vocab_map
    teacher = Teacher(
        pipeline=pipeline,
        head=head_rows(path, vocab, dtype=dtype, device=device, ids=ids),
        bias=None if ids is None else unknown_bias(vocab, ids, device=device),
        logits=logit_transform(setup.teacher_config),
        ids=ids,
    )
    return student, teacher


def pipeline_of(setup: Setup, topology: Topology) -> TeacherPipeline | RemoteTeacher | None:
    """What answers this rank's micro-batches: its stage and its group's, or ranks of the teacher's own."""
    teacher = setup.recipe.teacher
    if teacher is None:
        return None
    if topology.bridge is None:
        stage = stage_of(setup, topology, topology.group_rank, topology.group_size)
        return TeacherPipeline(stage, topology)
    return RemoteTeacher(topology.bridge, *forms_of(setup), queue=teacher.queue, device=topology.device)


def serve(setup: Setup, topology: Topology) -> None:
    """A rank of the teacher's own, until the student's ranks need no more."""
    teacher, bridge = setup.recipe.teacher, topology.bridge
    assert teacher is not None
    assert bridge is not None
    stage = stage_of(setup, topology, topology.rank % topology.group_size, topology.group_size)
    TeacherServer(stage, bridge, *forms_of(setup), queue=teacher.queue).serve()


def stage_of(setup: Setup, topology: Topology, stage: int, stages: int) -> TeacherStage:
    assert setup.recipe.teacher is not None
    dtype = PRECISIONS[setup.recipe.train.precision]
    path = Path(setup.recipe.teacher.path)
    return TeacherStage.load(path, stage=stage, stages=stages, dtype=dtype, device=topology.device)


def forms_of(setup: Setup) -> tuple[RequestForm, Wire]:
    """How micro-batches and hidden states travel between the student's ranks and the teacher's."""
    recipe = setup.recipe
    assert recipe.teacher is not None
    assert setup.teacher_config is not None
    form = RequestForm(recipe.train.micro_batch, setup.data.sequence_length, recipe.data.document_mask)
    width, dtype = int(setup.teacher_config.hidden_size), PRECISIONS[recipe.train.precision]
    return form, Wire(width, dtype, float8=recipe.teacher.wire == "float8")


def ahead_of(setup: Setup, teacher: Teacher) -> str:
    """One line: how far the teacher runs ahead, and what that holds."""
    pipeline, rows = teacher.pipeline, setup.recipe.train.micro_batch
    held = pipeline.bytes_in_flight(rows, setup.data.sequence_length)
    return (
        f"the teacher runs {pipeline.ahead} micro-batches ahead; a rank holds {held / (1 << 20):.1f} MiB of hidden "
        "states in flight"
    )


def objective_of(setup: Setup) -> Objective:
    recipe = setup.recipe
    return Objective(
        loss=recipe.loss,
        steps=recipe.train.steps,
        seed=recipe.run.seed,
        student_logits=logit_transform(setup.student_config),
    )


def resume(folder: Path, student: StudentEngine, topology: Topology) -> tuple[int, Cursor | None]:
    """Restores the newest checkpoint; (step, cursor) to go on from, (0, None) where there is none. Collective.

    Raises:
        OperatorFault: the newest checkpoint is damaged, or not every rank sees the same one.
    """
    checkpoint, problem = None, None
    try:
        checkpoint = newest_checkpoint(folder)
        if checkpoint is not None and topology.is_first:
            checkpoint.verify()
    except OperatorFault as fault:
        problem = fault
    # Every rank must have opened the same one: ranks that see different folders would train on from different steps.
    step = checkpoint.manifest.step if checkpoint is not None else 0
    told = torch.tensor(step if topology.is_first else 0, device=topology.device)
    first_step = int(all_reduce_sum(told, topology.world_group))
    if problem is None and step != first_step:
        problem = OperatorFault(
            f"rank {topology.rank} sees step {step} as the newest checkpoint of {folder}, rank 0 sees step "
            f"{first_step}: run.folder must be one folder that every node shares"
        )
    if not everywhere(problem is None, topology.device, topology.world_group):
        raise problem or OperatorFault(f"the newest checkpoint of {folder} cannot be used: another rank says why")
    if checkpoint is None:
        return 0, None
    student.load_local_state(checkpoint.read)
    rng = checkpoint.rng_state(topology.rank, topology.world)
    if rng is not None:
        torch.set_rng_state(rng)
    return step, Cursor.from_state(checkpoint.manifest.cursor)


def save(setup: Setup, student: StudentEngine, step: int, cursor: Cursor, topology: Topology) -> Path:
    """A checkpoint of exactly this step. Collective."""
    return save_checkpoint(
        setup.folder / "checkpoints",
        {**student.local_state(), RNG_KEY: torch.get_rng_state()},
        step=step,
        tokens=step * setup.tokens_per_step,
        vocab_size=setup.data.vocab_size,
        cursor=cursor.state(),
        parameters=student.parameters,
        versions=versions(),
        topology=topology,
    )


def stream_of(setup: Setup, topology: Topology, *, start: Cursor | None) -> TokenStream:
    data = setup.recipe.data
    return TokenStream(
        setup.data,
        seed=data.seed,
        batch_slots=setup.recipe.train.global_batch,
        rank=topology.rank,
        world_size=topology.world,
        start=start,
        document_mask=data.document_mask,
        on_fault=data.on_fault,
        max_holes_per_million=data.max_holes_per_million,
        skips=[(first, stop) for first, stop in data.skip],
        prefetch=data.prefetch,
    )


def holes_of_all(batch: TokenBatch, topology: Topology) -> list[int]:
    """The slots of a global batch that were found damaged, by any rank; this rank says what it found. Collective."""
    for _, message in batch.faults:
        print(f"rank {topology.rank}: {message}: masked", file=sys.stderr)
    found = torch.full((len(batch),), -1, dtype=torch.int64)
    slots = [slot for slot, _ in batch.faults]
    found[: len(slots)] = torch.tensor(slots, dtype=torch.int64)
    everyones = all_gather_rows(found.to(topology.device), topology.world_group)
    return [slot for slot in everyones.tolist() if slot >= 0]


def meter_of(setup: Setup, topology: Topology) -> Meter:
    return Meter(
        student=setup.student_config,
        teacher=setup.teacher_config,
        sequence_length=setup.data.sequence_length,
        tokens_per_step=setup.tokens_per_step,
        precision=setup.recipe.train.precision,
        topology=topology,
    )


@contextmanager
def run_log(setup: Setup, topology: Topology, start_step: int) -> Iterator[RunLog]:
    """The run's log, closed however the run ends."""
    log = RunLog(
        setup.folder,
        start_step=start_step,
        steps=setup.recipe.train.steps,
        log_every=setup.recipe.train.log_every,
        loss=setup.recipe.loss if setup.recipe.objective == "distill" else None,
        topology=topology,
    )
    try:
        yield log
    finally:
        log.close()
