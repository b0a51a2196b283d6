"""Room `export`: from a checkpoint to a Hugging Face folder, tensor by tensor. It starts no ranks, and needs no GPU."""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megadistill.config import Recipe, validate_recipe
from megadistill.errors import UserError
from megadistill.export.model_card import Origin, model_card
from megadistill.models.families import load_config
from megadistill.models.hf_export import NamedReader, export_model, exported_config
from megadistill.precision import Precision, torch_dtype
from megadistill.train.checkpoint.format import Checkpoint, checkpoint_folders, newest_checkpoint
from megadistill.train.checkpoint.rollback import given_up, read_rollbacks
from megadistill.train.setup.run_folder import TOKENIZER_FOLDER, student_config_of


def export_run(source: Path, output: Path, *, step: int | None, max_shard_bytes: int, dtype: Precision | None) -> int:
    """Writes the student of a checkpoint to `output`, with a card that says what it was trained on; its step.

    `source`: a run folder, whose newest checkpoint it is, or that of `step`; or a checkpoint's own folder. The float32
    master weights are rounded once, to `dtype` or to the run's precision, which is what the training model computes
    with. Held in memory: a shard of `max_shard_bytes`, as much of the checkpoint, and one parameter in float32.

    Raises:
        UserError: neither a run folder nor a checkpoint, no such step, or an output that exists.
        OperatorFault: the checkpoint is damaged.
    """
    if max_shard_bytes < 1:
        raise UserError("--max-shard-mb: a shard needs at least 1 MB")
    if output.exists():  # before a checkpoint of terabytes is read
        raise UserError(f"{output} exists already; remove it, or export to another folder")
    run, checkpoint = _found(source, step)
    manifest = checkpoint.manifest
    recipe = _recipe_of(run, checkpoint)
    numbers = torch_dtype(dtype or recipe.train.precision)
    config = load_config(student_config_of(run, recipe.student), what="student.config")
    config = exported_config(config, dtype=numbers, true_vocab=manifest.vocab_size)
    tokenizer = run / TOKENIZER_FOLDER if run is not None else None
    if tokenizer is None:
        print(f"{checkpoint.folder} lies in no run folder: no tokenizer is exported with it", file=sys.stderr)
    checkpoint.verify()
    export_model(
        output,
        config=config,
        tensors=_readers(checkpoint, mapped_bytes=max_shard_bytes),
        dtype=numbers,
        true_vocab=manifest.vocab_size,
        max_shard_bytes=max_shard_bytes,
        tokenizer_folder=tokenizer,
        card=model_card(output.name, Origin(checkpoint, recipe, run, config)),
    )
    return manifest.step


def _readers(checkpoint: Checkpoint, *, mapped_bytes: int) -> list[NamedReader]:
    """A reader for each parameter. The checkpoint's files are let go whenever `mapped_bytes` of them have been read."""
    mapped = 0

    def read(name: str) -> Tensor:
        nonlocal mapped
        parameter = checkpoint.parameter(name)
        mapped += parameter.nbytes
        if mapped >= mapped_bytes:
            checkpoint.release()
            mapped = 0
        return parameter

    return [(name, torch.Size(shape), partial(read, name)) for name, shape in checkpoint.manifest.parameters.items()]


def _found(source: Path, step: int | None) -> tuple[Path | None, Checkpoint]:
    """The run folder, where there is one, and the checkpoint."""
    if (source / "recipe.json").is_file():
        return source, _checkpoint_of(source, step)
    if not (source / "manifest.json").is_file():
        raise UserError(
            f"{source} is no run folder: it has no recipe.json; and no checkpoint: it has no manifest.json. Name a run "
            "folder, or one of its checkpoints/step-…"
        )
    checkpoint = Checkpoint(source)
    if step not in (None, checkpoint.manifest.step):
        raise UserError(f"--step {step}: {source} is the checkpoint of step {checkpoint.manifest.step}; leave it out")
    run = source.resolve().parent.parent
    return run if (run / "recipe.json").is_file() else None, checkpoint


def _checkpoint_of(run: Path, step: int | None) -> Checkpoint:
    folder = run / "checkpoints"
    if step is None:
        newest = newest_checkpoint(folder)
        if newest is None:
            raise UserError(f"{run} has no checkpoint yet: train it, or lower train.checkpoint_every")
        if given_up(newest.manifest, read_rollbacks(run)):
            raise UserError(
                f"{newest.folder} is newest, but a rollback has left it for an older one: name a step with --step"
            )
        return newest
    complete = checkpoint_folders(folder)
    if step not in complete:
        found = ", ".join(map(str, complete)) or "none"
        raise UserError(f"--step {step}: {run} has no checkpoint of it; it has {found}")
    return Checkpoint(complete[step])


def _recipe_of(run: Path | None, checkpoint: Checkpoint) -> Recipe:
    """The recipe that wrote the checkpoint: its own word, or the run folder's, where its format has none."""
    if checkpoint.manifest.recipe:
        return validate_recipe(checkpoint.manifest.recipe, source=str(checkpoint.folder / "manifest.json"))
    if run is None:
        raise UserError(
            f"{checkpoint.folder} does not say its recipe, as checkpoints of format 1 do not: put it back into its run "
            "folder, below checkpoints/"
        )
    path = run / "recipe.json"
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["recipe"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    return validate_recipe(values, source=str(path))
