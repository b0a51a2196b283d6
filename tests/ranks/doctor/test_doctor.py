"""The doctor on real ranks: what they measure together, the rehearsal of several recipes, a fault that one rank has."""

import json
import multiprocessing
import os
import socket
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from megadistill.config import Recipe
from megadistill.distributed.bandwidth import (
    all_reduce_bandwidth,
    clock_offsets,
    gathered_texts,
    neighbours,
    pair_bandwidths,
)
from megadistill.distributed.collectives import barrier
from megadistill.distributed.topology import Launch, Topology
from megadistill.doctor import examine as doctor
from megadistill.doctor.dry_run import rehearse
from megadistill.doctor.findings import Report
from megadistill.train.setup.setup import prepare
from tests.ranks.harness import PRELOAD, run_ranks
from tests.unit.train.cases import MODEL, described_data, described_teacher, recipe

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(PRELOAD)


def _measured(topology: Topology) -> dict[str, Any]:
    clock = time.time
    if topology.rank == 2:
        time.time = lambda: clock() + 100.0
    offsets = clock_offsets(topology)
    time.time = clock
    rounds = neighbours(topology.world, topology.world)
    return {
        "texts": gathered_texts("é" * topology.rank, topology),
        "offsets": offsets,
        "pairs": pair_bandwidths(topology, rounds),
        "all": all_reduce_bandwidth(topology),
    }


def test_three_ranks_measure_each_other() -> None:
    found = run_ranks(3, _measured)
    for each in found:
        assert each["texts"] == ["", "é", "éé"]
        assert each["offsets"][:2] == pytest.approx([0.0, 0.0], abs=5.0)
        assert each["offsets"][2] == pytest.approx(100.0, abs=5.0)
        assert set(each["pairs"]) == {(0, 1), (1, 2), (0, 2)}
        assert each["pairs"] == found[0]["pairs"]
        assert min(each["pairs"].values()) > 0
        assert each["all"] > 0


def _rehearsed(topology: Topology, rehearsed: Recipe) -> str:
    launch = Launch(topology.rank, topology.world, topology.local_rank, topology.world)
    return rehearse(prepare(rehearsed, launch), topology, launch, timeout=timedelta(minutes=1))


@pytest.mark.parametrize(
    ("model_type", "sections"),
    [
        ("llama", {"loss": {"targets": {"select": "top_k", "k": 8}}, "data": {"document_mask": True}}),
        ("gemma2", {"loss": {"divergence": "jsd"}, "train": {"precision": "bfloat16"}}),
    ],
)
def test_a_small_step_of_the_recipes_kind_goes_through(
    model_type: str, sections: dict[str, Any], tmp_path: Path
) -> None:
    model = {**MODEL, "model_type": model_type, "num_hidden_layers": 5}
    teacher = described_teacher(tmp_path / "teacher", **model)
    sections = {"student": {"config": model}, **sections}
    whole = recipe(described_data(tmp_path / "data"), tmp_path / "run", teacher=teacher, **sections)
    first, second = (said.rpartition(",")[0] for said in run_ranks(2, _rehearsed, whole))  # without the seconds
    assert first == second
    assert first.startswith("one small step of student, teacher and loss: loss ")


def _examines(rank: int, port: int, path: Path) -> None:
    """One of two ranks, the second of which finds its part of the rehearsal broken; the first writes what it tells."""
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in variables.items()}, MASTER_ADDR="127.0.0.1")

    def rehearse_broken(_: object, topology: Topology, *__: object, **___: object) -> str:
        if topology.rank == 1:
            raise RuntimeError("no kernel image is available")
        barrier(topology.world_group)
        return "well"

    patch = pytest.MonkeyPatch()
    patch.setattr(doctor, "rehearse", rehearse_broken)
    patch.setattr(doctor, "TELLING_SECONDS", 0.0)

    def tell(report: Report) -> None:
        path.with_name("told.json").write_text(json.dumps(report.values()))

    well = doctor.examine(path, [], tell=tell)
    os._exit(0 if well else 2)


def test_a_fault_that_one_rank_has_is_told_by_the_first(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    values = recipe(described_data(tmp_path / "data"), tmp_path / "run").snapshot()
    path.write_text(json.dumps(values), encoding="utf-8")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [_context.Process(target=_examines, args=(rank, port, path), daemon=True) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=60)
    assert [process.exitcode for process in ranks] == [2, 2]
    told = json.loads((tmp_path / "told.json").read_text())
    rows = {row["what"]: row for row in told["rows"]}
    assert "no kernel image is available" in rows["all ranks"]["said"]
    assert "rank 1" in rows["all ranks"]["said"]
    # whatever comes before it is told as well: the shards that are only described, the ranks side by side
    assert (rows["shards"]["mark"], rows["world"]["mark"]) == ("bad", "good")
    assert rows["pairs of ranks"]["said"].startswith("on a node")
    assert not told["ok"]
