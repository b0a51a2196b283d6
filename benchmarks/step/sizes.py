"""The sizes of a step to measure, the features that can be switched off, and the input files."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.utils.logging import disable_progress_bar

from benchmarks.teacher import write_inputs
from megadistill.config.recipe import Recipe
from megadistill.distributed.launch import Launch
from megadistill.distributed.topology import Topology
from megadistill.models.families import load_config
from megadistill.precision import Precision, torch_dtype
from megadistill.student import engine
from megadistill.student.flat_step import FlatStep
from megadistill.train.setup.setup import Setup, prepare

SEQUENCES = 64
"""Number of sequences of the data; a measurement that takes more reads them again."""

Sizes = dict[str, int]
"""Keys of a Llama's config."""


def _llama(
    width: int, inner: int, layers: int, heads: int = 8, kv_heads: int = 4, head_dim: int | None = None
) -> Sizes:
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": width // heads if head_dim is None else head_dim,
    }


SMALL_STUDENT, SMALL_TEACHER = _llama(256, 768, 4), _llama(384, 1024, 8)


@dataclass(frozen=True)
class Size:
    """Models and batch of one rank's step."""

    vocab: int
    student: Sizes
    teacher: Sizes | None
    """None: a step on labels."""
    micro_batch: int
    sequence: int
    precision: Precision = "float32"

    @property
    def tokens(self) -> int:
        """Tokens of one rank's step."""
        return self.micro_batch * self.sequence

    def config(self, sizes: Sizes) -> PretrainedConfig:
        """The config of the student or the teacher."""
        keys = {"model_type": "llama", "vocab_size": self.vocab, "max_position_embeddings": self.sequence}
        return load_config({**keys, **sizes}, what="a model of this benchmark")

    def __str__(self) -> str:
        models = {"student": self.student, "teacher": self.teacher}
        widths = [
            f"{model} {sizes['hidden_size']} x {sizes['num_hidden_layers']}"
            for model, sizes in models.items()
            if sizes is not None
        ]
        return f"V {self.vocab:,}, {', '.join(widths)}, {self.micro_batch} x {self.sequence} tokens a rank"


SIZES = {
    "tiny": Size(2_048, _llama(64, 128, 2), _llama(96, 128, 2), 2, 32),
    "deep": Size(2_000, _llama(256, 768, 8), _llama(384, 1024, 16), 8, 128),
    "wide": Size(32_000, SMALL_STUDENT, SMALL_TEACHER, 4, 512),
    "widest": Size(128_000, SMALL_STUDENT, SMALL_TEACHER, 2, 512),
}
"""Sizes on a CPU. In `deep` most of the products are the layers', in the others the heads'. `tiny`: for tests."""

FEATURE_SIZES = ("deep", "wide", "tiny")
"""Sizes whose features are measured one by one."""

_SHALLOW = (_llama(256, 768, 2), _llama(384, 1024, 4))
GROWTHS = {
    "sequence": {S: Size(2_000, *_SHALLOW, 8192 // S, S) for S in (512, 2048, 8192)},
    "vocabulary": {V: Size(V, *_SHALLOW, 1, 512) for V in (32_000, 64_000, 128_000, 256_000)},
}
"""Sizes that grow in one number, by its name and its value; a step has the same number of tokens."""

LLAMA_8B = _llama(4096, 14336, 32, 32, 8)
DEVICE_SIZES = {
    "labels, 8B": (Size(128_256, LLAMA_8B, None, 1, 8192, "bfloat16"), 6_600),
    "distillation, 8B to 4B": (
        Size(128_256, _llama(3072, 9216, 32, 32, 8, head_dim=128), LLAMA_8B, 1, 8192, "bfloat16"),
        7_000,
    ),
}
"""Sizes for accelerators, and the least tokens a second of one of them: docs/results/benchmarks.md says where from."""


@dataclass(frozen=True)
class Features:
    """Features that make our step fast: values of the recipe, and two that no recipe turns off."""

    attention: str = "auto"
    leaves: bool = True
    flat_step: bool = True
    student_compile: bool = True
    teacher_compile: bool = True
    loss: str = "compiled"
    checkpointing: str = "none"

    def student(self) -> dict[str, Any]:
        """Keys of the recipe."""
        return {
            "attention": self.attention,
            "compile": self.student_compile,
            "activation_checkpointing": self.checkpointing,
        }

    def teacher(self) -> dict[str, Any]:
        """Keys of the recipe."""
        return {"attention": self.attention, "compile": self.teacher_compile}


EAGER = Features("eager", leaves=False, flat_step=False, student_compile=False, teacher_compile=False, loss="eager")
IN_TURN = {
    "none": EAGER,
    "+ attention": (_attention := replace(EAGER, attention="auto")),
    "+ compiled loss": (_loss := replace(_attention, loss="compiled")),
    "+ layers as ZeRO-3 leaves": (_leaves := replace(_loss, leaves=True)),
    "+ optimizer step on flat partitions": (_flat := replace(_leaves, flat_step=True)),
    "+ compiled student": replace(_flat, student_compile=True),
    "+ compiled teacher": Features(),
    "selective checkpointing": Features(checkpointing="selective"),
    "full checkpointing": Features(checkpointing="full"),
}
"""Each has one feature more than the one before, but the last two: all features, and checkpointing."""


def write_files(folder: Path, size: Size) -> Path:
    """Random tokens, a random teacher and a random student."""
    disable_progress_bar()
    write_inputs(
        folder, sequence=size.sequence, vocab=size.vocab, teacher=size.teacher or SMALL_TEACHER, sequences=SEQUENCES
    )
    model = AutoModelForCausalLM.from_config(size.config(size.student), dtype=torch_dtype(size.precision))
    model.save_pretrained(folder / "student")
    return folder


def setup_of(topology: Topology, folder: Path, size: Size, features: Features) -> Setup:
    """The set-up of a run whose step is one micro-batch of each rank."""
    disable_progress_bar()
    distills = size.teacher is not None
    teacher = {"path": str(folder / "teacher"), "vocab_map": str(folder / "map.json"), **features.teacher()}
    values: dict[str, Any] = {
        "objective": "distill" if distills else "labels",
        "run": {"folder": str(folder / "run")},
        "data": {"manifest": str(folder / "data" / "manifest.json")},
        "student": {"config": str(folder / "student"), "weights": str(folder / "student"), **features.student()},
        "loss": {"elementwise": features.loss},
        "distributed": {"vocab_group": topology.group_size, "shard": topology.shard_world},
        "train": {
            "steps": 1_000_000,
            "global_batch": topology.world * size.micro_batch,
            "micro_batch": size.micro_batch,
            "precision": size.precision,
            "optimizer": {"learning_rate": 1e-3},
        },
    }
    values |= {"teacher": teacher} if distills else {}
    launch = Launch(topology.rank, topology.world, topology.local_rank, topology.world)
    return prepare(Recipe.model_validate(values), launch)


@contextmanager
def built_with(features: Features) -> Iterator[None]:
    """Builds a student without the features that no recipe turns off: the functions that add them do nothing."""
    with ExitStack() as patches:
        if not features.leaves:
            patches.enter_context(patch.object(engine, "set_z3_leaf_module", lambda module, leaf: None))
        if not features.flat_step:
            patches.enter_context(patch.object(FlatStep, "install", lambda zero, topology: None))
        yield
