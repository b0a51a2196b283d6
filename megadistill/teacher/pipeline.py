"""The teacher's stages as a pipeline that runs ahead of the student: a group's tokens in, each rank's signal out.

Legend: g ranks of the group, which are the stages; B sequences of a rank's micro-batch, S tokens of each, E width.

A *round* is one micro-batch of each rank of the group. In a *tick* every stage works on one round, stage j on the one
that entered j ticks ago: its input arrived during the tick before, and while the student used a signal. So no stage
waits for another within a tick, a round's signals are ready g - 1 ticks after it entered, and the pipeline is filled
once and drained once, however many steps and accumulation windows lie between.

Several teachers are as many pipelines over the same ranks, in turn. Of a micro-batch each gets the rows that it
teaches, so a round may have another number of rows of each rank (`TokenBatch.peer_rows`), and none of any: that one
costs nothing, but passes the stages like every other, so that all pipelines run equally far ahead.

A *packet* is one micro-batch between two stages: its digests, then its hidden states. The digests are taken where the
tokens are read and leave the pipeline together with the hidden states, so a micro-batch that is lost, doubled or
delivered to the wrong rank does not match that rank's batch.
"""

import math
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megadistill import timeline
from megadistill.distributed.collectives import all_gather_rows, scatter_rows
from megadistill.distributed.p2p import Endpoint, Message, chain
from megadistill.distributed.topology import Topology
from megadistill.teacher.codec import INT64_BYTES, checked_signal, pack, unpack
from megadistill.teacher.stage import TeacherStage
from megadistill.types import TeacherSignal, TokenBatch, token_digest


@dataclass(frozen=True)
class _Round:
    """A round in the pipeline, as every rank knows it."""

    batch: TokenBatch
    """This rank's micro-batch."""
    rows: tuple[int, ...]
    """Rows of each rank. Buffers have those of the largest, B."""
    tokens_gBS: Tensor
    positions_gBS: Tensor | None

    @property
    def shape(self) -> tuple[int, int]:
        """B, S"""
        return max(self.rows), self.batch.tokens.shape[1]


class TeacherPipeline:
    """The frozen teacher, one stage on each rank of the group. Collective: all of them make it."""

    def __init__(self, stage: TeacherStage, topology: Topology, *, beside: "TeacherPipeline | None" = None) -> None:
        """`beside`: a pipeline of another teacher on the same ranks, whose connections this one uses too."""
        assert (stage.stage, stage.stages) == (topology.group_rank, topology.group_size)
        self.stage = stage
        self.group = topology.pipeline_group
        first_rank = topology.rank - topology.group_rank
        ranks = range(first_rank, first_rank + topology.group_size)
        if beside is None:
            self.endpoint = Endpoint(self.group, rank=stage.stage, ranks=ranks)
            self.endpoint.connect(chain(range(stage.stages)), stage.device)
        else:
            self.endpoint = beside.endpoint
        self._name = f"teacher stage {stage.stage}"

    @property
    def ahead(self) -> int:
        """Micro-batches of each rank that enter after one before its signal is ready."""
        return self.stage.stages - 1

    def bytes_in_flight(self, B: int, S: int) -> int:
        """Upper bound on the bytes of rounds under way that a rank holds: one round received and one sent."""
        return 2 * self.stage.stages * self._packet_bytes(B, S) if self.ahead else 0

    @torch.no_grad()
    def signals(self, batches: Iterator[TokenBatch]) -> Generator[TeacherSignal, None, None]:
        """The teacher's final hidden states for each of this rank's `batches`, in order.

        `batches` is read `ahead` of the signals. Collective: all ranks have as many batches, of the same
        shapes or with their `peer_rows`, and take as many signals; then any of them may close the iterator, if all do.
        Several pipelines on the same ranks are read in one order on all of them. All ranks run the same
        operations in the same order, on the pipeline's own group. The host waits for the device once a tick, at its
        end, where it reads digests and whether the hidden states are finite: all that was queued before has then run.

        Raises:
            OperatorFault: this rank's hidden states are not finite: the teacher is broken, and a restart repeats it.
        """
        rounds: deque[_Round] = deque()
        first = tick = 0  # the oldest round under way, and the one that enters
        incoming: Message | None = None
        outgoing: Message | None = None
        stage = self.stage.stage
        try:
            while True:
                batch = next(batches, None)
                if batch is not None:
                    rounds.append(self._share_tokens(batch))
                if not rounds:
                    return
                last = first + len(rounds) - 1
                current = tick - stage
                finished = None
                if first <= current <= last and any(rounds[current - first].rows):
                    with timeline.span(timeline.COMPUTE, self._name, current):
                        packets = self._work(rounds[current - first], incoming)
                    if outgoing is not None:
                        outgoing.wait()
                    outgoing = None
                    if self.stage.is_last:
                        finished = packets
                    else:
                        outgoing = self.endpoint.send(packets, stage + 1, label="packet")
                incoming = None
                following = rounds[current + 1 - first] if first <= current + 1 <= last else None
                if not self.stage.is_first and following is not None and any(following.rows):
                    buffer = self._empty_packets(self.stage.stages, *following.shape)
                    incoming = self.endpoint.post_recv(buffer, stage - 1, label="packet")
                if first <= tick - self.ahead:
                    yield self._scatter_signals(rounds[0], finished)
                    rounds.popleft()
                    first += 1
                tick += 1
        except GeneratorExit:  # closed early: messages between two stages are received and dropped
            for message in (incoming, outgoing):
                if message is not None:
                    message.wait()
            raise

    def close(self) -> None:
        """Nothing to do: the stages run on the ranks that use them. See `RemoteTeacher.close`."""

    def _share_tokens(self, batch: TokenBatch) -> _Round:
        moved = batch.to(self.stage.device)
        rows, positions = batch.peer_rows or (len(batch),) * self.stage.stages, moved.positions
        assert rows[self.stage.stage] == len(batch)
        if not any(rows):
            return _Round(batch, rows, moved.tokens, positions)
        with timeline.span(timeline.WAIT, "share tokens"):
            if positions is not None:  # hidden states do not show a stage where documents begin
                positions = all_gather_rows(_with_rows(positions, max(rows)), self.group)
            tokens = all_gather_rows(_with_rows(moved.tokens, max(rows)), self.group)
            return _Round(batch, rows, tokens, positions)

    def _work(self, current: _Round, incoming: Message | None) -> Tensor:
        """[g, bytes]: a round through this stage."""
        stages = self.stage.stages
        positions = [None] * stages if current.positions_gBS is None else current.positions_gBS.chunk(stages)
        arrived = None if incoming is None else incoming.wait()
        with timeline.timed(timeline.Part.STAGE):
            packets = self._empty_packets(stages, *current.shape, final=self.stage.is_last)
            tokens = current.tokens_gBS.chunk(stages)
            inputs = zip(packets, self._inputs(current, arrived), positions, tokens, current.rows, strict=True)
            for packet, (x, digests_B), positions_BS, tokens_BS, rows in inputs:
                if rows:
                    hidden = self.stage(x, None if positions_BS is None else positions_BS[:rows], tokens_BS[:rows])
                    size = self._packet_bytes(rows, current.shape[1], final=self.stage.is_last)
                    pack(digests_B, hidden, out=packet[:size])
            return packets

    def _inputs(self, current: _Round, arrived: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
        """The input of this stage for each micro-batch (tokens, or hidden states that arrived), and its digests."""
        stages = self.stage.stages
        if self.stage.is_first:
            digests_gB = token_digest(current.tokens_gBS)
            chunks = zip(current.tokens_gBS.chunk(stages), digests_gB.chunk(stages), current.rows, strict=True)
            yield from ((tokens[:rows], digests[:rows]) for tokens, digests, rows in chunks)
            return
        assert arrived is not None, "the stage before sent nothing"
        for packet, rows in zip(arrived, current.rows, strict=True):
            yield self._unpack(packet, rows, current.shape[1])

    def _scatter_signals(self, oldest: _Round, finished: Tensor | None) -> TeacherSignal:
        """This rank's part of a round, from the last stage."""
        (B, S), own = oldest.shape, len(oldest.batch)
        if B:
            kind, name = (timeline.SEND, "send answers") if self.stage.is_last else (timeline.WAIT, "wait for answer")
            with timeline.span(kind, name):
                packets = scatter_rows(
                    finished, self._empty_packets(1, B, S, final=True), source=self.stage.stages - 1, group=self.group
                )
        if not own:
            hidden = torch.empty(self.stage.hidden_shape(0, S), dtype=self.stage.dtype, device=self.stage.device)
            return TeacherSignal(hidden.flatten(0, 1), oldest.batch.slots, oldest.batch.digests)
        # After the last collective of the tick: a rank that stops here leaves no other one waiting in it.
        hidden_BSE, digests_B = self._unpack(packets[0], own, S, final=True)
        return checked_signal(hidden_BSE, oldest.batch.slots, digests_B)

    def _packet_bytes(self, B: int, S: int, *, final: bool = False) -> int:
        return INT64_BYTES * B + math.prod(self._shape(B, S, final=final)) * self.stage.dtype.itemsize

    def _shape(self, B: int, S: int, *, final: bool) -> tuple[int, int, int]:
        return self.stage.hidden_shape(B, S) if final else self.stage.packet_shape(B, S)

    def _empty_packets(self, count: int, B: int, S: int, *, final: bool = False) -> Tensor:
        """[count, bytes]; `final`: of what the last stage gives, not of what a stage hands on."""
        return torch.empty(count, self._packet_bytes(B, S, final=final), dtype=torch.uint8, device=self.stage.device)

    def _unpack(self, packet: Tensor, B: int, S: int, *, final: bool = False) -> tuple[Tensor, Tensor]:
        """Hidden states [B, S, ..], copied to be aligned for matrix kernels, and digests [B]."""
        digests_B, payload = unpack(packet[: self._packet_bytes(B, S, final=final)], B)
        return payload.clone().view(self.stage.dtype).view(self._shape(B, S, final=final)), digests_B


def _with_rows(rows: Tensor, number: int) -> Tensor:
    """[number, S]: the rows, then others that nobody reads."""
    return rows if len(rows) == number else torch.cat([rows, rows.new_zeros(number - len(rows), rows.shape[1])])
