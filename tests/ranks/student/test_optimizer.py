"""An optimizer that a test adds trains, saves, and resumes on another number of ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megadistill.config.recipe import Recipe
from megadistill.distributed.launch import Launch
from megadistill.distributed.topology import Topology
from megadistill.train.checkpoint.format import Checkpoint, newest_checkpoint
from megadistill.train.loop import run
from megadistill.train.setup.setup import prepare
from tests.corpora import small_data_set
from tests.paths import DS_CONFIGS
from tests.ranks.harness import run_ranks
from tests.toy_optimizer import toy_optimizer

STEPS, HALF = 6, 3


def _recipe(manifest: str, folder: str) -> Recipe:
    student: dict[str, Any] = {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    return Recipe.model_validate(
        {
            "objective": "labels",
            "run": {"folder": folder},
            "data": {"manifest": manifest},
            "student": {"deepspeed": str(DS_CONFIGS / "cpu.json"), "vocab_multiple": 64, "config": student},
            "train": {
                "steps": STEPS,
                "global_batch": 4,
                "micro_batch": 1,
                "precision": "float32",
                "optimizer": {"kind": "momentum", "learning_rate": 0.1},
                "histograms_every": STEPS,
            },
        }
    )


def _train(topology: Topology, manifest: str, folder: str, stop_after: int | None) -> int:
    launch = Launch(topology.rank, topology.world, topology.local_rank, topology.world)
    with toy_optimizer():
        return run(prepare(_recipe(manifest, folder), launch), topology, stop_after=stop_after).step


def _newest(folder: Path) -> Checkpoint:
    checkpoint = newest_checkpoint(folder / "checkpoints")
    assert checkpoint is not None
    return checkpoint


def _flat(checkpoint: Checkpoint, kind: str) -> Tensor:
    sizes = {name: torch.Size(shape).numel() for name, shape in checkpoint.manifest.parameters.items()}
    return torch.cat([checkpoint.read(f"{kind}/{name}", 0, size) for name, size in sizes.items()])


@pytest.mark.parametrize("world", [1, 2])
def test_a_new_optimizer_trains_saves_and_resumes_on_another_world_size(tmp_path: Path, world: int) -> None:
    data = small_data_set(tmp_path, sequence_length=64, heldout_fraction=0.3)
    manifest = str(data / "train" / "manifest.json")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run_ranks(2, _train, manifest, str(whole), None) == [STEPS] * 2
    assert run_ranks(2, _train, manifest, str(parts), HALF) == [HALF] * 2
    half = _flat(_newest(parts), "master")
    assert run_ranks(world, _train, manifest, str(parts), None) == [STEPS] * world
    for kind in ("master", "momentum_buffer"):
        expected, actual = _flat(_newest(whole), kind), _flat(_newest(parts), kind)
        reference = half if kind == "master" else torch.zeros_like(half)
        change = (expected - reference).norm()
        assert change > 0
        assert (actual - expected).norm() <= (0 if world == 2 else 1e-4) * change, kind
