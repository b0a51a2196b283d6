"""The training loop: setup, then the steps, each followed by the hooks."""

import logging
import math
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice

import torch

from megadistill import logs, timeline
from megadistill.config.auto import describe_choices
from megadistill.config.recipe import EXTERNAL_TRACKERS, Recipe
from megadistill.data import TokenStream
from megadistill.data.stream.segments import steps_to
from megadistill.distributed.collectives import all_reduce_sum, broadcast_object
from megadistill.distributed.groups.guard import ReplicasChanged
from megadistill.distributed.launch import SeparateReplica
from megadistill.distributed.members import Epoch, Members
from megadistill.distributed.topology import Topology
from megadistill.errors import OperatorFault, RestartFault, UserError
from megadistill.events import last_step
from megadistill.redaction import printable
from megadistill.timeline.clock import clock_for
from megadistill.timeline.stopwatch import Stopwatch
from megadistill.tracking.process import CLOSE_SECONDS, STOP_SECONDS, TrackerProcesses
from megadistill.train.build import (
    build,
    check_teacher,
    held_out_of,
    launched,
    meter_of,
    objective_of,
    stream_of,
    write_run_files,
)
from megadistill.train.checkpoint.format import Checkpoint
from megadistill.train.checkpoint.heartbeat import refuse_running
from megadistill.train.checkpoint.local_tier import LocalCheckpoint
from megadistill.train.hooks.checkpoints import Checkpoints
from megadistill.train.hooks.diverged_student import DivergedStudentCheck
from megadistill.train.hooks.hook import Hook, Request, StepEvent
from megadistill.train.hooks.loss_anomalies import LossAnomalies
from megadistill.train.hooks.non_finite import NonFiniteGuard
from megadistill.train.hooks.norm_log import NormLog
from megadistill.train.hooks.profile import ProfiledSteps
from megadistill.train.hooks.starved_experts import StarvedExperts
from megadistill.train.hooks.step_log import StepLog
from megadistill.train.hooks.stop import StopOnRequest
from megadistill.train.hooks.straggler_check import StragglerCheck
from megadistill.train.hooks.teacher_weights import TeacherWeightsCheck
from megadistill.train.hooks.unlabelled import UnlabelledGuard
from megadistill.train.hooks.validation_hook import ValidationHook, ValidationPlan
from megadistill.train.lookahead import StepBatches
from megadistill.train.resilience.anomalies import LossMonitor
from megadistill.train.resilience.masked_samples import masked_cursor, masked_flag
from megadistill.train.resilience.preemption import StopRequests, ignore_stop_signals, stop_reason
from megadistill.train.resilience.recovery import Recovery
from megadistill.train.resilience.sdc import require_sound_student
from megadistill.train.resume_point import ResumePoint
from megadistill.train.router_losses import describe_routers
from megadistill.train.schedule import learning_rate, progress
from megadistill.train.setup.plausibility import implausible_settings
from megadistill.train.setup.recipe_changes import recipe_changes
from megadistill.train.setup.setup import Setup, describe_layout
from megadistill.train.setup.step_shape import StepShape, stable_steps_of, student_config_of_entry
from megadistill.train.setup.teacher_files import of_teacher
from megadistill.train.step import train_step
from megadistill.train.teacher.placement import run_teacher_server
from megadistill.train.teacher.probe import TeacherCheck, worse_than_uniform
from megadistill.train.teacher.several import RowGroups
from megadistill.train.telemetry.metrics import RunLog
from megadistill.train.telemetry.profile_capture import ProfileCapture
from megadistill.train.telemetry.timeline_capture import TimelineCapture, capture_teacher_server
from megadistill.types import Cursor, TokenBatch

logger = logging.getLogger(__name__)

WAITING_REPLICAS = "waiting_replicas"
"""Flag of a step: ranks that know of a replica that waits to join."""


@dataclass(frozen=True)
class RunOutcome:
    """How a run ended."""

    step: int
    """The last step that was taken."""
    done: bool
    """Whether it is the recipe's last."""
    stopped_by: str | None = None
    """The stop request that ended the run; None for its last step, or `stop_after`."""
    diverged: bool = False
    """Whether the student diverged, in this attempt or an earlier one."""
    plateau: bool = False
    """Whether `validation.stop` ended the run before its last step."""


def train(recipe: Recipe, *, stop_after: int | None = None, after: int | None = None) -> RunOutcome | None:
    """Trains on the ranks that the launcher started, from the latest valid checkpoint of the run folder.

    Args:
        stop_after: save and stop after this step; the same command without it resumes.
        after: the run's newest attempt, which is not alive (0: none); None: one that is alive ends.

    Returns:
        None on a rank of the teacher's own.

    Raises:
        UserError: the recipe does not fit the launch, the data, the teacher or the folder; nothing was started.
        OperatorFault, RestartFault: see `errors`.
    """
    with launched(recipe) as (setup, topology):
        if topology.role == "teacher":
            topology.watchdog.write_collectives_to(setup.folder / "stacks" / "teacher-collectives-")
            with ignore_stop_signals(topology.rank), capture_teacher_server(setup, topology):
                run_teacher_server(setup, topology)
            return None
        if setup.separate is None:
            return run(setup, topology, stop_after, after)
        return _run_separate(setup, topology, setup.separate, stop_after, takes_over=after is None)


def run(setup: Setup, topology: Topology, stop_after: int | None, after: int | None = None) -> RunOutcome:
    """Trains on process groups that exist. Collective; see `train`."""
    with _stop_requests(setup, topology) as stops:
        outcome = _attempt(setup, topology, stops, ResumePoint(), stop_after, after)
        stops.acknowledge()
    return outcome


def _stop_requests(setup: Setup, topology: Topology) -> StopRequests:
    minutes = setup.recipe.run.time_limit_minutes
    return StopRequests(setup.folder, rank=topology.rank, first=topology.is_first, minutes=minutes)


def _run_separate(
    setup: Setup, alone: Topology, separate: SeparateReplica, stop_after: int | None, *, takes_over: bool
) -> RunOutcome | None:
    """Trains as one of the replicas that are launches of their own. Collective over it.

    None: the run that it was to join has ended.
    """
    members = Members(separate, alone, minimum=setup.recipe.distributed.min_replicas)  # a signal ends its wait
    with _stop_requests(setup, alone) as stops:
        members.is_stopped = stops.is_requested
        outcome = _epochs(setup, alone, stops, members, stop_after, takes_over=takes_over)
        if outcome is not None:
            stops.acknowledge()
    return outcome


def _epochs(
    setup: Setup, alone: Topology, stops: StopRequests, members: Members, stop_after: int | None, *, takes_over: bool
) -> RunOutcome | None:
    """An attempt for each epoch of the run's replicas, with the models that are in memory. See `members`."""
    point, ended = ResumePoint(), False
    try:
        if members.joins:
            point.models = build(setup.with_replicas(1), alone)
        while True:
            point.epoch = members.next_epoch(point.steps)
            if point.epoch is None:
                ended = True
                return None
            topology = point.epoch.topology
            _log_run(setup, point.epoch)
            stops.first, own = topology.is_first, setup.with_replicas(topology.replicas)
            stops.somebody_waits = lambda: members.somebody_waits
            try:
                _require_one_recipe(setup, topology)
                after = None if takes_over or point.epoch.number > 1 else _free_folder(own, topology)
                outcome = _attempt(own, topology, stops, point, stop_after, after)
            except ReplicasChanged:
                point.began = time.perf_counter()
                if point.models is None:
                    raise RestartFault("a replica of the student was lost before the first step") from None
            else:
                ended = True
                return outcome
    finally:
        members.close(ended=ended)


def _require_one_recipe(setup: Setup, topology: Topology) -> None:
    """Refuses this replica where its recipe is not that of the first one. Collective.

    A recipe of its own would give it other rows, or another step: the sum of the gradients would be of no batch.

    Raises:
        UserError: it is another one, with the keys that differ.
    """
    own = setup.recipe.snapshot()
    changes = recipe_changes(broadcast_object(own, topology.world_group), own)
    if changes:
        differing = "; ".join(f"{key} is {there!r} there, {here!r} here" for key, (there, here) in changes.items())
        raise UserError(
            f"this replica has another recipe than the first one: {printable(differing)}: start all with the same"
        )


def _log_run(setup: Setup, epoch: Epoch) -> None:
    """Lines about the whole run come from one replica: that with rank 0, which may be lost. The others name it."""
    topology = epoch.topology
    if not topology.is_first:
        place = (setup.number_of_replica(topology), topology.replicas, epoch.members[0].replica)
        logger.info(
            "replica %d is one of %d in the run, whose lines are in the log of replica %d, and in %s",
            *place,
            setup.folder / "log.txt",
        )
    logs.log_run(here=topology.is_first)


def _free_folder(setup: Setup, topology: Topology) -> int:
    """The newest attempt at the run's folder, which is not alive. Collective.

    Raises:
        UserError: it is.
    """
    newest, problem = 0, ""
    if topology.is_first:
        try:
            newest = refuse_running(setup.folder)
        except UserError as error:
            problem = str(error)
    newest, problem = broadcast_object((newest, problem), topology.world_group)
    if problem:
        raise UserError(problem)
    return newest


def _attempt(
    setup: Setup,
    topology: Topology,
    stops: StopRequests,
    point: ResumePoint,
    stop_after: int | None,
    after: int | None,
) -> RunOutcome:
    """One attempt at the run; `point` is where it goes on, and where the next one would."""
    recovery = Recovery(setup, topology, after=after, step=max(point.steps, 0))
    if topology.is_first:
        logs.add_file(setup.folder / "log.txt", topology.rank)
    topology.watchdog.open_stack_file(setup.folder, recovery.attempt.number, rank=_stack_rank(setup, topology))
    topology.watchdog.enter_phase("starting", 0, limit=60 * setup.recipe.distributed.timeout_minutes)
    topology.watchdog.on_abort = partial(recovery.aborted, rank=topology.rank)
    stops.on_second_signal = partial(recovery.quit, rank=topology.rank)
    trackers = None
    try:
        trainer = Trainer(setup, topology, recovery, stops, point)
        if topology.is_first:
            external = [name for name in setup.recipe.track if name in EXTERNAL_TRACKERS]
            trackers = TrackerProcesses(setup.folder, external)
        outcome = trainer.train(stop_after)
    except (RestartFault, OperatorFault) as fault:
        fault.prints = recovery.ended(str(fault), rank=topology.rank, exit_code=fault.exit_code)
        raise
    except ReplicasChanged:
        point.is_unsaved = point.is_unsaved or recovery.saving
        raise
    finally:
        recovery.close()
        if trackers is not None:
            trackers.release()
    if trackers is not None:
        trackers.close(seconds=CLOSE_SECONDS if outcome.stopped_by is None else STOP_SECONDS)
    return outcome


def _stack_rank(setup: Setup, topology: Topology) -> int | None:
    """The rank in the name of a stack file, where replicas are launches of their own, which count alike."""
    return None if setup.separate is None else topology.rank


class Trainer:
    """One attempt at a run, on one of the student's ranks. All of them call the same methods."""

    def __init__(
        self, setup: Setup, topology: Topology, recovery: Recovery, stops: StopRequests, point: ResumePoint
    ) -> None:
        self.step = 0
        """The current step, or the last one between steps."""
        self._setup, self._topology, self._recovery, self._stops, self._point = setup, topology, recovery, stops, point
        # first: what is wrong with it costs no model
        self._newest = None if point.has_state else recovery.find_checkpoint()
        if point.models is None:
            point.models = build(setup, topology)
        else:
            point.models[0].begin_again(topology, accumulation=setup.accumulation)
        self._student, self._teacher = point.models
        torch.manual_seed(setup.recipe.run.seed + topology.shard_rank)  # nothing draws today; saved once a shard
        if topology.is_first:
            write_run_files(setup)
            for warning in implausible_settings(setup).values():
                logger.warning("%s", warning)
        self._objective = objective_of(setup)
        self._held_out = held_out_of(setup, topology)
        self._frozen = self._teacher.frozen_weights() if setup.recipe.resilience.teacher_hash_every else None
        if self._frozen is not None:
            self._frozen.require_same_replicas(topology)
        self._norms: NormLog | None = None
        if setup.recipe.train.norms_every and self._student.norms is not None:
            train = setup.recipe.train
            self._norms = NormLog(self._student.norms, every=train.norms_every, max_norm=train.max_grad_norm)

    def train(self, stop_after: int | None) -> RunOutcome:
        """Takes steps up to the last one, `stop_after` or a stop request; a rollback resumes from older weights."""
        outcome, checkpoint, point = None, self._newest, self._point
        if point.has_state:
            cursor = self._take_over()
        else:
            self.step, cursor = self._restore(checkpoint)
        while True:
            outcome = self._train_from(cursor, stop_after)
            if outcome is not None:
                break
            point.lose_state()
            self.step, cursor = self._restore(self._recovery.find_checkpoint())
        self._teacher.close()
        if outcome.done and (line := self._teacher.finish()):
            logger.info("%s", line)
        return outcome

    def _restore(self, checkpoint: Checkpoint | LocalCheckpoint | None) -> tuple[int, Cursor | None]:
        step, cursor = self._recovery.restore(checkpoint, self._student)
        self._point.reached(step, cursor, self._recovery.tokens)
        self._point.parents = self._recovery.parents
        return step, cursor

    def _take_over(self) -> Cursor | None:
        """Continues from the state of the replica that is furthest. Collective."""
        point = self._point
        assert point.epoch is not None
        point.take_over(self._student, self._topology)
        self.step = point.steps
        seconds = time.perf_counter() - point.began
        self._recovery.go_on(point.epoch, step=point.steps, tokens=point.tokens, parents=point.parents, seconds=seconds)
        return point.cursor

    def _train_from(self, cursor: Cursor | None, stop_after: int | None) -> RunOutcome | None:
        """Takes steps from a checkpoint on; None where a rollback ends them."""
        setup, topology, recovery = self._setup, self._topology, self._recovery
        skips = [rollback.skipped_slots for rollback in recovery.rollbacks]
        monitor, self._student_monitor = recovery.monitors(self.step)
        stream = stream_of(setup, topology, start=cursor, skips=skips)
        self._run_steps = self._steps_of_run(stream)
        last = min(self._run_steps, stop_after or self._run_steps)
        if self.step < last:
            self._teacher.start()
        self._shape: StepShape | None = None
        with ExitStack() as stack:
            log = RunLog(
                setup.folder,
                setup.recipe,
                start_step=self.step,
                start_tokens=recovery.tokens,
                topology=topology,
                epoch_tokens=setup.epoch_tokens,
                has_experts=self._student.routers is not None,
            )
            stack.enter_context(closing(log))
            self._log_start(cursor, skips)
            stopped_by = self._stop_reason()
            if stopped_by is not None:
                return self._stopped(stopped_by)
            steps = islice(stream, max(0, last - self.step))
            self._use_shape(setup.shape_at(max(0, stream.start.next_slot - 1)))  # of the checkpoint's last step
            validations = self._validations()
            batches = StepBatches(
                steps,
                self._teacher,
                micro_batch=self._micro_batch,
                part=topology.sequence_part,
                validations=None if validations is None else validations.schedule,
            )
            stack.enter_context(closing(batches))
            timeline_capture = stack.enter_context(TimelineCapture(setup, topology))
            profile = stack.enter_context(ProfileCapture(setup, topology))
            validation = None if validations is None else self._validation(validations, batches, log)
            first_slot = stream.start.next_slot
            hooks = self._hooks(log, monitor, ProfiledSteps(profile), first_slot=first_slot, validation=validation)
            self._make_up(hooks, stream.start, last=self.step >= last)
            seconds = setup.recipe.resilience.step_timeout_seconds
            limit = max(60 * setup.recipe.distributed.timeout_minutes, seconds)  # the first step compiles
            if validation is not None:
                validation.before_first_step(self.step)
                if validation.stopped_by is not None:
                    return self._stopped(validation.stopped_by)
                if validation.finished and self.step < last:
                    return self._finished_early()
            while self.step < last:
                self.step += 1
                timeline_capture.step(self.step)
                profile.before_step(self.step)
                self._enter_phase("step", limit=limit)
                limit = seconds
                event = self._take_step(batches, stream)
                requests = set()
                for hook in hooks:
                    request = hook.after_step(event)
                    if request is Request.ROLL_BACK:
                        return None
                    requests.add(request)
                ends = self.step == last or not requests.isdisjoint({Request.STOP, Request.FINISH})
                changes = event.outcome.flags.get(WAITING_REPLICAS, 0.0) > 0 and not ends
                if ends or Request.SAVE in requests:
                    self._save(event.cursor, last=ends)
                elif Request.SAVE_LOCAL in requests:
                    self._save(event.cursor, last=False, local=True)
                unvalidated = None if validation is None else validation.stopped_by
                if unvalidated is not None or (Request.STOP in requests and self.step < last):
                    return self._stopped(unvalidated or stop_reason(event.outcome.flags))
                if Request.FINISH in requests and self.step < last:
                    return self._finished_early()
                self._point.is_unsaved = False
                if changes:
                    raise ReplicasChanged
            return self._ended()

    def _make_up(self, hooks: Sequence[Hook], cursor: Cursor, *, last: bool) -> None:
        """Makes up for what the last step lacks, where replicas were lost behind it: its line in the log, a save.

        Collective.
        """
        point, topology = self._point, self._topology
        if point.event is not None:
            logged = last_step(self._setup.folder) if topology.is_first else None
            if broadcast_object(logged, topology.world_group) != point.event.step:
                for hook in hooks:
                    if isinstance(hook, StepLog):
                        hook.after_step(point.event)
        if point.is_unsaved:
            self._save(cursor, last=last)

    def _validations(self) -> ValidationPlan | None:
        """The validations of an attempt that begins after the current step; None without them. Collective."""
        if self._held_out is None:
            return None
        setup, topology = self._setup, self._topology
        return ValidationPlan.of(
            setup.recipe, self._held_out, topology, folder=setup.folder, step=self.step, last=self._run_steps
        )

    def _validation(self, plan: ValidationPlan, batches: StepBatches, log: RunLog) -> ValidationHook:
        parts = (self._student, self._objective, self._recovery, log, self._topology, self._setup.recipe)
        return ValidationHook(plan, batches, *parts, stop_requested=self._stop_reason)

    def _hooks(
        self,
        log: RunLog,
        monitor: LossMonitor,
        profiled: ProfiledSteps,
        *,
        first_slot: int,
        validation: ValidationHook | None,
    ) -> list[Hook]:
        """The hooks, in the order in which they run after each step. Collective."""
        topology, recovery, events = self._topology, self._recovery, self._recovery.events
        recipe, resilience, frozen = self._setup.recipe, self._setup.recipe.resilience, self._frozen
        meter, every = meter_of(self._setup, topology), recipe.train.histograms_every
        local = recipe.checkpoint.local if recovery.has_local_saves else None
        hooks: list[Hook | None] = [
            Checkpoints(
                recovery,
                every=recipe.train.checkpoint_every,
                stable_steps=stable_steps_of(recipe, self._setup.data),
                local_every=0 if local is None else local.every,
            ),
            StepLog(
                log,
                meter,
                self._objective,
                recovery,
                self._student,
                topology,
                histograms_every=every,
                norms=self._norms,
                has_entries=len(self._setup.shapes) > 1,
                groups=RowGroups.of(self._setup),
            ),
            UnlabelledGuard(self._setup, max_in_a_row=resilience.max_skipped_steps),
            NonFiniteGuard(events, max_skipped_steps=resilience.max_skipped_steps),
            StragglerCheck(events, topology, every=resilience.straggler_every) if resilience.straggler_every else None,
            TeacherWeightsCheck(frozen, topology, every=resilience.teacher_hash_every) if frozen else None,
            DivergedStudentCheck(recovery, self._student_monitor),
            StarvedExperts(recovery, self._objective.router_coefs) if self._student.routers else None,
            LossAnomalies(recipe, monitor, recovery, topology, first_slot=first_slot, frozen=frozen),
            StopOnRequest(events),
            profiled,
            validation,
        ]
        return [hook for hook in hooks if hook is not None]

    def _take_step(self, batches: StepBatches, stream: TokenStream) -> StepEvent:
        every = self._setup.recipe.resilience.recompute_every
        began, waited_before = time.perf_counter(), batches.waited  # a step is everything up to the next one
        batch = next(batches)
        cursor, shape = batch.cursor, self._shape_of(batch.batch)
        if shape != self._shape:
            self._begin_entry(shape)
        self._recovery.tokens += shape.tokens
        at = progress(self._setup.recipe.train, step=self.step, tokens=self._recovery.tokens)
        masks = self._setup.recipe.data.on_corrupt_sample == "mask"
        own_flags = masked_flag(batch.batch) if masks else {}
        rate = learning_rate(self._setup.recipe.train, at)
        if self._norms is not None:
            self._norms.before_step(self.step)
        with Stopwatch(clock_for(self._topology.device)) as stopwatch:
            outcome = train_step(
                self._student,
                batch,
                step=self.step,
                learning_rate=rate,
                objective=self._objective.of_entry(shape.loss),
                topology=self._topology,
                flags=lambda: {**self._stops.counts(), **self._recovery.flags(), **self._waiting(), **own_flags},
                recompute=every > 0 and self.step % every == 0,
                progress=at,
            )
        parts = stopwatch.read()  # the step ended in a device sync, since its gradient norm was read: no further one
        if masks:
            place = (stream, self._topology, self._recovery.events)
            cursor = masked_cursor(batch.batch, cursor, *place, step=self.step, reduced=outcome.flags)
        seconds, waited = time.perf_counter() - began, batches.waited - waited_before
        event = StepEvent(
            self.step,
            outcome,
            rate,
            cursor,
            seconds,
            data_seconds=waited,
            parts=parts,
            shape=shape,
            progress=at,
        )
        is_due = self.step % self._setup.recipe.train.checkpoint_every == 0
        self._point.took(event, self._recovery.tokens, is_due=is_due)
        return event

    def _waiting(self) -> dict[str, float]:
        """1 where this rank knows of a replica that waits to join; nothing in a run that none can join."""
        return {} if self._setup.separate is None else {WAITING_REPLICAS: float(self._stops.somebody_waits())}

    def _steps_of_run(self, stream: TokenStream) -> int:
        """The number of the run's last step, for a stream that follows the current one."""
        train = self._setup.recipe.train
        if train.tokens is None:
            return train.steps
        paces, slot = [shape.pace for shape in self._setup.shapes], stream.start.next_slot
        return self.step + steps_to(paces, train.tokens, slot=slot, taken=self._recovery.tokens, skips=stream.skips)

    def _shape_of(self, batch: TokenBatch) -> StepShape:
        return self._setup.shape_at(int(batch.slots[0]))

    def _micro_batch(self, batch: TokenBatch) -> int:
        return self._shape_of(batch).micro_batch

    def _begin_entry(self, shape: StepShape) -> None:
        """Gives the student the shape of the next steps, and records it where the run has several."""
        self._shape = shape
        self._use_shape(shape)
        if len(self._setup.shapes) > 1:
            self._recovery.begin_entry(shape)

    def _use_shape(self, shape: StepShape) -> None:
        """Gives the student the rotary embeddings and accumulation of a shape, where entries decide it."""
        if self._setup.has_shapes:
            config = student_config_of_entry(self._setup.student_config, shape)
            self._student.begin_entry(config, accumulation=shape.accumulation)

    def _log_start(self, cursor: Cursor | None, skips: Sequence[tuple[int, int]]) -> None:
        """The first lines of an attempt, and the teacher's consistency check. Collective."""
        setup, topology, teacher, vocab = self._setup, self._topology, self._teacher, self._student.head.vocab
        logger.info("%s", describe_layout(setup, topology))
        logger.info("%s", describe_choices(setup.choices()))
        if self._student.routers is not None:
            layers, coefs = len(self._student.routers.layers), self._objective.router_coefs
            logger.info("%s", describe_routers(setup.student_config, layers, coefs, accumulation=setup.accumulation))
        self._recovery.mark_resumed(self.step)
        B, S = setup.longest.micro_batch, setup.longest.sequence_length
        if line := teacher.describe_prefetch(micro_batch=B, sequence_length=S):
            logger.info("%s", line)
        for check in check_teacher(setup, teacher, vocab, topology, start=cursor, skips=skips):
            self._log_teacher_check(check)

    def _log_teacher_check(self, check: TeacherCheck) -> None:
        named = {} if check.name is None else {"teacher": check.name}
        logger.info("%s", check.line)
        if check.float8 is not None:
            logger.info("%s", check.float8.line)
            if check.is_new:
                self._recovery.events.write("float8_teacher", step=self.step, **asdict(check.float8), **named)
        vocab_size = self._setup.data.vocab_size
        if problem := worse_than_uniform(check.cross_entropy, vocab_size):
            values = {"teacher_ce": check.cross_entropy, "uniform_ce": math.log(vocab_size), **named}
            problem = problem if check.name is None else f"{check.name}: {of_teacher(problem, check.name)}"
            self._recovery.events.warn("teacher_above_uniform", problem, step=self.step, **values)

    def _enter_phase(self, phase: str, *, limit: float) -> None:
        self._topology.watchdog.enter_phase(phase, self.step, limit=limit)
        self._recovery.step = self.step

    def _save(self, cursor: Cursor, *, last: bool, local: bool = False) -> None:
        self._enter_phase("saving", limit=60 * self._setup.recipe.distributed.timeout_minutes)
        with timeline.span(timeline.SAVE, "save"):
            self._point.is_unsaved = True
            require_sound_student(self._student, self._topology)
            self._teacher.flush()
            self._recovery.save(self._student, self.step, cursor, last=last, local=local)
            self._point.is_unsaved = False

    def _stop_reason(self) -> str | None:
        """The stop requests that any rank has received. Collective."""
        counts = self._stops.counts()
        values = torch.tensor(list(counts.values()), device=self._topology.device)
        reduced = all_reduce_sum(values, self._topology.world_group).tolist()
        return stop_reason(dict(zip(counts, reduced, strict=True)))

    def _stopped(self, reason: str | None) -> RunOutcome:
        self._recovery.events.write("stopped", step=self.step, reason=reason)
        logger.info("stopped at step %d (%s); %s", self.step, reason, self._recovery.goodput())
        return RunOutcome(self.step, done=False, stopped_by=reason, diverged=self._student_monitor.reported)

    def _finished_early(self) -> RunOutcome:
        self._recovery.ended_early(self.step)
        logger.info("ended at step %d: validation.patience is used up; %s", self.step, self._recovery.goodput())
        return RunOutcome(self.step, done=False, diverged=self._student_monitor.reported, plateau=True)

    def _ended(self) -> RunOutcome:
        done = self.step >= self._run_steps
        if done:
            self._recovery.done(self.step)
        else:
            self._recovery.events.write("stopped", step=self.step, reason="--stop-after")
        logger.info("%s", self._recovery.goodput())
        return RunOutcome(self.step, done=done, diverged=self._student_monitor.reported)
