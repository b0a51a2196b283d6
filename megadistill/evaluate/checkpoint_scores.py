"""The rows that `megadistill follow` writes on the checkpoints of a run: scores on tasks, and samples."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megadistill.errors import UserError
from megadistill.events import json_lines
from megadistill.redaction import printable

FOLLOW = "follow"
"""Folder in a run folder."""
ROWS = "follow.jsonl"
LARGEST = 1 << 60

Count = Annotated[int, Field(ge=0, le=LARGEST)]
Name = Annotated[str, Field(max_length=400)]
Finite = Annotated[float, Field(ge=-1e30, le=1e30)]


class _Row(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class TaskScore(_Row):
    """One metric on a task of lm-evaluation-harness."""

    task: Name
    metric: Name
    value: Finite | None
    error: Finite | None = None
    """Standard error."""
    samples: Count | None = None
    """Number of questions."""
    fewshot: Count | None = None


class PromptSample(_Row):
    """A prompt and its continuation."""

    prompt: Annotated[str, Field(max_length=1 << 16)]
    text: Annotated[str, Field(max_length=1 << 18)]
    ended: bool
    """Whether the model ended the document."""


class CheckpointScores(_Row):
    """One row: a checkpoint, measured with some settings."""

    time: Finite
    """Seconds since 1970."""
    step: Count
    tokens: Count
    checkpoint: Annotated[str, Field(max_length=64)]
    """sha256 of its manifest."""
    settings: Mapping[str, Any]
    """Tasks, prompts and sampling, as they were asked for."""
    harness: Name | None = None
    """Version of lm-evaluation-harness."""
    scores: tuple[TaskScore, ...] = ()
    samples: tuple[PromptSample, ...] = ()


def read_scores(run: Path, notes: list[str] | None = None) -> list[CheckpointScores]:
    """The rows of a run folder, in the order of the file; none where no follower wrote any.

    `notes`: gets a line on rows that are damaged, which are left out.
    """
    rows, damaged = [], 0
    try:
        for line in json_lines(run / FOLLOW / ROWS):
            try:
                rows.append(CheckpointScores.model_validate(line))
            except ValidationError:
                damaged += 1
    except (UserError, OSError) as error:
        if notes is not None:
            notes.append(printable(f"{FOLLOW}/{ROWS} cannot be read: {error}"))
    if damaged and notes is not None:
        notes.append(f"{FOLLOW}/{ROWS}: {damaged:,} damaged rows left out")
    return rows


def newest_scores(rows: Sequence[CheckpointScores]) -> dict[tuple[str, str], dict[int, tuple[int, float]]]:
    """(task, metric) -> step -> (tokens, value), the later row where a step was measured twice."""
    values: dict[tuple[str, str], dict[int, tuple[int, float]]] = {}
    for row in rows:
        for score in row.scores:
            if score.value is not None and math.isfinite(score.value):
                values.setdefault((score.task, score.metric), {})[row.step] = (row.tokens, score.value)
    return values
