"""A timeline in the Trace Event Format, which chrome://tracing and Perfetto load.

A process is a node, a thread is a rank. Format: "Trace Event Format" (Google, the Chromium project's document): `X` a
complete event, `s` and `f` the ends of an arrow, `M` names; `ts` and `dur` are microseconds.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megadistill.timeline.spans import KINDS, MessageId, Span, Timeline


def write_trace(timeline: Timeline, path: Path) -> None:
    content = {
        "traceEvents": list(trace_events(timeline)),
        "displayTimeUnit": "ms",
        "otherData": {"title": timeline.title, "note": timeline.note, "kinds": dict(KINDS)},
    }
    path.write_text(json.dumps(content) + "\n", encoding="utf-8")


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
            times = {"ts": _us(step.begin), "dur": _us(step.end) - _us(step.begin)}
            yield {"ph": "X", "name": f"step {step.number}", "cat": "step", **times, **place}
        for span in lane.spans:
            if span.end < begin or span.begin > end:
                continue
            event = {**_event(span, max(begin, span.begin), min(end, span.end)), **place}
            yield event
            if span.message is not None and span.kind in ("send", "wait"):
                ends.setdefault((span.message, span.kind), event)
    yield from _arrows(ends)


def _event(span: Span, begin: float, end: float) -> dict[str, Any]:
    arguments = {} if span.number is None else {"number": span.number}
    if span.message is not None:
        arguments = {**arguments, **span.message._asdict()}
    return {
        "ph": "X",
        "name": span.name,
        "cat": span.kind,
        "ts": _us(begin),
        "dur": _us(end) - _us(begin),
        "args": arguments,
    }


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


def _us(seconds: float) -> float:
    return round(1e6 * seconds, 3)
