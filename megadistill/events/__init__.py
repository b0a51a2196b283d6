"""Records of a run as JSON lines (events.jsonl, metrics.jsonl, validation.jsonl), and the goodput from them.

An event is one line: `time` (seconds since 1970), `attempt`, `event` (a name of `EVENTS`), `step`, and the event's own
keys. Costs are in seconds. A start reads the ends of both files, whatever their length (`read_history`).
"""

from megadistill.events.event_log import EVENTS, RENAMED_EVENTS, SAVED, EventLog
from megadistill.events.faults import FaultKind
from megadistill.events.goodput import Goodput, goodput, goodput_of
from megadistill.events.lines import JsonLines, LineFromEnd, json_lines, scan_lines
from megadistill.events.reading import (
    LARGEST_COUNT,
    events_from_end,
    is_event,
    last_step,
    metrics_from_end,
    read_events,
    read_metrics,
    seconds_of,
)
from megadistill.events.totals import History, StepTotals, Totals, paused_seconds, read_history
from megadistill.events.validations import (
    ALL,
    PLATEAU,
    VALIDATIONS,
    ValidationHistory,
    cross_entropy_of,
    drop_validations_after,
    numbers_of,
    read_validations,
)

__all__ = [
    "ALL",
    "EVENTS",
    "LARGEST_COUNT",
    "PLATEAU",
    "RENAMED_EVENTS",
    "SAVED",
    "VALIDATIONS",
    "EventLog",
    "FaultKind",
    "Goodput",
    "History",
    "JsonLines",
    "LineFromEnd",
    "StepTotals",
    "Totals",
    "ValidationHistory",
    "cross_entropy_of",
    "drop_validations_after",
    "events_from_end",
    "goodput",
    "goodput_of",
    "is_event",
    "json_lines",
    "last_step",
    "metrics_from_end",
    "numbers_of",
    "paused_seconds",
    "read_events",
    "read_history",
    "read_metrics",
    "read_validations",
    "scan_lines",
    "seconds_of",
]
