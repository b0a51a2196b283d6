"""One bit that flips on one rank is found, and the rank is named on all of them."""

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count, islice, repeat
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megadistill.config.recipe import Recipe
from megadistill.distributed.launch import Launch
from megadistill.distributed.roles import Roles
from megadistill.distributed.topology import Topology
from megadistill.errors import OperatorFault
from megadistill.student.routers import RouterSums
from megadistill.train.resilience.sdc import FrozenWeights, require_sound_student
from megadistill.train.setup.setup import prepare
from megadistill.train.teacher import placement
from megadistill.train.teacher.placement import load_pipeline, load_stage
from megadistill.types import TokenBatch, token_digest
from tests.ranks import student_cases
from tests.ranks.harness import run_ranks
from tests.ranks.student_cases import Case, RunResult, three_steps
from tests.unit.train.cases import SEQUENCE, described_data, described_teacher, recipe


@contextmanager
def _flipped(tensor: Tensor, here: bool) -> Iterator[None]:
    """The lowest bit of the second element, on this rank or on none."""
    raw = tensor.detach().view(-1).view(torch.uint8)
    mask = int(here)
    raw[tensor.dtype.itemsize] ^= mask
    yield
    raw[tensor.dtype.itemsize] ^= mask


def _message(check: Callable[[], object]) -> str:
    try:
        check()
    except OperatorFault as fault:
        return str(fault)
    return ""


HOST = socket.gethostname()
NORM, MATRIX = "model.layers.1.input_layernorm.weight", "model.layers.0.mlp.down_proj.weight"


def _student(topology: Topology, precision: str, offload: bool) -> dict[str, str]:
    """This rank's messages about a sound student, and about the same one with a bit flipped on rank 1."""
    case = Case(precision=precision, persistence=100, offload_optimizer=offload)
    student = student_cases.build(case, topology)
    student_cases.run_steps(case, student, topology, range(2))
    parameters: dict[str, Any] = dict(student._model.named_parameters())
    here = topology.rank == 1

    def check() -> None:
        require_sound_student(student, topology)

    messages = {"sound": _message(check)}
    assert len(student.state.replicated()) == 5, "two norms of each layer, and the last one"
    with _flipped(parameters[MATRIX].ds_tensor, here):
        messages["piece"] = _message(check)
    assert parameters[NORM].numel() == 64
    with _flipped(parameters[NORM].data, here):  # in a part of which rank 0 has the master
        messages["copy"] = _message(check)
    with _flipped(parameters[NORM].data[64 // topology.world :], here):
        messages["copy of its own piece"] = _message(check)
    messages["sound again"] = _message(check)
    return messages


def _require_reported(by_rank: list[dict[str, str]], copies: str) -> None:
    for rank, messages in enumerate(by_rank):
        assert messages["sound"] == messages["sound again"] == ""
        assert f"{NORM}, {copies}" in messages["copy"]
        if rank == 1:
            assert f"the student's {MATRIX} is not its float32 master, rounded" in messages["piece"]
            assert f"the student's {NORM} is not its float32 master" in messages["copy of its own piece"]
        else:
            assert f"are corrupt: rank 1 reports: rank 1 on {HOST}: the student's {MATRIX} is not" in messages["piece"]


def test_a_bit_of_the_student() -> None:
    _require_reported(run_ranks(4, _student, "bfloat16", False), f"on rank 1 ({HOST}) of 4")


def test_of_two_ranks_none_has_the_majority() -> None:
    _require_reported(run_ranks(2, _student, "float32", True), f"and ranks 0 ({HOST}), 1 ({HOST}) have no majority")


def _replica(topology: Topology) -> dict[str, str]:
    """This rank's messages about sound replicas, and about a bit flipped in the last rank's shard alone."""
    case = Case(precision="bfloat16", persistence=100)
    student = student_cases.build(case, topology)
    student_cases.run_steps(case, student, topology, range(2))
    state, here = student.state.local(), topology.rank == topology.world - 1

    def check() -> None:
        require_sound_student(student, topology)

    messages = {"sound": _message(check)}
    for key in (f"master/{MATRIX}", f"exp_avg_sq/{MATRIX}"):
        with _flipped(state[key], here):
            messages[key] = _message(check)
    state["optimizer_step"] += int(here)
    messages["optimizer_step"] = _message(check)
    state["optimizer_step"] -= int(here)
    messages["sound again"] = _message(check)
    return messages


@pytest.mark.parametrize(
    ("replicas", "named"),
    [(2, f"and ranks 1 ({HOST}), 3 ({HOST}) have no majority"), (4, f"on rank 3 ({HOST}) of 4")],
)
def test_a_bit_of_a_replica(replicas: int, named: str) -> None:
    """Of the lowest bits, which no copy in bfloat16 shows. Every rank names the rank, its host and the tensor."""
    for messages in run_ranks(4, _replica, replicas=replicas):
        assert messages.pop("sound") == messages.pop("sound again") == ""
        for key, message in messages.items():
            assert f"replicas of the student differ: {key}, {named}" in message


def _teacher(topology: Topology) -> list[str]:
    """Rank 1 of the world, the second place of the first vocab group, has a bit of its own: at once, and later."""
    weights = torch.randn(3, 5, generator=torch.Generator().manual_seed(topology.group_rank))
    here = topology.rank == 1
    with _flipped(weights, here):
        loaded = FrozenWeights.of([("q", torch.ones(2)), ("k", weights)])
        messages = [_message(lambda: loaded.require_same_replicas(topology))]
    sound = FrozenWeights.of([("q", torch.ones(2)), ("k", weights)])
    messages += [
        _message(lambda: sound.require_same_replicas(topology)),
        _message(lambda: sound.require_unchanged(topology)),
    ]
    with _flipped(weights, here):
        messages.append(_message(lambda: sound.require_unchanged(topology)))
    return messages


def test_a_bit_of_the_teacher() -> None:
    for rank, (unlike, alike, unchanged, changed) in enumerate(run_ranks(4, _teacher, vocab_group=2)):
        assert alike == unchanged == ""
        if rank % 2:  # the replicas of that stage: ranks 1 and 3
            assert f"k, and ranks 1 ({HOST}), 3 ({HOST}) have no majority" in unlike
        else:
            assert "weights differ between ranks: rank 1 reports: the teacher's weights differ: k, and" in unlike
        assert "rank 1 on" in changed
        assert ("changed in memory: rank 1 reports: rank 1 on" in changed) == (rank != 1)


def _computed_twice(topology: Topology, case: Case, recompute: bool) -> RunResult:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(student_cases, "run_steps", partial(student_cases.run_steps, recompute=recompute))
        return three_steps(topology, case)


@pytest.mark.parametrize(
    "case",
    [
        Case(accumulation=2, persistence=100),
        Case(tied=True, precision="bfloat16", activation_checkpointing="full"),
        Case(objective="labels"),
    ],
    ids=["accumulation", "tied", "labels"],
)
def test_computing_twice_moves_nothing(case: Case) -> None:
    """Losses, gradients and parameters of three steps, to the last bit."""
    once, twice = (run_ranks(2, _computed_twice, case, recompute)[0] for recompute in (False, True))
    assert once.steps == twice.steps
    for ours, theirs in zip((*once.gradients, once.parameters), (*twice.gradients, twice.parameters), strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def _computes_wrongly(topology: Topology) -> str:
    """The second time, rank 1 gets one bit of its hidden states wrong."""
    student = student_cases.build(Case(), topology)
    compute, calls = student.routed_hidden, 0

    def hidden(*arguments: Any, **options: Any) -> tuple[Tensor, RouterSums | None]:
        nonlocal calls
        calls += 1
        states, sums = compute(*arguments, **options)
        if (topology.rank, calls) == (1, 2):
            states[3, 5] *= 1 + 2**-10
        return states, sums

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(student, "routed_hidden", hidden)
        message = _message(lambda: student_cases.run_steps(Case(), student, topology, range(1), recompute=True))
    return message


def test_a_rank_that_computes_two_results_is_named() -> None:
    first, second = run_ranks(2, _computes_wrongly)
    assert first.startswith("another rank computed a micro-batch twice")
    assert second.startswith("rank 1 on")
    assert "computed a micro-batch twice and got two results" in second


def _serves(topology: Topology, folder: str) -> str:
    """One micro-batch after the other for two steps of four; in the sixth a bit of the teacher's rank flips."""
    bridge, path = topology.bridge, Path(folder)
    assert bridge is not None
    teacher = {"placement": "disaggregated", "ranks": 1, "queue": 1}
    base = recipe(path / "data" / "manifest.json", path / "run", teacher=path / "teacher").snapshot()
    values = {**base, "teacher": {**base["teacher"], **teacher}, "resilience": {"teacher_hash_every": 1}}
    setup = prepare(Recipe.model_validate(values), Launch(bridge.rank, 2, topology.local_rank, 2))
    if topology.role == "student":
        pipeline = load_pipeline(setup, topology)
        tokens = torch.zeros(2, SEQUENCE, dtype=torch.int64)
        batch = TokenBatch(tokens, tokens, torch.arange(2), token_digest(tokens), tokens == 0)
        return str(len(list(islice(pipeline.signals(repeat(batch)), 8))))
    stage, calls = load_stage(setup, topology, 0, 1), count(1)

    def flip(*_: object) -> None:
        if next(calls) == 6:
            stage.decoder.norm.weight.view(torch.uint8)[0] ^= 1

    stage.register_forward_hook(flip)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(placement, "load_stage", lambda *_: stage)
        with pytest.raises(OperatorFault) as caught:
            placement.run_teacher_server(setup, topology)
    # gloo drops a send whose work is freed, so the last answer must outlive this function, until both ranks leave.
    SERVERS.append(caught.tb)
    return str(caught.value)


SERVERS: list[object] = []
"""What this process's server still sends."""


def test_a_teachers_own_rank_looks_at_its_weights_after_each_step(tmp_path: Path) -> None:
    described_data(tmp_path / "data")
    described_teacher(tmp_path / "teacher")
    student, teacher = run_ranks(2, _serves, str(tmp_path), roles=Roles(2, 1, 1))
    assert student == "8", "the first check, after four, found nothing"
    assert teacher.startswith("the teacher's rank 0 on")
    assert "norm.weight of stage 0 of 1 changed in memory" in teacher
