"""A model on tasks of lm-evaluation-harness, through its Python interface (`simple_evaluate`)."""

import importlib
import importlib.metadata
import importlib.util
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from megadistill.errors import UserError, nearest
from megadistill.evaluate.sample import load_for_sampling
from megadistill.io import read_given_json
from megadistill.models.hf_export import GENERATION_FILE
from megadistill.models.weights import load_pretrained

HARNESS = "lm_eval"


@dataclass(frozen=True)
class Score:
    """One metric on a task."""

    task: str
    metric: str
    value: float | None
    """None where it is not finite."""
    error: float | None
    """Standard error; None where the harness gives none."""
    samples: int | None
    """Number of questions; None for a group of tasks."""
    fewshot: int | None
    """Examples before each question."""


@dataclass(frozen=True)
class TaskScores:
    """Scores of one model."""

    model: str
    harness: str
    """Version of lm-evaluation-harness."""
    scores: tuple[Score, ...]

    def table(self) -> Table:
        """A table for a terminal."""
        table = Table(title=f"{self.model}, lm-eval {self.harness}", title_justify="left")
        for heading in ("task", "metric"):
            table.add_column(heading)
        for heading in ("value", "± error", "samples", "shots"):
            table.add_column(heading, justify="right", no_wrap=True)
        for score in self.scores:
            numbers = [
                "-" if number is None else f"{number:,}" if isinstance(number, int) else f"{number:.4f}"
                for number in (score.value, score.error, score.samples, score.fewshot)
            ]
            table.add_row(score.task, score.metric, *numbers)
        return table


def run_tasks(
    folder: Path,
    tasks: Sequence[str],
    *,
    include: Path | None,
    fewshot: int | None,
    batch: int,
    limit: int | None,
    device: torch.device,
) -> TaskScores:
    """Scores of the model in `folder` on `tasks`, by their names; `include`: a folder with more of them.

    A text's first token is predicted from the token before each document in training: the tokenizer's begin token if
    its rules put one there, else its end token. `fewshot`: examples before a question (None: the task's default);
    `limit`: questions of each task (None: all).

    Raises:
        UserError: the harness is not installed, there is no such task, or the folder holds no model with a tokenizer.
    """
    manager = check_tasks(tasks, include=include, fewshot=fewshot, batch=batch, limit=limit)
    tokenizer = load_for_sampling(folder, None)
    harness: Any = importlib.import_module(HARNESS)
    results = harness.simple_evaluate(
        model=_behind_one_bos(
            pretrained=_model(folder, device),
            tokenizer=str(folder.resolve()),
            trust_remote_code=False,
            prefix_token_id=tokenizer.eos if tokenizer.bos is None else tokenizer.bos,
            batch_size=batch,
            device=str(device),
        ),
        tasks=list(tasks),
        num_fewshot=fewshot,
        batch_size=batch,
        device=str(device),
        limit=limit,
        log_samples=False,
        task_manager=manager,
    )
    return TaskScores(folder.resolve().name, importlib.metadata.version(HARNESS), tuple(_scores(results)))


def check_tasks(
    tasks: Sequence[str], *, include: Path | None, fewshot: int | None, batch: int, limit: int | None
) -> Any:
    """The harness's manager of tasks. No model is read.

    Raises:
        UserError: the harness is not installed, there is no such task, or a number is out of its range.
    """
    if importlib.util.find_spec(HARNESS) is None:
        raise UserError("lm-eval needs lm-evaluation-harness: pip install 'megadistill[lm-eval]'")
    for option, value, least in (("--batch", batch, 1), ("--fewshot", fewshot, 0), ("--limit", limit, 1)):
        if value is not None and value < least:
            raise UserError(f"{option} {value}: give at least {least}")
    if include is not None and not include.is_dir():
        raise UserError(f"--include {include} is no folder: give the one that holds the YAML files of your tasks")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    manager = importlib.import_module(f"{HARNESS}.tasks").TaskManager(include_path=include and str(include))
    for task in tasks:
        if not manager.match_tasks([task]):
            raise UserError(
                f"lm-eval has no task {task}{nearest(task, manager.all_tasks)}: `lm-eval ls tasks` lists them, and "
                "--include DIR adds your own"
            )
    return manager


def _behind_one_bos(**arguments: Any) -> Any:
    """The harness's model, which measures a whole text behind `prefix_token_id` and no second BOS of its tokenizer."""
    base: Any = importlib.import_module(f"{HARNESS}.models.huggingface").HFLM

    class Model(base):  # type: ignore[misc]
        def loglikelihood_rolling(self, *requests: Any, **options: Any) -> Any:
            self.add_bos_token: bool | None = False
            try:
                return super().loglikelihood_rolling(*requests, **options)
            finally:
                self.add_bos_token = None

    return Model(**arguments)


def _model(folder: Path, device: torch.device) -> Any:
    """The model as every command reads it, and the ids that end a text by the folder's generation_config.json."""
    model = load_pretrained(folder, what=str(folder), device=device)
    path = folder / GENERATION_FILE
    if path.is_file():
        settings = read_given_json(path, dict, what=str(folder), way_out="correct or remove it")
        ids = settings.get("eos_token_id")
        ids = ids if isinstance(ids, list) else [ids]
        if ids and all(type(id) is int for id in ids):
            model.generation_config.eos_token_id = ids
    return model


def _scores(results: Any) -> list[Score]:
    """Scores in the harness's results, which have `metric,filter` and `metric_stderr,filter` for each task."""
    return [
        Score(
            task=task,
            metric=metric if filtered == "none" else name,
            value=_finite(value),
            error=_finite(metrics.get(f"{metric}_stderr,{filtered}")),
            samples=results["n-samples"].get(task, {}).get("effective"),
            fewshot=results["n-shot"].get(task),
        )
        for task, metrics in results["results"].items()
        for name, value in metrics.items()
        for metric, comma, filtered in [name.partition(",")]
        if comma and not metric.endswith("_stderr")
    ]


def _finite(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
