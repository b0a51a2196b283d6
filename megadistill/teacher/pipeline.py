"""Room `teacher`: the stages as a pipeline that runs ahead, from the group's tokens to each rank's signal. No student.

Legend: g ranks of the group, which are the stages; B sequences of a rank's micro-batch, S tokens of each, E width.

A *round* is one micro-batch of each rank of the group. In a *beat* every stage works on one round, stage j on the one
that entered j beats ago: what it reads arrived during the beat before, and while the student used its answer. So no
stage waits for another within a beat, a round is answered g - 1 beats after it entered, and the pipeline is filled once
and drained once, however many steps and accumulation windows lie between.

A *parcel* is one micro-batch on its way: the bytes of its hidden states, then those of its digests. The digests are
taken where the tokens are read and leave the pipeline together with the hidden states, so a micro-batch that is lost,
doubled or delivered to the wrong rank does not answer that rank's batch.
"""

import time
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megadistill import timeline
from megadistill.distributed.collectives import all_gather_rows, scatter_rows
from megadistill.distributed.p2p import Arrival, StageLink
from megadistill.distributed.topology import Topology
from megadistill.errors import OperatorFault
from megadistill.teacher.stage import TeacherStage
from megadistill.types import TeacherSignal, TokenBatch, token_digest

_DIGEST_BYTES = torch.int64.itemsize


@dataclass(frozen=True)
class _Round:
    """What every rank knows of a round that is in the pipeline."""

    batch: TokenBatch
    """This rank's."""
    tokens_gBS: Tensor
    positions_gBS: Tensor | None


class TeacherPipeline:
    """The frozen teacher, one stage on each rank of the group."""

    def __init__(self, stage: TeacherStage, topology: Topology) -> None:
        assert (stage.stage, stage.stages) == (topology.group_rank, topology.group_size)
        self.stage = stage
        self.group = topology.pipeline_group
        self.link = StageLink(topology.pipeline_group, stage=stage.stage, stages=stage.stages)
        self._name = f"teacher stage {stage.stage}"
        self.waited = 0.0
        """Seconds that this rank has waited for other stages."""

    @property
    def ahead(self) -> int:
        """Micro-batches of each rank that enter after one before it is answered."""
        return self.link.stages - 1

    def bytes_in_flight(self, B: int, S: int) -> int:
        """What a rank holds of rounds under way, at most: what it receives, and what it sends."""
        return 2 * self.link.stages * self._parcel_bytes(B, S) if self.ahead else 0

    @torch.no_grad()
    def signals(self, batches: Iterator[TokenBatch]) -> Generator[TeacherSignal, None, None]:
        """The teacher's final hidden states for each of this rank's `batches`, in order.

        `batches` is read `ahead` of what has been answered. Collective: all ranks have as many batches, of the same
        shapes, and take as many signals; then any of them may close the iterator, if all do. All ranks run the same
        operations in the same order, on the pipeline's own group. The host waits for the device twice a beat: on the
        first stage for the tokens' digests, before a layer is queued, and on every rank at the end.

        Raises:
            OperatorFault: this rank's hidden states are not finite: the teacher is broken, and a restart repeats it.
        """
        rounds: deque[_Round] = deque()
        first = beat = 0  # the oldest round under way, and the one that enters
        coming: Arrival | None = None
        going: Arrival | None = None
        try:
            while True:
                batch = next(batches, None)
                if batch is not None:
                    rounds.append(self._entered(batch))
                if not rounds:
                    return
                last = first + len(rounds) - 1
                mine = beat - self.link.stage
                finished = None
                if first <= mine <= last:
                    with timeline.span(timeline.COMPUTE, self._name, mine):
                        parcels = self._work(rounds[mine - first], coming)
                    if going is not None:
                        self._wait(going)
                    going = None
                    if self.link.is_last:
                        finished = parcels
                    else:
                        going = self.link.send(parcels)
                coming = None
                if not self.link.is_first and first <= mine + 1 <= last:
                    coming = self.link.expect(self._empty_parcels(rounds[mine + 1 - first]))
                if first <= beat - self.ahead:
                    yield self._answer(rounds[0], finished)
                    rounds.popleft()
                    first += 1
                beat += 1
        except GeneratorExit:  # closed early: what is between two stages is taken off the wire
            for arrival in (coming, going):
                if arrival is not None:
                    arrival.wait()
            raise

    def dismiss(self) -> None:
        """Nobody waits for more: the stages are the ranks that ask. See `RemoteTeacher.dismiss`."""

    def _entered(self, batch: TokenBatch) -> _Round:
        positions = batch.positions
        with timeline.span(timeline.WAIT, "share tokens"):
            if positions is not None:  # every stage must know where documents begin, and cannot tell from hidden states
                positions = all_gather_rows(positions.to(self.stage.device), self.group)
            return _Round(batch, all_gather_rows(batch.tokens.to(self.stage.device), self.group), positions)

    def _work(self, entered: _Round, coming: Arrival | None) -> Tensor:
        """[g, bytes]: a round through this stage."""
        stages = self.link.stages
        positions = [None] * stages if entered.positions_gBS is None else entered.positions_gBS.chunk(stages)
        done = [
            _pack(self.stage(x, positions_BS), digests_B)
            for (x, digests_B), positions_BS in zip(self._read(entered, coming), positions, strict=True)
        ]
        return torch.stack(done)

    def _read(self, entered: _Round, coming: Arrival | None) -> Iterator[tuple[Tensor, Tensor]]:
        """What this stage reads of each micro-batch, and its digests: tokens, or the hidden states that arrived."""
        stages = self.link.stages
        if self.link.is_first:
            digests_gB = token_digest(entered.tokens_gBS)
            yield from zip(entered.tokens_gBS.chunk(stages), digests_gB.chunk(stages), strict=True)
            return
        assert coming is not None, "the stage before sent nothing"
        for parcel in self._wait(coming):
            yield self._unpack(parcel, *entered.batch.tokens.shape)

    def _answer(self, entered: _Round, finished: Tensor | None) -> TeacherSignal:
        """This rank's part of a round, from the last stage."""
        B, S = entered.batch.tokens.shape
        began = time.perf_counter()
        kind, name = (timeline.SEND, "send answers") if self.link.is_last else (timeline.WAIT, "wait for answer")
        with timeline.span(kind, name):
            parcel = scatter_rows(
                finished, self._empty_parcel(B, S).unsqueeze(0), source=self.link.stages - 1, group=self.group
            )[0]
        self.waited += time.perf_counter() - began
        hidden_BSE, digests_B = self._unpack(parcel, B, S)
        # One number instead of B·S·E flags: a NaN or an infinity stays one in the sum. It crosses to the host with the
        # digests, after the last collective, so a rank that stops here leaves nobody waiting inside this beat.
        finite = hidden_BSE.sum(dtype=torch.float32).isfinite()
        *digests, is_finite = torch.cat([digests_B, finite.long().unsqueeze(0)]).tolist()
        slots = entered.batch.slots
        if not is_finite:
            raise OperatorFault(
                f"the teacher's hidden states are not finite in slots {slots.tolist()}: check its weights and "
                f"its dtype ({self.stage.dtype}) before starting again"
            )
        return TeacherSignal(hidden=hidden_BSE.flatten(0, 1), slots=slots, digests=torch.tensor(digests))

    def _wait(self, arrival: Arrival) -> Tensor:
        began = time.perf_counter()
        arrived = arrival.wait()
        self.waited += time.perf_counter() - began
        return arrived

    def _parcel_bytes(self, B: int, S: int) -> int:
        elements = torch.Size(self.stage.hidden_shape(B, S)).numel()
        return elements * self.stage.dtype.itemsize + B * _DIGEST_BYTES

    def _empty_parcel(self, B: int, S: int) -> Tensor:
        return torch.empty(self._parcel_bytes(B, S), dtype=torch.uint8, device=self.stage.device)

    def _empty_parcels(self, entered: _Round) -> Tensor:
        """[g, bytes]"""
        parcel = self._empty_parcel(*entered.batch.tokens.shape)
        return parcel.new_empty(self.link.stages, len(parcel))

    def _unpack(self, parcel: Tensor, B: int, S: int) -> tuple[Tensor, Tensor]:
        """Both are copied, to be aligned for matrix kernels."""
        hidden_bytes = len(parcel) - B * _DIGEST_BYTES
        hidden_BSE = parcel[:hidden_bytes].clone().view(self.stage.dtype).view(self.stage.hidden_shape(B, S))
        return hidden_BSE, parcel[hidden_bytes:].clone().view(torch.int64)


def _pack(hidden_BSE: Tensor, digests_B: Tensor) -> Tensor:
    return torch.cat([hidden_BSE.flatten().view(torch.uint8), digests_B.contiguous().view(torch.uint8)])
