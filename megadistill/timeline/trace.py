"""A timeline in the Trace Event Format, which chrome://tracing and Perfetto load.

A process is a node, a thread is a rank. Format: "Trace Event Format" (Google, the Chromium project's document): `X` a
complete event, `s` and `f` the ends of an arrow, `M` names; `ts` and `dur` are microseconds.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megadistill.io import write_file
from megadistill.timeline.spans import KINDS, MessageId, Timeline


def write_trace(timeline: Timeline, path: Path) -> None:
    content = {
        "traceEvents": list(trace_events(timeline)),
        "displayTimeUnit": "ms",
        "otherData": {"title": timeline.title, "note": timeline.note, "kinds": dict(KINDS)},
    }
    write_file(path, json.dumps(content) + "\n")


def trace_events(timeline: Timeline) -> Iterator[dict[str, Any]]:
    begin, end = timeline.window
    nodes = {node: place for place, node in enumerate(dict.fromkeys(lane.node for lane in timeline.lanes))}
    for node, pid in nodes.items():
        yield _name("process_name", pid, 0, name=f"node {pid}: {node}")
        yield _name("process_sort_index", pid, 0, sort_index=pid)
    ends: dict[tuple[MessageId, str], dict[str, Any]] = {}
    for lane in timeline.lanes:
        place = {"pid": nodes[lane.node], "tid": lane.rank}
        yield _name("thread_name", **place, name=f"rank {lane.rank}: {lane.role}")
        yield _name("thread_sort_index", **place, sort_index=lane.rank)
        for step in lane.steps:
            yield {"ph": "X", "name": f"step {step.number}", "cat": "step", **_times(step.begin, step.end), **place}
        for span in lane.spans:
            if span.end < begin or span.begin > end:
                continue
            arguments = {} if span.number is None else {"number": span.number}
            if span.message is not None:
                arguments |= span.message._asdict()
            times = _times(max(begin, span.begin), min(end, span.end))
            event = {"ph": "X", "name": span.name, "cat": span.kind, **times, "args": arguments, **place}
            yield event
            if span.message is not None and span.kind in ("send", "wait"):
                ends.setdefault((span.message, span.kind), event)
    yield from _arrows(ends)


def _arrows(ends: dict[tuple[MessageId, str], dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Arrows between the sending span and the waiting span of each message that has both."""
    for number, ((message, kind), sent) in enumerate(ends.items()):
        arrived = ends.get((message, "wait"))
        if kind != "send" or arrived is None:
            continue
        common = {"name": "message", "cat": "message", "id": number}
        yield {"ph": "s", **common, "ts": sent["ts"], "pid": sent["pid"], "tid": sent["tid"]}
        # An arrow ends at the event around its time, so its time must not be later than the event's end.
        ts = arrived["ts"] + arrived["dur"] - min(0.001, arrived["dur"] / 2)
        yield {"ph": "f", "bp": "e", **common, "ts": ts, "pid": arrived["pid"], "tid": arrived["tid"]}


def _name(what: str, pid: int, tid: int, **arguments: Any) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": pid, "tid": tid, "args": arguments}


def _times(begin: float, end: float) -> dict[str, float]:
    """Begin and duration (µs) of an event from `begin` to `end` (s)."""
    ts, stop = (round(1e6 * seconds, 3) for seconds in (begin, end))
    return {"ts": ts, "dur": stop - ts}
