"""The doctor on real ranks: their measurements, the dry run of several recipes, a fault of one rank."""

import json
import multiprocessing
import os
import re
import socket
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from megadistill.config.recipe import Recipe
from megadistill.distributed.collectives import all_gather_objects, barrier
from megadistill.distributed.launch import Launch
from megadistill.distributed.measures.bandwidth import (
    all_reduce_bandwidth,
    clock_offsets,
    neighbours,
    pair_bandwidths,
)
from megadistill.distributed.topology import Topology
from megadistill.doctor import examine as doctor
from megadistill.doctor.dry_run import dry_run
from megadistill.doctor.rank_report import Report
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
        "texts": all_gather_objects("é" * topology.rank, topology.world_group),
        "offsets": offsets,
        "pairs": pair_bandwidths(topology, rounds),
        "all": all_reduce_bandwidth(topology),
    }


def test_three_ranks_measure_each_other() -> None:
    results = run_ranks(3, _measured)
    for each in results:
        assert each["texts"] == ["", "é", "éé"]
        assert each["offsets"][:2] == pytest.approx([0.0, 0.0], abs=5.0)
        assert each["offsets"][2] == pytest.approx(100.0, abs=5.0)
        assert set(each["pairs"]) == {(0, 1), (1, 2), (0, 2)}
        assert each["pairs"] == results[0]["pairs"]
        assert min(each["pairs"].values()) > 0
        assert each["all"] > 0


def _dry_run(topology: Topology, tried: Recipe) -> str:
    launch = Launch(topology.rank, topology.world, topology.local_rank, topology.world)
    return dry_run(prepare(tried, launch), topology, launch, timeout=timedelta(minutes=1))


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
    first, second = (detail.rpartition(",")[0] for detail in run_ranks(2, _dry_run, whole))  # without the seconds
    assert first == second
    assert first.startswith("one small step of student, teacher and loss: loss ")


@pytest.mark.thorough
def test_a_small_step_has_all_of_several_teachers(tmp_path: Path) -> None:
    """Of two families and widths: a specialist, and one for the rest."""
    data = described_data(tmp_path / "data")
    mixture = {"manifest": None, "sources": {"web": str(data), "code": str(data)}}
    plain = recipe(data, tmp_path / "run").snapshot()
    plain["data"] |= {**mixture, "curriculum": [{"weights": {"web": 3, "code": 1}}]}
    coder = described_teacher(tmp_path / "coder", **{**MODEL, "model_type": "qwen3", "hidden_size": 64})
    general = described_teacher(tmp_path / "general", **MODEL)
    teachers = {"coder": {"path": str(coder), "sources": ["code"]}, "general": {"path": str(general)}}
    whole = Recipe.model_validate({**plain, "objective": "distill", "teachers": teachers})
    first, second = (detail.rpartition(",")[0] for detail in run_ranks(2, _dry_run, whole))
    assert first == second
    assert first.startswith("one small step of student, 2 teachers and loss: loss ")


def _examines(rank: int, port: int, path: Path) -> None:
    """One of two ranks, the second of which has a broken dry run; the first writes its report."""
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in variables.items()}, MASTER_ADDR="127.0.0.1")

    def broken(_: object, topology: Topology, *__: object, **___: object) -> str:
        if topology.rank == 1:
            raise RuntimeError("no kernel image is available")
        barrier(topology.world_group)
        return "well"

    patch = pytest.MonkeyPatch()
    patch.setattr(doctor, "dry_run", broken)
    patch.setattr(doctor, "REPORT_SECONDS", 0.0)

    def publish(report: Report) -> None:
        path.with_name("report.json").write_text(json.dumps(report.to_json()))

    well = doctor.examine(path, [], publish=publish)
    os._exit(0 if well else 2)


def test_a_fault_of_one_rank_is_reported_by_the_first(tmp_path: Path) -> None:
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
    report = json.loads((tmp_path / "report.json").read_text())
    rows = {row["check"]: row for row in report["rows"]}
    assert "no kernel image is available" in rows["all ranks"]["detail"]
    assert "rank 1" in rows["all ranks"]["detail"]
    # earlier checks are reported as well: the shards that are only described, the comparison of the ranks
    assert (rows["shards"]["status"], rows["world"]["status"]) == ("fail", "ok")
    assert rows["pairs of ranks"]["detail"].startswith("on a node")
    assert re.search(r"latency_us: {all_gather: {2: [\d.]+}, all_reduce: {2: [\d.]+}}$", rows["latency"]["detail"])
    assert not report["ok"]
