"""DeepSpeed's JSON file: keys that it may and must hold, and the ones that the recipe adds."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import BaseModel, ValidationError

from megadistill.config.load import dotted
from megadistill.config.recipe import TrainSection
from megadistill.errors import UserError, nearest
from megadistill.io import read_given_json
from megadistill.precision import Precision
from megadistill.shipped import shipped_folder

OWNED_BY_RECIPE = {
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.global_batch / (ranks x train.micro_batch), rounded up",
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
"""Key of a DeepSpeed file -> the recipe key that owns its value."""

ALLOWED = (
    "zero_optimization",
    "data_types",
    "communication_data_type",
    "aio",
    "comms_logger",
    "flops_profiler",
    "memory_breakdown",
    "wall_clock_breakdown",
)
"""Keys that a file may hold at the top level. DeepSpeed itself accepts unknown ones without a warning."""

UNSUPPORTED = {
    "elasticity": "DeepSpeed removed it; a run here resumes with any number of ranks",
    "nebula": "DeepSpeed removed it; checkpoints here are asynchronous",
    "curriculum_learning": "DeepSpeed removed it; data.curriculum changes the mixture",
    "data_efficiency": "the stream here is a function of the seed; data.curriculum changes the mixture",
    "compile": "DeepCompile is not supported with a student whose head stays partitioned",
    "zero_optimization.mics_shard_size": "DeepSpeed removed MiCS; zero_hpz_partition_size keeps copies in a node",
    "zero_optimization.mics_hierarchical_params_gather": "DeepSpeed removed MiCS",
    "zero_optimization.leaf_module": "each decoder layer is a leaf",
    "zero_optimization.stage3_module_granularity_threshold": "each decoder layer is a leaf",
    "zero_optimization.zenflow": "ZenFlow replaces train.optimizer",
    "zero_optimization.offload_optimizer.super_offload": "SuperOffload replaces train.optimizer",
}
"""Keys of published files that DeepSpeed no longer has, or that conflict with this package -> the reason."""

GPU_ONLY = {
    "overlap_comm": False,
    "zero_quantized_weights": False,
    "zero_quantized_nontrainable_weights": False,
}
"""Keys of zero_optimization that need a GPU -> their value on a CPU. DeepSpeed would start with them and fail at the
first kernel, or (overlap_comm) create streams that do not overlap."""


PREFETCH, PERSISTENCE = "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold"
"""Keys of zero_optimization, in parameters: gathered ahead, and the largest that stays gathered."""

RANKS_OF_A_SMALL_WORLD = 64
"""Most ranks over which the last norm, which is no layer's, is gathered by itself: an all-gather of some kilobytes that
compute hides. Over more it stays gathered between steps, as its latency grows with the ranks (`student.persistent`)."""

COMMUNICATION_DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
"""Values of `communication_data_type` -> the dtype that gradients are reduced in."""

RANKS_OF_LOW_PRECISION = 64
"""Most ranks whose gradients may be reduced in 16 bits without a warning: the error of their sum is about 1 %."""

BFLOAT16_SHRINK = {64: 0.99, 512: 0.76, 1536: 0.27, 2048: 0.21}
"""Ranks -> size of the mean of gradients that agree, against the true one, after a ring reduction in bfloat16.

Each of the ranks - 1 hops rounds the partial sum to 8 bits, and a sum of equal terms stops growing at 256 of them. In
these figures a gradient's mean is ten times its deviation over the ranks; where it is a tenth, the sum keeps at least
98 % of its size, and its relative error is 1 to 5 %. `tests/unit/student/test_gradient_reduction.py` simulates both.
"""


def shipped_deepspeed_files() -> dict[str, Path]:
    """Name, as `student.deepspeed` takes it, -> file that comes with the package."""
    return {path.stem: path for path in sorted(shipped_folder("ds_configs").glob("*.json"), key=lambda path: path.stem)}


def default_deepspeed(*, on_gpus: bool) -> str:
    """Name of the file of a recipe without `student.deepspeed`."""
    return "zero3" if on_gpus else "cpu"


def deepspeed_path(name: str | None, *, on_gpus: bool) -> Path:
    """The file that `student.deepspeed` names.

    A bare name is a file that comes with the package; one with a slash, or that ends in .json, is a path of the user's.

    Raises:
        UserError: no file of that name comes with the package.
    """
    name = default_deepspeed(on_gpus=on_gpus) if name is None else name
    if "/" in name or name.endswith(".json"):
        return Path(name)
    shipped = shipped_deepspeed_files()
    if name not in shipped:
        raise UserError(
            f"student.deepspeed is {name!r}, and no such file comes with megadistill{nearest(name, shipped)}; give one "
            f"of {', '.join(shipped)}, or the path of your own, which has a slash or ends in .json"
        )
    return shipped[name]


def describe_deepspeed(name: str | None) -> str:
    """The file that `student.deepspeed` names on this machine, as text."""
    on_gpus = torch.accelerator.is_available()
    device = "on GPUs" if on_gpus else "on a CPU"
    return f"{default_deepspeed(on_gpus=on_gpus)}, the default {device}" if name is None else name


def active_deepspeed_config(name: str | None) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The settings of `student.deepspeed` on this machine, and those that are disabled because it has no GPU.

    Raises:
        UserError: see `deepspeed_path` and `load_deepspeed_config`.
    """
    on_gpus = torch.accelerator.is_available()
    deepspeed_config = load_deepspeed_config(deepspeed_path(name, on_gpus=on_gpus))
    zero = deepspeed_config.get("zero_optimization")
    if on_gpus or not isinstance(zero, dict):
        return deepspeed_config, ()
    disabled = tuple(name for name in GPU_ONLY if zero.get(name))
    return {**deepspeed_config, "zero_optimization": {**zero, **GPU_ONLY}} if disabled else deepspeed_config, disabled


def load_deepspeed_config(path: Path) -> dict[str, Any]:
    """Loads a DeepSpeed JSON file, which may hold only keys that DeepSpeed owns.

    Raises:
        UserError: it is missing, is not a JSON object, holds "auto" or an unknown key, or sets a key that the recipe
            owns.
    """
    way_out = f"name a DeepSpeed JSON file, relative to {Path.cwd()}"
    if not path.exists() and path.stem in shipped_deepspeed_files():
        way_out = f"student.deepspeed={path.stem} is the file that comes with megadistill"
    values: dict[str, Any] = read_given_json(path, dict, what="student.deepspeed", way_out=way_out)
    zero = values.get("zero_optimization")
    if isinstance(zero, dict):
        zero = values["zero_optimization"] = _with_documented_names(zero, path)
    for key, owner in OWNED_BY_RECIPE.items():
        if key in values:
            raise UserError(f"{path} sets {key}, which the recipe owns: remove it there and use {owner}")
    for key, value in _items(values):
        if key in UNSUPPORTED:
            raise UserError(f"{path} sets {key}: {UNSUPPORTED[key]}: remove it")
        if value == "auto":
            raise UserError(f'{path} sets {key} to "auto", which only the Hugging Face Trainer fills in: give a value')
    dtype = values.get("communication_data_type")  # DeepSpeed's default is null: the run's precision
    if dtype is not None and (not isinstance(dtype, str) or dtype not in COMMUNICATION_DTYPES):
        raise UserError(f"{path}: communication_data_type is {dtype!r}: give one of {', '.join(COMMUNICATION_DTYPES)}")
    for key in values:
        if key not in ALLOWED:
            raise UserError(f"{path}: no such key {key}{nearest(key, ALLOWED)}; it may hold {', '.join(ALLOWED)}")
    if isinstance(zero, dict):
        if zero.get("zero_quantized_gradients"):
            raise UserError(
                f"{path}: zero_optimization.zero_quantized_gradients must be false: DeepSpeed's kernel reads gradients "
                "as float16 whatever they are, so those of a run in bfloat16 or float32 would be corrupted"
            )
        _refuse_unknown(zero, DeepSpeedZeroConfig, f"{path}: zero_optimization")
        _refuse_wrong_values(zero, path)
    return values


def build_engine_config(
    deepspeed_config: dict[str, Any], train: TrainSection, accumulation: int, *, ranks: int, replicas: int = 1
) -> dict[str, Any]:
    """The configuration of a DeepSpeed engine: `deepspeed_config` with the recipe's values.

    `ranks`: those of a replica. `replicas`: of the student, with an engine each.

    Raises:
        UserError: `deepspeed_config` has settings under which gradients would be wrong.
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
    if replicas > 1:
        _refuse_offload(zero)
    _require_secondary_groups(zero.get("zero_hpz_partition_size", 1), ranks)
    accumulated = types.get("grad_accum_dtype")
    if accumulated != "fp32":
        raise UserError(
            f"student.deepspeed: data_types.grad_accum_dtype must be 'fp32', found {accumulated!r}: "
            "under bfloat16 the gradients of an accumulation window would be summed in bfloat16"
        )
    return {
        **copy.deepcopy(deepspeed_config),  # DeepSpeed modifies it
        "train_micro_batch_size_per_gpu": train.micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": train.max_grad_norm,
        "bf16": {"enabled": train.precision == "bfloat16"},
        "steps_per_print": 2**31,
        "zero_force_ds_cpu_optimizer": False,  # torch's optimizer also updates an offloaded state
        "zero_allow_untested_optimizer": True,  # DeepSpeed lists those that it tests; `student.optimizer` decides
    }


def with_layer_prefetch(engine_config: dict[str, Any], layers: Sequence[Sequence[int]]) -> dict[str, Any]:
    """The configuration with a size of prefetches, where it has none: that of the largest layer.

    A layer is gathered by one all-gather then, ahead of its use. With DeepSpeed's default a large layer is gathered by
    two: the parameters that fit, and the others when they are needed.

    Args:
        layers: the sizes of each layer's parameters.
    """
    zero = engine_config["zero_optimization"]
    return {**engine_config, "zero_optimization": {PREFETCH: layer_prefetch(zero, layers), **zero}}


def layer_prefetch(zero: Mapping[str, Any], layers: Sequence[Sequence[int]]) -> int:
    """The most parameters of a layer that ZeRO-3 gathers at each use: those that are not small enough to stay.

    `zero`: DeepSpeed's zero_optimization. `layers`: the sizes of each layer's parameters.
    """
    threshold = int(zero.get(PERSISTENCE, DeepSpeedZeroConfig.model_fields["param_persistence_threshold"].default))
    return max(sum(size for size in layer if size > threshold) for layer in layers)


def numeric_settings(deepspeed_config: dict[str, Any], precision: Precision) -> dict[str, Any]:
    """The settings that change a run's numbers, defaults included; keys are dotted.

    All others decide where states are and how they travel.
    """
    quantized = "zero_optimization.zero_quantized_weights"
    return {
        "communication_data_type": reduction_dtype(deepspeed_config, precision),
        quantized: dotted(deepspeed_config).get(quantized, False),
    }


def reduction_dtype(deepspeed_config: Mapping[str, Any], precision: Precision) -> str:
    """The dtype that ZeRO-3 adds up gradients in: `communication_data_type`, or else the run's precision."""
    dtype = deepspeed_config.get("communication_data_type")
    return precision if dtype is None else COMMUNICATION_DTYPES[dtype]


def low_precision_reduction(deepspeed_config: Mapping[str, Any], precision: Precision, ranks: int) -> str | None:
    """A warning where gradients of too many `ranks` are added up in 16 bits; else None."""
    dtype = reduction_dtype(deepspeed_config, precision)
    if dtype == "float32" or ranks <= RANKS_OF_LOW_PRECISION:
        return None
    shrink = ", ".join(f"{share:g} over {count:,}" for count, share in BFLOAT16_SHRINK.items())
    return (
        f"gradients of {ranks:,} ranks are added up in {dtype}: a ring rounds the partial sum at each rank, and in "
        f"bfloat16 shrinks gradients that agree to {shrink}: set communication_data_type to fp32 in DeepSpeed's file, "
        "as the files that come with megadistill do"
    )


def _refuse_offload(zero: Mapping[str, Any]) -> None:
    """Refuses what leaves no flat gradient on the device, which replicas of the student add up."""
    devices = {key: (zero.get(key) or {}).get("device") for key in ("offload_optimizer", "offload_param")}
    for key, device in devices.items():
        if device == "nvme" or (key == "offload_optimizer" and device == "cpu"):
            raise UserError(
                f"student.deepspeed: zero_optimization.{key} to {device} has no gradient on the device, where replicas "
                "of the student (distributed.shard) add theirs up: shard it over more ranks instead, up to all of them"
            )


def _require_secondary_groups(size: int, world: int) -> None:
    """Refuses a size of hpZ's groups, which keep a copy of the weights each, that does not divide the `world` ranks."""
    if size > 1 and world % size:
        divisors = [divisor for divisor in range(1, world + 1) if world % divisor == 0]
        raise UserError(
            f"student.deepspeed: zero_optimization.zero_hpz_partition_size is {size}, which does not divide the "
            f"{world} ranks that share the student: give the ranks of a node, one of {', '.join(map(str, divisors))}"
        )


def _with_documented_names(zero: dict[str, Any], path: Path) -> dict[str, Any]:
    """The settings by the names of DeepSpeed's documentation: it also takes `stage3_...` without its beginning."""
    documented = {name: field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()}
    for name in zero:
        if documented.get(name, name) != name and documented[name] in zero:
            raise UserError(f"{path}: zero_optimization has {name} and {documented[name]}, which are one: remove one")
    return {documented.get(name, name): value for name, value in zero.items()}


def _refuse_unknown(values: Mapping[str, Any], model: type[BaseModel], where: str) -> None:
    """Refuses keys, at any depth, that DeepSpeed's own model does not have."""
    fields = model.model_fields
    known = {**fields, **{field.alias: field for field in fields.values() if field.alias}}
    for key, value in values.items():
        if key not in known:
            raise UserError(f"{where} has no key {key}{nearest(key, known)}")
        extra = known[key].json_schema_extra
        if isinstance(extra, dict) and extra.get("deprecated"):
            instead = f"use {extra['new_param']}" if extra.get("new_param") else "remove it"
            raise UserError(f"{where}: DeepSpeed removed {key}: {instead}")
        options = [option for option in get_args(known[key].annotation) if isinstance(option, type)]
        models = [option for option in options if issubclass(option, BaseModel)]
        if models and isinstance(value, dict):
            _refuse_unknown(value, models[0], f"{where}.{key}")


def _refuse_wrong_values(zero: dict[str, Any], path: Path) -> None:
    try:
        DeepSpeedZeroConfig(**copy.deepcopy(zero))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, ("zero_optimization", *first["loc"])))
        raise UserError(f"{path}: {place}: {first['msg'].lower()}, found {first['input']!r}") from None


def _items(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every entry of nested objects and lists, at any depth."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        name = f"{path}.{key}" if path else str(key)
        yield name, child
        yield from _items(child, name)
