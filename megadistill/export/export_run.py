"""Export of a checkpoint to a Hugging Face folder, tensor by tensor, in one process without a GPU."""

import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megadistill.config.load import validate_recorded
from megadistill.config.paths import wrong_path
from megadistill.config.recipe import Recipe
from megadistill.data.tokenizers.auto_tokenizer import auto_tokenizer_differs
from megadistill.data.tokenizers.special_ids import generation_settings
from megadistill.errors import UserError
from megadistill.export.model_card import model_card
from megadistill.models.experts import RouterCoefs, record_router_coefs
from megadistill.models.families import load_config
from megadistill.models.hf_export import ExportedTokenizer, NamedReader, export_model, exported_config
from megadistill.precision import Precision, torch_dtype
from megadistill.redaction import printable
from megadistill.train.checkpoint.folders import checkpoint_folders
from megadistill.train.checkpoint.format import Checkpoint, newest_checkpoint
from megadistill.train.checkpoint.rollback import is_abandoned, read_rollbacks
from megadistill.train.setup.run_folder import TOKENIZER_FOLDER, run_tokenizer, student_config_of
from megadistill.train.setup.step_shape import config_at

logger = logging.getLogger(__name__)


def export_run(source: Path, output: Path, *, step: int | None, max_shard_bytes: int, dtype: Precision | None) -> int:
    """Writes the student of a checkpoint to `output` with a model card, and returns the checkpoint's step.

    `source`: a run folder, for its newest checkpoint or that of `step`; or a checkpoint's own folder. The float32
    master weights are rounded once, to `dtype` or to the run's precision, which the training model computes with.
    Memory holds a shard of `max_shard_bytes`, as much of the checkpoint, and one parameter in float32.

    Raises:
        UserError: no run folder and no checkpoint, no such step, or an output that exists.
        OperatorFault: the checkpoint is damaged.
    """
    if max_shard_bytes < 1:
        raise UserError("--max-shard-mb: a shard needs at least 1 MB")
    if output.exists():  # before a checkpoint of terabytes is read
        raise UserError(f"{output} exists already; remove it, or export to another folder")
    run, checkpoint = _find_checkpoint(source, step)
    export_checkpoint(checkpoint, output, run=run, max_shard_bytes=max_shard_bytes, dtype=dtype)
    return checkpoint.manifest.step


def export_checkpoint(
    checkpoint: Checkpoint, output: Path, *, run: Path | None, max_shard_bytes: int, dtype: Precision | None
) -> None:
    """Writes the student of a checkpoint to `output`, see `export_run`. `run`: the folder of its run, where known.

    Raises:
        UserError: an output that exists. OperatorFault: the checkpoint is damaged.
    """
    manifest = checkpoint.manifest
    recipe = validate_recorded(manifest.recipe, source=str(checkpoint.folder / "manifest.json"))
    weights_dtype = torch_dtype(dtype or recipe.train.precision)
    config = load_config(student_config_of(run, recipe.student), what="student.config")
    config = config_at(config, recipe, manifest.cursor)
    record_router_coefs(config, RouterCoefs.of(recipe.loss, config))
    tokenizer = None if run is None else _tokenizer(run, rows=manifest.vocab_size)
    if tokenizer is None:
        logger.warning("%s is in no run folder: it is exported without a tokenizer", checkpoint.folder)
    config = exported_config(config, dtype=weights_dtype, true_vocab=manifest.vocab_size, tokenizer=tokenizer)
    checkpoint.verify()
    tokenizer_class = "AutoTokenizer"
    if tokenizer is not None and auto_tokenizer_differs(tokenizer.files, model_type=config.model_type):
        tokenizer_class = "PreTrainedTokenizerFast"
        logger.warning(
            "%s: transformers' AutoTokenizer cuts texts by the rules of a %s model, not by those of its tokenizer.json "
            "that the student was trained with: load it with PreTrainedTokenizerFast.from_pretrained",
            output,
            config.model_type,
        )
    export_model(
        output,
        config=config,
        tensors=_readers(checkpoint, mapped_bytes=max_shard_bytes),
        dtype=weights_dtype,
        true_vocab=manifest.vocab_size,
        max_shard_bytes=max_shard_bytes,
        tokenizer=tokenizer,
        texts=_card(output.name, checkpoint, recipe, run=run, config=config, tokenizer_class=tokenizer_class),
    )


def _tokenizer(run: Path, *, rows: int) -> ExportedTokenizer:
    """The tokenizer of the run's data. Raises UserError: it is missing, or was changed since the run began.

    One that cannot be read does not stop the export of a finished run: the special ids are left out.
    """
    files = run_tokenizer(run)
    try:
        generation = generation_settings(run / TOKENIZER_FOLDER, rows=rows)
    except UserError as error:
        logger.warning("%s: the export has no bos_token_id, eos_token_id and pad_token_id: add them", error)
        generation = {}
    return ExportedTokenizer(files, generation)


def _card(
    name: str, checkpoint: Checkpoint, recipe: Recipe, *, run: Path | None, config: Any, tokenizer_class: str
) -> dict[str, str]:
    """README.md, by its name; nothing, for the short one of `export_model`, where the records of the run are damaged.

    A card reads what lies around a run: the records, evaluations, the teacher's folder. None of it is worth a student.
    """
    try:
        return {
            "README.md": model_card(name, checkpoint, recipe, run=run, config=config, tokenizer_class=tokenizer_class)
        }
    except Exception as error:
        reason = printable(" ".join(f"{type(error).__name__}: {error}".split()))
        logger.warning("README.md has no model card, only the sizes of the model: %s", reason[:400])
        return {}


def _readers(checkpoint: Checkpoint, *, mapped_bytes: int) -> list[NamedReader]:
    """A reader for each parameter. The checkpoint's files are unmapped after every `mapped_bytes` that are read."""
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


def _find_checkpoint(source: Path, step: int | None) -> tuple[Path | None, Checkpoint]:
    """The run folder, where there is one, and the checkpoint."""
    if (source / "recipe.json").is_file():
        return source, _checkpoint_of(source, step)
    if not (source / "manifest.json").is_file():
        if reason := wrong_path(source, "run"):
            raise UserError(reason)
        raise UserError(
            f"{source}: not a run folder (no recipe.json) or a checkpoint (no manifest.json). Name a run folder, or "
            "one of its checkpoints/step-…"
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
        if is_abandoned(newest.manifest, read_rollbacks(run)):
            raise UserError(f"{newest.folder} is newest, but a rollback abandoned it: name a step with --step")
        return newest
    complete = checkpoint_folders(folder)
    if step not in complete:
        steps = ", ".join(map(str, complete)) or "none"
        raise UserError(f"--step {step}: {run} has no checkpoint of it; it has {steps}")
    return Checkpoint(complete[step])
