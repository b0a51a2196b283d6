"""A fault of thousands of ranks is one event and a few files, whichever rank comes first, and names the cause."""

import json
import random
import socket
from pathlib import Path
from typing import Any

import pytest

from megadistill.events import EventLog, read_events
from megadistill.events.faults import MAX_REASONS, FaultKind, claim_fault

LOST = "lost another rank in a collective: rank 1717 (n214): a bit is wrong (Connection closed by peer)"
Write = tuple[int, FaultKind, str]


def _fail(folder: Path, monkeypatch: pytest.MonkeyPatch, writes: list[Write], *, per_node: int = 8) -> list[int]:
    """Ranks end in this order; those that print it."""
    prints = []
    for rank, kind, reason in writes:
        monkeypatch.setattr(socket, "gethostname", lambda rank=rank: f"n{rank // per_node}")
        if EventLog(folder, 3, writes=rank == 0).attempt_failed(kind, reason, step=9, rank=rank, exit_code=3):
            prints.append(rank)
    return prints


def _files(folder: Path) -> dict[str, Any]:
    return {path.name: json.loads(path.read_text()) for path in (folder / "faults" / "00003").iterdir()}


@pytest.mark.parametrize("world", [4096])
def test_the_ranks_that_a_lost_one_ends_add_no_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: int
) -> None:
    """The rank with the cause writes it before its connections close, which the others then notice."""
    others: list[Write] = [(rank, "lost_peer", LOST) for rank in range(world) if rank != 1717]
    random.Random(0).shuffle(others)
    prints = _fail(tmp_path, monkeypatch, [(1717, "cause", "a bit is wrong"), *others])
    (event,) = read_events(tmp_path)
    assert (event["rank"], event["reason"], event["attempt"], event["step"]) == (1717, "a bit is wrong", 3, 9)
    assert len(prints) == world // 8, "one a node"
    assert len(_files(tmp_path)) == world // 8 + 1
    assert sum(path.stat().st_size for path in (tmp_path / "faults").rglob("*.json")) < 512 * 400


@pytest.mark.parametrize("seed", range(3))
def test_in_any_order_the_cause_has_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    writes: list[Write] = [(rank, "lost_peer", LOST) for rank in range(64)]
    writes[17] = (17, "cause", "a bit is wrong")
    random.Random(seed).shuffle(writes)
    prints = _fail(tmp_path, monkeypatch, writes)
    events = list(read_events(tmp_path))
    assert len(events) == 2 - (writes[0][1] == "cause")
    assert [event["reason"] for event in events if "lost_peer" not in event] == ["a bit is wrong"]
    assert 17 in prints
    assert len(prints) <= 8 + 1


def test_a_rank_that_was_killed_is_named_by_one_of_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prints = _fail(tmp_path, monkeypatch, [(rank, "lost_peer", LOST) for rank in range(1, 64)])
    (event,) = read_events(tmp_path)
    assert event["reason"] == LOST
    assert event["lost_peer"] is True
    assert prints == [1, *range(8, 64, 8)], "the node of the dead local rank 0 has one that prints it too"


def test_different_reasons_have_files_up_to_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that differ in numbers alone are one; different ones take a bounded space."""
    same: list[Write] = [(rank, "cause", f"rank {rank}: step 9: loss is nan") for rank in range(1, 300)]
    prints = _fail(tmp_path, monkeypatch, [(0, "cause", "no checkpoint is valid"), *same], per_node=1000)
    assert prints == [0, 1]
    letters: list[Write] = [(rank, "cause", chr(500 + rank) * 5_000) for rank in range(300, 400)]
    prints = _fail(tmp_path, monkeypatch, letters, per_node=1000)
    assert len(prints) == MAX_REASONS - 1
    assert len(_files(tmp_path)) == 2 + MAX_REASONS
    assert len(list(read_events(tmp_path))) == 1
    assert sum(path.stat().st_size for path in (tmp_path / "faults").rglob("*.json")) < 1 << 18


def test_a_second_signal_is_a_request_whatever_came_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It decides whether the time until the next start counts."""
    quits: list[Write] = [(rank, "requested", "SIGINT") for rank in range(16)]
    _fail(tmp_path, monkeypatch, [(3, "cause", "it broke"), *quits, (17, "lost_peer", LOST)])
    assert [event.get("requested", False) for event in read_events(tmp_path)] == [False, True]


def test_a_disk_that_refuses_costs_no_reason(tmp_path: Path) -> None:
    (tmp_path / "faults").write_text("a file where the folder should be")
    claim = claim_fault(tmp_path, 3, "lost_peer", {"rank": 5, "step": 9, "reason": LOST, "exit_code": 3})
    assert claim.writes_event
    assert claim.prints


def test_a_peer_of_ranks_that_a_person_ended_adds_no_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fail(tmp_path, monkeypatch, [(0, "requested", "SIGINT"), *((rank, "lost_peer", LOST) for rank in range(1, 16))])
    assert [event["reason"] for event in read_events(tmp_path)] == ["SIGINT"]


@pytest.mark.parametrize("kind", ["cause", "requested", "lost_peer"])
def test_the_next_start_writes_the_event_of_a_rank_that_was_killed_before(tmp_path: Path, kind: FaultKind) -> None:
    """Between its file and its line, as by the launcher when another rank has left."""
    EventLog(tmp_path, 3, writes=True).write("attempt_started", step=0)
    claim_fault(tmp_path, 3, kind, {"rank": 1717, "step": 9, "reason": "a bit is wrong", "exit_code": 3})
    for _ in range(2):
        EventLog(tmp_path, 4, writes=False).complete_faults()
        EventLog(tmp_path, 4, writes=True).complete_faults()
    (event,) = list(read_events(tmp_path))[1:]
    record = json.loads((tmp_path / "faults" / "00003" / f"{kind}.json").read_text())
    marks: dict[str, bool] = {} if kind == "cause" else {kind: True}
    names = ("time", "step", "rank", "reason", "exit_code")
    assert event == {"attempt": 3, "event": "attempt_failed", **{name: record[name] for name in names}, **marks}


def test_the_next_start_adds_no_event_to_those_that_were_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    EventLog(tmp_path, 3, writes=True).write("attempt_started", step=0)
    _fail(tmp_path, monkeypatch, [(2, "lost_peer", LOST), (1, "cause", "a bit is wrong"), (0, "requested", "SIGINT")])
    before = (tmp_path / "events.jsonl").read_bytes()
    EventLog(tmp_path, 4, writes=True).complete_faults()
    assert (tmp_path / "events.jsonl").read_bytes() == before
    for content in ("", "[]", '{"reason": "x", "step": "nine"}'):
        (tmp_path / "faults" / "00004").mkdir(exist_ok=True)
        (tmp_path / "faults" / "00004" / "cause.json").write_text(content)
        EventLog(tmp_path, 5, writes=True).complete_faults()
    assert (tmp_path / "events.jsonl").read_bytes() == before
