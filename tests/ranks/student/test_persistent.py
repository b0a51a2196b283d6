"""Parameters that stay gathered between steps: one all-reduce brings them, to the last bit; training is the same."""

from types import SimpleNamespace
from typing import Any

import torch

from megadistill.distributed.topology import Topology
from megadistill.student import engine
from megadistill.student.persistent import gather_together
from tests.ranks.harness import run_ranks
from tests.ranks.student.test_student import assert_matches
from tests.ranks.student_cases import Case, RunResult, build, dense_truth, run_steps, three_steps


def _as_in_a_large_world(topology: Topology, case: Case) -> RunResult:
    vars(engine)["RANKS_OF_A_SMALL_WORLD"] = 1
    return three_steps(topology, case)


def test_training_with_a_gathered_last_norm_equals_the_dense_truth() -> None:
    case = Case(accumulation=2)
    for result in run_ranks(2, _as_in_a_large_world, case):
        assert_matches(result, dense_truth(case), case=case)


def _whole_parameters(topology: Topology) -> list[str]:
    vars(engine)["RANKS_OF_A_SMALL_WORLD"] = 1
    student = build(Case(), topology)
    run_steps(Case(), student, topology, range(2))
    assert student.state.params_differing_from_master() == []
    return [name for name, _ in student.state.replicated()]


def test_the_last_norm_is_whole_on_every_rank_between_steps() -> None:
    assert run_ranks(2, _whole_parameters) == [["model.norm.weight"]] * 2


VALUES = [torch.tensor([1.5, -0.0, float("nan"), -3e38, 7.0]), torch.tensor([-0.0, 2.0])]


def _gathered(topology: Topology) -> list[torch.Tensor]:
    parameters: list[Any] = []
    for value in VALUES:
        size = -(-value.numel() // topology.world)
        whole = torch.nn.functional.pad(value, (0, size * topology.world - value.numel()))
        piece = whole[topology.rank * size : (topology.rank + 1) * size]
        parameters.append(SimpleNamespace(ds_tensor=piece, ds_numel=value.numel(), ds_shape=value.shape))
    gather_together(parameters, topology)
    return [parameter.data for parameter in parameters]


def test_pieces_are_gathered_to_the_last_bit() -> None:
    for world in (1, 3):
        for gathered in run_ranks(world, _gathered):
            for value, whole in zip(VALUES, gathered, strict=True):
                assert torch.equal(whole.view(torch.int32), value.view(torch.int32))
