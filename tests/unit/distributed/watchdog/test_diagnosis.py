"""Which rank is named from the heartbeats of all: cases that runs have shown."""

from dataclasses import replace

import pytest

from megadistill.distributed.watchdog.diagnosis import (
    GRACE_SECONDS,
    LOST,
    HangDetector,
    Heartbeat,
    read_decision,
    silence_limit,
    stalled_ranks,
)

STEP, LONG = 60.0, 600.0


def _state(**values: object) -> Heartbeat:
    """A rank that waits in a collective of step 7, and is late."""
    heartbeat = Heartbeat(
        host="node7", pid=42, phase="train", step=7, seconds=61.0, limit=STEP, is_waiting=True, location="step.py:9 f"
    )
    return replace(heartbeat, **values)  # type: ignore[arg-type]


WAITING, BUSY = _state(), _state(is_waiting=False, location="reader.py:5 read")
SERVING = _state(phase="serve", step=0, seconds=9000.0, limit=None)
"""A rank of the teacher's that waits for requests."""


def _joined(world: int, *, busy: bool = False, **groups: int) -> Heartbeat:
    """A late rank that has joined as many collectives of each group."""
    return replace(BUSY if busy else WAITING, collectives={"0": world, **groups})


@pytest.mark.parametrize(
    ("heartbeats", "named"),
    [
        ([_state(seconds=59.0), _state(seconds=59.0, is_waiting=False)], None),
        ([WAITING, BUSY, WAITING], [1]),
        ([BUSY, WAITING, BUSY], [0, 2]),
        ([BUSY], [0]),
        ([WAITING, WAITING], []),
        # The teacher: not for waiting, but if it is what the student waits for.
        ([WAITING, BUSY, SERVING], [1]),
        ([WAITING, WAITING, SERVING], []),
        ([WAITING, WAITING, replace(SERVING, is_waiting=False)], [2]),
        ([BUSY, WAITING, replace(SERVING, is_waiting=False)], [0]),
        ([replace(SERVING, is_waiting=False), SERVING], None),
        # One that works within the limit of its own phase excuses those that wait for it, and no longer.
        ([WAITING, _state(phase="save", limit=LONG, is_waiting=False)], None),
        ([_state(seconds=601.0), _state(phase="save", limit=LONG, is_waiting=False)], [1]),
        ([WAITING, replace(SERVING, is_waiting=False), _state(phase="save", limit=LONG, is_waiting=False)], None),
        # By the collectives that were joined, where frames are all alike.
        (
            [_state(collectives={"0": 57}), _state(collectives={"0": 56}), _state(collectives={"0": 57})],
            [1],
        ),
        (
            [
                replace(BUSY, collectives={"0": 57}),
                replace(BUSY, collectives={"0": 56}),
                replace(BUSY, collectives={"0": 57}),
            ],
            [1],
        ),
        (
            [_state(collectives={"0": 5}), replace(BUSY, collectives={"0": 4}), _state(collectives={"0": 4})],
            [1],
        ),
        (
            [
                _state(collectives={"0": 5, "a": 1}),
                _state(collectives={"0": 5, "b": 8}),
                replace(BUSY, collectives={"0": 5}),
            ],
            [2],
        ),
        # By step, and by the line where few are, where nothing else tells.
        ([WAITING, _state(step=6), WAITING], [1]),
        ([replace(BUSY, location="b"), replace(BUSY, location="a"), replace(BUSY, location="b")], [1]),
        ([replace(BUSY, seconds=1.0), BUSY], [1]),
    ],
)
def test_the_one_outside_is_named(heartbeats: list[Heartbeat], named: list[int] | None) -> None:
    assert stalled_ranks(dict(enumerate(heartbeats))) == named


class _Run:
    """An update a second, with a new heartbeat of each rank but the silent ones."""

    def __init__(self, *heartbeats: Heartbeat, silence: float = 9.0) -> None:
        self.heartbeats = dict(enumerate(heartbeats))
        self.detector = HangDetector(silence=silence, period=1.0)
        self.now = 1000.0
        self.tick = 0

    def update(self, *, silent: tuple[int, ...] = (), later: float = 1.0) -> str | None:
        self.now += later
        self.tick += 1
        for rank, heartbeat in self.heartbeats.items():
            if rank not in silent:
                self.heartbeats[rank] = replace(heartbeat, tick=self.tick)
        return self.detector.update(self.heartbeats, self.now)


def test_a_stall_is_seen_twice_before_it_is_said() -> None:
    run = _Run(WAITING, BUSY)
    assert run.update() is None
    run.heartbeats[1] = WAITING  # it was only passing from one collective to the next
    assert run.update() is None
    run.heartbeats[1] = BUSY
    assert run.update() is None
    reason = run.update()
    assert reason is not None
    assert reason.startswith("rank 1 (node7, process 42) is stuck and is not in the collective of the others: ")
    assert "in train of step 7 at reader.py:5 read for 61 s" in reason


def test_ranks_that_stand_alike_are_not_blamed() -> None:
    run = _Run(WAITING, WAITING)
    run.update()
    assert "all 2 ranks look alike, so none can be named" in str(run.update())


def test_a_silent_rank_is_named_when_its_time_is_over() -> None:
    run = _Run(_state(seconds=1.0), _state(seconds=1.0, is_waiting=False))
    assert run.update() is None
    assert [run.update(silent=(1,)) for _ in range(9)] == [None] * 9
    reason = run.update(silent=(1,))
    assert reason == (
        "no heartbeat from rank 1 for 10 s: it was killed or is frozen (node7, process 42), last seen in train of step "
        "7 at step.py:9 f"
    )


def test_a_rank_that_froze_outside_of_the_collective_is_called_silent_and_not_stuck() -> None:
    run = _Run(_state(seconds=1.0, limit=8.0), _state(seconds=1.0, limit=8.0, is_waiting=False), silence=60.0)
    run.update()
    reason = None
    while reason is None:
        run.heartbeats[0] = replace(run.heartbeats[0], seconds=run.heartbeats[0].seconds + 1)
        reason = run.update(silent=(1,))
    assert reason.startswith("no heartbeat from rank 1")


def test_after_a_freeze_of_its_own_the_reader_blames_nobody() -> None:
    """All were stopped and go on together: the heartbeats are as old as the reader's last look."""
    run = _Run(_state(seconds=1.0), _state(seconds=1.0))
    run.update()
    assert run.update(silent=(0, 1), later=3600.0) is None
    assert run.update() is None


def test_a_rank_that_ended_ends_the_others_after_a_grace() -> None:
    run = _Run(_state(seconds=1.0), _state(seconds=1.0, end=LOST), _state(seconds=1.0, end="ValueError: no"))
    reasons = [run.update(), *(run.update(silent=(1, 2)) for _ in range(int(GRACE_SECONDS) + 1))]
    assert reasons[:-1] == [None] * (len(reasons) - 1)
    assert (
        reasons[-1] == "rank 2 (node7, process 42) failed: ValueError: no; the other ranks cannot continue without it"
    )


def test_who_is_missing_is_who_gave_a_reason_else_who_is_silent() -> None:
    run = _Run(_state(end=LOST), WAITING, WAITING)
    run.update()
    assert run.detector.lost_rank(run.now) is None
    for _ in range(4):
        run.update(silent=(2,))
    lost_rank = run.detector.lost_rank(run.now)
    assert lost_rank is not None
    assert lost_rank.startswith("rank 2 (node7, process 42): no heartbeat for 4 s")
    run.heartbeats[1] = replace(WAITING, end="OSError: disk")
    run.update(silent=(2,))
    assert run.detector.lost_rank(run.now) == "rank 1 (node7, process 42): OSError: disk"


def test_no_silence_is_shorter_than_a_few_beats() -> None:
    assert [silence_limit(60.0, None), silence_limit(60.0, 20.0), silence_limit(60.0, 0.1)] == [60.0, 20.0, 3.0]


def test_a_sign_travels() -> None:
    heartbeat = _state(collectives={"student 0": 3}, end=LOST, limit=None)
    assert Heartbeat.loads(heartbeat.dumps()) == heartbeat


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "\x80\x04.", "[" * 5000, '{"host": 1, "pid": "a"}', '{"tick": 1e999}', "x" * (1 << 20)]
)
def test_what_another_program_has_written_is_no_heartbeat_and_no_decision(text: str) -> None:
    assert Heartbeat.loads(text) is None
    assert read_decision(text) is None


def test_texts_of_a_heartbeat_and_a_decision_can_be_printed() -> None:
    heartbeat = Heartbeat.loads(Heartbeat(host="n\x1b[2J1", pid=1, end="a\nb").dumps())
    assert heartbeat is not None
    assert (heartbeat.host, heartbeat.end) == ("n\ufffd[2J1", "a\ufffdb")
    decision = read_decision('{"tick": 1, "abort": "\\u001b[2J", "grace": 0.0, "lost_rank": null}')
    assert decision is not None
    assert decision["abort"] == "\ufffd[2J"
