"""A teacher with ranks of its own: each client gets the unsplit model's answer to its own tokens."""

from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from megadistill.distributed.collectives import barrier
from megadistill.distributed.roles import Roles
from megadistill.distributed.topology import Topology
from megadistill.errors import UserError
from megadistill.teacher.codec import ActivationCodec
from megadistill.teacher.disaggregated import RemoteTeacher, RequestCodec, TeacherServer
from megadistill.teacher.stage import TeacherStage
from megadistill.types import TeacherSignal, TokenBatch, token_digest
from tests.ranks.harness import run_ranks
from tests.unit.models.cases import VOCAB, final_hidden, saved_model

B, S, E, ROUNDS = 2, 9, 64, 6


def _batch(rank: int, index: int, *, masked: bool = False) -> TokenBatch:
    tokens = torch.randint(VOCAB, (B, S), generator=torch.Generator().manual_seed(100 * rank + index))
    starts = torch.zeros_like(tokens, dtype=torch.bool)
    starts[:, [0, 4]] = True
    slots = torch.arange(B) + 1000 * rank + 10 * index
    return TokenBatch(tokens, tokens, slots, token_digest(tokens), starts, document_mask=masked)


def _serve(topology: Topology, folder: str, requests: RequestCodec, answers: ActivationCodec, queue: int) -> int:
    """The number of micro-batches that passed through this rank of the teacher."""
    assert topology.bridge is not None
    place: dict[str, Any] = {"stage": topology.rank % topology.group_size, "stages": topology.group_size}
    stage = TeacherStage.load(Path(folder), **place, dtype=torch.float32, device=topology.device)
    *_, done = TeacherServer(stage, topology.bridge, requests, answers, queue=queue).serve()
    return done


def _answers(
    topology: Topology, folder: str, masked: bool, float8: bool, queue: int, stops_after: int
) -> list[TeacherSignal] | int:
    """The signals of a client; on a teacher's rank the number of micro-batches that passed through it."""
    bridge = topology.bridge
    assert bridge is not None
    requests, answers = RequestCodec(B, S, masked), ActivationCodec(E, torch.float32, float8)
    if topology.role == "teacher":
        return _serve(topology, folder, requests, answers, queue)
    remote = RemoteTeacher(bridge, requests, answers, queue=queue, device=topology.device)
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
        assert read == min(ROUNDS, answered + queue), "requests ahead, and no further than it may"
    signals.close()
    remote.close()
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
    results = run_ranks(roles.world, _answers, *arguments, roles=roles)
    assert results[students:] == [ROUNDS * students // replicas] * (stages * replicas)
    for rank, signals in enumerate(results[:students]):
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


def _streams(topology: Topology, folder: str, takes: list[int]) -> list[list[TeacherSignal]] | int:
    """One after the other on the same ranks, each closed after as many signals."""
    bridge = topology.bridge
    assert bridge is not None
    requests, answers = RequestCodec(B, S, masked=False), ActivationCodec(E, torch.float32)
    if topology.role == "teacher":
        return _serve(topology, folder, requests, answers, queue=3)
    remote = RemoteTeacher(bridge, requests, answers, queue=3, device=topology.device)
    results = []
    for stream, take in enumerate(takes):
        batches = (_batch(topology.rank, 10 * stream + index) for index in range(ROUNDS))
        with closing(remote.signals(batches)) as signals:
            results.append(list(islice(signals, take)))
    remote.close()
    return results


@pytest.mark.parametrize(("students", "stages"), [(1, 1), (2, 2)])
def test_a_stream_that_ends_early_leaves_nothing_to_the_next_one(students: int, stages: int, tmp_path: Path) -> None:
    """As a rollback does: pending answers are dropped, and other batches are requested on the same ranks."""
    model = saved_model("llama", tmp_path)
    takes = [2, ROUNDS, 0, 1]
    results = run_ranks(
        students + stages, _streams, str(tmp_path), takes, roles=Roles(students + stages, stages, stages)
    )
    requested = (2 + 2) + ROUNDS + 0 + (1 + 2)
    assert results[students:] == [students * requested] * stages
    for rank, streams in enumerate(results[:students]):
        assert [len(signals) for signals in streams] == takes
        for stream, signals in enumerate(streams):
            for index, signal in enumerate(signals):
                batch = _batch(rank, 10 * stream + index)
                assert torch.equal(signal.hidden_for(batch), final_hidden(model, batch.tokens).flatten(0, 1))


def _closed_alone(topology: Topology, folder: str) -> int:
    """Client 0 closes before client 1 has sent a request, so that the teacher waits for client 1's turn."""
    bridge = topology.bridge
    assert bridge is not None
    requests, answers = RequestCodec(B, S, masked=False), ActivationCodec(E, torch.float32)
    if topology.role == "teacher":
        return _serve(topology, folder, requests, answers, queue=3)
    remote = RemoteTeacher(bridge, requests, answers, queue=3, device=topology.device)
    if topology.rank == 1:
        barrier(topology.world_group)
    with closing(remote.signals(_batch(topology.rank, index) for index in range(ROUNDS))) as signals:
        next(signals)
    if topology.rank == 0:
        barrier(topology.world_group)
    remote.close()
    return 0


def test_closing_waits_for_nobody(tmp_path: Path) -> None:
    """A rank that an error ends must not wait for answers behind requests that the others will never send."""
    saved_model("llama", tmp_path)
    assert run_ranks(3, _closed_alone, str(tmp_path), roles=Roles(3, 1, 1), deadline=20) == [0, 0, 2 * 3]


def test_eight_bits_are_near(tmp_path: Path) -> None:
    model = saved_model("llama", tmp_path)
    signals, _ = run_ranks(2, _answers, str(tmp_path), False, True, 2, ROUNDS, roles=Roles(2, 1, 1))
    for index, signal in enumerate(signals):
        batch = _batch(0, index)
        truth = final_hidden(model, batch.tokens).flatten(0, 1)
        error = (signal.hidden_for(batch) - truth).abs()
        largest = truth.abs().amax(dim=1, keepdim=True)
        assert (error <= truth.abs() / 16 + largest / 448 / 512 + 1e-7).all()
        assert error.max() > 0


def test_each_token_has_a_scale_of_its_own() -> None:
    """Tokens a million times smaller than their neighbours keep three bits of mantissa too."""
    hidden = torch.randn(1, 4, E, generator=torch.Generator().manual_seed(1))
    hidden *= torch.tensor([1.0, 1e-6, 1e6, 1e-3])[None, :, None]
    codec = ActivationCodec(E, torch.float32, float8=True)
    decoded, slots, digests = codec.decode(codec.encode(hidden, torch.tensor([7]), torch.tensor([-9])), 1, 4)
    assert (slots.tolist(), digests.tolist()) == ([7], [-9])
    largest = hidden.abs().amax(dim=-1, keepdim=True)
    assert ((decoded - hidden).abs() <= hidden.abs() / 16 + largest / 448 / 512).all()


def test_half_the_bytes() -> None:
    plain, short = ActivationCodec(4096, torch.bfloat16), ActivationCodec(4096, torch.bfloat16, float8=True)
    assert short.bytes(8, 2048) / plain.bytes(8, 2048) == pytest.approx(0.5, abs=0.001)


@pytest.mark.parametrize(
    ("world", "teachers", "stages", "error"),
    [
        (4, 0, 1, "the teacher needs at least one"),
        (4, 4, 2, "and so does the student"),
        (5, 3, 2, "does not divide into pipelines of teacher.stages 2"),
        (5, 2, 1, "3 ranks of the student cannot be shared out to 2 replicas"),
    ],
)
def test_roles_that_do_not_fit_are_refused(world: int, teachers: int, stages: int, error: str) -> None:
    with pytest.raises(UserError, match=error):
        Roles(world, teachers, stages)


def test_every_rank_has_one_place() -> None:
    roles = Roles(12, 4, 2)
    assert [roles.is_student(rank) for rank in range(12)] == [True] * 8 + [False] * 4
    assert [list(roles.clients(replica)) for replica in range(2)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [(roles.replica(rank), roles.stage(rank)) for rank in range(8, 12)] == [(0, 0), (0, 1), (1, 0), (1, 1)]
