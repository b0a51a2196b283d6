"""One rank of each stage reads the teacher, the ranks of the other replicas open no file; all hold the same bits."""

import errno
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megadistill.config.recipe import Recipe
from megadistill.distributed.broadcast_reader import BroadcastReader
from megadistill.distributed.launch import Launch
from megadistill.distributed.roles import Roles
from megadistill.distributed.topology import Topology, even_slice
from megadistill.errors import RankUserError, RestartFault
from megadistill.io import read_json, write_json
from megadistill.models.hf_folder import SafetensorsFolder
from megadistill.teacher.stage import TeacherStage, head_rows
from megadistill.train.resilience.sdc import weights_digest
from megadistill.train.setup.setup import check_node, prepare, with_copy
from megadistill.train.teacher.placement import load_teacher, run_teacher_server
from tests.ranks.harness import run_ranks
from tests.unit.models.cases import VOCAB, saved_model
from tests.unit.train.cases import described_data, described_teacher, recipe

READS = [("whole", "llama", "native"), ("experts", "mixtral", "native"), ("tied", "qwen2", "float8"),
         ("quantised", "llama", "native"), ("experts in float8", "mixtral", "float8")]  # fmt: skip
"""Folder, case, precision."""


class Reads:
    """Bytes of tensors that this process reads, and folders of weights that it opens."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.bytes = self.folders = 0
        preadv, opened = os.preadv, SafetensorsFolder.__init__

        def counted(*arguments: Any) -> int:
            count = preadv(*arguments)
            self.bytes += count
            return count

        def opening(*arguments: Any, **keywords: Any) -> None:
            self.folders += 1
            opened(*arguments, **keywords)

        patch.setattr(os, "preadv", counted)
        patch.setattr(SafetensorsFolder, "__init__", opening)


def _quantise(folder: Path) -> None:
    """Matrices of the layers in float8 with a scale a row."""
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if ".layers." in name and tensors[name].ndim == 2]:
        scales = tensors[name].abs().amax(dim=1, keepdim=True) / 448
        tensors |= {name: (tensors[name] / scales).to(torch.float8_e4m3fn), f"{name}_scale": scales}
    save_file(tensors, folder / "model.safetensors")
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", {**config, "quantization_config": {"quant_method": "fbgemm_fp8"}})


Loaded = tuple[Tensor, Tensor]
"""Digests of a stage's tensors, and rows of the head."""


def _load(folder: Path, precision: Any, topology: Topology, *, alone: bool = False) -> Loaded:
    def reader() -> BroadcastReader | None:
        return None if alone else BroadcastReader(topology, group=topology.slice_group)

    how: dict[str, Any] = {"dtype": torch.bfloat16, "device": topology.device}
    place: dict[str, Any] = {"stage": topology.group_rank, "stages": topology.group_size}
    stage = TeacherStage.load(folder, **place, **how, precision=precision, reader=reader())
    return weights_digest(stage.weights()), head_rows(folder, even_slice(VOCAB, topology), **how, reader=reader())


def _counted(topology: Topology, path: str) -> list[tuple[int, int, bool]]:
    """Bytes read, folders opened, and whether all is as this rank reads it alone, for each of READS."""
    results = []
    for name, _, precision in READS:
        with pytest.MonkeyPatch.context() as patch:
            reads = Reads(patch)
            loaded = _load(Path(path) / name, precision, topology)
        truth = _load(Path(path) / name, precision, topology, alone=True)
        results.append((reads.bytes, reads.folders, all(map(torch.equal, loaded, truth))))
    return results


def test_the_second_replica_reads_nothing_and_holds_the_same(tmp_path: Path) -> None:
    sizes = {}
    for name, case, _ in READS:
        saved_model(case, tmp_path / name, shard_size="30KB" if name == "whole" else "5GB")
        if name == "quantised":
            _quantise(tmp_path / name)
        headers = [load_file(file) for file in (tmp_path / name).glob("*.safetensors")]
        sizes[name] = sum(tensor.nbytes for tensors in headers for tensor in tensors.values())
    by_rank = run_ranks(4, _counted, str(tmp_path), vocab_group=2)
    for index, (name, case, _) in enumerate(READS):
        (first, _, _), (second, _, _), *others = counts = [results[index] for results in by_rank]
        assert all(same for _, _, same in counts)
        assert [(read, opened) for read, opened, _ in others] == [(0, 0), (0, 0)]
        embedding = VOCAB * 64 * 4
        tied = embedding if case == "qwen2" else 0  # read for the stage and for the head
        assert first + second == sizes[name] + tied, "each tensor once"


def _fails(topology: Topology, path: str, how: str, rank: int) -> tuple[str, str, bool]:
    """The error of each rank where one cannot read, and whether this rank prints it."""
    folder = Path(path)
    with pytest.MonkeyPatch.context() as patch:
        if topology.rank == rank and how == "missing":
            folder = folder / "missing"
        if topology.rank == rank and how == "disk":

            def broken(*_: Any) -> int:
                raise OSError(errno.EIO, "Input/output error")

            patch.setattr(os, "preadv", broken)
        try:
            _load(folder, "native", topology)
        except (RankUserError, RestartFault) as error:
            return type(error).__name__, str(error), error.prints
    return "", "", False


@pytest.mark.parametrize(("how", "rank", "p"), [("missing", 1, 2), ("disk", 0, 1)])
def test_a_rank_that_cannot_read_ends_all_with_its_own_line(how: str, rank: int, p: int, tmp_path: Path) -> None:
    saved_model("llama", tmp_path, shard_size="30KB")
    index = read_json(tmp_path / "model.safetensors.index.json")
    (tmp_path / "missing").mkdir()
    for file in tmp_path.glob("*.*"):
        if file.name != index["weight_map"]["model.layers.4.mlp.up_proj.weight"]:
            shutil.copy(file, tmp_path / "missing")
    by_rank = run_ranks(3 if p == 1 else 4, _fails, str(tmp_path), how, rank, vocab_group=p)
    ((kind, line),) = {each[:2] for each in by_rank}
    assert [at for at, (_, _, prints) in enumerate(by_rank) if prints] == [rank], "one line, not one of each rank"
    assert line.startswith(f"rank {rank}: {tmp_path}")
    if how == "missing":
        assert kind == "RankUserError"
        assert "does not exist, but model.safetensors.index.json names it" in line
    else:
        assert kind == "RestartFault"
        assert "cannot be read at byte" in line
        assert "Input/output error" in line


def _apart(topology: Topology, path: str) -> tuple[int, int, Tensor]:
    """Bytes read and folders opened by a rank of a teacher with ranks of its own, or of its students; digests."""
    folder, bridge = Path(path), topology.bridge
    assert bridge is not None
    base = recipe(folder / "data" / "manifest.json", folder / "run", teacher=folder / "teacher").snapshot()
    teacher = {"placement": "disaggregated", "ranks": 4, "stages": 2, "queue": 1}
    values = {**base, "teacher": {**base["teacher"], **teacher}, "resilience": {"teacher_hash_every": 1}}
    setup = prepare(Recipe.model_validate(values), Launch(bridge.rank, 6, topology.local_rank, 6))
    with pytest.MonkeyPatch.context() as patch:
        reads = Reads(patch)
        if topology.role == "teacher":
            digests: list[Tensor] = []
            patch.setattr("megadistill.train.teacher.placement.TeacherServer", _Server(digests))
            run_teacher_server(setup, topology)
            return reads.bytes, reads.folders, digests[0]
        live: Any = load_teacher(setup, topology)(even_slice(setup.data.vocab_size, topology))
    return reads.bytes, reads.folders, live.head


class _Server:
    """Notes the stage in the place of serving it."""

    def __init__(self, digests: list[Tensor]) -> None:
        self._digests = digests

    def __call__(self, stage: TeacherStage, *_: Any, **__: Any) -> "_Server":
        self._digests.append(weights_digest(stage.weights()))
        return self

    def serve(self) -> list[int]:
        return []


def test_a_teacher_with_ranks_of_its_own_is_read_once(tmp_path: Path) -> None:
    described_data(tmp_path / "data")
    described_teacher(tmp_path / "teacher")
    students, teachers = (run := run_ranks(6, _apart, str(tmp_path), vocab_group=1, roles=Roles(6, 4, 2)))[:2], run[2:]
    size = sum(tensor.nbytes for tensor in load_file(tmp_path / "teacher" / "model.safetensors").values())
    read = [count for count, _, _ in run]
    assert sum(read) == size
    assert read[0] > 0
    assert [count[:2] for count in (students[1], *teachers[2:])] == [(0, 0)] * 3
    assert torch.equal(students[0][2], students[1][2])
    for stage in range(2):
        assert torch.equal(teachers[stage][2], teachers[stage + 2][2])


def _from_copies(topology: Topology, path: str) -> tuple[int, bool]:
    """Bytes read from a copy of the node's, and whether the replicas hold the same. Each rank is a node."""
    folder = Path(path)
    base = recipe(folder / "data" / "manifest.json", folder / "run", teacher=folder / "teacher").snapshot()
    teacher = {**base["teacher"], "local_copy": str(folder / f"disk-{topology.rank}")}
    launch = Launch(topology.rank, 2, 0, 1)
    setup = prepare(Recipe.model_validate({**base, "teacher": teacher}), launch)
    digests = check_node(setup, launch)
    (folder / f"checked-{topology.rank}").touch()
    while len(list(folder.glob("checked-*"))) < 2:
        time.sleep(0.01)
    (folder / "teacher" / "model.safetensors").unlink(missing_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        reads = Reads(patch)
        live = load_teacher(with_copy(setup), topology)(even_slice(setup.data.vocab_size, topology))
    frozen = live.frozen_weights()
    assert frozen is not None
    frozen.require_same_replicas(topology)
    return reads.bytes, "teacher.local_copy" in digests


def test_with_copies_each_rank_reads_its_nodes(tmp_path: Path) -> None:
    described_data(tmp_path / "data")
    described_teacher(tmp_path / "teacher")
    size = sum(tensor.nbytes for tensor in load_file(tmp_path / "teacher" / "model.safetensors").values())
    assert run_ranks(2, _from_copies, str(tmp_path), vocab_group=1) == [(size, True)] * 2


def test_nodes_of_students_alone_make_no_copy(tmp_path: Path) -> None:
    described_data(tmp_path / "data")
    described_teacher(tmp_path / "teacher")
    base = recipe(tmp_path / "data" / "manifest.json", tmp_path / "run", teacher=tmp_path / "teacher").snapshot()
    apart = {"placement": "disaggregated", "ranks": 2, "local_copy": str(tmp_path / "disk")}
    made = Recipe.model_validate({**base, "teacher": {**base["teacher"], **apart}})
    copies = [
        "teacher.local_copy" in check_node(prepare(made, launch), launch)
        for launch in (Launch(0, 4, 0, 2), Launch(2, 4, 0, 2))
    ]
    assert copies == [False, True]
