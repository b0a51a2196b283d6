"""The optimizer step on flat partitions: DeepSpeed's own result, in a fixed number of operators."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megadistill.distributed.topology import Topology
from megadistill.errors import UserError
from megadistill.student.deepspeed_config import load_deepspeed_config
from megadistill.student.flat_step import FlatStep
from tests.paths import DS_CONFIGS
from tests.ranks.harness import run_ranks
from tests.ranks.student_cases import RATE, Case, build, run_steps

PIECES = {"sub_group_size": 20_000}
"""DeepSpeed's key: a decay group is then updated in several pieces; of the default size only large models have more."""

CASES: list[tuple[int, Case, dict[str, int]]] = [
    (1, Case(tied=True, persistence=10_000), PIECES),
    (2, Case(precision="bfloat16", accumulation=2), {}),
    (2, Case(clip=1e6), {}),
    (2, Case(offload_optimizer=True, precision="bfloat16"), PIECES),
]


@dataclass(frozen=True)
class _Run:
    norms: list[float]
    state: dict[str, Tensor]
    differing: list[str]
    """Compute copies that are not their masters."""


def _by_both(topology: Topology, case: Case, keys: dict[str, int]) -> tuple[_Run, _Run]:
    """Three steps by the step on flat partitions, and by DeepSpeed's own."""
    runs = []
    for deepspeeds in (False, True):
        settings = load_deepspeed_config(DS_CONFIGS / "cpu.json")
        settings["zero_optimization"].update(keys)
        student = build(case, topology, settings)
        assert (len(student._engine.optimizer.fp16_groups) > 2) == bool(keys)
        if deepspeeds:
            del student._engine.optimizer.step
        norms = [step["grad_norm"] for step in run_steps(case, student, topology, range(3))]
        runs.append(_Run(norms, student.state.snapshot(), student.state.params_differing_from_master()))
    return runs[0], runs[1]


@pytest.mark.parametrize(("world", "case", "keys"), CASES)
def test_the_step_is_deepspeeds(world: int, case: Case, keys: dict[str, int]) -> None:
    """Norms to the order of a float64 sum; weights, optimizer state and compute copies to the last bit.

    For an offloaded optimizer DeepSpeed rounds the norm to float32.
    """
    rounding = 1e-6 if case.offload_optimizer else 0.0
    for ours, theirs in run_ranks(world, _by_both, case, keys):
        assert ours.norms == pytest.approx(theirs.norms, rel=max(rounding, 1e-12))
        assert ours.differing == []
        assert ours.state.keys() == theirs.state.keys()
        for key, value in ours.state.items():
            torch.testing.assert_close(value, theirs.state[key], rtol=rounding, atol=rounding * RATE, msg=key)


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def _operators(topology: Topology, model_type: str) -> tuple[int, int, list[str]]:
    """Tensors of the model, host-device syncs and operators of its second step, without waiting for the loss."""
    case = Case(model_type=model_type, precision="bfloat16")
    student = build(case, topology)
    run_steps(case, student, topology, range(1))
    step, operators = student._engine.step, _Operators()

    def counted() -> None:
        with operators:
            step()

    student._engine.step = counted
    run_steps(case, student, topology, range(1, 2))
    syncs = operators.names.count("aten._local_scalar_dense.default")
    return len(list(student._model.parameters())), syncs, operators.names


def test_a_step_launches_as_many_operators_for_many_parameters_as_for_few() -> None:
    few, syncs, names = run_ranks(2, _operators, "llama")[0]
    many, _, more = run_ranks(2, _operators, "qwen3_moe")[0]
    assert many > 1.5 * few
    assert names == more
    assert len(names) <= 20, names
    assert syncs == 1
    assert names.count("aten._fused_adamw_.default") == 2, "matrices, and vectors"
    assert sum(name.startswith("c10d") for name in names) == 1, "the norm"


def _backward_operators(topology: Topology) -> list[str]:
    student, operators = build(Case(), topology), _Operators()
    run_steps(Case(), student, topology, range(2))  # DeepSpeed records the order of the layers
    backward = student._engine.backward

    def counted(*arguments: Any, **named: Any) -> None:
        with operators:
            backward(*arguments, **named)

    student._engine.backward = counted
    run_steps(Case(), student, topology, range(2, 3))
    return operators.names


def test_a_cpu_reduces_gradients_in_the_bucket() -> None:
    """gloo's reduce-scatter is a clone, an all-reduce and a copy, of a concatenation that DeepSpeed makes for it."""
    for names in run_ranks(2, _backward_operators):
        assert sum(name.startswith("c10d") for name in names) == names.count("c10d.allreduce_.default") == 1
        assert names.count("aten.cat.default") == 0


def _infinite_on_one_rank(topology: Topology) -> tuple[float, dict[str, Tensor], dict[str, Tensor], float]:
    case = Case(accumulation=2)
    student = build(case, topology)
    run_steps(case, student, topology, range(1))
    before = student.state.snapshot()
    flat = student._engine.optimizer.grad_partitions_flat_buffer
    step = student._engine.step

    def spoilt() -> None:
        if topology.rank == 1 and student._engine.is_gradient_accumulation_boundary():
            flat[-1] = torch.inf
        step()

    student._engine.step = spoilt
    (outcome,) = run_steps(case, student, topology, range(1, 2))
    after = student.state.snapshot()
    student._engine.step = step
    (sound,) = run_steps(case, student, topology, range(2, 3))
    return outcome["grad_norm"], before, after, sound["grad_norm"]


def test_an_infinity_in_one_ranks_partition_stops_the_step_of_all_and_of_no_other() -> None:
    for norm, before, after, next_norm in run_ranks(2, _infinite_on_one_rank):
        assert norm == torch.inf
        assert all(torch.equal(value, after[key]) for key, value in before.items())
        assert 0 < next_norm < torch.inf


def test_an_unknown_layout_is_refused() -> None:
    topology: Any = SimpleNamespace(world_group=None)
    with pytest.raises(UserError, match=r"deepspeed 0\.19.*has no averaged_gradients.*docs/environment\.md"):
        FlatStep.install(SimpleNamespace(clip_grad=1.0), topology)


@pytest.mark.parametrize("states", ["swap_optimizer", "params_in_nvme_and_cpu"])
def test_tensors_on_nvme_are_left_to_deepspeeds_step(states: str) -> None:
    topology: Any = SimpleNamespace(world_group=None)
    zero = SimpleNamespace(**{states: True})
    FlatStep.install(zero, topology)
    assert not hasattr(zero, "step")


def _moved_gradients(topology: Topology) -> str:
    zero: Any = build(Case(), topology)._engine.optimizer
    zero.grad_partitions_flat_buffer = zero.grad_partitions_flat_buffer.clone()
    with pytest.raises(UserError) as refused:
        FlatStep.install(zero, topology)
    return str(refused.value)


def test_gradients_that_lie_elsewhere_are_refused() -> None:
    assert "gradients are not pieces of a flat tensor" in run_ranks(1, _moved_gradients)[0]
