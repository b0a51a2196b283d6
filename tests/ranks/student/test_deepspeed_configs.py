"""Each file of ds_configs/ trains, as far as a CPU allows: where states lie, and how they travel, moves no number."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megadistill.distributed.topology import Topology
from megadistill.student.deepspeed_config import active_deepspeed_config
from tests.paths import DS_CONFIGS
from tests.ranks.harness import run_ranks
from tests.ranks.student_cases import Case, WatchedStudent, build, run_steps

CASE = Case(accumulation=2, persistence=10)
"""Norms and nothing else stay gathered between steps."""


def _student(name: str, topology: Topology, *, hpz: int = 1) -> WatchedStudent:
    deepspeed_config, _ = active_deepspeed_config(str(DS_CONFIGS / name))
    if hpz > 1:
        deepspeed_config["zero_optimization"]["zero_hpz_partition_size"] = hpz
    return build(CASE, topology, deepspeed_config)


def _trained(topology: Topology, name: str, hpz: int) -> tuple[list[dict[str, float]], bool, bool]:
    student = _student(name, topology, hpz=hpz)
    zero = student._engine.optimizer
    parameters: list[Any] = list(student._model.parameters())
    backward, copies = student.backward, []

    def watched(loss: Tensor) -> None:
        backward(loss)
        copies.append(any(parameter.ds_secondary_tensor is not None for parameter in parameters))

    student.backward = watched  # type: ignore[method-assign]
    steps = run_steps(CASE, student, topology, range(3))
    assert len(set(copies)) == 1
    return steps, bool(zero.offload_optimizer), copies[0]


@pytest.fixture(scope="module")
def truth() -> list[dict[str, float]]:
    steps: list[dict[str, float]] = run_ranks(2, _trained, "cpu.json", 1)[0][0]
    return steps


@pytest.mark.parametrize(("name", "hpz"), [("zero3.json", 1), ("hpz.json", 2), ("zeropp.json", 2)])
def test_a_file_for_gpus_trains_to_the_same_numbers(name: str, hpz: int, truth: list[dict[str, float]]) -> None:
    result, offloaded, copies = run_ranks(2, _trained, name, hpz)[0]
    assert result == truth
    assert not offloaded
    assert copies == (hpz > 1), "hpZ keeps a second partition of each parameter"


def test_offloading_moves_no_more_than_the_rounding_of_the_gradient_norm(truth: list[dict[str, float]]) -> None:
    result, offloaded, _ = run_ranks(2, _trained, "zero3-offload.json", 1)[0]
    assert offloaded
    for step, true in zip(result, truth, strict=True):
        assert step == pytest.approx(true, rel=1e-5)


def _reader(state: dict[str, Tensor], student: WatchedStudent) -> Callable[[str, int, int], Tensor]:
    starts = {partition.name: partition.start for partition in student.state._partitions()}

    def read(key: str, start: int, stop: int) -> Tensor:
        first = 0 if key == "optimizer_step" else starts[key.partition("/")[2]]
        return state[key][start - first : stop - first]

    return read


def _saved(topology: Topology) -> tuple[dict[str, Any], list[dict[str, float]]]:
    student = _student("cpu.json", topology)
    run_steps(CASE, student, topology, range(2))
    state = {key: value.numpy() for key, value in student.state.snapshot().items()}
    return state, run_steps(CASE, student, topology, range(2, 4))


def _gone_on(topology: Topology, states: list[dict[str, Any]]) -> list[dict[str, float]]:
    student = _student("cpu.json", topology, hpz=2)
    state = {key: torch.from_numpy(value) for key, value in states[topology.rank].items()}
    student.state.load(_reader(state, student))
    return run_steps(CASE, student, topology, range(2, 4))


def test_a_resume_under_hpz_leaves_no_stale_copy_of_the_weights() -> None:
    """DeepSpeed gathers from hpZ's second partition until the first step: that of a new engine holds first values."""
    saved = run_ranks(2, _saved)
    result = run_ranks(2, _gone_on, [state for state, _ in saved])
    assert result[0] == saved[0][1]
