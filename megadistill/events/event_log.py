"""Names of events, and the log that writes them."""

import logging
import time
from itertools import takewhile
from pathlib import Path
from typing import Any

from megadistill.events.faults import FaultKind, claim_fault, claimed_faults
from megadistill.events.lines import JsonLines
from megadistill.events.reading import events_from_end, is_event
from megadistill.redaction import redacted

logger = logging.getLogger(__name__)

EVENTS = {
    "attempt_started": "an attempt began: `world_size`, `attempt_record` (host, command, versions), `before`: ranks "
    "of the attempt before that were aborted",
    "resumed": "training continues after `step` (0: from the start); `startup_seconds`, `lost_steps` to take again and "
    "their `lost_seconds`; `tier`: `local` for a save of the local tier; `totals`: sums over the run until now",
    "branched": "the run began from `step` of another one: `run` (its folder's name), `sha256` of the manifest",
    "replicas_changed": "the run continues after `step` with `replicas` copies of the student: the numbers of those "
    "that were `lost` and that `joined`, `seconds` that it took",
    "recipe_changed": "the run continues after `step` with another recipe: `changes`, key -> [former, present value]",
    "curriculum_entry": "`step` is the first one of curriculum entry `entry`, or of its rest after a start: "
    "`sequence_length`, `global_batch`, `micro_batch`, `accumulation`, `rope`",
    "checkpoint_saved": "`stall_seconds` the host waited (an accelerator's copy aside), `write_seconds` on the disk, "
    "`bytes` a rank, `removed`; `totals`: sums over the run up to `step`",
    "checkpoint_failed": "a checkpoint was not written: `reason`, `stall_seconds`; the run continues",
    "local_checkpoint_saved": "a save of the local tier is whole on all nodes: keys as of `checkpoint_saved`",
    "local_checkpoint_failed": "a save of the local tier was not written: `reason`, `stall_seconds`; the run continues",
    "checkpoint_quarantined": "a checkpoint that cannot be used was renamed to `path`: `reason`",
    "step_skipped": "the optimizer did not move, since a loss or a gradient was not finite: `reason`",
    "loss_spike": "the `loss` left its window: `median`, `zscore`",
    "student_diverged": "`student_ce` stayed above `limit`, far above `first_ce` of the first step",
    "experts_starved": "`count` experts of the student had a small part of an even load over `steps` steps: `experts`, "
    "each with `layer`, `expert` and its relative `load`",
    "rollback": "back to the checkpoint of `to_step`; `skipped_slots` [first, stop) are left out from then on",
    "teacher_drift": "the `teacher_ce` left its window: `median`, `zscore`, `slots` [first, last] of the step",
    "teacher_above_uniform": "the teacher's cross-entropy on the first tokens, `teacher_ce`, is above `uniform_ce`",
    "float8_teacher": "the teacher in float8 was compared with the native one on the first tokens: `kl` (nats a token)"
    ", `native_ce`, `float8_ce`",
    "samples_masked": "corrupt sequences were masked: `slots`",
    "validated": "held-out splits were measured: `seconds`, `cross_entropy` of the student over all of them",
    "validation_plateau": "no lower held-out cross-entropy than `best`, of `best_step`, in `validations` of a row; the "
    "last is `cross_entropy`",
    "held_out_masked": "corrupt held-out sequences were left out: `splits`, name -> their number",
    "straggler": "a rank is slower than the others: `message`",
    "stop_requested": "a stop of the run was requested: `reason`",
    "stopped": "the run stopped after `step` with a checkpoint: `reason`; the same command resumes it",
    "attempt_failed": "an attempt ended by a fault: `rank`, `reason`, `exit_code`; `requested` by a second signal; "
    "`lost_peer`: the rank only lost another one. The first rank writes it, `faults/ATTEMPT/` has more of them",
    "completed": "the last step is taken and saved",
}

SAVED = ("checkpoint_saved", "local_checkpoint_saved")
"""Events of saves, for which a run waits."""

FAULT_MARKS = ("requested", "lost_peer")
"""Keys of `attempt_failed` that tell the kinds of fault that are no cause."""

RENAMED_EVENTS = {
    "start": "attempt_started",
    "resume": "resumed",
    "saved": "checkpoint_saved",
    "save_failed": "checkpoint_failed",
    "set_aside": "checkpoint_quarantined",
    "skip": "step_skipped",
    "spike": "loss_spike",
    "teacher_alarm": "teacher_drift",
    "hole": "samples_masked",
    "signal": "stop_requested",
    "stop": "stopped",
    "fault": "attempt_failed",
    "done": "completed",
}
"""Names of events before 0.1.0, and today's."""


class EventLog:
    """Writes events.jsonl. Only the rank with `writes` does, except for failures, which any rank may record."""

    def __init__(self, folder: Path, attempt: int, *, writes: bool) -> None:
        self._folder = folder
        self._lines = JsonLines(folder / "events.jsonl")
        self._attempt = attempt
        self._writes = writes

    def write(self, event: str, *, step: int, **values: Any) -> None:
        if self._writes:
            self._append(event, step, values)

    def warn(self, event: str, line: str, /, *, step: int, **values: Any) -> None:
        """Writes an event and logs a line as a warning, both on the rank that writes."""
        if self._writes:
            logger.warning("%s", line)
            self._append(event, step, values)

    def attempt_failed(self, kind: FaultKind, reason: str, *, step: int, rank: int, exit_code: int) -> bool:
        """Records the end of an attempt by a fault, on any rank. Whether this rank's log should have the reason too.

        The first rank with a kind of fault writes the line, see `faults`: thousands end by the same.
        """
        values = {"rank": rank, "reason": reason, "exit_code": exit_code}
        claim = claim_fault(self._folder, self._attempt, kind, redacted({"step": step, **values}))
        if claim.writes_event:
            self._append("attempt_failed", step, {**values, **_marks(kind)})
        return claim.prints

    def complete_faults(self) -> None:
        """Writes the end of the attempt before, where its rank was killed before it did. Before any other event."""
        attempt = self._attempt - 1
        claimed = claimed_faults(self._folder, attempt) if self._writes else {}
        if not claimed:
            return
        last = takewhile(lambda event: event["event"] != "attempt_started", events_from_end(self._folder))
        written = [event for event in last if event["event"] == "attempt_failed" and event["attempt"] == attempt]
        for kind, record in claimed.items():
            marks = _marks(kind)
            if any({name: event[name] for name in FAULT_MARKS if name in event} == marks for event in written):
                continue
            keys = {
                "time": record.get("time"),
                "attempt": attempt,
                "event": "attempt_failed",
                "step": record.get("step"),
            }
            if is_event(keys):
                values = {name: record.get(name) for name in ("rank", "reason", "exit_code")}
                self._lines.append({**keys, **values, **marks})

    def _append(self, event: str, step: int, values: dict[str, Any]) -> None:
        assert event in EVENTS, event
        self._lines.append(
            {"time": round(time.time(), 3), "attempt": self._attempt, "event": event, "step": step, **redacted(values)}
        )


def _marks(kind: FaultKind) -> dict[str, bool]:
    """The key of an event that tells its kind of fault; none for a cause."""
    return {kind: True} if kind in FAULT_MARKS else {}
