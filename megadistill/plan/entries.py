"""Curriculum entries whose steps have a shape of their own: a plan for each, since memory and time follow from it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megadistill.config.load import validate_recipe
from megadistill.config.recipe import WHOLE_DATA, Recipe, ScheduleSection
from megadistill.data import Mixture
from megadistill.data.stream.mixture import curriculum_of, segments_of
from megadistill.data.stream.segments import Segment, paces, steps_of, steps_to


@dataclass(frozen=True)
class EntryRecipe:
    """The steps of one shape, as a recipe of their own."""

    entry: int
    """Number of the first curriculum entry with this shape, from 1."""
    steps: int
    """0: the run ends before it."""
    tokens: int
    sequence_length: int
    recipe: Recipe


def entry_recipes(recipe: Recipe, lengths: Mapping[str, int]) -> list[EntryRecipe]:
    """A recipe for the steps of each shape; `lengths`: tokens of a sequence of each source."""
    train, entries = recipe.train, recipe.data.curriculum
    segments = segments_of(curriculum_of(entries, lengths, global_batch=train.global_batch), lengths)
    all_paces = paces(segments, train.global_batch)
    steps = train.steps if train.tokens is None else steps_to(all_paces, train.tokens)
    shares = steps_of(all_paces, steps)
    return [
        EntryRecipe(
            entry=segment.entry + 1,
            steps=share,
            tokens=share * pace.tokens,
            sequence_length=segment.sequence_length,
            recipe=_alone(recipe, segment, pace.batch, share),
        )
        for segment, pace, share in zip(segments, all_paces, shares, strict=True)
    ]


def source_lengths(recipe: Recipe, data: Mixture | None, sequence_length: int | None) -> dict[str, int]:
    """Tokens of a sequence of each source: the data's, or those that the entries name, else `sequence_length`."""
    if data is not None:
        return {name: manifest.sequence_length for name, manifest in data.sources.items()}
    assert sequence_length is not None
    lengths = dict.fromkeys(recipe.data.sources, sequence_length)
    for entry in recipe.data.curriculum:
        lengths.update(dict.fromkeys(entry.weights, entry.sequence_length or sequence_length))
    return lengths


def teacher_shares(recipe: Recipe, *, tokens: int) -> dict[str, float]:
    """Fraction of the sequences of a run of so many tokens that each of several teachers reads."""
    read: dict[str, float] = {} if recipe.data.curriculum else {WHOLE_DATA: 1.0}
    left = tokens
    for entry in recipe.data.curriculum:
        length = left if entry.tokens is None else min(entry.tokens, left)
        left -= length
        for source, weight in entry.weights.items():
            share = weight / sum(entry.weights.values())
            read[source] = read.get(source, 0.0) + share * length / tokens
    of_sources = {source: recipe.teachers_of(source) for source in read}
    return {
        name: sum(share for source, share in read.items() if name in of_sources[source]) for name in recipe.teachers
    }


def in_steps(recipe: Recipe, *, tokens_per_step: int) -> Recipe:
    """A recipe with `train.tokens` as one with `train.steps`; its schedules move no cost."""
    assert recipe.train.tokens is not None
    values = recipe.snapshot()
    _without_schedules(values, steps=-(-recipe.train.tokens // tokens_per_step))
    return validate_recipe(values, source="train.tokens in steps")


def main_entry(entries: Sequence[EntryRecipe]) -> EntryRecipe:
    """The one with the most tokens."""
    return max(entries, key=lambda each: each.tokens)


def _alone(recipe: Recipe, segment: Segment, batch: int, steps: int) -> Recipe:
    entry, values = recipe.data.curriculum[segment.entry], recipe.snapshot()
    values["data"]["curriculum"] = [{"weights": dict(entry.weights)}]
    _without_schedules(values, steps=max(1, steps))
    micro_batch = entry.micro_batch or recipe.train.micro_batch
    values["train"] |= {"global_batch": batch, "micro_batch": micro_batch}
    return validate_recipe(values, source=f"curriculum entry {segment.entry + 1}")


def _without_schedules(values: dict[str, Any], *, steps: int) -> None:
    schedule = ScheduleSection(warmup_steps=0).model_dump(mode="json")
    values["train"] |= {"tokens": None, "steps": steps, "schedule": schedule}
    values["loss"]["schedule"] = None
