"""Shared by the tests of this folder: a world of one, a data set that is only described, small recipes."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from megadistill.config.recipe import CheckpointSection, LossSection, Recipe
from megadistill.data import Manifest, Mixture
from megadistill.distributed.topology import Topology
from megadistill.distributed.vocab import padded_vocabulary
from megadistill.models.families import FAMILIES, load_config, parameter_shapes
from megadistill.train.checkpoint.attempt import Attempt
from megadistill.train.checkpoint.format import FORMAT, CheckpointManifest
from megadistill.train.checkpoint.writer import Saver, require_saved
from megadistill.train.setup.run_folder import write_description
from megadistill.train.setup.step_shape import StepShape
from tests.paths import DS_CONFIGS

VOCAB, SEQUENCE, TOKENIZER = 250, 32, b"the pieces that both models know"

MODEL: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def topology(*, rank: int = 0, world: int = 1) -> Topology:
    """A rank that talks to nobody."""
    return Topology(
        rank=rank,
        world=world,
        local_rank=rank,
        group_size=1,
        device=torch.device("cpu"),
        world_group=None,
        vocab_group=None,
        slice_group=None,
        pipeline_group=None,
    )


def described_data(folder: Path) -> Path:
    """The manifest of a data set whose shards nobody reads."""
    values = {
        "version": 3,
        "split": "train",
        "sequence_length": SEQUENCE,
        "dtype": "uint16",
        "vocab_size": VOCAB,
        "sample_format": {"kind": "npy", "tokens": "tokens.npy", "bounds": "bounds.npy"},
        "tokenizer": {
            "kind": "sentencepiece",
            "file": "../tokenizer/tokenizer.model",
            "sha256": hashlib.sha256(TOKENIZER).hexdigest(),
        },
        "packer": {"name": "chunk", "version": 2, "bos": None, "eos": 2},
        "documents": 3,
        "tokens": 8 * SEQUENCE,
        "text_bytes": 1000,
        "source": {"inputs": ["text"], "include": ["*"], "exclude": [], "heldout_fraction": 0.1},
        "shards": [
            {
                "name": "shard-00000.tar",
                "sequences": 8,
                "bytes": 1,
                "sha256": "0" * 64,
                "index_sha256": "0" * 64,
            }
        ],
    }
    folder.mkdir(parents=True, exist_ok=True)
    Manifest.model_validate_json(json.dumps(values)).write(folder)
    return folder / "manifest.json"


def described_teacher(folder: Path, *, tokenizer: bytes | None = TOKENIZER, **changes: Any) -> Path:
    """A model folder with its config, its tokenizer, and weights of zero."""
    folder.mkdir(parents=True, exist_ok=True)
    keys = {**MODEL, "vocab_size": VOCAB, **changes}
    (folder / "config.json").write_text(json.dumps(keys), encoding="utf-8")
    if keys["model_type"] in FAMILIES:
        shapes = parameter_shapes(load_config(folder, what="test"))
        save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, folder / "model.safetensors")
    if tokenizer is not None:
        (folder / "tokenizer.model").write_bytes(tokenizer)
    return folder


def recipe(manifest: Path, run: Path, *, teacher: Path | None = None, **sections: Any) -> Recipe:
    """A small valid recipe; `sections` replace keys of the sections that they name."""
    values: dict[str, Any] = {
        "objective": "labels" if teacher is None else "distill",
        "run": {"folder": str(run)},
        "data": {"manifest": str(manifest)},
        "student": {"config": MODEL, "deepspeed": str(DS_CONFIGS / "zero3.json"), "vocab_multiple": 256},
        "train": {"steps": 6, "global_batch": 8, "micro_batch": 2, "optimizer": {"learning_rate": 1e-3}},
        "teacher": None if teacher is None else {"path": str(teacher)},
    }
    for name, section in sections.items():
        values[name] = {**(values.get(name) or {}), **section}
    return Recipe.model_validate(values)


def cursor_of(next_slot: int) -> dict[str, Any]:
    return {"fingerprint": "f", "next_slot": next_slot, "masked_slots": [], "skips": [], "order": {}}


def manifest_of(step: int, *, world: int = 1, **changes: Any) -> CheckpointManifest:
    """The manifest of a checkpoint of `step`, without its files."""
    values: dict[str, Any] = {
        "format": FORMAT,
        "step": step,
        "tokens": 64 * step,
        "world": world,
        "vocab_size": 5,
        "cursor": cursor_of(8 * step),
        "parameters": {"w": (6, 2), "b": (3,)},
        "versions": {"torch": "some"},
        "attempt": 1,
        "files": {},
    }
    return CheckpointManifest.model_validate_json(json.dumps(values | changes))


def save_checkpoint(
    folder: Path,
    state: dict[str, Tensor],
    step: int,
    *,
    rank: Topology | None = None,
    attempt: int = 1,
    **manifest: Any,
) -> Path:
    """Writes a checkpoint below `folder` at once, as an attempt at the run above it; its path. Collective."""
    rank = rank or topology()
    saver = Saver(folder, rank, Attempt(folder.parent, attempt), CheckpointSection(asynchronous=False, keep_last=99))
    try:
        (result,) = saver.start(state, manifest_of(step, world=rank.shard_world, attempt=attempt, **manifest))
    finally:
        saver.close()
    path = require_saved(result).path
    assert path is not None
    return path


def run_with_checkpoint(folder: Path, data: Path, *, step: int = 4, made: Recipe | None = None, **changes: Any) -> Path:
    """A run folder with one more checkpoint, from which another run may begin; `changes`: of its manifest."""
    made = recipe(data, folder) if made is None else made
    order = Mixture.load(made.data).order(made.data.seed)
    padded = padded_vocabulary(VOCAB, made.student.vocab_multiple, ranks=1)
    shapes = parameter_shapes(load_config({**MODEL, "vocab_size": padded}, what="student.config"))
    values: dict[str, Any] = {
        "vocab_size": VOCAB,
        "recipe": made.snapshot(),
        "parameters": {name: tuple(shape) for name, shape in shapes.items()},
        "cursor": {
            "fingerprint": order.fingerprint,
            "next_slot": 8 * step,
            "masked_slots": [],
            "skips": [],
            "order": order.description,
        },
    }
    write_description(folder, made.snapshot(), {"communication_data_type": "fp32"})
    return save_checkpoint(folder / "checkpoints", {"master/w": torch.zeros(3)}, step, **(values | changes))


def step_shape(*, sequence_length: int, global_batch: int, **changes: Any) -> StepShape:
    """The shape of the steps of a run without curriculum entries of their own shape, on one rank."""
    shape = StepShape(
        entry=1,
        start=0,
        stop=None,
        sequence_length=sequence_length,
        global_batch=global_batch,
        micro_batch=global_batch,
        accumulation=1,
        rope=None,
        loss=LossSection(),
    )
    return replace(shape, **changes)
