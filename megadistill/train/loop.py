"""The training loop, top to bottom: one page that joins the rooms. It knows no mathematics."""

import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from megadistill.comm.collectives import all_gather_rows, all_reduce_sum, barrier, everywhere
from megadistill.comm.topology import Launch, Topology, joined
from megadistill.config import Recipe
from megadistill.data import TokenStream
from megadistill.errors import OperatorFault, RankUserError, UserError
from megadistill.model.families import logit_transform
from megadistill.records import Cursor, TokenBatch
from megadistill.student.engine import StudentEngine
from megadistill.train.checkpoint import RNG_KEY, newest_checkpoint, save_checkpoint
from megadistill.train.lookahead import Lookahead
from megadistill.train.metrics import Meter, RunLog
from megadistill.train.objective import Objective
from megadistill.train.placement import ahead_of, finish, keeping, pipeline_of, serve, teacher_of
from megadistill.train.run_folder import describe, keep_tokenizer, versions, write_description
from megadistill.train.schedule import scheduled
from megadistill.train.setup import Setup, prepare, where_it_runs
from megadistill.train.step import train_step
from megadistill.train.teaching import StoredTeacher, Teacher, lessons


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
    if isinstance(teacher, Teacher) and step < last:
        teacher = keeping(setup, teacher, topology)
    with run_log(setup, topology, start_step=step) as log, ExitStack() as stack:
        log.say(where_it_runs(setup, topology))
        log.say(f"{setup.folder}: {'starting' if step == 0 else f'going on after step {step}'}, {section.steps} steps")
        if isinstance(teacher, Teacher):
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
                if isinstance(teacher, Teacher) and teacher.store is not None:
                    teacher.store.flush()  # before a checkpoint says that these slots are done
                log.say(f"saved {save(setup, student, step, cursor, topology)}")
    if step >= section.steps and isinstance(teacher, Teacher) and teacher.store is not None:
        barrier(topology.world_group)
        if topology.is_first:
            print(finish(setup))
    return Outcome(step=step, done=step >= section.steps)


def build(setup: Setup, topology: Topology) -> tuple[StudentEngine, Teacher | StoredTeacher | None]:
    """Student and teacher of this rank. The teacher's stage comes first: a live `zero.Init` would partition it too."""
    recipe = setup.recipe
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
    return student, teacher_of(setup, pipeline, student.head.vocab, topology)


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
