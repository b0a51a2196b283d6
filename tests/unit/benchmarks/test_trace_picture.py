"""The picture of a profile: ranges of one step and one thread, nested."""

import gzip
import json
from pathlib import Path
from typing import Any

from benchmarks.trace_picture import Range, draw, ranges_of


def _event(name: str, ts: float, dur: float, cat: str = "cpu_op", tid: int = 1) -> dict[str, Any]:
    return {"ph": "X", "name": name, "ts": ts, "dur": dur, "cat": cat, "tid": tid}


def test_the_second_step_is_drawn_by_nesting(tmp_path: Path) -> None:
    spans = [("step 1", 0, 1000), ("step 2", 1000, 2000), ("loss", 1500, 1000), ("gloo:send", 1200, 9000)]
    operators = [("aten::mm", 1600, 200), ("aten::add", 2600, 100)]
    events = [_event(*span, cat="user_annotation") for span in spans] + [_event(*each) for each in operators]
    events.append(_event("aten::elsewhere", 1600, 100, tid=2))
    with gzip.open(tmp_path / "trace.json.gz", "wt", encoding="utf-8") as file:
        json.dump({"traceEvents": [*events, {"ph": "M", "name": "thread_name"}]}, file)
    title, ranges = ranges_of(tmp_path / "trace.json.gz")
    assert title == "step 2"
    assert ranges == [
        Range("step 2", True, 0.0, 2.0, 0),
        Range("loss", True, 0.5, 1.5, 1),
        Range("aten::mm", False, 0.6, 0.8, 2),
        Range("aten::add", False, 1.6, 1.7, 1),
    ]
    draw(tmp_path / "trace.json.gz", tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
