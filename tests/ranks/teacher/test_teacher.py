"""The teacher's pipeline on real ranks, each against the unsplit model on its own tokens."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megadistill.distributed.topology import Topology
from megadistill.errors import OperatorFault
from megadistill.teacher.pipeline import TeacherPipeline
from megadistill.teacher.stage import TeacherStage
from megadistill.types import SignalMismatch, TeacherSignal, TokenBatch, token_digest
from tests.ranks.harness import run_ranks
from tests.unit.models.cases import VOCAB, final_hidden, saved_model

SHAPES = [(1, 8), (3, 8), (3, 13)]  # B, S of successive batches


def _batch(rank: int, index: int, vocab: int = VOCAB) -> TokenBatch:
    B, S = SHAPES[index]
    tokens = torch.randint(vocab, (B, S), generator=torch.Generator().manual_seed(100 * rank + index))
    slots = torch.arange(B) + 1000 * rank + 10 * index
    starts = torch.zeros_like(tokens, dtype=torch.bool)
    return TokenBatch(tokens=tokens, labels=tokens, slots=slots, digests=token_digest(tokens), starts=starts)


def _pipeline(topology: Topology, folder: str, dtype: torch.dtype = torch.float32) -> TeacherPipeline:
    place: dict[str, Any] = {"stage": topology.group_rank, "stages": topology.group_size}
    stage = TeacherStage.load(Path(folder), **place, dtype=dtype, device=topology.device)
    return TeacherPipeline(stage, topology)


def _signals(topology: Topology, folder: str) -> list[TeacherSignal]:
    pipeline = _pipeline(topology, folder)
    return list(pipeline.signals(_batch(topology.rank, index) for index in range(len(SHAPES))))


@pytest.mark.parametrize(("world", "p"), [(1, 1), (2, 2), (3, 3), (4, 2), (2, 1)])
def test_each_rank_gets_the_unsplit_models_hidden_states_of_its_own_tokens(world: int, p: int, tmp_path: Path) -> None:
    model = saved_model("qwen3", tmp_path, shard_size="30KB")
    for rank, signals in enumerate(run_ranks(world, _signals, str(tmp_path), vocab_group=p)):
        for index, signal in enumerate(signals):
            batch = _batch(rank, index)
            truth = final_hidden(model, batch.tokens).flatten(0, 1)
            assert torch.equal(signal.hidden_for(batch), truth)
            assert not signal.hidden.requires_grad


ROWS = [(2, 0, 1), (0, 0, 0), (0, 3, 0), (1, 1, 1)]
"""Rows of each rank in successive rounds of one of two teachers; the other one has them in reverse order."""


def _ragged(rank: int, rows: tuple[int, ...], index: int) -> TokenBatch:
    tokens = torch.randint(VOCAB, (rows[rank], 8), generator=torch.Generator().manual_seed(100 * rank + index))
    starts = torch.zeros_like(tokens, dtype=torch.bool)
    starts[:, 0] = starts[:, 3 + index :: 4] = True
    slots = torch.arange(rows[rank]) + 1000 * rank + 10 * index
    return TokenBatch(tokens, tokens, slots, token_digest(tokens), starts, document_mask=True, peer_rows=rows)


def _two_teachers(topology: Topology, folders: tuple[str, str]) -> tuple[list[list[Tensor]], list[int]]:
    """Hidden states of each teacher's rounds, read in turn; and rows that went through this rank's stages."""
    first = _pipeline(topology, folders[0])
    second = TeacherPipeline(_pipeline(topology, folders[1]).stage, topology, beside=first)
    computed = []
    for each in (first, second):
        each.stage.register_forward_pre_hook(lambda _, inputs: computed.append(len(inputs[0])))
    world = topology.world
    rounds = [[_ragged(topology.rank, rows[:world], i) for i, rows in enumerate(all_)] for all_ in (ROWS, ROWS[::-1])]
    streams = [pipeline.signals(iter(batches)) for pipeline, batches in zip((first, second), rounds, strict=True)]
    signals = list(zip(*streams, strict=True))
    hidden = [[signal.hidden_for(batch) for signal, batch in zip(of, batches, strict=True)]
              for of, batches in zip(zip(*signals, strict=True), rounds, strict=True)]  # fmt: skip
    return hidden, computed


@pytest.mark.parametrize("world", [1, 3])
def test_two_teachers_of_unequal_rows_compute_those_and_no_others(world: int, tmp_path: Path) -> None:
    """Of other widths too; a round without a row of any rank costs nothing."""
    folders = (tmp_path / "one", tmp_path / "two")
    for family, folder in zip(("qwen3", "mistral"), folders, strict=True):
        saved_model(family, folder)
    alone = [run_ranks(1, _alone, str(folder), world, index)[0] for index, folder in enumerate(folders)]
    needed = 2 * sum(sum(rows[:world]) for rows in ROWS)
    for rank, (hidden, computed) in enumerate(run_ranks(world, _two_teachers, tuple(map(str, folders)))):
        assert sum(computed) == needed
        for of_teacher, truth in zip(hidden, alone, strict=True):
            torch.testing.assert_close(of_teacher, truth[rank], rtol=0, atol=0)


def _alone(topology: Topology, folder: str, world: int, reverse: int) -> list[list[Tensor]]:
    """For each rank, the hidden states of the complete model on its rows of each round."""
    stage = _pipeline(topology, folder).stage
    rounds = ROWS[::-1] if reverse else ROWS
    batches = [[_ragged(rank, rows[:world], i) for i, rows in enumerate(rounds)] for rank in range(world)]
    return [
        [stage(b.tokens, b.positions).flatten(0, 1) if len(b) else torch.zeros(0, _width(stage)) for b in of_rank]
        for of_rank in batches
    ]


def _width(stage: TeacherStage) -> int:
    return stage.hidden_shape(1, 1)[2]


def _with_documents(topology: Topology, folder: str) -> list[Tensor]:
    pipeline = _pipeline(topology, folder)
    batches = (_documents(_batch(topology.rank, index)) for index in range(len(SHAPES)))
    return [signal.hidden for signal in pipeline.signals(batches)]


def _documents(batch: TokenBatch) -> TokenBatch:
    """Documents of 3 to 5 tokens, at other places in each row."""
    starts = batch.starts.clone()
    for row in range(len(batch)):
        starts[row, 3 + row % 2 :: 4] = True
    return replace(batch, starts=starts, document_mask=True)


@pytest.mark.parametrize("case", ["qwen3", "mistral"])
def test_every_stage_knows_where_documents_begin(case: str, tmp_path: Path) -> None:
    """Each document alone through the unsplit model gives the same hidden states, bar the order of float32 sums."""
    model = saved_model(case, tmp_path)
    for rank, signals in enumerate(run_ranks(3, _with_documents, str(tmp_path), vocab_group=3)):
        for index, hidden in enumerate(signals):
            batch = _documents(_batch(rank, index))
            alone = [
                final_hidden(model, document.unsqueeze(0))[0]
                for tokens, starts in zip(batch.tokens, batch.starts, strict=True)
                for document in tokens.tensor_split(starts.nonzero().flatten().tolist())
                if len(document)
            ]
            torch.testing.assert_close(hidden, torch.cat(alone), rtol=1e-5, atol=1e-5)


def _bfloat16(topology: Topology, folder: str) -> Tensor:
    return next(_pipeline(topology, folder, torch.bfloat16).signals(iter([_batch(topology.rank, 1)]))).hidden


def test_bfloat16_travels_as_it_is(tmp_path: Path) -> None:
    saved_model("llama", tmp_path)
    whole = TeacherStage.load(tmp_path, stage=0, stages=1, dtype=torch.bfloat16, device=torch.device("cpu"))
    for rank, hidden in enumerate(run_ranks(2, _bfloat16, str(tmp_path))):
        assert hidden.dtype == torch.bfloat16
        assert torch.equal(hidden, whole(_batch(rank, 1).tokens).flatten(0, 1))


def _mixed_up(topology: Topology, folder: str) -> str:
    """A last stage that gives each rank another one's micro-batch."""
    pipeline: Any = _pipeline(topology, folder)
    work = pipeline._work
    if pipeline.stage.is_last:
        pipeline._work = lambda *arguments: work(*arguments).flip(0)
    batch = _batch(topology.rank, 0)
    try:
        next(pipeline.signals(iter([batch]))).hidden_for(batch)
    except SignalMismatch as error:
        return str(error)
    return "not detected"


def test_a_micro_batch_that_reaches_the_wrong_rank_is_detected(tmp_path: Path) -> None:
    saved_model("llama", tmp_path)
    assert all("different tokens" in error for error in run_ranks(2, _mixed_up, str(tmp_path)))


def _broken(topology: Topology, folder: str) -> list[str]:
    """An infinity in the embedding of the last id, which only rank 1's tokens name."""
    pipeline = _pipeline(topology, folder)
    if pipeline.stage.is_first:
        pipeline.stage.decoder.embed_tokens.weight[VOCAB - 1, 0] = float("inf")
    words = []
    for index in range(2):
        batch = _batch(topology.rank, index, vocab=VOCAB - 1)
        if (topology.rank, index) == (1, 0):
            batch.tokens[0, 3] = VOCAB - 1
        try:
            next(pipeline.signals(iter([batch])))
            words.append("finite")
        except OperatorFault as error:
            words.append(str(error))
    return words


def test_a_teacher_that_is_not_finite_stops_its_own_rank_and_hangs_nobody(tmp_path: Path) -> None:
    saved_model("llama", tmp_path)
    first, second = run_ranks(2, _broken, str(tmp_path))
    assert first == ["finite", "finite"]
    assert "not finite in slots [1000]" in second[0]
    assert second[1] == "finite"


ROUNDS = 7


def _counted(topology: Topology, folder: str) -> list[tuple[int, int]]:
    """At each answer: batches read so far, and micro-batches that this rank's stage has worked on."""
    pipeline = _pipeline(topology, folder)
    read = worked = 0

    def count(*_: object) -> None:
        nonlocal worked
        worked += 1

    def batches() -> Iterator[TokenBatch]:
        nonlocal read
        for index in range(ROUNDS):
            read += 1
            yield _batch(topology.rank, index % len(SHAPES))

    pipeline.stage.register_forward_hook(count)
    return [(read, worked) for _ in pipeline.signals(batches())]


@pytest.mark.parametrize(("world", "p"), [(3, 3), (4, 2), (1, 1)])
def test_stage_j_works_one_round_ahead_of_the_stage_behind_it(world: int, p: int, tmp_path: Path) -> None:
    """So no tick between the first signal and the last has an idle stage: the bubble is at both ends of the run."""
    saved_model("llama", tmp_path)
    for rank, counts in enumerate(run_ranks(world, _counted, str(tmp_path), vocab_group=p)):
        ahead = p - 1 - rank % p
        rounds = range(ROUNDS)
        assert [read for read, _ in counts] == [min(ROUNDS, answered + p) for answered in rounds]
        assert [worked for _, worked in counts] == [p * min(ROUNDS, answered + 1 + ahead) for answered in rounds]


def _closed_and_restarted(topology: Topology, folder: str) -> list[TeacherSignal]:
    """Closed with rounds under way, as a stop does; then a run from the position that was reached."""
    pipeline = _pipeline(topology, folder)
    taken: list[TeacherSignal] = []
    while len(taken) < len(SHAPES):
        signals = pipeline.signals(_batch(topology.rank, index) for index in range(len(taken), len(SHAPES)))
        taken.append(next(signals))
        signals.close()
    return taken


def test_a_run_that_stops_at_any_moment_resumes_exactly(tmp_path: Path) -> None:
    model = saved_model("qwen3", tmp_path)
    for rank, signals in enumerate(run_ranks(3, _closed_and_restarted, str(tmp_path))):
        for index, signal in enumerate(signals):
            batch = _batch(rank, index)
            assert torch.equal(signal.hidden_for(batch), final_hidden(model, batch.tokens).flatten(0, 1))


def test_the_bytes_in_flight_are_bounded(tmp_path: Path) -> None:
    """Measured: the packets that a rank receives and sends at a time are at most `bytes_in_flight`."""
    saved_model("llama", tmp_path)
    for bound, measured in run_ranks(3, _in_flight, str(tmp_path)):
        assert 0 < measured <= bound


def _in_flight(topology: Topology, folder: str) -> tuple[int, int]:
    pipeline: Any = _pipeline(topology, folder)
    B, S = SHAPES[1]
    most = 0
    post_recv, send = pipeline.endpoint.post_recv, pipeline.endpoint.send
    in_flight = {"incoming": 0, "outgoing": 0}

    def measured_post_recv(buffer: Tensor, *arguments: Any, **keywords: Any) -> Any:
        in_flight["incoming"] = buffer.numel()
        return post_recv(buffer, *arguments, **keywords)

    def measured_send(packets: Tensor, *arguments: Any, **keywords: Any) -> Any:
        in_flight["outgoing"] = packets.numel()
        return send(packets, *arguments, **keywords)

    pipeline.endpoint.post_recv, pipeline.endpoint.send = measured_post_recv, measured_send
    for _ in pipeline.signals(_batch(topology.rank, 1) for _ in range(ROUNDS)):
        most = max(most, sum(in_flight.values()))
    return pipeline.bytes_in_flight(B, S), most
