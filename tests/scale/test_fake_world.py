"""The fake world itself: what its collectives are counted as, and a step of a student on 1,536 ranks."""

import pytest
import torch
import torch.distributed as dist

from benchmarks.collective_calls import Collective, Collectives
from megadistill.distributed.topology import Topology
from megadistill.models.families import load_config
from tests.scale.fake_world import build_student, in_fake_world, take_step

LAYERS = 2


def _known_calls(topology: Topology) -> list[Collective]:
    collectives = Collectives()
    with collectives:
        dist.all_reduce(torch.zeros(3, dtype=torch.float64), group=topology.world_group)
        dist.broadcast(torch.zeros(5, dtype=torch.bfloat16), src=0, group=topology.vocab_group)
        dist.all_gather_into_tensor(torch.zeros(192 * 4), torch.zeros(4), group=topology.slice_group)
    return collectives.calls


def test_a_collective_is_recorded_with_its_group_and_its_bytes() -> None:
    assert in_fake_world(1536, _known_calls) == [
        Collective("allreduce", 1536, 24),
        Collective("broadcast", 8, 10),
        Collective("allgather_base", 192, 192 * 16),
    ]


def _fails(topology: Topology) -> None:
    raise ValueError(f"of {topology.world} ranks")


def test_the_error_of_a_rank_is_the_error_of_the_test() -> None:
    with pytest.raises(AssertionError, match="ValueError: of 16 ranks"):
        in_fake_world(16, _fails)


def _steps(topology: Topology) -> list[Collective]:
    model = {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "vocab_size": 1536,
        "tie_word_embeddings": False,
    }
    student = build_student(topology, load_config(model, what="test"))
    take_step(student, topology)
    return take_step(student, topology, step=1)


def test_a_student_takes_a_step_on_1536_ranks() -> None:
    calls = in_fake_world(1536, _steps)
    ranks = {call.ranks for call in calls}
    assert ranks == {1536, 192, 8}, "the world, the slice group and the vocab group"
    whole = [call for call in calls if call.ranks == 1536 and call.name == "allgather_base"]
    assert LAYERS <= len(whole) <= 2 * LAYERS + 3, "a layer is gathered by one call"
