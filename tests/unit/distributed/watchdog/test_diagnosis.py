"""Who is named, from what ranks say of themselves: every case that the issue and its runs have shown."""

from dataclasses import replace

import pytest

from megadistill.distributed.watchdog.diagnosis import GRACE_SECONDS, LOST, Observer, Sign, silence_limit, stalled

STEP, LONG = 60.0, 600.0


def _sign(**values: object) -> Sign:
    """A rank that waits in a collective of step 7, and is late."""
    sign = Sign(host="node7", pid=42, phase="train", step=7, seconds=61.0, limit=STEP, waits=True, place="step.py:9 f")
    return replace(sign, **values)  # type: ignore[arg-type]


WAITING, BUSY = _sign(), _sign(waits=False, place="reader.py:5 read")
SERVING = _sign(phase="serve", step=0, seconds=9000.0, limit=None)
"""A rank of the teacher's that waits for requests."""


@pytest.mark.parametrize(
    ("signs", "named"),
    [
        ([_sign(seconds=59.0), _sign(seconds=59.0, waits=False)], None),
        ([WAITING, BUSY, WAITING], [1]),
        ([BUSY, WAITING, BUSY], [0, 2]),
        ([BUSY], [0]),
        ([WAITING, WAITING], []),
        # The teacher: not for waiting, but if it is what the student waits for.
        ([WAITING, BUSY, SERVING], [1]),
        ([WAITING, WAITING, SERVING], []),
        ([WAITING, WAITING, replace(SERVING, waits=False)], [2]),
        ([BUSY, WAITING, replace(SERVING, waits=False)], [0]),
        ([replace(SERVING, waits=False), SERVING], None),
        # One that works within the limit of its own phase excuses those that wait for it, and no longer.
        ([WAITING, _sign(phase="save", limit=LONG, waits=False)], None),
        ([_sign(seconds=601.0), _sign(phase="save", limit=LONG, waits=False)], [1]),
        ([WAITING, replace(SERVING, waits=False), _sign(phase="save", limit=LONG, waits=False)], None),
        # By the collectives that were joined, where frames are all alike.
        ([_sign(joined={"0": 57}), _sign(joined={"0": 56}), _sign(joined={"0": 57})], [1]),
        ([replace(BUSY, joined={"0": 57}), replace(BUSY, joined={"0": 56}), replace(BUSY, joined={"0": 57})], [1]),
        ([_sign(joined={"0": 5}), replace(BUSY, joined={"0": 4}), _sign(joined={"0": 4})], [1]),
        ([_sign(joined={"0": 5, "a": 1}), _sign(joined={"0": 5, "b": 8}), replace(BUSY, joined={"0": 5})], [2]),
        # By step, and by the line where few are, where nothing else tells.
        ([WAITING, _sign(step=6), WAITING], [1]),
        ([replace(BUSY, place="b"), replace(BUSY, place="a"), replace(BUSY, place="b")], [1]),
        ([replace(BUSY, seconds=1.0), BUSY], [1]),
    ],
)
def test_the_one_outside_is_named(signs: list[Sign], named: list[int] | None) -> None:
    assert stalled(dict(enumerate(signs))) == named


class _Run:
    """Looks at ranks once a second; each look is a new sign of each rank but the silent ones."""

    def __init__(self, *signs: Sign, silence: float = 9.0) -> None:
        self.signs = dict(enumerate(signs))
        self.observer = Observer(silence=silence, period=1.0)
        self.now = 1000.0
        self.beat = 0

    def look(self, *, silent: tuple[int, ...] = (), later: float = 1.0) -> str | None:
        self.now += later
        self.beat += 1
        for rank, sign in self.signs.items():
            if rank not in silent:
                self.signs[rank] = replace(sign, beat=self.beat)
        return self.observer.look(self.signs, self.now)


def test_a_stall_is_seen_twice_before_it_is_said() -> None:
    run = _Run(WAITING, BUSY)
    assert run.look() is None
    run.signs[1] = WAITING  # it was only passing from one collective to the next
    assert run.look() is None
    run.signs[1] = BUSY
    assert run.look() is None
    said = run.look()
    assert said is not None
    assert said.startswith("rank 1 (node7, process 42) is stuck and is not in the collective of the others: ")
    assert "in train of step 7 at reader.py:5 read for 61 s" in said


def test_ranks_that_stand_alike_are_not_blamed() -> None:
    run = _Run(WAITING, WAITING)
    run.look()
    assert "all 2 ranks stand alike and none can be named" in str(run.look())


def test_a_silent_rank_is_named_when_its_time_is_over() -> None:
    run = _Run(_sign(seconds=1.0), _sign(seconds=1.0, waits=False))
    assert run.look() is None
    assert [run.look(silent=(1,)) for _ in range(9)] == [None] * 9
    said = run.look(silent=(1,))
    assert said == (
        "no sign of life from rank 1 for 10 s: it was killed or is frozen (node7, process 42), last seen in train of "
        "step 7 at step.py:9 f"
    )


def test_a_rank_that_froze_outside_of_the_collective_is_called_silent_and_not_stuck() -> None:
    run = _Run(_sign(seconds=1.0, limit=8.0), _sign(seconds=1.0, limit=8.0, waits=False), silence=60.0)
    run.look()
    said = None
    while said is None:
        run.signs[0] = replace(run.signs[0], seconds=run.signs[0].seconds + 1)
        said = run.look(silent=(1,))
    assert said.startswith("no sign of life from rank 1")


def test_after_a_freeze_of_its_own_the_reader_blames_nobody() -> None:
    """All were stopped and go on together: the signs are as old as the reader's last look."""
    run = _Run(_sign(seconds=1.0), _sign(seconds=1.0))
    run.look()
    assert run.look(silent=(0, 1), later=3600.0) is None
    assert run.look() is None


def test_a_rank_that_ended_ends_the_others_after_a_grace() -> None:
    run = _Run(_sign(seconds=1.0), _sign(seconds=1.0, end=LOST), _sign(seconds=1.0, end="ValueError: no"))
    looks = [run.look(), *(run.look(silent=(1, 2)) for _ in range(int(GRACE_SECONDS) + 1))]
    assert looks[:-1] == [None] * (len(looks) - 1)
    assert looks[-1] == "rank 2 (node7, process 42) failed: ValueError: no; the others cannot go on without it"


def test_who_is_missing_is_who_gave_a_reason_else_who_is_silent() -> None:
    run = _Run(_sign(end=LOST), WAITING, WAITING)
    run.look()
    assert run.observer.missing(run.now) is None
    for _ in range(4):
        run.look(silent=(2,))
    missing = run.observer.missing(run.now)
    assert missing is not None
    assert missing.startswith("rank 2 (node7, process 42): no sign of life for 4 s")
    run.signs[1] = replace(WAITING, end="OSError: disk")
    run.look(silent=(2,))
    assert run.observer.missing(run.now) == "rank 1 (node7, process 42), which says: OSError: disk"


def test_no_silence_is_shorter_than_a_few_beats() -> None:
    assert [silence_limit(60.0, None), silence_limit(60.0, 20.0), silence_limit(60.0, 0.1)] == [60.0, 20.0, 3.0]


def test_a_sign_travels() -> None:
    sign = _sign(joined={"student 0": 3}, end=LOST, limit=None)
    assert Sign.loads(sign.dumps()) == sign
