"""Events of a run in words: one sentence each, checkpoints and skipped steps in a row together."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from megadistill.events import EVENTS
from megadistill.report.run_record import Event, Floats, RunRecord, number
from megadistill.report.tables import text
from megadistill.units import number_of, readable, short, spell

MEANINGS = {
    "attempt_started": "the command was started",
    "resumed": "training began, or continued from a checkpoint",
    "branched": "the run began from a checkpoint of another run",
    "replicas_changed": "a replica of the student was lost, or joined, and the run went on with those that were there",
    "recipe_changed": "the run continued with another recipe, which leaves the steps before as they are",
    "curriculum_entry": "steps took the sequence length, batch and rotary embeddings of a curriculum entry",
    "checkpoint_saved": "weights, optimizer and position were written; a later start continues from there",
    "checkpoint_failed": "a checkpoint could not be written; the run continued",
    "local_checkpoint_saved": "the same on the nodes themselves, from which a start on these nodes continues",
    "local_checkpoint_failed": "a save on the nodes themselves could not be written; the run continued",
    "checkpoint_quarantined": "a checkpoint could not be used and was renamed; an older one was taken",
    "step_skipped": "a loss or gradient was not finite; the weights were left as they were",
    "loss_spike": "the loss left the range of the steps before it",
    "student_diverged": "the cross-entropy stayed far above that of the first step: the learning rate is too high",
    "experts_starved": "experts of the student got hardly any tokens, and so hardly learnt",
    "rollback": "the run went back to an earlier checkpoint, and leaves out the data in between",
    "teacher_drift": "the teacher's cross-entropy left the range of the steps before it",
    "teacher_above_uniform": "the teacher predicted the first tokens worse than a uniform guess over all ids",
    "float8_teacher": "the teacher in float8 was compared with the native one before the first step",
    "samples_masked": "corrupt sequences were left out of the loss",
    "validated": "the student was measured on held-out text",
    "validation_plateau": "the held-out cross-entropy has not fallen for as long as validation.patience says",
    "held_out_masked": "corrupt held-out sequences were left out of the measures",
    "straggler": "a rank is slower than the others",
    "stop_requested": "a signal or the time limit asked the run to stop",
    "stopped": "the run stopped as asked, with a checkpoint",
    "attempt_failed": "an attempt ended by a fault",
    "completed": "the last step was taken and saved",
}
"""Meaning of each of `EVENTS`, for a reader of the page."""

assert MEANINGS.keys() == EVENTS.keys()

MAX_LISTED = 8
"""Maximum numbers of a list in a sentence."""


@dataclass(frozen=True)
class Sentence:
    """One event, or several of a kind in a row, as a sentence."""

    event: Event
    """The first of them."""
    text: str


def sentences(run: RunRecord) -> list[Sentence]:
    """Sentences for the events of a run, in the order of their times."""
    times = run.series["time"]
    ends = np.sort(times[np.isfinite(times)])
    described: list[Sentence] = []
    before: Event | None = None
    earlier, signs = 0.0, 0.0  # time of the last event of earlier attempts, and of all
    for _, group in groupby(run.events, key=_group):
        together = list(group)
        if before is None or together[0].attempt != before.attempt:
            earlier = signs
        pause = _pause(together[0], ends, earlier)
        described.append(Sentence(together[0], _sentence(together, before, pause)))
        before = together[-1]
        signs = before.time
    return described


def _pause(event: Event, ends: Floats, earlier: float) -> float:
    """Seconds between the last step or event of earlier attempts, at `earlier` at least, and this one's start."""
    if event.kind != "resumed":
        return 0.0
    began = event.time - event.seconds("startup_seconds")
    steps = int(np.searchsorted(ends, began))
    last = max(earlier, float(ends[steps - 1]) if steps else 0.0)
    return began - last if last > 0 else 0.0


def _group(event: Event) -> tuple[Any, ...]:
    """Equal for events of one sentence."""
    if event.kind in ("checkpoint_saved", "local_checkpoint_saved", "validated"):
        return (event.kind, event.attempt)
    if event.kind == "step_skipped":
        return (event.kind, event.attempt, text(event.values.get("reason")))
    return (id(event),)


def _sentence(events: Sequence[Event], before: Event | None, pause: float) -> str:
    event = events[0]
    if event.kind in ("checkpoint_saved", "local_checkpoint_saved"):
        return _saved(events)
    if event.kind == "validated":
        return _validated(events)
    if event.kind == "step_skipped":
        steps = [f"{each.step:,}" for each in events]
        return f"{'steps' if len(steps) > 1 else 'step'} {_listed(steps)} skipped{_because(event)}"
    if event.kind == "resumed":
        return _resumed(event, before, pause)
    return _ONE[event.kind](event)


def _saved(events: Sequence[Event]) -> str:
    size = max(number(event.values.get("bytes")) for event in events)
    waited = sum(event.seconds("stall_seconds") for event in events)
    written = max(event.seconds("write_seconds") for event in events)
    costs = [f"{readable(size, 'B')} a rank"] if size > 0 else []
    costs += [f"{spell(written)} to write"] if written else []
    costs += [f"training waited {spell(waited)}"] if waited else []
    several = len(events) > 1
    kind = "local save" if events[0].kind == "local_checkpoint_saved" else "checkpoint"
    where = f"{len(events):,} {kind}s, steps {events[0].step:,} to {events[-1].step:,}"
    return _with(where if several else f"{kind} at step {events[0].step:,}", costs)


def _validated(events: Sequence[Event]) -> str:
    first, last = events[0], events[-1]
    seconds = sum(event.seconds("seconds") for event in events)
    ce = number(last.values.get("cross_entropy"))
    costs = [f"cross-entropy {short(ce)}"] if ce == ce else []
    costs += [spell(seconds)] if seconds else []
    where = f"validated {len(events):,} times, steps {first.step:,} to {last.step:,}"
    return _with(where if len(events) > 1 else f"validated at step {first.step:,}", costs)


def _plateau(event: Event) -> str:
    best, step = (number(event.values.get(name)) for name in ("best", "best_step"))
    since = f" since {short(best)} at step {int(step):,}" if best == best and step >= 0 else ""
    return f"the held-out cross-entropy has not fallen at step {event.step:,}{since}"


def _held_out_masked(event: Event) -> str:
    splits = event.values.get("splits")
    counts = [f"{text(name)} {text(count)}" for name, count in splits.items()] if isinstance(splits, dict) else []
    return f"corrupt held-out sequences left out at step {event.step:,}" + (f": {_listed(counts)}" if counts else "")


def _resumed(event: Event, before: Event | None, pause: float) -> str:
    startup, lost = event.seconds("startup_seconds"), number(event.values.get("lost_steps"))
    costs = ["from a local save"] if event.values.get("tier") == "local" else []
    costs += [f"{spell(startup)} to start"] if startup else []
    costs += [f"{number_of(int(lost), 'step')} to take again"] if lost > 0 else []
    if before is not None and before.kind == "rollback":
        return _with(f"continued from step {event.step:,} after the rollback", costs)
    what = f"resumed from step {event.step:,}" if event.step else "training began"
    return _with(what + (f" after a pause of {spell(pause)}" if pause >= 1 else ""), costs)


def _with(what: str, costs: Sequence[str]) -> str:
    return f"{what} ({', '.join(costs)})" if costs else what


def _because(event: Event) -> str:
    reason = event.values.get("reason")
    return f": {text(reason)}" if reason else ""


def _listed(items: Sequence[str]) -> str:
    more = len(items) - MAX_LISTED
    return ", ".join(items[:MAX_LISTED]) + (f" and {more:,} more" if more > 0 else "")


def _started(event: Event) -> str:
    ranks = number(event.values.get("world_size"))
    count = f" on {number_of(int(ranks), 'process', 'processes')}" if ranks >= 1 else ""
    before = event.values.get("before")
    return f"attempt {event.attempt:,} started{count}" + (f"; before, {text(before)}" if before else "")


def _quarantined(event: Event) -> str:
    path = event.values.get("path")
    where = f" as {text(path)}" if path else ""
    return f"checkpoint of step {event.step:,} quarantined{where}{_because(event)}"


def _left_its_window(what: str, name: str) -> Callable[[Event], str]:
    def sentence(event: Event) -> str:
        numbers = _numbers(event, ": {}, where the steps before had {}", name, "median")
        score = number(event.values.get("zscore"))
        deviations = f" ({score:,.0f} standard deviations)" if score == score else ""
        slots = _slots(event.values.get("slots"), inclusive=True)
        return f"{what} at step {event.step:,}{numbers}{deviations}" + (f"; {slots}" if slots else "")

    return sentence


def _numbers(event: Event, template: str, *names: str) -> str:
    """`template` with the numbers of these names; empty where one is unknown."""
    values = [number(event.values.get(name)) for name in names]
    return template.format(*map(short, values)) if all(value == value for value in values) else ""


def _diverged(event: Event) -> str:
    numbers = _numbers(event, ": cross-entropy {}, {} at the first step", "student_ce", "first_ce")
    return f"the student diverged at step {event.step:,}{numbers}"


def _above_uniform(event: Event) -> str:
    numbers = _numbers(event, ": cross-entropy {}, a uniform guess has {}", "teacher_ce", "uniform_ce")
    return f"the teacher does not know this text at step {event.step:,}{numbers}"


def _float8_teacher(event: Event) -> str:
    names = "kl", "float8_ce", "native_ce"
    return f"teacher in float8{_numbers(event, ': KL {} to the native one, cross-entropy {} instead of {}', *names)}"


def _starved(event: Event) -> str:
    experts, number_starved = event.values.get("experts"), number(event.values.get("count"))
    known = [
        f"expert {int(number(each.get('expert'))):,} of layer {int(number(each.get('layer'))):,}"
        for each in (experts if isinstance(experts, list) else ())
        if isinstance(each, dict) and number(each.get("expert")) >= 0 and number(each.get("layer")) >= 0
    ]
    count = int(number_starved) if number_starved >= 1 else len(known)
    which = number_of(count, "expert") if count else "experts"
    return f"{which} starved at step {event.step:,}" + (f": {_listed(known)}" if known else "")


def _rollback(event: Event) -> str:
    to_step = number(event.values.get("to_step"))
    target = f" to step {int(to_step):,}" if to_step >= 0 else ""
    slots = _slots(event.values.get("skipped_slots"), inclusive=False)
    return f"rolled back from step {event.step:,}{target}" + (f"; {slots} are left out from now on" if slots else "")


def _slots(bounds: Any, *, inclusive: bool) -> str:
    if not isinstance(bounds, list) or len(bounds) != 2 or not all(number(each) >= 0 for each in bounds):
        return ""
    first, last = int(bounds[0]), int(bounds[1]) - (not inclusive)
    return f"slots {first:,} to {last:,}"


def _masked(event: Event) -> str:
    slots = event.values.get("slots")
    known = [f"{int(each):,}" for each in slots if number(each) >= 0] if isinstance(slots, list) else []
    if len(known) == 1:
        return f"1 corrupt sample masked at step {event.step:,}: slot {known[0]}"
    which = f": slots {_listed(known)}" if known else ""
    return f"{len(known):,} corrupt samples masked at step {event.step:,}{which}"


def _recipe_changed(event: Event) -> str:
    changes = event.values.get("changes")
    pairs = changes.items() if isinstance(changes, dict) else ()
    keys = [
        f"{text(key)} {text(pair[0])} -> {text(pair[1])}"
        for key, pair in pairs
        if isinstance(pair, list) and len(pair) == 2
    ]
    return f"recipe changed at step {event.step:,}" + (f": {_listed(keys)}" if keys else "")


def _entry(event: Event) -> str:
    values = {name: number(event.values.get(name)) for name in ("entry", "sequence_length", "global_batch")}
    known = {name: f"{int(value):,}" for name, value in values.items() if value == value}
    parts = [f"sequences of {known['sequence_length']} tokens"] if "sequence_length" in known else []
    parts += [f"global batch {known['global_batch']}"] if "global_batch" in known else []
    if (rope := event.values.get("rope")) is not None:
        parts.append(f"rope {text(rope)}")
    return _with(f"curriculum entry {known.get('entry', '?')} from step {event.step:,} on", parts)


def _replicas(event: Event) -> str:
    values, parts = event.values, []
    for kind in ("lost", "joined"):
        if isinstance(numbers := values.get(kind), list) and numbers:
            parts.append(f"{', '.join(map(text, numbers[:MAX_LISTED]))} {kind}")
    count, seconds = number(values.get("replicas")), number(values.get("seconds"))
    parts += [f"after {spell(seconds)}"] if seconds == seconds else []
    known = number_of(int(count), "replica") if count == count else "other replicas"
    return _with(f"went on from step {event.step:,} with {known}", parts)


def _failed(event: Event) -> str:
    rank, code = (number(event.values.get(name)) for name in ("rank", "exit_code"))
    where = f" on rank {int(rank):,}" if rank >= 0 else ""
    return f"attempt {event.attempt:,} failed at step {event.step:,}{where}{_because(event)}" + (
        f" (exit code {int(code)})" if code == code else ""
    )


_ONE: Mapping[str, Callable[[Event], str]] = {
    "attempt_started": _started,
    "branched": lambda event: f"began from step {event.step:,} of {text(event.values.get('run'))}",
    "replicas_changed": _replicas,
    "recipe_changed": _recipe_changed,
    "curriculum_entry": _entry,
    "checkpoint_failed": lambda event: f"checkpoint at step {event.step:,} not written{_because(event)}",
    "local_checkpoint_failed": lambda event: f"local save at step {event.step:,} not written{_because(event)}",
    "checkpoint_quarantined": _quarantined,
    "loss_spike": _left_its_window("loss spike", "loss"),
    "student_diverged": _diverged,
    "experts_starved": _starved,
    "rollback": _rollback,
    "teacher_drift": _left_its_window("teacher's cross-entropy", "teacher_ce"),
    "teacher_above_uniform": _above_uniform,
    "float8_teacher": _float8_teacher,
    "samples_masked": _masked,
    "validation_plateau": _plateau,
    "held_out_masked": _held_out_masked,
    "straggler": lambda event: (
        f"slow rank at step {event.step:,}: {text(event.values.get('message')).removeprefix('straggler: ')}"
    ),
    "stop_requested": lambda event: f"stop requested at step {event.step:,}{_because(event)}",
    "stopped": lambda event: f"stopped after step {event.step:,}{_because(event)}",
    "attempt_failed": _failed,
    "completed": lambda event: f"completed at step {event.step:,}",
}
