"""The ends of an attempt by a fault, rank by rank: one event for all of them, and a few files of details.

When a rank of thousands fails, all of them end, and each knows a reason. faults/00003/ of attempt 3 has

* cause.json, of the first rank with a reason of its own; lost_peer.json, of the first that only lost another rank and
  found no cause; requested.json, of the first that a person ended. Each is made by an exclusive create, and its rank
  writes the event: one line, or one for each of these kinds. Where it is killed before that, the next start does.
* host-NAME.json, of the first rank of each node, and reason-1a2b3c4d.json, of the first rank with each further reason,
  `MAX_REASONS` at most. Reasons that differ in numbers alone are one.
"""

import hashlib
import json
import re
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from megadistill.io import read_json

FaultKind = Literal["cause", "lost_peer", "requested"]

MAX_REASONS = 16
MAX_REASON_CHARACTERS = 2000


class FaultClaim(NamedTuple):
    """The part of a rank in recording its own end."""

    writes_event: bool
    prints: bool
    """Whether its standard error has the reason: no other rank of its node prints the same."""


def claim_fault(folder: Path, attempt: int, kind: FaultKind, values: Mapping[str, Any]) -> FaultClaim:
    """Records the end of a rank by a fault in the run folder. On any rank; costs a few calls of the file system.

    `values`: `rank`, `step`, `reason`, `exit_code`.
    """
    reason, host = str(values["reason"])[:MAX_REASON_CHARACTERS], socket.gethostname()
    record = {"time": round(time.time(), 3), "host": host, "kind": kind, **values, "reason": reason}
    place = _place(folder, attempt)
    try:
        place.mkdir(parents=True, exist_ok=True)
        is_known = kind == "lost_peer" and any((place / f"{each}.json").exists() for each in ("cause", "requested"))
        is_first = not is_known and _create(place / f"{kind}.json", record)
        is_first_of_host = _create(place / f"host-{re.sub(r'[^A-Za-z0-9.-]', '_', host)[:100]}.json", record)
        is_new = not is_first and kind == "cause" and _is_new_reason(place, record)
    except OSError:  # a full disk: a line too many is better than none
        return FaultClaim(writes_event=True, prints=True)
    return FaultClaim(writes_event=is_first, prints=is_first or is_first_of_host or is_new)


def claimed_faults(folder: Path, attempt: int) -> dict[FaultKind, dict[str, Any]]:
    """The records of the ranks that have an event of the attempt's end to write, by the kind of fault."""
    records: dict[FaultKind, dict[str, Any]] = {}
    for kind in get_args(FaultKind):
        try:
            record = read_json(_place(folder, attempt) / f"{kind}.json")
        except (OSError, ValueError):  # none, or one that a full disk left empty
            continue
        if isinstance(record, dict):
            records[kind] = record
    if len(records) > 1:
        records.pop("lost_peer", None)
    return records


def _place(folder: Path, attempt: int) -> Path:
    return folder / "faults" / f"{attempt:05d}"


def _is_new_reason(place: Path, record: Mapping[str, Any]) -> bool:
    path = _path_of_reason(place, str(record["reason"]))
    if path.exists() or len([*place.glob("reason-*.json")]) >= MAX_REASONS:
        return False
    try:
        first = read_json(place / "cause.json")["reason"]
    except (OSError, ValueError, KeyError, TypeError):  # being written
        first = ""
    return path != _path_of_reason(place, str(first)) and _create(path, record)


def _path_of_reason(place: Path, reason: str) -> Path:
    digest = hashlib.sha256(re.sub(r"\d+", "0", reason).encode("utf-8", "surrogatepass")).hexdigest()
    return place / f"reason-{digest[:8]}.json"


def _create(path: Path, record: Mapping[str, Any]) -> bool:
    """Whether this process has made the file: another one was not first."""
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    except FileExistsError:
        return False
    return True
