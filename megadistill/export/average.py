"""Averages of a run's checkpoints, as a checkpoint of weights alone that `export` reads like any other."""

import logging
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from megadistill.config.paths import wrong_path
from megadistill.errors import OperatorFault, UserError
from megadistill.export.pinned import pinned, sole_writer
from megadistill.redaction import printable
from megadistill.train.checkpoint.folders import checkpoint_folders
from megadistill.train.checkpoint.format import (
    VOCABULARY_TABLES,
    AveragedCheckpoint,
    AverageRecord,
    Checkpoint,
    CheckpointManifest,
    commit,
    range_of_rank,
    write_rank,
)
from megadistill.train.checkpoint.rollback import Rollback, is_abandoned, read_rollbacks
from megadistill.train.checkpoint.versions import versions
from megadistill.units import number_of

logger = logging.getLogger(__name__)

AVERAGES = "averages"
"""Folder in a run folder."""
MAX_FILE_BYTES = 1 << 30
"""Largest file of an average, which is held in memory while it is written."""


def average_run(run: Path, *, last: int | None, decay: float | None, max_file_bytes: int = MAX_FILE_BYTES) -> Path:
    """Writes the average of checkpoints of a run to `RUN/averages/NAME`, and returns that folder.

    Without `decay` the mean of the `last` checkpoints; with it their exponential moving average, oldest first, which
    begins at the oldest: e ← decay · e + (1 - decay) · θ. `last` None: all checkpoints. Those that a rollback abandoned
    are left out. Sums are float64, in the order of the steps, and are rounded once to float32. Memory holds a file of
    `max_file_bytes`, and one parameter's part of it in float64.

    Raises:
        UserError: no run folder, fewer checkpoints than `last`, an average that exists, or a checkpoint that the run
            deleted.
        OperatorFault: a checkpoint is damaged.
    """
    _refuse_options(last, decay)
    if not (run / "recipe.json").is_file():
        raise UserError(
            wrong_path(run, "run") or f"{printable(str(run))}: not a run folder (no recipe.json): name a run's folder"
        )
    folders = _chosen(run, last)
    steps = sorted(folders)
    count = len(steps)
    kind = "mean" if decay is None else f"ema-{decay:g}"
    output = run / AVERAGES / f"{kind}-of-{count}-to-{steps[-1]:08d}"
    if output.exists():
        raise UserError(f"{printable(str(output))} exists already: export it, or remove it to average again")
    with (
        sole_writer(output.parent, "megadistill average"),
        pinned([folders[step] for step in steps], within=output.parent) as places,
    ):
        checkpoints = [Checkpoint(place) for place in places]
        _refuse_different_parameters(checkpoints)
        for checkpoint in checkpoints:
            checkpoint.verify()
        _write(output, checkpoints, average_weights(count, decay), decay, max_file_bytes=max_file_bytes)
    return output


def average_weights(count: int, decay: float | None) -> list[float]:
    """Weight of each of `count` checkpoints, oldest first; the sum is 1."""
    if decay is None:
        return [1 / count] * count
    return [(1 - decay if place else 1.0) * decay ** (count - 1 - place) for place in range(count)]


def _refuse_options(last: int | None, decay: float | None) -> None:
    if last is None and decay is None:
        raise UserError("nothing says which average: give --last K for a mean of K checkpoints, or --ema DECAY")
    if last is not None and last < 2:
        raise UserError(f"--last {last}: an average needs at least 2 checkpoints")
    if decay is not None and not 0 < decay < 1:
        raise UserError(f"--ema {decay:g}: give a decay between 0 and 1, such as 0.9")


def _chosen(run: Path, last: int | None) -> dict[int, Path]:
    """Step -> folder of the newest `last` checkpoints, without those that a rollback abandoned."""
    rollbacks = read_rollbacks(run)
    folders = checkpoint_folders(run / "checkpoints")
    usable = {step: path for step, path in folders.items() if not rollbacks or not _abandoned(path, rollbacks)}
    if len(usable) < (last or 2):
        there = ", ".join(map(str, usable)) or "none"
        fewer = last is not None and len(usable) > 1
        needed = f"--last asks for {last}: give fewer" if fewer else "an average needs 2: wait for more"
        raise UserError(
            f"{printable(str(run))} has {number_of(len(usable), 'checkpoint')} to average (steps: {there}), {needed}, "
            "or let the run keep more (checkpoint.keep_last)"
        )
    return dict(list(usable.items())[-last:] if last else usable)


def _abandoned(path: Path, rollbacks: Sequence[Rollback]) -> bool:
    return is_abandoned(Checkpoint(path).manifest, rollbacks)


def _refuse_different_parameters(checkpoints: Sequence[Checkpoint]) -> None:
    first = _shapes_without_padding(checkpoints[0].manifest)
    for each in checkpoints[1:]:
        if _shapes_without_padding(each.manifest) != first:
            raise OperatorFault(
                f"{printable(str(each.folder))} has other parameters than {checkpoints[0].folder.name}: they are not "
                "of one run"
            )


def _shapes_without_padding(manifest: CheckpointManifest) -> dict[str, tuple[int, ...]]:
    """The shapes of the parameters, without the rows past the vocabulary, which a resume on other ranks changes."""
    tables = {name: manifest.parameters[name] for name in VOCABULARY_TABLES if name in manifest.parameters}
    true_rows = {name: (min(rows, manifest.vocab_size), *width) for name, (rows, *width) in tables.items()}
    return manifest.parameters | true_rows


def _write(
    output: Path,
    checkpoints: Sequence[Checkpoint],
    weights: Sequence[float],
    decay: float | None,
    *,
    max_file_bytes: int,
) -> None:
    """Writes the files as ranks would, each with its piece of every parameter, so that a reader sees no difference."""
    shapes = {name: math.prod(shape) for name, shape in checkpoints[-1].manifest.parameters.items()}
    world = max(1, -(-4 * sum(shapes.values()) // max_file_bytes))
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as beside:
        folder = Path(beside) / output.name
        folder.mkdir()
        for rank in range(world):
            pieces = {
                f"master/{name}": _weighted_sum(checkpoints, weights, name, *range_of_rank(numel, rank, world))
                for name, numel in shapes.items()
            }
            write_rank(folder, pieces, rank=rank, world=world)
            for checkpoint in checkpoints:  # their mapped pages count as this process's memory
                checkpoint.release()
            logger.info("%s: file %d of %d written", printable(str(output)), rank + 1, world)
        commit(folder, output, _manifest(checkpoints, weights, decay, world=world))


def _weighted_sum(
    checkpoints: Sequence[Checkpoint], weights: Sequence[float], name: str, start: int, stop: int
) -> Tensor:
    """Float32 elements `start` to `stop` of the average of a parameter."""
    total = torch.zeros(stop - start, dtype=torch.float64)
    for checkpoint, weight in zip(checkpoints, weights, strict=True):
        # Two operations: a fused one rounds once, which numpy does not, and some processors do not have.
        total += weight * checkpoint.read(f"master/{name}", start, stop).double()
    return total.float()


def _manifest(
    checkpoints: Sequence[Checkpoint], weights: Sequence[float], decay: float | None, *, world: int
) -> CheckpointManifest:
    """The newest checkpoint's manifest with what the average is made of."""
    record = AverageRecord(
        kind="mean" if decay is None else "ema",
        decay=decay,
        checkpoints=tuple(
            AveragedCheckpoint(step=each.manifest.step, sha256=each.manifest.sha256, weight=weight)
            for each, weight in zip(checkpoints, weights, strict=True)
        ),
    )
    changes = {"average": record, "world": world, "versions": versions()}
    return checkpoints[-1].manifest.model_copy(update=changes)
