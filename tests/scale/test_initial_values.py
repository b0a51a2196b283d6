"""Start of a student on thousands of ranks: its construction sends nothing, and a rank draws little more than it holds.

The construction of today's DeepSpeed alone has two collectives over the world for each parameter.
"""

import math
from typing import Any

import numpy as np
import pytest

from benchmarks.collective_calls import Collective, Collectives
from megadistill.distributed.topology import Topology
from megadistill.models import initial_weights
from megadistill.models.families import load_config, parameter_shapes
from megadistill.models.initial_weights import BLOCK, RandomWeights
from megadistill.precision import torch_dtype
from tests.paths import ROOT
from tests.scale.fake_world import build_student, in_fake_world

WORLD = 1536
MODEL: dict[str, Any] = {
    "model_type": "gemma2",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "vocab_size": 3000,
}


def _start(topology: Topology, deepspeed: str, persistence: int) -> list[Collective]:
    """Collectives of a first start: construction, and initial values."""
    with Collectives() as collectives:
        student = build_student(
            topology,
            load_config(MODEL, what="test"),
            deepspeed=deepspeed,
            settings={"stage3_param_persistence_threshold": persistence},
        )
    assert student.state.has_values
    assert len(student.state.shapes) == 46
    return list(collectives.calls)


@pytest.mark.parametrize(("deepspeed", "persistence"), [("zero3.json", 0), ("zero3.json", 100_000), ("hpz.json", 0)])
def test_a_student_is_built_and_filled_without_sending_a_value(deepspeed: str, persistence: int) -> None:
    calls = in_fake_world(WORLD, _start, deepspeed, persistence)
    assert {call.name for call in calls} == {"barrier"}
    assert len(calls) <= 3, "DeepSpeed's own, however many parameters there are"


class _Counter:
    """A generator that counts the numbers drawn."""

    drawn = 0

    def standard_normal(self, size: int, dtype: Any) -> Any:
        _Counter.drawn += size
        return np.broadcast_to(np.zeros((), dtype), (size,))


@pytest.mark.parametrize("world", [2048, 4096])
def test_a_rank_draws_its_share_of_a_published_model_and_less_than_a_block_a_matrix_more(
    world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """9.24e9 numbers on one rank took 211 s of CPU; these take a rank one or two, and at most four."""
    monkeypatch.setattr(initial_weights, "keyed_generator", lambda seed, name, block: _Counter())
    config = load_config(ROOT / "recipes/models/gemma-2-9b", what="test")
    shapes = parameter_shapes(config)
    weights = RandomWeights(config, vocab_size=256_000, seed=1, dtype=torch_dtype("bfloat16"))
    matrices = sum(len(shape) > 1 for shape in shapes.values())
    drawn = []
    for rank in (0, 1, 777, world // 2, world - 1):
        _Counter.drawn = held = 0
        for name, shape in shapes.items():
            numel = math.prod(shape)
            size = -(-numel // world)
            start, stop = min(numel, rank * size), min(numel, (rank + 1) * size)
            weights.read(name, shape, start, stop)
            held += stop - start
        assert _Counter.drawn <= held + matrices * BLOCK
        drawn.append(_Counter.drawn)
    assert sum(drawn) / len(drawn) < 2 * (sum(map(math.prod, shapes.values())) / world + matrices * BLOCK / 2)
