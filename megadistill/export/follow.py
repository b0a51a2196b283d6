"""A follower of a run: exports each new checkpoint, measures it, and writes a row beside the run's curves.

It is a process of its own, which reads the run's folder and writes below `RUN/follow` alone: the run waits for nothing
of it. A checkpoint is read under second names (`pinned`), so that the run may delete it meanwhile.
"""

import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from megadistill.config.paths import wrong_path
from megadistill.errors import OperatorFault, UserError
from megadistill.evaluate.checkpoint_scores import FOLLOW, ROWS, read_scores
from megadistill.evaluate.lm_eval import TaskScores, check_tasks, run_tasks
from megadistill.evaluate.prompts import typed_prompts
from megadistill.evaluate.sample import Sample, load_for_sampling, samples
from megadistill.events import PLATEAU, JsonLines, events_from_end
from megadistill.export.export_run import export_checkpoint
from megadistill.export.pinned import CheckpointDeletedError, pinned, sole_writer
from megadistill.models.sampling import Sampling
from megadistill.redaction import printable
from megadistill.train.checkpoint.folders import checkpoint_folders
from megadistill.train.checkpoint.format import Checkpoint
from megadistill.train.checkpoint.rollback import is_abandoned, read_rollbacks

logger = logging.getLogger(__name__)

EXPORTS = "exports"
"""Folder of the exports that are kept, below `FOLLOW`."""
POLL_SECONDS = 30.0
MAX_SHARD_BYTES = 4_096_000_000
MAX_PROMPTS, MAX_PROMPT_LETTERS, MAX_NEW_TOKENS = 32, 32_768, 512
"""A row of follow.jsonl holds all samples, and prompts twice: readers leave out a line of more than 1 MiB."""


@dataclass(frozen=True)
class Measurements:
    """The measurements of each checkpoint."""

    tasks: Sequence[str] = ()
    """Tasks of lm-evaluation-harness."""
    include: Path | None = None
    """A folder with more tasks."""
    fewshot: int | None = None
    limit: int | None = None
    """Questions of each task; None: all."""
    batch: int = 8
    prompts: Sequence[str] = ()
    """Texts to continue."""
    sampling: Sampling = field(default_factory=lambda: Sampling(64, 1.0, 1.0, 1))
    keep_exports: bool = False

    def settings(self) -> dict[str, Any]:
        """The settings that decide the numbers of a row, as JSON: with the same ones nothing is measured again."""
        tasks = {"tasks": list(self.tasks), "fewshot": self.fewshot, "limit": self.limit} if self.tasks else {}
        prompts = {"prompts": list(self.prompts), "sampling": asdict(self.sampling)} if self.prompts else {}
        return {**tasks, **prompts, **({"exports": True} if self.keep_exports else {})}

    def check(self) -> None:
        """Raises UserError: there is nothing to measure, or a task or number that does not exist."""
        if not (self.tasks or self.prompts or self.keep_exports):
            raise UserError("nothing to do with a checkpoint: give --tasks TASK, --prompt TEXT or --keep-exports")
        letters = sum(map(len, self.prompts))
        if len(self.prompts) > MAX_PROMPTS or letters > MAX_PROMPT_LETTERS or self.sampling.new_tokens > MAX_NEW_TOKENS:
            raise UserError(
                f"{len(self.prompts)} prompts of {letters:,} characters and --new-tokens {self.sampling.new_tokens}: a "
                f"row holds at most {MAX_PROMPTS}, {MAX_PROMPT_LETTERS:,} and {MAX_NEW_TOKENS}; sample an export with "
                "megadistill sample"
            )
        if self.tasks:
            check_tasks(self.tasks, include=self.include, fewshot=self.fewshot, batch=self.batch, limit=self.limit)


def follow(
    run: Path,
    measurements: Measurements,
    *,
    once: bool,
    device: torch.device,
    wait: Callable[[float], None] = time.sleep,
) -> int:
    """Measures the run's checkpoints, oldest first, and returns the number of rows that were written.

    With `once` those that are there; without it until the run has taken its last step. A checkpoint that has a row with
    the same settings is passed over, so the same command resumes. One that is damaged, or that the run deletes before
    it is read, is left out with a line in the log. `wait`: waits some seconds for the next checkpoint.

    Raises:
        UserError: no run folder, another follower, or something in `measurements` that does not exist.
    """
    measurements.check()
    if not (run / "recipe.json").is_file():
        raise UserError(
            wrong_path(run, "run") or f"{printable(str(run))}: not a run folder (no recipe.json): name a run's folder"
        )
    rows, passed = 0, set[str]()
    with sole_writer(run / FOLLOW, "megadistill follow"):
        if (path := run / FOLLOW / ROWS).is_symlink():
            raise UserError(f"{printable(str(path))} is a link, and rows would go where it leads: remove it")
        while True:
            is_finished = _is_finished(run)  # before the checkpoints are listed: the last one is among them then
            checkpoint = next(_new_checkpoints(run, measurements.settings(), passed), None)
            if checkpoint is not None:
                rows += _measured(run, checkpoint, measurements, device)
                passed.add(checkpoint.manifest.sha256)
            elif once or is_finished:
                return rows
            else:
                wait(POLL_SECONDS)


def _is_finished(run: Path) -> bool:
    """Whether the run has ended by itself. An attempt after that, of a longer recipe, continues it."""
    for event in events_from_end(run):
        if event["event"] == "completed" or (event["event"] == "stopped" and event.get("reason") == PLATEAU):
            return True
        if event["event"] == "attempt_started":
            return False
    return False


def _new_checkpoints(run: Path, settings: Mapping[str, Any], passed: set[str]) -> Iterator[Checkpoint]:
    """Checkpoints without a row with these settings, oldest first.

    `passed`: those that this process has dealt with, by the sha256 of their manifests, and gets damaged ones by their
    names, so that the log has one line on each.
    """
    measured = passed | {each.checkpoint for each in read_scores(run) if each.settings == settings}
    rollbacks = read_rollbacks(run)
    for folder in checkpoint_folders(run / "checkpoints").values():
        try:
            checkpoint = Checkpoint(folder)
        except OperatorFault as fault:
            if folder.exists() and folder.name not in passed:
                passed.add(folder.name)
                logger.warning("left out: %s", fault)
            continue
        if checkpoint.manifest.sha256 not in measured and not is_abandoned(checkpoint.manifest, rollbacks):
            yield checkpoint


def _measured(run: Path, checkpoint: Checkpoint, measurements: Measurements, device: torch.device) -> bool:
    """Writes the checkpoint's row. False: it was left out, with a line in the log."""
    manifest, home = checkpoint.manifest, run / FOLLOW
    began = time.monotonic()
    with tempfile.TemporaryDirectory(dir=home, prefix=".export-") as beside:
        student = Path(beside) / checkpoint.folder.name
        if not _exported(run, checkpoint.folder, student, home):
            return False
        scores, drawn = _scores(student, measurements, device), _samples(student, measurements, device)
        if measurements.keep_exports:
            _keep(student, home / EXPORTS / student.name)
    problem = JsonLines(home / ROWS).append(
        {
            "time": round(time.time(), 3),
            "step": manifest.step,
            "tokens": manifest.tokens,
            "checkpoint": manifest.sha256,
            "settings": measurements.settings(),
            "harness": None if scores is None else scores.harness,
            "scores": [] if scores is None else [asdict(each) for each in scores.scores],
            "samples": [
                {"prompt": each.prompt, "text": text.text, "ended": text.ended}
                for each in drawn
                for text in each.continuations
            ],
        }
    )
    if problem is not None:
        raise OperatorFault(f"{home / ROWS} cannot be written: {problem}: free space; the same command resumes")
    best = ", ".join(f"{each.task} {each.metric} {each.value:.4g}" for each in _main_scores(scores))
    logger.info("step %d: measured in %.0f s%s", manifest.step, time.monotonic() - began, f": {best}" if best else "")
    return True


def _exported(run: Path, folder: Path, student: Path, home: Path) -> bool:
    """Exports a checkpoint to `student`. False: it is damaged, or was deleted before it was read."""
    try:
        with pinned([folder], within=home) as (place,):
            try:
                export_checkpoint(Checkpoint(place), student, run=run, max_shard_bytes=MAX_SHARD_BYTES, dtype=None)
            except (OperatorFault, FileNotFoundError):
                if place == folder and not folder.exists():  # it was read in place
                    raise CheckpointDeletedError(folder) from None
                raise
    except (CheckpointDeletedError, OperatorFault) as error:
        logger.warning("left out: %s", error)
        return False
    return True


def _scores(student: Path, measurements: Measurements, device: torch.device) -> TaskScores | None:
    if not measurements.tasks:
        return None
    return run_tasks(
        student,
        measurements.tasks,
        include=measurements.include,
        fewshot=measurements.fewshot,
        batch=measurements.batch,
        limit=measurements.limit,
        device=device,
    )


def _samples(student: Path, measurements: Measurements, device: torch.device) -> list[Sample]:
    if not measurements.prompts:
        return []
    tokenizer = load_for_sampling(student, None)
    prompts = typed_prompts(measurements.prompts, [], tokenizer)
    return list(samples(student, prompts, tokenizer, measurements.sampling, count=1, device=device))


def _keep(student: Path, target: Path) -> None:
    """Moves the export to its place. One of the same step is replaced: a rollback has taken that step again."""
    target.parent.mkdir(exist_ok=True)
    shutil.rmtree(target, ignore_errors=True)
    student.rename(target)


def _main_scores(scores: TaskScores | None) -> list[Any]:
    """The first metric of each task."""
    first = {
        each.task: each for each in reversed(scores.scores if scores is not None else ()) if each.value is not None
    }
    return list(first.values())[::-1][:4]
