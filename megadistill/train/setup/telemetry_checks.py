"""Refuses trackers, norms and profiles of a recipe that cannot be had here, before anything is started."""

from importlib.util import find_spec
from typing import Any

import torch

from megadistill.config.recipe import EXTERNAL_TRACKERS, Recipe
from megadistill.distributed.launch import Launch
from megadistill.errors import UserError
from megadistill.units import number_of


def refuse_telemetry(recipe: Recipe, deepspeed_config: dict[str, Any], launch: Launch) -> None:
    """Refuses what the recipe records or sends, and cannot here. `launch`: the student's part.

    Raises:
        UserError: a tracker's package is missing, an optimizer on NVMe has no norms, a profiled rank does not exist, or
            the accelerator has no history of its memory.
    """
    for name in recipe.track:
        if name in EXTERNAL_TRACKERS and find_spec(name) is None:
            raise UserError(
                f"track has {name}, which is not installed: pip install 'megadistill[{name}]', or take it off the list"
            )
    zero = deepspeed_config.get("zero_optimization", {})
    on_nvme = any(isinstance(each, dict) and each.get("device") == "nvme" for each in zero.values())
    if recipe.train.norms_every and on_nvme:
        raise UserError(
            f"train.norms_every is {recipe.train.norms_every}, but student.deepspeed offloads to NVMe, from where the "
            "tensors come one by one: set it to 0, or offload to the host's memory (device: cpu)"
        )
    profile = recipe.profile
    if profile is None:
        return
    if (last := max(profile.ranks)) >= launch.world:
        ranks = number_of(launch.world, "rank")
        raise UserError(f"profile.ranks has {last}, but the student has {ranks}, numbered from 0: name some of them")
    if profile.memory_snapshot and not records_memory_history():
        raise UserError(
            "profile.memory_snapshot needs an accelerator whose allocator records its history (CUDA), which is not "
            "here: set it to false; a trace has the memory of each operator all the same"
        )


def records_memory_history() -> bool:
    """Whether torch can record the allocations of this machine's accelerator."""
    if not torch.accelerator.is_available():
        return False
    memory = getattr(torch.get_device_module(torch.accelerator.current_accelerator()), "memory", None)
    return hasattr(memory, "_record_memory_history") and hasattr(memory, "_dump_snapshot")
