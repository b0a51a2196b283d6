"""DeepSpeed's JSON file: what it may say, what it must say, and what the recipe adds. It builds no engine."""

import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import BaseModel, ValidationError

from megadistill.config import TrainSection
from megadistill.errors import UserError, nearest

# Keys of a DeepSpeed file whose value the recipe owns: two owners of one number drift apart.
OWNED_BY_RECIPE = {
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.global_batch / (ranks x train.micro_batch)",
    "gradient_clipping": "train.max_grad_norm",
    "optimizer": "train.optimizer",
    "scheduler": "train.schedule",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "torch_autocast": "train.precision",
    "activation_checkpointing": "student.activation_checkpointing",
    "checkpoint": "checkpoint",
    "tensorboard": "the run folder",
}

# What a file may hold: a key that nobody knows is a typing mistake, and DeepSpeed itself would keep it in silence.
KNOWN = (
    "zero_optimization",
    "data_types",
    "communication_data_type",
    "aio",
    "comms_logger",
    "flops_profiler",
    "memory_breakdown",
    "wall_clock_breakdown",
)

# Keys of published files that DeepSpeed no longer has, or whose work is done here by something else.
GIVEN_UP = {
    "elasticity": "DeepSpeed removed it; a run here goes on with any number of ranks",
    "nebula": "DeepSpeed removed it; checkpoints here are asynchronous by themselves",
    "curriculum_learning": "DeepSpeed removed it; stages of data.sources change what is read",
    "data_efficiency": "the stream here is a function of the seed; stages of data.sources change what is read",
    "compile": "DeepCompile is not supported with a student whose head stays partitioned",
    "zero_optimization.mics_shard_size": "DeepSpeed removed MiCS; zero_hpz_partition_size keeps copies within a node",
    "zero_optimization.mics_hierarchical_params_gather": "DeepSpeed removed MiCS",
    "zero_optimization.zenflow": "ZenFlow takes the place of train.optimizer",
    "zero_optimization.offload_optimizer.super_offload": "SuperOffload takes the place of train.optimizer",
}

# Under zero_optimization, and what stands for it on a CPU: DeepSpeed would start, and fail at the first kernel, or
# (overlap_comm) make streams that do not overlap.
GPU_ONLY = {
    "overlap_comm": False,
    "zero_quantized_weights": False,
    "zero_quantized_gradients": False,
    "zero_quantized_nontrainable_weights": False,
}


def active_deepspeed_config(path: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The settings in force, and the names of those that the file switches on and a CPU does without.

    Raises:
        UserError: see `load_deepspeed_config`.
    """
    deepspeed_config = load_deepspeed_config(path)
    zero = deepspeed_config.get("zero_optimization")
    if torch.accelerator.is_available() or not isinstance(zero, dict):
        return deepspeed_config, ()
    disabled = tuple(name for name in GPU_ONLY if zero.get(name))
    return {**deepspeed_config, "zero_optimization": {**zero, **GPU_ONLY}} if disabled else deepspeed_config, disabled


def load_deepspeed_config(path: Path) -> dict[str, Any]:
    """A DeepSpeed JSON file, which may hold only what DeepSpeed owns.

    Raises:
        UserError: it is missing, no JSON object, holds "auto" or a key that DeepSpeed does not have, or sets what the
            recipe owns.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"student.deepspeed: no file {path} (paths are relative to {Path.cwd()})") from None
    except (OSError, ValueError) as error:
        raise UserError(f"student.deepspeed: {path} cannot be read as JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"student.deepspeed: {path} must hold a JSON object, found {type(values).__name__}")
    for key, owner in OWNED_BY_RECIPE.items():
        if key in values:
            raise UserError(f"{path} sets {key}, which the recipe owns: remove it there and use {owner}")
    for place in _places(values):
        if place in GIVEN_UP:
            raise UserError(f"{path} sets {place}: {GIVEN_UP[place]}: remove it")
    unknown = [key for key in values if key not in KNOWN]
    if unknown:
        raise UserError(f"{path}: no such key {unknown[0]}{nearest(unknown[0], KNOWN)}; it may hold {', '.join(KNOWN)}")
    automatic = _find_auto(values)
    if automatic:
        raise UserError(
            f'{path} sets {automatic} to "auto", which only the Hugging Face Trainer fills in: give a value'
        )
    zero = values.get("zero_optimization")
    if isinstance(zero, dict):
        _refuse_unknown(zero, DeepSpeedZeroConfig, f"{path}: zero_optimization")
        _refuse_wrong_values(zero, path)
    return values


def build_engine_config(deepspeed_config: dict[str, Any], train: TrainSection, accumulation: int) -> dict[str, Any]:
    """The deepspeed_config (what DeepSpeed owns) with the sizes that the recipe owns.

    Raises:
        UserError: the deepspeed_config is not one that this trainer's gradients are right under.
    """
    zero, types = deepspeed_config.get("zero_optimization", {}), deepspeed_config.get("data_types", {})
    for name, value in (("zero_optimization", zero), ("data_types", types)):
        if not isinstance(value, dict):
            raise UserError(f"student.deepspeed: {name} must be an object, found {value!r}")
    if zero.get("stage") != 3:
        raise UserError(f"student.deepspeed: zero_optimization.stage must be 3, found {zero.get('stage')!r}")
    if zero.get("memory_efficient_linear", True):
        raise UserError(
            "student.deepspeed: zero_optimization.memory_efficient_linear must be false: it leaves "
            "torch.nn.functional.linear patched for every model of the process, the teacher's too"
        )
    _require_secondary_groups(zero.get("zero_hpz_partition_size", 1), train, accumulation)
    accumulated = types.get("grad_accum_dtype")
    if accumulated != "fp32":
        raise UserError(
            f"student.deepspeed: data_types.grad_accum_dtype must be 'fp32', found {accumulated!r}: "
            "under bfloat16 the gradients of an accumulation window would be summed in bfloat16"
        )
    return {
        **copy.deepcopy(deepspeed_config),  # DeepSpeed writes into what it is given
        "train_micro_batch_size_per_gpu": train.micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": train.max_grad_norm,
        "bf16": {"enabled": train.precision == "bfloat16"},
        "steps_per_print": 2**31,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW steps where an offloaded state is
    }


def _require_secondary_groups(size: int, train: TrainSection, accumulation: int) -> None:
    """hpZ keeps a copy of the weights in each group of `size` ranks."""
    world = train.global_batch // (train.micro_batch * accumulation)
    if size > 1 and world % size:
        divisors = [divisor for divisor in range(1, world + 1) if world % divisor == 0]
        raise UserError(
            f"student.deepspeed: zero_optimization.zero_hpz_partition_size is {size}, which does not divide the "
            f"{world} ranks of the student: give the ranks of a node, one of {', '.join(map(str, divisors))}"
        )


def _refuse_unknown(values: Mapping[str, Any], model: type[BaseModel], where: str) -> None:
    """Keys of the file, at any depth, against DeepSpeed's own model of them."""
    fields = model.model_fields
    known = {**fields, **{field.alias: field for field in fields.values() if field.alias}}
    for key, value in values.items():
        if key not in known:
            raise UserError(f"{where} has no key {key}{nearest(key, known)}")
        extra = known[key].json_schema_extra
        if isinstance(extra, dict) and extra.get("deprecated"):
            instead = f"use {extra['new_param']}" if extra.get("new_param") else "remove it"
            raise UserError(f"{where}: DeepSpeed gave up {key}: {instead}")
        below = [option for option in get_args(known[key].annotation) if isinstance(option, type)]
        models = [option for option in below if issubclass(option, BaseModel)]
        if models and isinstance(value, dict):
            _refuse_unknown(value, models[0], f"{where}.{key}")


def _refuse_wrong_values(zero: dict[str, Any], path: Path) -> None:
    try:
        DeepSpeedZeroConfig(**copy.deepcopy(zero))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, ("zero_optimization", *first["loc"])))
        raise UserError(f"{path}: {place}: {first['msg'].lower()}, found {first['input']!r}") from None


def _places(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Every key at any depth, with dots."""
    for key, value in values.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _places(value, f"{prefix}{key}.")


def _find_auto(value: Any, place: str = "") -> str | None:
    if value == "auto":
        return place
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        found = _find_auto(child, f"{place}.{key}" if place else str(key))
        if found:
            return found
    return None
