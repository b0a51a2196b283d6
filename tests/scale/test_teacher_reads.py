"""Files of the teacher that a start reads: once for all replicas, and checked once a node.

128 ranks are threads that load a real folder by the run's own code, under NCCL's rules.
"""

import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch._C._distributed_c10d import HashStore

from megadistill.distributed.broadcast_reader import BroadcastReader
from megadistill.distributed.launch import Launch
from megadistill.distributed.node_digests import check_nodes
from megadistill.distributed.topology import even_slice, topology_of_world
from megadistill.doctor.tiny import write_random
from megadistill.models import hf_folder
from megadistill.models.families import load_config
from megadistill.teacher.stage import TeacherStage, head_rows
from megadistill.train.resilience.sdc import weights_digest
from tests.ranks import nccl_rules
from tests.ranks.nccl_rules import finished, run_threads

REPLICAS, STAGES, VOCAB = 64, 2, 64
CPU, MINUTE = torch.device("cpu"), timedelta(minutes=1)
MODEL: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": STAGES,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "vocab_size": VOCAB,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    write_random(load_config(MODEL, what="test"), folder, seed=1)
    return folder


@pytest.mark.parametrize("replicas", [1, 8, pytest.param(REPLICAS, marks=pytest.mark.thorough)])
def test_a_start_reads_each_tensor_once_however_many_replicas_there_are(
    replicas: int, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: Counter[int] = Counter()
    opened: Counter[int] = Counter()
    preadv, make = os.preadv, hf_folder.SafetensorsFolder.__init__

    def counted(*arguments: Any) -> int:
        count = preadv(*arguments)
        read[nccl_rules._thread.rank] += count
        return count

    def opening(*arguments: Any, **keywords: Any) -> None:
        opened[nccl_rules._thread.rank] += 1
        make(*arguments, **keywords)

    monkeypatch.setattr(os, "preadv", counted)
    monkeypatch.setattr(hf_folder.SafetensorsFolder, "__init__", opening)
    world = replicas * STAGES

    def rank_of(rank: int, store: nccl_rules.Store) -> tuple[int, int]:
        topology = topology_of_world(Launch(rank, world, rank % 8, 8), vocab_group=STAGES, device=CPU, timeout=MINUTE)
        how: dict[str, Any] = {"dtype": torch.float32, "device": CPU}
        place: dict[str, Any] = {"stage": topology.group_rank, "stages": STAGES}
        reader = BroadcastReader(topology, group=topology.slice_group)
        stage = TeacherStage.load(teacher, **place, **how, reader=reader)
        reader = BroadcastReader(topology, group=topology.slice_group)
        head = head_rows(teacher, even_slice(VOCAB, topology), **how, reader=reader)
        return int(weights_digest(stage.weights()).sum()), int(weights_digest([("head", head)]).sum())

    digests = finished(run_threads(world, rank_of))
    assert digests == digests[:STAGES] * replicas
    assert digests[0] != digests[1]
    (file,) = teacher.glob("*.safetensors")
    assert sum(read.values()) == sum(tensor.nbytes for tensor in load_file(file).values())
    assert set(opened) == set(range(STAGES)), "the ranks of the other replicas open no file of weights"


class _CountingStore(HashStore):
    def __init__(self) -> None:
        super().__init__()
        self.set_timeout(MINUTE)
        self.calls: Counter[str] = Counter()

    def add(self, *arguments: Any) -> int:
        self.calls["add"] += 1
        return super().add(*arguments)

    def wait(self, *arguments: Any) -> None:
        self.calls["wait"] += 1
        super().wait(*arguments)

    def check(self, keys: list[str]) -> bool:
        self.calls["check"] += 1
        return super().check(keys)

    def compare_set(self, *arguments: Any) -> bytes:
        self.calls["compare_set"] += 1
        return super().compare_set(*arguments)


@pytest.mark.parametrize("nodes", [2, 64])
def test_messages_of_the_node_check_grow_with_the_ranks(nodes: int) -> None:
    local = 8
    store, world = _CountingStore(), nodes * local

    def rank_of(rank: int) -> None:
        local_rank = rank % local
        digests = {"the teacher": "digest"} if local_rank == 0 else {}
        check_nodes(store, Launch(rank, world, local_rank, local), digests, None, MINUTE)

    with ThreadPoolExecutor(world) as pool:
        list(pool.map(rank_of, range(world)))
    assert store.calls["compare_set"] == nodes, "one a node"
    assert store.calls["add"] == 2 * world
    assert store.calls["wait"] <= world
    assert store.calls["check"] == world
