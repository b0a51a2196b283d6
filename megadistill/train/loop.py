"""The training loop, top to bottom: one page that joins the rooms. It knows no mathematics."""

import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch

from megadistill import timeline
from megadistill.config import Recipe
from megadistill.data import TokenStream
from megadistill.distributed.collectives import all_gather_rows, all_reduce_sum, barrier
from megadistill.distributed.launch import Launch
from megadistill.distributed.topology import Topology, process_groups
from megadistill.distributed.watchdog.parent import terminate_with_parent
from megadistill.errors import OperatorFault, RankUserError, RestartFault, UserError
from megadistill.models.families import logit_transform
from megadistill.student.engine import StudentEngine
from megadistill.train.lookahead import Lookahead
from megadistill.train.objective import Objective
from megadistill.train.resilience.anomalies import LossMonitor, SkippedSteps, not_finite
from megadistill.train.resilience.preemption import StopRequests, ignore_stop_signals, stop_reason
from megadistill.train.resilience.recovery import Recovery
from megadistill.train.resilience.sdc import FrozenWeights, require_sound_student
from megadistill.train.resilience.stragglers import Stragglers
from megadistill.train.schedule import scheduled
from megadistill.train.setup.run_folder import (
    describe,
    keep_student_config,
    keep_tokenizer,
    started_from,
    write_description,
)
from megadistill.train.setup.setup import Setup, prepare, where_it_runs
from megadistill.train.step import StepOutcome, train_step
from megadistill.train.teacher.placement import ahead_of, finish, keeping, pipeline_of, serve, teacher_of
from megadistill.train.teacher.probe import check_probe
from megadistill.train.teacher.targets import Lesson, StoredTeacher, Teacher, frozen_weights, lessons
from megadistill.train.telemetry.histograms import histograms
from megadistill.train.telemetry.metrics import Meter, RunLog
from megadistill.train.telemetry.timeline_capture import recorded, recorded_service
from megadistill.types import Cursor, TokenBatch


@dataclass(frozen=True)
class Outcome:
    """How a run ended: after which step, whether that was the last one, and what asked it to stop before it."""

    step: int
    done: bool
    stopped_by: str | None = None


def train(recipe: Recipe, *, stop_after: int | None = None) -> Outcome | None:
    """Runs a recipe on the ranks that the launcher started, from the newest checkpoint of its folder that holds.

    `stop_after`: save and stop after this step; the same command without it goes on. None on a rank of the teacher's
    own.

    Raises:
        UserError: the recipe does not fit the launch, the data, the teacher or the folder; nothing was started.
        OperatorFault, RestartFault: see `errors`.
    """
    launch = Launch.from_environment()
    setup = prepare(recipe, launch)
    minutes = recipe.distributed.timeout_minutes
    terminate_with_parent(60 * minutes)
    with process_groups(launch, vocab_group=setup.group_size, timeout_minutes=minutes, roles=setup.roles) as topology:
        try:
            if topology.role == "teacher":
                with ignore_stop_signals(topology.rank), recorded_service(setup, topology):
                    serve(setup, topology)
                return None
            return run(setup, topology, stop_after)
        except UserError as error:
            raise RankUserError(f"rank {topology.rank}: {error}") from error


def run(setup: Setup, topology: Topology, stop_after: int | None) -> Outcome:
    """The run of a setup on an initialised world. Collective; see `train`."""
    minutes = setup.recipe.run.time_limit_minutes
    with StopRequests(setup.folder, rank=topology.rank, first=topology.is_first, minutes=minutes) as stops:
        recovery = Recovery(setup, topology)
        topology.watchdog.open_stack_file(setup.folder, recovery.attempt.number)
        topology.watchdog.enter_phase("starting", 0, limit=60 * setup.recipe.distributed.timeout_minutes)
        topology.watchdog.on_abort = partial(recovery.ended, rank=topology.rank, exit_code=RestartFault.exit_code)
        try:
            this = Run(setup, topology, recovery, stops)
            outcome = this.until(min(setup.recipe.train.steps, stop_after or setup.recipe.train.steps))
        except (RestartFault, OperatorFault) as fault:
            recovery.ended(str(fault), rank=topology.rank, exit_code=fault.exit_code)
            raise
        finally:
            recovery.close()
        stops.acknowledge()
    return outcome


class Run:
    """One attempt at a run, on one of its ranks. All of them call the same methods."""

    def __init__(self, setup: Setup, topology: Topology, recovery: Recovery, stops: StopRequests) -> None:
        self.step = 0
        """The last step that was taken."""
        self._setup, self._topology, self._recovery, self._stops = setup, topology, recovery, stops
        self._student, self._teacher = build(setup, topology)
        torch.manual_seed(setup.recipe.run.seed + topology.rank)  # nothing draws today; a checkpoint holds its state
        if topology.is_first:
            first = started_from(setup.folder, setup.recipe.student.weights)
            write_description(setup.folder, describe(setup.recipe.snapshot(), setup.profile, started_from=first))
            keep_tokenizer(setup.folder, setup.data)
            keep_student_config(setup.folder, setup.recipe.student)
        self._objective = objective_of(setup)
        self._meter = meter_of(setup, topology)
        self._frozen = self._frozen_weights()

    def _frozen_weights(self) -> FrozenWeights | None:
        """The teacher's, to be compared with what was loaded; None where nobody asks, or no teacher is here."""
        if not isinstance(self._teacher, Teacher) or not self._setup.recipe.resilience.teacher_hash_every:
            return None
        frozen = frozen_weights(self._teacher)
        frozen.require_same_replicas(self._topology)
        return frozen

    def until(self, last: int) -> Outcome:
        """Takes steps up to `last`, or until something asks the run to stop."""
        setup, topology = self._setup, self._topology
        outcome = None
        while outcome is None:
            self.step, cursor = self._recovery.resume(self._student)
            if isinstance(self._teacher, Teacher) and self.step < last:
                self._teacher = keeping(setup, self._teacher, topology)  # anew after a rollback, which stored some
            outcome = self._line(last, cursor)
        if isinstance(self._teacher, Teacher):
            self._teacher.pipeline.close()
        if outcome.done and isinstance(self._teacher, Teacher) and self._teacher.store is not None:
            barrier(topology.world_group)
            if topology.is_first:
                print(finish(setup))
        return outcome

    def _line(self, last: int, cursor: Cursor | None) -> Outcome | None:
        """From a checkpoint to the end of the run; None: a rollback ends the line before it."""
        setup, recovery, resilience = self._setup, self._recovery, self._setup.recipe.resilience
        monitor = recovery.loss_monitor(self.step)
        skipped = SkippedSteps(resilience.max_skipped_steps)
        skips = [rollback.skipped_slots for rollback in recovery.rollbacks]
        stream = stream_of(setup, self._topology, start=cursor, skips=skips)
        limit = max(
            60 * setup.recipe.distributed.timeout_minutes, resilience.step_timeout_seconds
        )  # a first step compiles, and warms up
        next_slots = deque([stream.start.next_slot], maxlen=resilience.rollback_steps + 1)
        stragglers, waited_before = Stragglers(self._topology) if resilience.straggler_every else None, 0.0
        with run_log(setup, self._topology, start_step=self.step) as log, ExitStack() as stack:
            self._introduce(log)
            self._probe(cursor, skips, log)
            stopped_by = self._asked_before_a_step()
            if stopped_by is not None:
                return self._stopped(stopped_by, log)
            ahead = Lookahead(islice(stream, last - self.step), micro_batch=setup.recipe.train.micro_batch)
            taught = stack.enter_context(closing(lessons(self._teacher, ahead.micro_batches())))
            recording = stack.enter_context(recorded(setup, self._topology, log.say))
            while self.step < last:
                self.step += 1
                recording.step(self.step)
                self._stamp("step", limit=limit)
                limit = resilience.step_timeout_seconds
                began, read_before = time.perf_counter(), ahead.waited  # a step is everything up to the next one
                batch, cursor = ahead.step()
                if setup.recipe.data.on_corrupt_sample == "mask":
                    cursor = self._journal_masked(stream, batch, cursor)
                rate, outcome = self._take_step(batch, taught)
                recovery.require_newest(outcome.flags)
                seconds = time.perf_counter() - began  # the step ended in a device sync: its gradient norm was read
                with timeline.span(timeline.HOST, "report"):
                    self._report(outcome, rate, seconds, ahead.waited - read_before, log)
                skipped.count(self.step, outcome.metrics, outcome.grad_norm)
                for said in recovery.poll(outcome.flags):
                    log.say(said)
                if stragglers is not None and self.step % resilience.straggler_every == 0:
                    self._name(stragglers.check(ahead.waited - waited_before), log)
                    waited_before = ahead.waited
                if self._frozen is not None and self.step % resilience.teacher_hash_every == 0:
                    self._frozen.require_unchanged(self._topology)
                next_slots.append(cursor.next_slot)
                if not outcome.skipped and self._maybe_roll_back(monitor, outcome, list(next_slots), log):
                    return None
                stopped_by = stop_reason(outcome.flags)
                if stopped_by is not None:
                    recovery.events.write("stop_requested", step=self.step, reason=stopped_by)
                ends = self.step == last or stopped_by is not None
                if ends or self.step % setup.recipe.train.checkpoint_every == 0:
                    self._save(cursor, log, last=ends)
                if stopped_by is not None and self.step < last:
                    return self._stopped(stopped_by, log)
            return self._ended(log)

    def _introduce(self, log: RunLog) -> None:
        setup = self._setup
        log.say(where_it_runs(setup, self._topology))
        log.say(self._recovery.mark_resumed(self.step))
        if isinstance(self._teacher, Teacher):
            log.say(ahead_of(setup, self._teacher))

    def _probe(self, cursor: Cursor | None, skips: Sequence[tuple[int, int]], log: RunLog) -> None:
        """Whether the teacher is the one that the run was started with."""
        if not isinstance(self._teacher, Teacher):
            return
        setup, topology = self._setup, self._topology

        def rows() -> TokenBatch:
            stream = stream_of(
                setup, topology, start=cursor, skips=skips
            )  # its own: what is damaged is the run's to find
            first = stream.start.next_slot
            return stream.batch(range(first, first + setup.recipe.train.micro_batch))

        log.say(check_probe(setup, self._teacher, self._student.head.vocab, topology, rows=rows))

    def _take_step(self, batch: TokenBatch, taught: Iterator[Lesson]) -> tuple[float, StepOutcome]:
        """The learning rate, and what the step computed."""
        section, every = self._setup.recipe.train, self._setup.recipe.resilience.recompute_every
        rate = scheduled(
            section.optimizer.learning_rate, step=self.step, steps=section.steps, schedule=section.schedule
        )
        outcome = train_step(
            self._student,
            self._teacher,
            taught,
            step=self.step,
            accumulation=self._setup.accumulation,
            valid_tokens=batch.valid_tokens,
            learning_rate=rate,
            objective=self._objective,
            topology=self._topology,
            flags=lambda: {**self._stops.counts(), **self._recovery.flags()},
            recompute=every > 0 and self.step % every == 0,
        )
        return rate, outcome

    def _report(self, outcome: StepOutcome, rate: float, seconds: float, data_seconds: float, log: RunLog) -> None:
        if outcome.skipped:
            reason = not_finite(outcome.metrics, outcome.grad_norm)
            self._recovery.events.write("step_skipped", step=self.step, reason=reason)
            log.say(f"step {self.step}: {reason}: this step moved nothing")
            return
        self._recovery.step_done(seconds)
        report = self._meter.report(
            self.step,
            outcome.metrics,
            rate,
            outcome.grad_norm,
            seconds,
            data_seconds,
            outcome.teacher_seconds,
            outcome.diagnostics,
        )
        log.step(report, weights=self._objective.moving_weights(self.step))
        every = self._setup.recipe.train.histograms_every
        if every > 0 and self.step % every == 0:
            log.histograms(self.step, histograms(self._student.distributions(), self._topology))

    def _journal_masked(self, stream: TokenStream, batch: TokenBatch, cursor: Cursor) -> Cursor:
        masked = gather_masked_slots(batch, self._topology)
        if masked:
            self._recovery.events.write("samples_masked", step=self.step, slots=masked)
        return stream.with_masked(cursor, masked)

    def _maybe_roll_back(self, monitor: LossMonitor, outcome: StepOutcome, next_slots: list[int], log: RunLog) -> bool:
        """Looks at a step's numbers; whether the run goes back to before it. `next_slots`: before each of the last."""
        recovery, metrics = self._recovery, outcome.metrics
        if self._setup.teacher_config is not None and self._setup.recipe.loss.targets is None:
            alarm = monitor.teacher_drift(self.step, metrics["teacher_ce"], (next_slots[-2], next_slots[-1] - 1))
            if alarm is not None:
                recovery.events.write(alarm.event, step=self.step, **alarm.values)
                log.say(alarm.line)
                if self._frozen is not None:
                    self._frozen.require_unchanged(self._topology)
                    held = "weights are" if self._topology.bridge is None else "rows of the head, here, are"
                    log.say(f"the teacher's {held} those that were loaded")
        spike = monitor.spike(self.step, metrics["loss"])
        if spike is None:
            return False
        recovery.events.write(spike.event, step=self.step, **spike.values)
        log.say(spike.line)
        slots_before = {self.step - back: slot for back, slot in enumerate(reversed(next_slots[:-1]))}
        rollback, why = recovery.roll_back(spike, self.step, slots_before=slots_before, slots_end=next_slots[-1])
        if why:
            log.say(why)
        return rollback is not None

    def _stamp(self, phase: str, *, limit: float) -> None:
        self._topology.watchdog.enter_phase(phase, self.step, limit=limit)
        self._recovery.step = self.step

    def _name(self, stragglers: list[str], log: RunLog) -> None:
        for line in stragglers:
            self._recovery.events.write("straggler", step=self.step, message=line)
            log.say(f"step {self.step}: {line}")

    def _save(self, cursor: Cursor, log: RunLog, *, last: bool) -> None:
        self._stamp("saving", limit=60 * self._setup.recipe.distributed.timeout_minutes)
        with timeline.span(timeline.SAVE, "save"):
            self._save_now(cursor, log, last=last)

    def _save_now(self, cursor: Cursor, log: RunLog, *, last: bool) -> None:
        require_sound_student(self._student, self._topology)
        if isinstance(self._teacher, Teacher) and self._teacher.store is not None:
            self._teacher.store.flush()  # before a checkpoint says that these slots are done
        for said in self._recovery.save(self._student, self.step, cursor, last=last):
            log.say(said)

    def _asked_before_a_step(self) -> str | None:
        """What has asked any rank to stop while the run was starting. Collective."""
        counts = self._stops.counts()
        told = torch.tensor(list(counts.values()), device=self._topology.device)
        summed = all_reduce_sum(told, self._topology.world_group).tolist()
        return stop_reason(dict(zip(counts, summed, strict=True)))

    def _stopped(self, stopped_by: str, log: RunLog) -> Outcome:
        self._recovery.events.write("stopped", step=self.step, reason=stopped_by)
        log.say(f"stopped after step {self.step}, as {stopped_by} asked; {self._recovery.goodput()}")
        return Outcome(step=self.step, done=False, stopped_by=stopped_by)

    def _ended(self, log: RunLog) -> Outcome:
        done = self.step >= self._setup.recipe.train.steps
        if done:
            self._recovery.done(self.step)
        log.say(self._recovery.goodput())
        return Outcome(step=self.step, done=done)


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


def stream_of(
    setup: Setup, topology: Topology, *, start: Cursor | None, skips: Sequence[tuple[int, int]] = ()
) -> TokenStream:
    """The tokens of this rank; `skips` are left out beside those of the recipe."""
    data = setup.recipe.data
    return TokenStream(
        setup.data,
        seed=data.seed,
        batch_slots=setup.recipe.train.global_batch,
        rank=topology.rank,
        world_size=topology.world,
        start=start,
        document_mask=data.document_mask,
        on_corrupt_sample=data.on_corrupt_sample,
        max_masked_per_million=data.max_masked_per_million,
        skips=[*((first, stop) for first, stop in data.skip), *skips],
        prefetch=data.prefetch,
    )


def gather_masked_slots(batch: TokenBatch, topology: Topology) -> list[int]:
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
    log = RunLog(setup.folder, setup.recipe, start_step=start_step, topology=topology)
    try:
        yield log
    finally:
        log.close()
