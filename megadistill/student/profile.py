"""DeepSpeed's JSON file: what it may say, what it must say, and what the recipe adds. It does not import deepspeed."""

import json
from pathlib import Path
from typing import Any

import torch

from megadistill.config import TrainSection, dotted
from megadistill.errors import UserError, nearest

# Keys of a DeepSpeed file whose value the recipe owns: two owners of one number drift apart.
OWNED_BY_RECIPE = {
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.global_batch / (ranks x train.micro_batch)",
    "gradient_clipping": "train.clip",
    "optimizer": "train.adamw",
    "scheduler": "train.schedule",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "torch_autocast": "train.precision",
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


def deepspeed_profile(path: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The settings in force, and the names of those that the file switches on and a CPU does without."""
    asked = load_deepspeed(path)
    cpu = path.with_suffix(".cpu.json")
    if torch.accelerator.is_available() or not cpu.is_file():
        return asked, ()
    used = load_deepspeed(cpu)
    flat_asked, flat_used = dotted(asked), dotted(used)
    return used, tuple(
        key.rpartition(".")[2] for key, value in flat_asked.items() if value is True and flat_used.get(key) is not True
    )


def load_deepspeed(path: Path) -> dict[str, Any]:
    """A DeepSpeed JSON file, which may hold only what DeepSpeed owns.

    Raises:
        UserError: it is missing, no JSON object, holds "auto", or sets what the recipe owns.
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
    unknown = [key for key in values if key not in KNOWN]
    if unknown:
        raise UserError(f"{path}: no such key {unknown[0]}{nearest(unknown[0], KNOWN)}; it may hold {', '.join(KNOWN)}")
    automatic = _find_auto(values)
    if automatic:
        raise UserError(
            f'{path} sets {automatic} to "auto", which only the Hugging Face Trainer fills in: give a value'
        )
    return values


def deepspeed_config(profile: dict[str, Any], train: TrainSection, accumulation: int) -> dict[str, Any]:
    """The profile (what DeepSpeed owns) with the sizes that the recipe owns.

    Raises:
        UserError: the profile is not one that this trainer's gradients are right under.
    """
    zero, types = profile.get("zero_optimization", {}), profile.get("data_types", {})
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
    if zero.get("zero_hpz_partition_size", 1) != 1:
        raise UserError(
            "student.deepspeed: zero_optimization.zero_hpz_partition_size is not supported: a resume would go on from "
            "its stale secondary copy of the weights; remove it"
        )
    accumulated = types.get("grad_accum_dtype")
    if accumulated != "fp32":
        raise UserError(
            f"student.deepspeed: data_types.grad_accum_dtype must be 'fp32', found {accumulated!r}: "
            "under bfloat16 the gradients of an accumulation window would be summed in bfloat16"
        )
    return {
        **profile,
        "train_micro_batch_size_per_gpu": train.micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": train.clip,
        "bf16": {"enabled": train.precision == "bfloat16"},
        "steps_per_print": 2**31,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW steps where an offloaded state is
    }


def _find_auto(value: Any, place: str = "") -> str | None:
    if value == "auto":
        return place
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        found = _find_auto(child, f"{place}.{key}" if place else str(key))
        if found:
            return found
    return None
