"""The shape of a run's steps by their place in the stream: sequence length, batch, rotary embeddings, loss weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megadistill.config.recipe import CurriculumEntry, EntryLossSection, LossSection, Recipe
from megadistill.data import Mixture
from megadistill.data.stream.segments import Pace, paces, steps_to, tokens_after
from megadistill.errors import UserError
from megadistill.io import read_json
from megadistill.student.rope import with_rope
from megadistill.train.checkpoint.folders import checkpoint_folders
from megadistill.train.checkpoint.format import CheckpointManifest
from megadistill.types import Cursor


@dataclass(frozen=True)
class StepShape:
    """Shape of the steps of a segment of the stream (`data.stream.segments`)."""

    entry: int
    """Number of its first curriculum entry, from 1."""
    start: int
    """Its first slot."""
    stop: int | None
    """The slot behind it; None for the last."""
    sequence_length: int
    """Tokens of a sequence."""
    global_batch: int
    """Sequences of a step."""
    micro_batch: int
    """Sequences of one forward pass on one rank."""
    accumulation: int
    """Micro-batches of a rank in a step."""
    rope: float | dict[str, Any] | None
    """The student's rotary embeddings, as in the recipe; None: those of its config."""
    loss: LossSection

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.global_batch * self.sequence_length

    def surplus(self, data_world: int) -> float:
        """Fraction of the rows of `data_world` ranks that are surplus: past the end of the global batch."""
        return 1 - self.global_batch / (data_world * self.accumulation * self.micro_batch)

    @property
    def pace(self) -> Pace:
        return Pace(self.start, self.stop, self.global_batch, self.tokens)

    @property
    def rope_key(self) -> str:
        """Name of its rotary embeddings in messages."""
        return f"data.curriculum: rope of entry {self.entry}"

    def describe(self) -> str:
        """A part of a log line."""
        parts = [
            f"sequences of {self.sequence_length:,} tokens",
            f"global batch {self.global_batch:,}",
            f"micro-batch {self.micro_batch:,}, accumulation {self.accumulation:,}",
        ]
        if self.rope is not None:
            parts.append(f"rope {self.rope}")
        return "; ".join(parts)


def step_shapes(recipe: Recipe, data: Mixture, world: int) -> tuple[StepShape, ...]:
    """The shape of each segment of the data, for `world` ranks of the student.

    Raises:
        UserError: the ranks do not divide into groups that share sequences.
    """
    train, entries = recipe.train, recipe.data.curriculum
    shapes = []
    for segment in data.segments:
        entry = entries[segment.entry] if entries else None
        weights = {} if entry is None or entry.loss is None else entry.loss.model_dump(exclude_none=True)
        shapes.append(
            StepShape(
                entry=segment.entry + 1,
                start=segment.start,
                stop=segment.stop,
                sequence_length=segment.sequence_length,
                global_batch=segment.batch or train.global_batch,
                micro_batch=(entry.micro_batch if entry is not None else None) or train.micro_batch,
                accumulation=recipe.accumulation(world, segment.entry if entries else None),
                rope=None if entry is None else entry.rope,
                loss=recipe.loss.model_copy(update=weights),
            )
        )
    return tuple(shapes)


def paces_of(recipe: Recipe, data: Mixture) -> list[Pace]:
    """The steps of each segment of the data, for any number of ranks."""
    return paces(data.segments, recipe.train.global_batch)


def with_steps(recipe: Recipe, data: Mixture, parent: CheckpointManifest | None = None) -> Recipe:
    """The recipe with the `train.steps` that its `train.tokens` make, where no slot is skipped.

    `parent`: the checkpoint that it begins from.

    Raises:
        UserError: it names another number.
    """
    train = recipe.train
    if train.tokens is None:
        return recipe
    before, slot, taken = 0, 0, 0
    if parent is not None:
        before, slot, taken = parent.step, Cursor.from_state(parent.cursor).next_slot, parent.tokens
    steps = before + steps_to(paces_of(recipe, data), train.tokens, slot=slot, taken=taken)
    if train.steps not in (0, steps):
        raise UserError(
            f"train.steps is {train.steps}, but train.tokens {train.tokens:,} make {steps} steps of this data and "
            "batch: leave train.steps out"
        )
    return recipe.model_copy(update={"train": train.model_copy(update={"steps": steps})})


def stable_steps_of(recipe: Recipe, data: Mixture) -> int:
    """`Recipe.stable_steps`, with `train.tokens` too: the last step that ends before the first decay begins."""
    if recipe.train.tokens is None:
        return recipe.stable_steps
    all_paces, stable = paces_of(recipe, data), recipe.stable_length
    if stable <= 0:
        return 0
    steps = steps_to(all_paces, stable)
    return steps if tokens_after(all_paces, steps) == stable else steps - 1


def student_config_of_entry(config: Any, shape: StepShape) -> Any:
    """The student's config with the rotary embeddings of a shape.

    Raises:
        UserError: the model cannot have them.
    """
    return with_rope(config, shape.rope, what=shape.rope_key)


def config_at(config: Any, recipe: Recipe, cursor: dict[str, Any]) -> Any:
    """The student's config with the rotary embeddings of a checkpoint's last step.

    `cursor`: the checkpoint's, whose order has the lengths of the curriculum's entries.

    Raises:
        UserError: the model cannot have them.
    """
    last, end = int(cursor["next_slot"]) - 1, 0
    stages = zip(cursor["order"].get("stages", []), recipe.data.curriculum, strict=False)
    for number, (stage, entry) in enumerate(stages, 1):
        end += stage["slots"] or 0
        if stage["slots"] is None or last < end:
            return with_rope(config, entry.rope, what=f"data.curriculum: rope of entry {number}")
    return config


def refuse_changed_entries(folder: Path, before: Recipe, now: Recipe) -> None:
    """Refuses another batch, rotary embeddings or loss of a curriculum entry that a run has begun to read.

    The stream compares what decides its order: sources, weights, lengths. Entries ahead may be edited.

    Raises:
        UserError: names the entry, and both values.
    """
    checkpoints = checkpoint_folders(folder / "checkpoints")
    if not checkpoints:
        return
    try:
        cursor = read_json(checkpoints[max(checkpoints)] / "manifest.json")["cursor"]
        next_slot, stages = int(cursor["next_slot"]), cursor["order"]["stages"]
    except (OSError, ValueError, KeyError, TypeError):
        return  # a damaged one: the search for a valid checkpoint says so
    start = 0
    pairs = zip(stages, before.data.curriculum, now.data.curriculum, strict=False)
    for number, (stage, was, is_) in enumerate(pairs, 1):
        if start >= next_slot:
            return
        for key in ("global_batch", "rope", "loss"):
            if getattr(was, key) != getattr(is_, key):
                raise UserError(
                    f"data.curriculum: {key} of entry {number} was {_value(was, key)}, is {_value(is_, key)}, and "
                    f"{folder} has read {next_slot - start:,} of its sequences: undo the change (entries not yet "
                    "reached may be edited), or name another run.folder"
                )
        start += stage["slots"] or 0


def _value(entry: CurriculumEntry, key: str) -> str:
    value = getattr(entry, key)
    return str(value.model_dump(exclude_none=True) if isinstance(value, EntryLossSection) else value)
