"""A teacher with ranks of its own: each client gets the unsplit model's answer to its own tokens."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megadistill.comm.roles import Roles
from megadistill.comm.topology import Topology
from megadistill.errors import UserError
from megadistill.records import TeacherSignal, TokenBatch, token_digest
from megadistill.teacher.remote import RemoteTeacher, RequestForm, TeacherServer
from megadistill.teacher.stage import TeacherStage
from megadistill.teacher.wire import Wire
from tests.ranks.harness import run_ranks
from tests.unit.model.cases import VOCAB, final_hidden, saved_model

B, S, E, ROUNDS = 2, 9, 64, 6


def _batch(rank: int, index: int, *, masked: bool = False) -> TokenBatch:
    tokens = torch.randint(VOCAB, (B, S), generator=torch.Generator().manual_seed(100 * rank + index))
    starts = torch.zeros_like(tokens, dtype=torch.bool)
    starts[:, [0, 4]] = True
    slots = torch.arange(B) + 1000 * rank + 10 * index
    return TokenBatch(tokens, tokens, slots, token_digest(tokens), starts, document_mask=masked)


def _answers(
    topology: Topology, folder: str, masked: bool, float8: bool, queue: int, stops_after: int
) -> list[TeacherSignal] | int:
    """A client's signals; of a teacher's rank, how many micro-batches passed through it."""
    bridge = topology.bridge
    assert bridge is not None
    form, wire = RequestForm(B, S, masked), Wire(E, torch.float32, float8)
    if topology.role == "teacher":
        place = {"stage": topology.rank % topology.group_size, "stages": topology.group_size}
        stage = TeacherStage.load(Path(folder), **place, dtype=torch.float32, device=topology.device)
        server = TeacherServer(stage, bridge, form, wire, queue=queue)
        server.serve()
        return server.answered
    remote = RemoteTeacher(bridge, form, wire, queue=queue, device=topology.device)
    read = 0

    def batches() -> Iterator[TokenBatch]:
        nonlocal read
        for index in range(ROUNDS):
            read += 1
            yield _batch(topology.rank, index, masked=masked)

    signals = remote.signals(batches())
    taken = []
    for answered in range(stops_after):
        taken.append(next(signals))
        assert read == min(ROUNDS, answered + queue), "asks ahead, and no further than it may"
    signals.close()
    return taken


@pytest.mark.parametrize(
    ("students", "stages", "replicas", "queue", "masked"),
    [(1, 1, 1, 1, False), (2, 2, 1, 3, False), (2, 2, 2, 2, True), (1, 3, 1, 4, False), (4, 1, 2, 2, True)],
)
def test_each_client_gets_the_unsplit_models_answer(
    students: int, stages: int, replicas: int, queue: int, masked: bool, tmp_path: Path
) -> None:
    model = saved_model("qwen3", tmp_path)
    roles = Roles(students + stages * replicas, stages * replicas, stages)
    arguments = (str(tmp_path), masked, False, queue, ROUNDS)
    found = run_ranks(roles.world, _answers, *arguments, roles=roles)
    assert found[students:] == [ROUNDS * students // replicas] * (stages * replicas)
    for rank, signals in enumerate(found[:students]):
        for index, signal in enumerate(signals):
            batch = _batch(rank, index)
            parts = [batch.tokens[:, :4], batch.tokens[:, 4:]] if masked else [batch.tokens]
            truth = torch.cat([final_hidden(model, part) for part in parts], dim=1).flatten(0, 1)
            torch.testing.assert_close(signal.hidden_for(batch), truth, rtol=0, atol=1e-5 if masked else 0)


def test_a_client_may_stop_at_any_moment(tmp_path: Path) -> None:
    model = saved_model("llama", tmp_path)
    *clients, first, last = run_ranks(4, _answers, str(tmp_path), False, False, 3, 2, roles=Roles(4, 2, 2))
    assert first == last == 2 * 4, "two were taken, two more were under way"
    for rank, signals in enumerate(clients):
        for index, signal in enumerate(signals):
            batch = _batch(rank, index)
            assert torch.equal(signal.hidden_for(batch), final_hidden(model, batch.tokens).flatten(0, 1))


def test_eight_bits_are_near(tmp_path: Path) -> None:
    model = saved_model("llama", tmp_path)
    signals, _ = run_ranks(2, _answers, str(tmp_path), False, True, 2, ROUNDS, roles=Roles(2, 1, 1))
    for index, found in enumerate(signals):
        batch = _batch(0, index)
        truth = final_hidden(model, batch.tokens).flatten(0, 1)
        error = (found.hidden_for(batch) - truth).abs()
        largest = truth.abs().amax(dim=1, keepdim=True)
        assert (error <= truth.abs() / 16 + largest / 448 / 512 + 1e-7).all()
        assert error.max() > 0


def test_each_token_has_a_scale_of_its_own() -> None:
    """Tokens a million times smaller than their neighbours keep three bits of mantissa too."""
    hidden = torch.randn(1, 4, E, generator=torch.Generator().manual_seed(1))
    hidden *= torch.tensor([1.0, 1e-6, 1e6, 1e-3])[None, :, None]
    wire = Wire(E, torch.float32, float8=True)
    found, slots, digests = wire.unpack(wire.pack(hidden, torch.tensor([7]), torch.tensor([-9])), 1, 4)
    assert (slots.tolist(), digests.tolist()) == ([7], [-9])
    largest = hidden.abs().amax(dim=-1, keepdim=True)
    assert ((found - hidden).abs() <= hidden.abs() / 16 + largest / 448 / 512).all()


def test_half_the_bytes() -> None:
    plain, short = Wire(4096, torch.bfloat16), Wire(4096, torch.bfloat16, float8=True)
    assert short.bytes(8, 2048) / plain.bytes(8, 2048) == pytest.approx(0.5, abs=0.001)


@pytest.mark.parametrize(
    ("world", "teachers", "stages", "says"),
    [
        (4, 0, 1, "the teacher needs at least one"),
        (4, 4, 2, "and so does the student"),
        (5, 3, 2, "does not divide into pipelines of teacher.stages 2"),
        (5, 2, 1, "3 ranks of the student cannot be shared out to 2 replicas"),
    ],
)
def test_roles_that_do_not_fit_are_refused(world: int, teachers: int, stages: int, says: str) -> None:
    with pytest.raises(UserError, match=says):
        Roles(world, teachers, stages)


def test_every_rank_has_one_place() -> None:
    roles = Roles(12, 4, 2)
    assert [roles.is_student(rank) for rank in range(12)] == [True] * 8 + [False] * 4
    assert [list(roles.clients(replica)) for replica in range(2)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [(roles.replica(rank), roles.stage(rank)) for rank in range(8, 12)] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [roles.partners(rank) for rank in (0, 5, 8, 11)] == [[8, 9], [10, 11], [0, 1, 2, 3], [4, 5, 6, 7]]
