"""From a run folder to a Hugging Face folder: one process, tensor by tensor. It starts no ranks."""

import json
from functools import partial
from pathlib import Path

import torch

from megadistill.config import Recipe, validate_recipe
from megadistill.errors import UserError
from megadistill.model.export import export_model
from megadistill.model.families import load_config
from megadistill.train.checkpoint import Checkpoint, checkpoint_folders, newest_checkpoint
from megadistill.train.run_folder import TOKENIZER_FOLDER


def export_run(run: Path, output: Path, *, step: int | None, max_shard_bytes: int) -> int:
    """Writes the student of a checkpoint (the newest, or that of `step`) to `output`; the step that it was.

    The float32 master weights are rounded once to the run's precision, which is what the training model computes with.

    Raises:
        UserError: no run folder, no such checkpoint, or an output that exists.
        OperatorFault: the checkpoint is damaged.
    """
    if max_shard_bytes < 1:
        raise UserError("--max-shard-mb: a shard needs at least 1 MB")
    recipe = _recipe_of(run)
    checkpoint = _checkpoint_of(run, step)
    checkpoint.verify()
    source = recipe.student.config
    config = load_config(Path(source) if isinstance(source, str) else source, what="student.config")
    export_model(
        output,
        config=config,
        tensors=[
            (name, torch.Size(shape), partial(checkpoint.parameter, name))
            for name, shape in checkpoint.manifest.parameters.items()
        ],
        dtype=getattr(torch, recipe.train.precision),
        true_vocab=checkpoint.manifest.vocab_size,
        max_shard_bytes=max_shard_bytes,
        tokenizer_folder=run / TOKENIZER_FOLDER,
    )
    return checkpoint.manifest.step


def _recipe_of(run: Path) -> Recipe:
    path = run / "recipe.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))["recipe"]
    except FileNotFoundError:
        raise UserError(f"{run} is no run folder: it has no recipe.json") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    return validate_recipe(values, source=str(path))


def _checkpoint_of(run: Path, step: int | None) -> Checkpoint:
    folder = run / "checkpoints"
    if step is None:
        newest = newest_checkpoint(folder)
        if newest is None:
            raise UserError(f"{run} has no checkpoint yet: train it, or lower train.checkpoint_every")
        return newest
    complete = checkpoint_folders(folder)
    if step not in complete:
        found = ", ".join(map(str, complete)) or "none"
        raise UserError(f"--step {step}: {run} has no checkpoint of it; it has {found}")
    return Checkpoint(complete[step])
