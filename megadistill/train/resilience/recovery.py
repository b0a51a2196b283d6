"""The run folder of a running attempt: resuming, saving, rolling back, and the record of events and goodput."""

import hashlib
import json
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megadistill.distributed.collectives import RunGroup, broadcast_object
from megadistill.distributed.members import Epoch
from megadistill.distributed.topology import Topology
from megadistill.distributed.watchdog.aborted import aborted_ranks, describe_aborted
from megadistill.errors import OperatorFault, RestartFault, Superseded, UserError
from megadistill.events import PLATEAU, VALIDATIONS, EventLog, FaultKind, Totals, events_from_end, goodput_of
from megadistill.io import write_file
from megadistill.student.engine import StudentEngine
from megadistill.train.checkpoint.attempt import Attempt, acquire, launch_record
from megadistill.train.checkpoint.folders import checkpoint_folders
from megadistill.train.checkpoint.format import (
    FORMAT,
    RNG_KEY,
    Checkpoint,
    CheckpointManifest,
    ParentRecord,
)
from megadistill.train.checkpoint.heartbeat import HeartbeatThread
from megadistill.train.checkpoint.local_tier import LocalCheckpoint, LocalTier, resumed_steps, run_id, was_passed_over
from megadistill.train.checkpoint.rollback import is_abandoned, plan_rollback, read_rollbacks, record_rollbacks
from megadistill.train.checkpoint.select import latest_valid, verified
from megadistill.train.checkpoint.versions import versions
from megadistill.train.checkpoint.writer import Saver, SaveResult, require_saved
from megadistill.train.resilience.anomalies import Anomaly, DivergedStudentMonitor, LossMonitor
from megadistill.train.resilience.run_history import read_run_history
from megadistill.train.setup.next_start import how_to_resume
from megadistill.train.setup.parent_checkpoint import Parent
from megadistill.train.setup.recipe_changes import changes_since, describe_changes
from megadistill.train.setup.setup import Setup
from megadistill.train.setup.step_shape import StepShape, stable_steps_of
from megadistill.types import Cursor
from megadistill.units import listed, number_of

FENCED = "fenced"

logger = logging.getLogger(__name__)


class Recovery:
    """One attempt at a run. Methods are collective, except for those that only record an event."""

    def __init__(self, setup: Setup, topology: Topology, *, after: int | None = None, step: int = 0) -> None:
        """Acquires the run folder: an older attempt that is still alive ends at its next step.

        `after`: the newest attempt when the folder was free; None: no matter which it is. `step`: steps that the
        students in memory have taken.

        Raises:
            UserError: another start has acquired the folder since.
        """
        self._setup = setup
        self._topology = topology
        self._folder = setup.folder
        self._began = time.perf_counter()
        number, saved_before, problem = 0, False, ""
        if topology.is_first:
            saved_before = any(event["event"] == "checkpoint_saved" for event in events_from_end(self._folder))
            try:
                number = acquire(self._folder, launch_record(topology.world), after=after).number
            except UserError as error:
                problem = str(error)
        values = broadcast_object((number, saved_before, problem), topology.world_group)
        number, self._saved_before, problem = values
        if problem:
            raise UserError(problem)
        self._heartbeat = HeartbeatThread(self._folder, number) if topology.is_first else None
        self.attempt = Attempt(self._folder, number)
        self.events = EventLog(self._folder, number, writes=topology.is_first)
        self.events.complete_faults()
        aborted = describe_aborted(aborted_ranks(self._folder, number - 1)) if topology.is_first else None
        if aborted is not None:
            logger.warning("attempt %d: %s: see stacks/", number - 1, aborted)
        self.events.write(
            "attempt_started",
            step=step,
            world_size=topology.world,
            attempt_record=f"attempts/{number:05d}.json",
            **({} if aborted is None else {"before": aborted}),
        )
        stable_steps, section = stable_steps_of(setup.recipe, setup.data), setup.recipe.checkpoint
        self.step = step
        """Current optimizer step."""
        self.tokens = 0
        """Tokens of all steps up to the current one; of a run that began from another, that one's too."""
        try:
            self._local = self._local_tier()
        except OperatorFault as fault:
            fault.prints = self.ended(str(fault), rank=topology.rank, exit_code=fault.exit_code)
            raise
        self._saver = Saver(
            self.checkpoints, topology, self.attempt, section, stable_steps=stable_steps, local=self._local
        )
        self.rollbacks = read_rollbacks(self._folder)
        self._recipe = setup.recipe.snapshot()
        self._recipe_sha256 = hashlib.sha256(json.dumps(self._recipe, sort_keys=True).encode()).hexdigest()
        self._recipe_changes = changes_since(self._folder, self._recipe) if topology.is_first else {}
        self._parents: tuple[ParentRecord, ...] = ()
        self._tier = ""
        self._lost, self._lost_seconds = 0, 0.0
        self._student_monitor: DivergedStudentMonitor | None = None
        self._totals = Totals(began=time.time())
        self._totals_of_saves: dict[int, Totals] = {}
        """Step -> the sums up to it, of a save under way."""

    @property
    def checkpoints(self) -> Path:
        return self._folder / "checkpoints"

    def _local_tier(self) -> LocalTier | None:
        """The local tier, where the recipe has one. Collective."""
        section, run, self._resumed = self._setup.recipe.checkpoint.local, "", dict[int, int]()
        if section is None:
            return None
        if self._topology.is_first:
            run, self._resumed = run_id(self._folder), resumed_steps(self._folder)
        run, self._resumed = broadcast_object((run, self._resumed), self._topology.world_group)
        try:
            return LocalTier(Path(section.folder), self._topology, self.attempt, run=run)
        except OperatorFault as fault:
            if self.attempt.number == 1:
                raise
            line = f"this attempt makes no local saves, a later one may: {fault}"  # a disk broke: no reason to stop
            self.events.warn("local_checkpoint_failed", line, step=0, reason=str(fault))
            return None

    @property
    def parents(self) -> tuple[ParentRecord, ...]:
        """Checkpoints of other runs from which this one began, and theirs, oldest first."""
        return self._parents

    @property
    def has_local_saves(self) -> bool:
        """Whether this attempt makes local saves; the same on every rank."""
        return self._local is not None

    def _newest_local(self) -> LocalCheckpoint | None:
        """The newest local save that the run may resume from. Collective.

        It is one of the same recipe: the set-up has compared a change of it, as of the schedule or `data.skip`, with
        the newest checkpoint, which may be older.
        """
        if self._local is None:
            return None

        def is_usable(manifest: CheckpointManifest) -> bool:
            same_recipe = manifest.recipe_sha256 == self._recipe_sha256
            is_past = was_passed_over(manifest, self._resumed) or is_abandoned(manifest, self.rollbacks)
            return same_recipe and not is_past

        return self._local.newest(is_usable)

    def find_checkpoint(self) -> Checkpoint | LocalCheckpoint | None:
        """The checkpoint to restore: the newest valid one, for a run without one that of `run.begin_from`, or None.

        Of a local save and a checkpoint of one step the local save is read. Of older checkpoints nothing is. For the
        start, before the models are built, and after a rollback. Only manifests and hashes are read. Collective.

        Raises:
            OperatorFault: the run has saved and no checkpoint is valid, or the ranks see different ones.
            RestartFault: a checkpoint cannot be read at the moment.
        """
        local = self._newest_local()
        checkpoint: Checkpoint | LocalCheckpoint | None
        checkpoint, quarantined = latest_valid(
            self.checkpoints,
            self._topology,
            self.attempt,
            saved_before=self._saved_before,
            newer_than=-1 if local is None else local.manifest.step,
            is_abandoned=lambda manifest: is_abandoned(manifest, self.rollbacks),
        )
        for each in quarantined:
            self.events.write("checkpoint_quarantined", step=each.step, path=each.path.name, reason=each.reason)
        checkpoint = checkpoint or local
        if self._local is not None:
            self._local.discard_after(0 if checkpoint is None else checkpoint.manifest.step)
        if checkpoint is not None:
            self._parents = checkpoint.manifest.parents
        elif self._setup.parent is not None:
            checkpoint = self._begin_from(self._setup.parent)
        return checkpoint

    def restore(
        self, checkpoint: Checkpoint | LocalCheckpoint | None, student: StudentEngine
    ) -> tuple[int, Cursor | None]:
        """Gives the student its values and returns the (step, cursor) that they are of.

        None: step 0, with the recipe's `student.weights` or values that each rank draws.

        Raises:
            OperatorFault: a file of the checkpoint does not hold what its manifest says.
            UserError: `student.weights` cannot be read.
        """
        if checkpoint is not None:
            return self._restore(checkpoint, student)
        recipe = self._setup.recipe
        if recipe.student.weights is not None:
            self._for_all_replicas(partial(student.load_weights, Path(recipe.student.weights)), student)
        else:
            student.draw_weights(recipe.run.seed)
        self.tokens = 0
        return 0, None

    def _for_all_replicas(self, read: Callable[[], None], student: StudentEngine) -> None:
        """Replica 0 reads the student's state from storage, and sends it to the others. Collective.

        Storage has less to give than the network: 64 replicas of 9 billion parameters would read 7.1 TB.

        Raises:
            ReplicasChanged: a replica is lost.
        """
        topology = self._topology
        if topology.replica == 0:
            read()
        if isinstance(topology.world_group, RunGroup):
            student.state.receive(topology.world_group, source=0)

    def go_on(self, epoch: Epoch, *, step: int, tokens: int, parents: tuple[ParentRecord, ...], seconds: float) -> None:
        """Records that the run goes on with other replicas, `seconds` after they changed, from where it is."""
        self.tokens, self._parents, self._tier = tokens, parents, ""
        lost = sorted(each.replica for each in epoch.lost)
        joined = sorted(each.replica for each in epoch.joined)
        kinds = {"lost": lost, "joined": joined}
        changes = [f"{listed([*map(str, numbers)])} {kind}" for kind, numbers in kinds.items() if numbers]
        what, count = f"replica {', '.join(changes)}" if changes else "the same ones", len(epoch.members)
        line = f"{number_of(count, 'replica')} of the student from step {step} on ({what}), after {seconds:.1f} s"
        self.events.warn("replicas_changed", line, step=step, replicas=count, **kinds, seconds=round(seconds, 3))

    def _begin_from(self, parent: Parent) -> Checkpoint:
        """The checkpoint of another run, which nothing here changes. Collective.

        Raises:
            OperatorFault: it is damaged. RestartFault: it cannot be read at the moment.
        """
        group = self._topology.world_group
        path = Path(broadcast_object(str(parent.checkpoint.folder), group))  # a run that still trains has a newer one
        checkpoint, damage = verified(path, self._topology)
        if checkpoint is None:
            raise OperatorFault(f"run.begin_from: {damage}: name another checkpoint")
        parent = replace(parent, checkpoint=checkpoint)
        self._parents = parent.lineage
        self.rollbacks = broadcast_object(parent.rollbacks() if self._topology.is_first else [], group)
        if self._topology.is_first:
            if self.rollbacks:
                record_rollbacks(self._folder, self.rollbacks)
            for name in ("metrics.jsonl", VALIDATIONS):
                (self._folder / name).unlink(missing_ok=True)  # of a start that saved nothing
        record = self._parents[-1]
        self.events.write("branched", step=record.step, run=record.run, sha256=record.sha256)
        logger.info("run %s begins from %s", self._folder, parent)
        return checkpoint

    def _restore(self, checkpoint: Checkpoint | LocalCheckpoint, student: StudentEngine) -> tuple[int, Cursor]:
        self.tokens = checkpoint.manifest.tokens
        self._tier = "local" if isinstance(checkpoint, LocalCheckpoint) else ""
        load = partial(student.state.load, checkpoint.read)
        try:
            if isinstance(checkpoint, LocalCheckpoint):
                load()
            else:
                self._for_all_replicas(load, student)
            rng = checkpoint.rng_state(*self._place_and_files(local=isinstance(checkpoint, LocalCheckpoint)))
        except OSError as error:
            raise RestartFault(f"{checkpoint.folder} cannot be read: {error}") from None
        if rng is not None:
            torch.set_rng_state(rng)
        checkpoint.release()
        return checkpoint.manifest.step, Cursor.from_state(checkpoint.manifest.cursor)

    def monitors(self, step: int) -> tuple[LossMonitor, DivergedStudentMonitor]:
        """Monitors of the steps after `step`, which know the steps before it from metrics.jsonl.

        The first rank reads the file for all, so that all ranks decide alike.

        Raises:
            Superseded: a later attempt has acquired the folder (on rank 0): the caller cuts lines off the file next.
        """
        resilience = self._setup.recipe.resilience
        history = None
        if self._topology.is_first:
            self.attempt.require_newest()
            size = self._setup.data.vocab_size
            history = read_run_history(self._folder, step, window=resilience.spike_window, vocab_size=size)
            self._lost, self._lost_seconds = history.lost_steps, history.lost_seconds
            self._totals = history.totals or Totals(began=time.time())
        values = None if history is None else (history.losses, history.teacher_ces, history.entry, history.student)
        shared = broadcast_object(values, self._topology.world_group)
        assert shared is not None
        losses, teacher_ces, entry, self._student_monitor = shared
        monitor = LossMonitor(resilience, losses=losses, teacher_ces=teacher_ces, entry=entry)
        return monitor, self._student_monitor

    def mark_resumed(self, step: int) -> None:
        """Records and logs that training starts after `step`, and counts goodput from here."""
        seconds, self._began = time.perf_counter() - self._began, time.perf_counter()
        lost, lost_seconds = self._lost, self._lost_seconds
        totals = self._totals
        self._totals = replace(totals, startup=totals.startup + seconds, repeated=totals.repeated + lost_seconds)
        values = {"lost_steps": lost, "lost_seconds": round(lost_seconds, 3), "totals": self._totals.to_json()}
        tier = {"tier": self._tier} if self._tier else {}
        self.events.write("resumed", step=step, startup_seconds=round(seconds, 3), **values, **tier)
        if self._recipe_changes:
            self.events.write("recipe_changed", step=step, changes=self._recipe_changes)
            logger.info("recipe changed at step %d: %s", step, describe_changes(self._recipe_changes))
            self._recipe_changes = {}
        if self._topology.is_first and step < self._setup.recipe.train.steps:  # of a run that is trained longer
            (self._folder / "DONE").unlink(missing_ok=True)
        where = f"{'starting at' if step == 0 else 'resuming from'} step {step} of {self._setup.recipe.train.steps}"
        repeated = f" ({self._tier} save)" if self._tier else ""
        repeated += f", {lost} steps to repeat" if lost else ""
        logger.info("run %s: attempt %d, %s%s", self._folder, self.attempt.number, where, repeated)

    def flags(self) -> dict[str, float]:
        """This rank's flags for the next step's reduction."""
        fenced = self._topology.is_first and not self.attempt.is_newest()
        return {**self._saver.flags(), FENCED: float(fenced)}

    def require_newest(self, reduced: Mapping[str, float]) -> None:
        """Raises Superseded: a later attempt has acquired the folder; nothing of this step is written to it."""
        if reduced[FENCED]:
            self.attempt.require_newest()
            raise Superseded(f"attempt {self.attempt.number} of {self._folder} ends: a later one has started")

    def begin_entry(self, shape: StepShape) -> None:
        """Records and logs that the next step is the first one of a curriculum entry in this attempt."""
        values: dict[str, Any] = {
            "sequence_length": shape.sequence_length,
            "global_batch": shape.global_batch,
            "micro_batch": shape.micro_batch,
            "accumulation": shape.accumulation,
            **({} if shape.rope is None else {"rope": shape.rope}),
        }
        self.events.write("curriculum_entry", step=self.step, entry=shape.entry, **values)
        logger.info("curriculum entry %d from step %d on: %s", shape.entry, self.step, shape.describe())

    def step_done(self, seconds: float) -> None:
        """Counts the time of a step as useful."""
        self._totals = replace(self._totals, useful=self._totals.useful + seconds)

    def validated(self, step: int, seconds: float, cross_entropy: float) -> None:
        """Records a validation, and counts its time. `cross_entropy`: of the student over all splits; may be NaN."""
        self._totals = replace(self._totals, validating=self._totals.validating + seconds)
        known = {"cross_entropy": cross_entropy} if math.isfinite(cross_entropy) else {}
        self.events.write("validated", step=step, seconds=round(seconds, 3), **known)

    def poll(self, reduced: Mapping[str, float]) -> None:
        """Advances the save under way, and records its end."""
        result = self._saver.poll(reduced)
        if result is not None:
            self._record(result)

    @property
    def saving(self) -> bool:
        """Whether a save is under way: the same on every rank."""
        return self._saver.busy

    def save(self, student: StudentEngine, step: int, cursor: Cursor, *, last: bool, local: bool = False) -> None:
        """Starts a checkpoint of this step, or a local save; the last one of a run is waited for.

        Raises:
            RestartFault: the last one failed.
        """
        state = {**student.state.local(), RNG_KEY: torch.get_rng_state()}
        manifest = CheckpointManifest(
            format=FORMAT,
            step=step,
            tokens=self.tokens,
            world=self._place_and_files(local=local)[1],
            vocab_size=self._setup.data.vocab_size,
            cursor=cursor.state(),
            parameters=student.state.shapes,
            versions=versions(),
            attempt=self.attempt.number,
            recipe=self._recipe,
            recipe_sha256=self._recipe_sha256,
            rollbacks=len(self.rollbacks),
            parents=self._parents,
            files={},
        )
        has_diverged = self._student_monitor is not None and self._student_monitor.reported
        self._totals_of_saves[step] = replace(self._totals, student_diverged=has_diverged)
        ended = self._saver.start_local(state, manifest) if local else self._saver.start(state, manifest)
        if last and (not ended or ended[-1].step != step):
            ended.append(self._saver.finish())
        for result in ended:
            self._record(result)
        if last:
            require_saved(ended[-1])

    def _place_and_files(self, *, local: bool) -> tuple[int, int]:
        """Number of this rank's file in a checkpoint, and number of files: one a shard, one a rank in a local save."""
        topology = self._topology
        return (topology.rank, topology.world) if local else (topology.shard_rank, topology.shard_world)

    def roll_back(self, spike: Anomaly, at_step: int, *, slots_before: Mapping[int, int], slots_end: int) -> bool:
        """Records a rollback for a spike, which `find_checkpoint` follows; False where there is none."""
        resilience = self._setup.recipe.resilience
        if len(self.rollbacks) >= resilience.max_rollbacks:
            if self.rollbacks:
                logger.info("no rollback: all of resilience.max_rollbacks are used")
            return False
        if self._saver.busy:
            self._record(self._saver.finish())
        plan = plan_rollback(
            at_step,
            spike.line,
            steps=resilience.rollback_steps,
            slots_before=slots_before,
            slots_end=slots_end,
            checkpoints=[*checkpoint_folders(self.checkpoints), *(self._local.steps if self._local else ())],
        )
        if plan is None:
            logger.info("no rollback: no checkpoint is %d steps older", resilience.rollback_steps)
            return False
        self._began = time.perf_counter()  # the time until the next step is start-up
        self.rollbacks.append(plan)
        if self._topology.is_first:
            record_rollbacks(self._folder, self.rollbacks)
        first, stop = plan.skipped_slots
        line = f"rolling back to step {plan.to_step}; slots {first} to {stop - 1} are skipped"
        self.events.warn("rollback", line, step=at_step, to_step=plan.to_step, skipped_slots=[first, stop])
        return True

    def ended(self, reason: str, *, rank: int, exit_code: int, lost_peer: bool = False) -> bool:
        """Records that the attempt ends by a fault on this rank. Whether this rank's log should have the reason.

        `lost_peer`: another rank has failed, which ends this one. `rank`: of the student's world.
        """
        kind: FaultKind = "lost_peer" if lost_peer else "cause"
        prints = self.events.attempt_failed(kind, reason, step=self.step, rank=rank, exit_code=exit_code)
        return prints or self._topology.is_first

    def aborted(self, reason: str, *, rank: int) -> bool:
        """Records that this rank loses the others, or in the watchdog's thread that it ends the attempt, which also
        prints what resumes the run. Whether this rank's log should have the reason."""
        in_watchdog = threading.current_thread() is not threading.main_thread()
        prints = self.ended(reason, rank=rank, exit_code=RestartFault.exit_code, lost_peer=not in_watchdog)
        if in_watchdog:  # the main thread prints it when it has failed by itself
            self._print_how_to_resume()
        return prints

    def quit(self, reason: str, *, rank: int) -> None:
        """Records that a person ends the attempt without a checkpoint. Called by a signal handler."""
        events = EventLog(self._folder, self.attempt.number, writes=True)  # the interrupted code may be using the other
        events.attempt_failed("requested", reason, step=self.step, rank=rank, exit_code=RestartFault.exit_code)
        self._print_how_to_resume()

    def _print_how_to_resume(self) -> None:
        """Prints it without a lock, and not to stderr, whose last line is the reason of the end."""
        with suppress(OSError):
            os.write(1, f"{how_to_resume(self._folder)}\n".encode())

    def done(self, step: int) -> None:
        """Records that the last step is saved, and writes the file DONE."""
        self.events.write("completed", step=step)
        if self._local is not None:
            self._local.clear()
        if self._topology.is_first:
            write_file(self._folder / "DONE", f"{step}\n")

    def ended_early(self, step: int) -> None:
        """Records that `validation.stop` has ended the run, and writes DONE: a scheduler does not start it again."""
        self.events.write("stopped", step=step, reason=PLATEAU)
        if self._topology.is_first:
            write_file(self._folder / "DONE", f"{step}\n")

    def goodput(self) -> str:
        """The goodput of all attempts until now, as a log line."""
        return str(goodput_of(self._totals, self._totals.useful, until=time.time()))

    def close(self) -> None:
        self._saver.close()
        if self._local is not None and not self._saver.busy:
            self._local.close()
        if self._heartbeat is not None:
            self._heartbeat.close()

    def _record(self, result: SaveResult) -> None:
        local, title = result.is_local, "local save" if result.is_local else "checkpoint"
        stall, write = round(result.stall_seconds, 3), round(result.write_seconds, 3)
        if result.path is None:
            self._totals_of_saves.pop(result.step, None)
            line = f"{title} of step {result.step} not written: {result.problem}"
            reason = {"reason": result.problem, "stall_seconds": stall}
            self.events.warn(
                "local_checkpoint_failed" if local else "checkpoint_failed", line, step=result.step, **reason
            )
            return
        self._totals = replace(self._totals, saving=self._totals.saving + stall)
        values: dict[str, Any] = {"bytes": result.bytes, "removed": list(result.removed)}
        at_step = self._totals_of_saves.pop(result.step, None)
        if at_step is not None:
            totals = replace(self._totals, useful=at_step.useful, student_diverged=at_step.student_diverged)
            values["totals"] = totals.to_json()
        seconds = {"stall_seconds": stall, "write_seconds": write}
        self.events.write(
            "local_checkpoint_saved" if local else "checkpoint_saved", step=result.step, **seconds, **values
        )
        line = "%s saved: %s (training waited %.2f s, written in %.2f s)"
        logger.info(line, title, result.path, stall, write)
