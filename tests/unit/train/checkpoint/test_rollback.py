"""Rollbacks: the checkpoint they go to, the slots they skip, the checkpoints they abandon."""

import json
import os
from pathlib import Path

import pytest

from megadistill.errors import OperatorFault
from megadistill.train.checkpoint.rollback import (
    Rollback,
    is_abandoned,
    plan_rollback,
    read_rollbacks,
    record_rollbacks,
)
from tests.unit.train.cases import manifest_of

SLOTS = {step: 100 + 8 * step for step in range(1, 60)}
"""The next slot before each step, of a run that has 8 a step."""


def _plan(at_step: int, steps: int, checkpoints: list[int], known: int = 99) -> Rollback | None:
    """`known`: before how many of the last steps the loop still knows the slot."""
    before = {step: SLOTS[step] for step in range(max(1, at_step - known + 1), at_step + 1)}
    return plan_rollback(
        at_step, "why", steps=steps, slots_before=before, slots_end=SLOTS[at_step + 1], checkpoints=checkpoints
    )


def test_the_sequences_of_the_last_steps_are_left_out() -> None:
    plan = _plan(20, 4, [5, 10, 15, 20])
    assert plan is not None
    assert (plan.at_step, plan.to_step, plan.reason) == (20, 15, "why")
    read = [slot for step in (17, 18, 19, 20) for slot in range(SLOTS[step], SLOTS[step + 1])]
    assert list(range(*plan.skipped_slots)) == read


def test_the_checkpoint_is_the_newest_that_has_seen_none_of_them() -> None:
    for checkpoint, used in [(16, True), (17, False), (19, False), (20, False)]:
        plan = _plan(20, 4, [5, checkpoint])
        assert plan is not None
        assert plan.to_step == (checkpoint if used else 5)
    assert _plan(20, 4, [17, 20]) is None
    assert _plan(20, 4, []) is None
    only = _plan(20, 1, [19])
    assert only is not None
    assert only.skipped_slots == (SLOTS[20], SLOTS[21])


def test_a_rollback_soon_after_a_start_skips_what_was_read() -> None:
    """Three steps after a start there are no more than three to leave out."""
    plan = _plan(20, 16, [17, 20], known=3)
    assert plan is not None
    assert (plan.to_step, plan.skipped_slots) == (17, (SLOTS[18], SLOTS[21]))


def test_checkpoints_behind_a_rollback_are_abandoned_and_no_others() -> None:
    """Checkpoints at 10, 15, 20; a spike at 22 goes back to 15; on that line 20, 25; a spike at 27 back to 10."""
    first = Rollback(at_step=22, to_step=15, skipped_slots=(8, 16), reason="")
    second = Rollback(at_step=27, to_step=10, skipped_slots=(24, 32), reason="")

    def alive(rollbacks: list[Rollback]) -> list[tuple[int, int]]:
        """(step, rollbacks before it) of those that are not abandoned."""
        all_ = [(5, 0), (10, 0), (15, 0), (20, 0), (20, 1), (25, 1), (15, 2), (20, 2), (30, 2)]
        possible = [(step, line) for step, line in all_ if line <= len(rollbacks)]
        return [each for each in possible if not is_abandoned(manifest_of(each[0], rollbacks=each[1]), rollbacks)]

    assert alive([]) == [(5, 0), (10, 0), (15, 0), (20, 0)]
    assert alive([first]) == [(5, 0), (10, 0), (15, 0), (20, 1), (25, 1)]
    assert alive([first, second]) == [(5, 0), (10, 0), (15, 2), (20, 2), (30, 2)]


TWO = [
    Rollback(at_step=22, to_step=15, skipped_slots=(8, 16), reason="the loss is 9"),
    Rollback(at_step=27, to_step=10, skipped_slots=(24, 32), reason=""),
]


def test_what_is_recorded_is_read_back(tmp_path: Path) -> None:
    assert read_rollbacks(tmp_path) == []
    record_rollbacks(tmp_path, TWO[:1])
    record_rollbacks(tmp_path, TWO)
    assert read_rollbacks(tmp_path) == TWO
    assert [path.name for path in tmp_path.iterdir()] == ["rollbacks.json"], "nothing temporary is left"


@pytest.mark.parametrize("when", ["before the sync", "before the name"])
def test_a_kill_in_the_middle_leaves_the_record_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    record_rollbacks(tmp_path, TWO[:1])

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync" if when == "before the sync" else "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            record_rollbacks(tmp_path, TWO)
    assert read_rollbacks(tmp_path) == TWO[:1]
    record_rollbacks(tmp_path, TWO)
    assert read_rollbacks(tmp_path) == TWO


@pytest.mark.parametrize(
    "content", ["", "{", "3", '{"a": 1}', "[1]", '[{"at_step": 1}]', "[" * 99_999, "null"], ids=lambda text: text[:9]
)
def test_a_damaged_record_is_refused(tmp_path: Path, content: str) -> None:
    """Without it a run would resume from an abandoned checkpoint."""
    (tmp_path / "rollbacks.json").write_text(content, encoding="utf-8")
    with pytest.raises(OperatorFault, match=r"rollbacks\.json is damaged") as caught:
        read_rollbacks(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_slot_of_a_record_is_a_whole_number(tmp_path: Path) -> None:
    values = [TWO[0].model_dump(mode="json") | {"skipped_slots": [1.5, 3]}]
    (tmp_path / "rollbacks.json").write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(OperatorFault, match="damaged"):
        read_rollbacks(tmp_path)
