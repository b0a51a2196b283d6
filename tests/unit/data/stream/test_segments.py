"""Segments of a curriculum: where shapes of steps begin and end, and how many steps lie between."""

import pytest

from megadistill.config.recipe import CurriculumEntry
from megadistill.data.stream.mixture import curriculum_of, segments_of
from megadistill.data.stream.segments import (
    Pace,
    Segment,
    paces,
    slots_after,
    steps_before,
    steps_of,
    steps_to,
    tokens_after,
)

LENGTHS = {"short": 16, "long": 48}


def segments(*entries: dict[str, object], global_batch: int = 8) -> tuple[Segment, ...]:
    sections = [CurriculumEntry.model_validate(entry) for entry in entries]
    return segments_of(curriculum_of(sections, LENGTHS, global_batch=global_batch), LENGTHS)


def short(tokens: int | None, **shape: object) -> dict[str, object]:
    return {"tokens": tokens, "weights": {"short": 1}, **shape}


def test_entries_without_a_shape_are_one_segment_and_end_where_they_did() -> None:
    entries = (short(5 * 16 - 1), {"tokens": 16, "weights": {"short": 2}}, short(None))
    assert segments(*entries) == (Segment(0, None, 16, None, 0),)
    sections = [CurriculumEntry.model_validate(entry) for entry in entries]
    assert [entry.slots for entry in curriculum_of(sections, LENGTHS, global_batch=8)] == [5, 1, None]


@pytest.mark.parametrize("shape", [{"micro_batch": 2}, {"rope": 1e6}, {"loss": {"kd_weight": 0.5}}])
def test_each_key_of_a_shape_begins_a_segment_with_a_whole_step(shape: dict[str, object]) -> None:
    assert segments(short(9 * 16), short(None, **shape)) == (
        Segment(0, 16, 16, None, 0),
        Segment(16, None, 16, None, 1),
    )


def test_tokens_are_rounded_up_from_the_entry_at_which_the_shape_began() -> None:
    """5 + 6 sequences of one shape are three steps of 4; then 7 are one of 7 in the batch of the run."""
    small = {"global_batch": 4}
    made = segments(short(5 * 16, **small), short(6 * 16, **small), short(7 * 16), {"weights": {"long": 1}})
    assert made == (Segment(0, 12, 16, 4, 0), Segment(12, 20, 16, None, 2), Segment(20, None, 48, None, 3))


PACES = [Pace(0, 12, 4, 64), Pace(12, 20, 8, 128), Pace(20, None, 4, 192)]


def test_paces_are_those_of_the_segments() -> None:
    made = segments(short(12 * 16, global_batch=4), short(8 * 16), {"weights": {"long": 1}, "global_batch": 4})
    assert paces(made, 8) == PACES


@pytest.mark.parametrize("steps", range(8))
def test_steps_slots_and_tokens_agree(steps: int) -> None:
    slots = [0, 4, 8, 12, 20, 24, 28, 32][steps]
    tokens = [0, 64, 128, 192, 320, 512, 704, 896][steps]
    assert (slots_after(PACES, steps), tokens_after(PACES, steps)) == (slots, tokens)
    assert steps_before(PACES, slots) == steps_before(PACES, slots + 1) == steps
    assert steps_to(PACES, tokens) == steps
    assert steps_to(PACES, tokens + 1) == steps + 1, "the last step is whole"
    assert sum(steps_of(PACES, steps)) == steps


def test_the_rest_of_a_run_is_counted_from_its_place() -> None:
    for steps in range(8):
        slot, taken = slots_after(PACES, steps), tokens_after(PACES, steps)
        assert steps + steps_to(PACES, 896, slot=slot, taken=taken) == 7


def test_skipped_slots_shorten_their_segment_and_leave_no_part_of_a_step() -> None:
    """10 slots are left in the first segment, two steps; the last segment makes up for the third."""
    assert steps_to(PACES, 896, skips=[(5, 7)]) == 2 + 1 + 4
    assert steps_to(PACES, 896, skips=[(10, 13)]) == 2 + 0 + 4
    assert steps_to(PACES, 896, slot=8, taken=128, skips=[(5, 7)]) == 1 + 1 + 3
