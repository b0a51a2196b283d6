"""The loop on real ranks: how many steps each takes is the recipe's word, never a rank's own view of the data."""

import json
from pathlib import Path
from typing import Any

import pytest

from megadistill.comm.topology import Launch, Topology
from megadistill.config import Recipe
from megadistill.data import Manifest, tokenize
from megadistill.errors import OperatorFault
from megadistill.train.loop import run
from megadistill.train.setup import prepare
from tests.paths import DS_CONFIGS
from tests.ranks.harness import run_ranks

STEPS, BATCH = 5, 4


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A split of a few units, so that steps end in the middle of an epoch, and epochs in the middle of a step."""
    folder = tmp_path_factory.mktemp("data")
    for number in range(12):
        text = f"def function_{number}(x):\n    return x * {number} + {number * 7}\n" * 2
        (folder / f"text{number}.py").write_text(text, encoding="utf-8")
    tokenize(
        [folder],
        folder / "set",
        tokenizer=None,
        vocab_size=300,
        sequence_length=64,
        heldout_fraction=0.3,
        progress=lambda stage, **numbers: None,
    )
    return folder / "set" / "train" / "manifest.json"


def recipe(manifest: Path, folder: Path) -> Recipe:
    values: dict[str, Any] = {
        "objective": "labels",
        "run": {"folder": str(folder)},
        "data": {"manifest": str(manifest)},
        "student": {
            "deepspeed": str(DS_CONFIGS / "zero3.json"),
            "vocab_multiple": 64,
            "config": {
                "model_type": "llama",
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
            },
        },
        "train": {
            "steps": STEPS,
            "global_batch": BATCH,
            "micro_batch": 1,
            "precision": "float32",
            "adamw": {"learning_rate": 1e-3},
        },
    }
    return Recipe.model_validate(values)


def _train(topology: Topology, manifest: str, folder: str) -> int:
    launch = Launch(topology.rank, topology.world, topology.local_rank, topology.world)
    return run(prepare(recipe(Path(manifest), Path(folder)), launch), topology, stop_after=None).step


@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_rank_takes_the_recipes_steps(manifest: Path, tmp_path: Path, world: int) -> None:
    """DeepSpeed's trap 9: ZeRO-3's gathers are collective, so a rank with one batch fewer hangs the others for ever."""
    units = Manifest.load(manifest).units
    assert units % BATCH, "the batch must not divide the epoch, or this tests nothing"
    assert units < STEPS * BATCH, "the run must be longer than an epoch"
    assert run_ranks(world, _train, str(manifest), str(tmp_path / "run")) == [STEPS] * world
    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, STEPS + 1))


def _train_in_a_folder_of_its_own(topology: Topology, manifest: str, folder: str) -> str:
    """What a rank says when rank 1 sees another run folder than rank 0."""
    launch = Launch(topology.rank, topology.world, topology.local_rank, topology.world)
    own = Path(folder) / ("shared" if topology.is_first else "unshared")
    try:
        run(prepare(recipe(Path(manifest), own), launch), topology, stop_after=None)
    except OperatorFault as fault:
        return str(fault)
    return "nothing"


def test_ranks_that_see_other_checkpoints_do_not_train_on(manifest: Path, tmp_path: Path) -> None:
    """A folder that the nodes do not share would go on from different steps, with weights of two runs."""
    run_ranks(2, _train, str(manifest), str(tmp_path / "shared"))
    (tmp_path / "unshared").mkdir()
    first, second = run_ranks(2, _train_in_a_folder_of_its_own, str(manifest), str(tmp_path))
    assert "another rank says why" in first
    assert "sees step 0" in second
    assert f"rank 0 sees step {STEPS}" in second


def _timeouts(topology: Topology) -> list[float]:
    groups: list[Any] = [topology.world_group, topology.vocab_group, topology.slice_group, topology.pipeline_group]
    return [group._get_backend(topology.device).options._timeout.total_seconds() for group in groups]


def test_every_group_has_the_time_limit_of_the_run() -> None:
    assert run_ranks(4, _timeouts, vocab_group=2) == [[60.0] * 4] * 4
