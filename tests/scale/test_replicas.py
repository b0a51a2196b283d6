"""4,096 ranks as 64 replicas of 64 (`distributed.shard: 64`): groups, files and collectives of a rank.

A replica is a world of 64 ranks, so that nothing of it depends on the other 63. What joins them is one group a rank.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.collective_calls import Collective
from megadistill.config.recipe import CheckpointSection
from megadistill.distributed.collectives import group_rank, group_size
from megadistill.distributed.topology import Topology
from megadistill.models.families import load_config
from megadistill.train.checkpoint import writer
from megadistill.train.checkpoint.attempt import Attempt, acquire
from megadistill.train.checkpoint.format import RNG_KEY, Checkpoint, rank_file
from megadistill.train.checkpoint.writer import Saver
from tests.scale import fake_world
from tests.scale.checkpoint_files import KINDS, SHAPES, header_bytes, piece_of, resume, write_checkpoint
from tests.scale.fake_world import LOCAL_WORLD, build_student, in_fake_world, take_step
from tests.unit.train.cases import manifest_of

WORLD, REPLICAS = 4096, 64
SHARDS = WORLD // REPLICAS
NUMBERS = 1024
"""Bytes that the numbers of a step have at most."""
LAYERS = 4
MODEL: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "vocab_size": WORLD,
    "tie_word_embeddings": False,
}


def _replicas_topology(rank: int) -> Topology:
    places: dict[str, Any] = {"local_rank": rank % LOCAL_WORLD, "group_size": LOCAL_WORLD}
    return Topology(rank=rank, world=WORLD, replicas=REPLICAS, device=torch.device("cpu"), **places)


def _groups(topology: Topology) -> dict[str, Any]:
    """The ranks of each group that this rank is in: of the whole run across replicas, otherwise of its replica."""
    own = {
        "shard": topology.shard_group,
        "vocab": topology.vocab_group,
        "slice": topology.slice_group,
        "pipeline": topology.pipeline_group,
    }
    (across,) = fake_world.across_replicas
    assert topology.across_group is not None
    assert (topology.across_group.size(), topology.across_group.rank()) == (REPLICAS, topology.replica)
    return {name: dist.get_process_group_ranks(group) for name, group in own.items()} | {
        "across": across,
        "run": (group_size(topology.world_group), group_rank(topology.world_group)),
        "stage": (group_size(topology.stage_group), group_rank(topology.stage_group)),
    }


@pytest.mark.parametrize("rank", [0, 2051, WORLD - 1])
def test_no_group_has_more_ranks_than_a_replica_or_than_there_are_replicas(rank: int) -> None:
    groups = in_fake_world(WORLD, _groups, rank=rank, replicas=REPLICAS)
    shard, place = rank % SHARDS, rank % LOCAL_WORLD
    node = list(range(shard - place, shard - place + LOCAL_WORLD))
    assert groups == {
        "shard": list(range(SHARDS)),
        "vocab": node,
        "slice": list(range(place, SHARDS, LOCAL_WORLD)),
        "pipeline": node,
        "across": list(range(shard, WORLD, SHARDS)),
        "run": (WORLD, rank),
        "stage": (WORLD // LOCAL_WORLD, rank // LOCAL_WORLD),
    }


def test_each_rank_has_a_shard_a_stage_and_sequences_of_its_own() -> None:
    ranks = [_replicas_topology(rank) for rank in range(WORLD)]
    assert [(each.replica, each.shard_rank) for each in ranks] == [divmod(rank, SHARDS) for rank in range(WORLD)]
    assert [each.data_rank for each in ranks] == list(range(WORLD))
    assert Counter(each.group_rank for each in ranks) == dict.fromkeys(range(LOCAL_WORLD), WORLD // LOCAL_WORLD)


def _groups_made(topology: Topology) -> tuple[int, int]:
    """Process groups of torch's, those of other ranks included, for which each rank calls `new_group`; and others."""
    return dist.distributed_c10d._world.group_count, len(fake_world.across_replicas)


def test_a_rank_makes_the_groups_of_a_replica_and_one_more() -> None:
    """A vocab group and a pipeline for each p ranks, p slice groups, and the world: of 64 ranks, not of 4,096."""
    assert in_fake_world(WORLD, _groups_made, replicas=REPLICAS) == (1 + 2 * SHARDS // LOCAL_WORLD + LOCAL_WORLD, 1)
    assert in_fake_world(WORLD, _groups_made) == (1 + 2 * WORLD // LOCAL_WORLD + LOCAL_WORLD, 0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "step-00000009", SHARDS)


@pytest.mark.parametrize("rank", [0, 2051, WORLD - 1])
def test_a_rank_resumes_from_its_shard_s_file_alone(checkpoint: Path, rank: int) -> None:
    """12 bytes of each of its parameters: 64 times those of a rank of one world, in as many bytes of headers."""
    shard = rank % SHARDS
    reads, wrong = in_fake_world(WORLD, resume, checkpoint, rank=rank, replicas=REPLICAS)
    assert wrong == []
    assert reads.opened == [rank_file(shard, SHARDS)]
    numels = [torch.Size(shape).numel() for shape in SHAPES.values()]
    own = sum(stop - start for start, stop in (piece_of(numel, shard, SHARDS) for numel in numels))
    assert reads.piece_bytes == 4 * (len(KINDS) * own + 1), "and the optimizer's step"
    assert reads.header_bytes == header_bytes(checkpoint / reads.opened[0])


def test_files_of_a_checkpoint_are_hashed_once_for_all_replicas(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: Counter[str] = Counter()
    manifest = Checkpoint(checkpoint).manifest

    def record_of(path: Path) -> Any:
        hashed[path.name] += 1
        return manifest.files[path.name]

    monkeypatch.setattr("megadistill.train.checkpoint.format.record_of", record_of)
    most = 0
    for rank in range(WORLD):
        before = hashed.total()
        Checkpoint(checkpoint, manifest).verify(rank, WORLD)
        most = max(most, hashed.total() - before)
    assert hashed == {rank_file(shard, SHARDS): 1 for shard in range(SHARDS)}
    assert most == 1


@pytest.fixture
def attempt(tmp_path: Path) -> Attempt:
    return acquire(tmp_path, {})


SAVES = 3


def test_a_save_is_64_files_which_one_replica_writes_in_turn(attempt: Attempt, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks of four replicas, and their saves one after the other, with nothing exchanged."""
    monkeypatch.setattr(writer, "all_reduce_sum", lambda values, group: WORLD * values)
    monkeypatch.setattr(writer, "broadcast_object", lambda value, group: value)
    monkeypatch.setattr(Saver, "finish", lambda saver: saver._save.writing.result())
    written: list[tuple[int, int, str, int]] = []

    def write_rank(folder: Path, state: dict[str, Tensor], *, rank: int, world: int) -> None:
        nbytes = sum(tensor.nbytes for tensor in state.values())
        written.append((save, topology.replica, rank_file(rank, world), nbytes))

    monkeypatch.setattr(writer, "write_rank", write_rank)
    state = {"master/w": torch.zeros(100), RNG_KEY: torch.zeros(1)}
    for topology in (_replicas_topology(replica * SHARDS + shard) for replica in range(4) for shard in range(SHARDS)):
        saver = Saver(attempt.folder / "checkpoints", topology, attempt, CheckpointSection(asynchronous=False))
        for save in range(SAVES):
            saver.start(state, manifest_of(save, world=SHARDS))
        saver.close()
    nbytes = sum(tensor.nbytes for tensor in state.values())
    turns = [(save, save, rank_file(shard, SHARDS), nbytes) for save in range(SAVES) for shard in range(SHARDS)]
    assert written == turns


def _step(topology: Topology, deepspeed: str, accumulation: int) -> tuple[list[Collective], int]:
    """The calls of a step after those in which DeepSpeed learns the order of layers; elements of the flat gradient."""
    student = build_student(
        topology, load_config(MODEL, what="test"), deepspeed=deepspeed, vocab_multiple=WORLD, accumulation=accumulation
    )
    calls: list[Collective] = []
    for step in range(3):
        calls = take_step(student, topology, step=step, accumulation=accumulation)
    return calls, student._engine.optimizer.grad_partitions_flat_buffer.numel()


def _is_small(call: Collective) -> bool:
    return call.name != "reduce_scatter_base" and call.nbytes <= NUMBERS


def _multiset(calls: list[Collective]) -> Counter[tuple[str, int, int]]:
    return Counter((call.name, call.ranks, call.nbytes) for call in calls)


@pytest.mark.parametrize(("deepspeed", "accumulation"), [("hpz.json", 1), ("zero3.json", 2)])
def test_no_collective_of_a_step_has_more_than_64_ranks(deepspeed: str, accumulation: int) -> None:
    calls, flat = in_fake_world(WORLD, _step, deepspeed, accumulation, rank=WORLD // 2, replicas=REPLICAS)
    assert {call.ranks for call in calls} == {SHARDS, LOCAL_WORLD}
    across = [call for call in calls if call.group.startswith("across_")]
    within = [call for call in calls if not call.group.startswith("across_")]
    gradient = [call for call in across if not _is_small(call)]
    assert gradient == [Collective("allreduce", REPLICAS, 4 * flat)], "once a step, in float32"
    assert len(across) - len(gradient) == 2, "the count of tokens, and the numbers of the step"
    alone, flat_alone = in_fake_world(SHARDS, _step, deepspeed, accumulation)
    assert flat == flat_alone
    assert _multiset(alone) - _multiset(within) == Counter(), "a replica does all that a world of 64 ranks does"
    more = (_multiset(within) - _multiset(alone)).elements()
    assert [nbytes for _, _, nbytes in more if nbytes > NUMBERS] == []
    assert len(within) - len(alone) == 2, "what the first rank has heard across it tells the others"


def test_in_one_world_of_4096_ranks_each_layer_is_gathered_over_all_of_them() -> None:
    """What replicas are for: as many calls as layers, where with replicas there are none of more than 64 ranks."""
    calls, flat = in_fake_world(WORLD, _step, "hpz.json", 1)
    wide = [call for call in calls if call.ranks > SHARDS]
    assert Counter((call.name, call.ranks) for call in wide) == {
        ("allgather_base", WORLD): 1 + LAYERS,  # the embedding and each layer
        ("reduce_scatter_base", WORLD): 1,
        ("allreduce", WORLD): 4,  # tokens, numbers, norm, small parameters
        ("allgather_base", WORLD // LOCAL_WORLD): 1,  # the head's rows, and their gradient
        ("reduce_scatter_base", WORLD // LOCAL_WORLD): 1,
    }
    replicas, shard = in_fake_world(WORLD, _step, "hpz.json", 1, rank=WORLD // 2, replicas=REPLICAS)
    assert 0.85 * WORLD // SHARDS * flat < shard <= WORLD // SHARDS * flat, (
        "64 times the gradient of a rank, less padding"
    )
    gathers = [sum(call.nbytes for call in each if call.name == "allgather_base") for each in (replicas, calls)]
    assert gathers[0] <= gathers[1], "each gather is over fewer ranks, of the same weights"
