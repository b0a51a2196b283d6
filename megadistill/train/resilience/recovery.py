"""Room `train`: the run folder's side of a run: attempt, where to go on from, saving, going back. It takes no step."""

import hashlib
import json
import math
import sys
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from megadistill.distributed.collectives import all_reduce_sum
from megadistill.distributed.topology import Topology
from megadistill.errors import OperatorFault
from megadistill.events import EventLog, Goodput, goodput, read_lines
from megadistill.student.engine import StudentEngine
from megadistill.train.checkpoint.attempt import Attempt, claim, launch_record
from megadistill.train.checkpoint.format import FORMAT, RNG_KEY, Checkpoint, CheckpointManifest, checkpoint_folders
from megadistill.train.checkpoint.rollback import Rollback, given_up, plan_rollback, read_rollbacks, record_rollbacks
from megadistill.train.checkpoint.select import newest_valid
from megadistill.train.checkpoint.writer import Saver, SaveResult, require_saved
from megadistill.train.resilience.anomalies import Finding, Vigil
from megadistill.train.setup.setup import Setup
from megadistill.types import Cursor
from megadistill.versions import versions

FENCED = "fenced"


class Recovery:
    """One attempt at a run. Every method is collective, but for those of the events."""

    def __init__(self, setup: Setup, topology: Topology) -> None:
        """Claims the run folder: an older attempt that is still alive ends with its next step."""
        self._setup = setup
        self._topology = topology
        self._folder = setup.folder
        self._began = time.perf_counter()
        number, saved_before = 0, False
        if topology.is_first:
            saved_before = any(event["event"] == "saved" for event in read_lines(self._folder / "events.jsonl"))
            number = claim(self._folder, launch_record(topology.world)).number
        told = torch.tensor([number, int(saved_before)], device=topology.device)
        number, self._saved_before = all_reduce_sum(told, topology.world_group).tolist()
        self.attempt = Attempt(self._folder, number)
        self.events = EventLog(self._folder, number, speaks=topology.is_first)
        self.events.write("start", step=0, world=topology.world, attempt_record=f"attempts/{number:05d}.json")
        section = setup.recipe.checkpoint
        self._saver = Saver(
            self.checkpoints,
            topology,
            self.attempt,
            asynchronous=section.asynchronous,
            keep_last=section.keep_last,
            keep_every=section.keep_every,
        )
        self.rollbacks = read_rollbacks(self._folder)
        self._recipe = setup.recipe.snapshot()
        self._recipe_sha256 = hashlib.sha256(json.dumps(self._recipe, sort_keys=True).encode()).hexdigest()
        self._lost = 0
        self.step = 0
        """That the run is at."""
        self._goodput = Goodput()
        self._goodput_since = time.perf_counter()

    @property
    def checkpoints(self) -> Path:
        return self._folder / "checkpoints"

    def resume(self, student: StudentEngine) -> tuple[int, Cursor | None]:
        """Restores the newest checkpoint that holds: (step, cursor) to go on from, (0, None) for a run without one.

        That begins from `student.weights` where the recipe names them, and no other start reads them again.

        Raises:
            OperatorFault: the run has saved, and no checkpoint holds; or not every rank sees the same ones.
            RestartFault: a checkpoint cannot be read at the moment.
        """
        checkpoint, aside = newest_valid(
            self.checkpoints,
            self._topology,
            self.attempt,
            saved_before=bool(self._saved_before),
            abandoned=lambda manifest: given_up(manifest, self.rollbacks),
        )
        for each in aside:
            self.events.write("set_aside", step=each.step, path=each.path.name, reason=each.reason)
        if checkpoint is not None:
            return self._restore(checkpoint, student)
        if self._setup.recipe.student.weights is not None:
            student.load_weights(Path(self._setup.recipe.student.weights))
        return 0, None

    def _restore(self, checkpoint: Checkpoint, student: StudentEngine) -> tuple[int, Cursor]:
        student.load_local_state(checkpoint.read)
        rng = checkpoint.rng_state(self._topology.rank, self._topology.world)
        if rng is not None:
            torch.set_rng_state(rng)
        return checkpoint.manifest.step, Cursor.from_state(checkpoint.manifest.cursor)

    def vigil(self, step: int) -> Vigil:
        """What looks at the numbers after `step`, and has seen those before it. What was logged past it is lost.

        The first rank reads metrics.jsonl for all: ranks that knew other pasts would decide differently.
        """
        faults = self._setup.recipe.faults
        recent: deque[tuple[float, float]] = deque(maxlen=faults.spike_window)
        if self._topology.is_first:
            for line in read_lines(self._folder / "metrics.jsonl"):
                self._lost = max(0, int(line["step"]) - step)
                if int(line["step"]) <= step:
                    recent.append((float(line["loss"]), float(line.get("teacher_ce", math.nan))))
        missing = faults.spike_window - len(recent)
        table = torch.tensor([*recent, *[(0.0, 0.0)] * missing], dtype=torch.float64)
        told = torch.cat([table.flatten(), torch.tensor([float(len(recent))])]).to(self._topology.device)
        told = all_reduce_sum(told if self._topology.is_first else torch.zeros_like(told), self._topology.world_group)
        known = told[:-1].view(-1, 2)[: int(told[-1])].tolist()
        return Vigil(faults, losses=[loss for loss, _ in known], teacher_ces=[ce for _, ce in known])

    def goes_on(self, step: int) -> str:
        """The event of a start, when all is ready for the next step; a line. Goodput is counted on from here."""
        seconds, self._began = time.perf_counter() - self._began, time.perf_counter()
        lost, self._lost = self._lost, 0
        self.events.write("resume", step=step, seconds=round(seconds, 3), lost_steps=lost)
        if self._topology.is_first:
            self._goodput, self._goodput_since = goodput(self._folder), time.perf_counter()
        going_on = f"going on after step {step}" + (f", {lost} steps are taken again" if lost else "")
        return f"attempt {self.attempt.number}, {'starting' if step == 0 else going_on}"

    def flags(self) -> dict[str, float]:
        """What this rank tells the others with the next step."""
        fenced = self._topology.is_first and not self.attempt.is_newest()
        return {**self._saver.flags(), FENCED: float(fenced)}

    def require_newest(self, told: Mapping[str, float]) -> None:
        """Raises OperatorFault: another attempt has the folder; nothing of this step is written to it."""
        if told[FENCED]:
            self.attempt.require_newest()
            raise OperatorFault(f"attempt {self.attempt.number} of {self._folder} is over: a later one has started")

    def step_done(self, seconds: float) -> None:
        """A step that counts took so long."""
        self._goodput = replace(self._goodput, useful=self._goodput.useful + seconds)

    def poll(self, told: Mapping[str, float]) -> list[str]:
        """Lines on a save that ended with this step, if one did."""
        result = self._saver.poll(told)
        return self._told([result]) if result is not None else []

    def save(self, student: StudentEngine, step: int, cursor: Cursor, *, last: bool) -> list[str]:
        """Begins a checkpoint of exactly this step, and waits for the last one. Lines on what ended.

        Raises:
            RestartFault: the last one failed.
        """
        began = time.perf_counter()
        state = {**student.local_state(), RNG_KEY: torch.get_rng_state()}
        manifest = CheckpointManifest(
            format=FORMAT,
            step=step,
            tokens=step * self._setup.tokens_per_step,
            world=self._topology.world,
            vocab_size=self._setup.data.vocab_size,
            cursor=cursor.state(),
            parameters=student.parameters,
            versions=versions(),
            attempt=self.attempt.number,
            recipe=self._recipe,
            recipe_sha256=self._recipe_sha256,
            rollbacks=len(self.rollbacks),
            files={},
        )
        ended = self._saver.start(state, manifest, stalled=time.perf_counter() - began)
        if last and (not ended or ended[-1].step != step):
            ended.append(self._saver.finish())
        lines = self._told(ended)
        if last:
            require_saved(ended[-1])
        return lines

    def roll_back(
        self, spike: Finding, at_step: int, *, slots_before: Mapping[int, int], slots_end: int
    ) -> tuple[Rollback | None, str]:
        """Decides on a spike. A rollback is on record when this returns; `resume` then goes on before it.

        Returns it, or None and why there is none.
        """
        faults = self._setup.recipe.faults
        if len(self.rollbacks) >= faults.max_rollbacks:
            return None, f"no rollback: faults.max_rollbacks is {faults.max_rollbacks}" if faults.max_rollbacks else ""
        ended = self._told([self._saver.finish()] if self._saver.busy else [])
        plan = plan_rollback(
            at_step,
            spike.line,
            steps=faults.rollback_steps,
            slots_before=slots_before,
            slots_end=slots_end,
            checkpoints=list(checkpoint_folders(self.checkpoints)),
        )
        if plan is None:
            return None, f"no rollback: no checkpoint is {faults.rollback_steps} steps older"
        self._began = time.perf_counter()  # what comes until the next step is a start
        self.rollbacks.append(plan)
        if self._topology.is_first:
            record_rollbacks(self._folder, self.rollbacks)
        self.events.write("rollback", step=at_step, to_step=plan.to_step, skip=list(plan.skip))
        line = f"rolling back to step {plan.to_step}; slots {plan.skip[0]} to {plan.skip[1] - 1} are left out"
        return plan, "; ".join([*ended, line])

    def ended(self, reason: str, *, rank: int, exit_code: int) -> None:
        """The attempt ends by a fault, as this rank met it."""
        self.events.fault(reason, step=self.step, rank=rank, exit_code=exit_code)

    def done(self, step: int) -> None:
        """The last step is saved: whoever looks at the folder finds the file DONE."""
        self.events.write("done", step=step)
        if self._topology.is_first:
            (self._folder / "DONE").write_text(f"{step}\n", encoding="utf-8")

    def goodput(self) -> str:
        """A line: where the time of all attempts went."""
        wall = self._goodput.wall + time.perf_counter() - self._goodput_since
        return str(replace(self._goodput, wall=wall))

    def close(self) -> None:
        self._saver.close()

    def _told(self, results: list[SaveResult]) -> list[str]:
        lines = []
        for result in results:
            stall, write = round(result.stall_seconds, 3), round(result.write_seconds, 3)
            if result.path is None:
                self.events.write("save_failed", step=result.step, reason=result.problem, stall_seconds=stall)
                lines.append(f"the checkpoint of step {result.step} was not written: {result.problem}")
                if not self._topology.is_first:  # whose log says it; a person may look at any rank's
                    print(f"megadistill: rank {self._topology.rank}: {lines[-1]}", file=sys.stderr, flush=True)
                continue
            self._goodput = replace(self._goodput, saving=self._goodput.saving + stall)
            self.events.write(
                "saved",
                step=result.step,
                stall_seconds=stall,
                write_seconds=write,
                bytes=result.bytes,
                removed=list(result.removed),
            )
            lines.append(f"saved {result.path} (waited {stall:.2f} s, written in {write:.2f} s)")
        return lines
