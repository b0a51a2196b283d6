"""Room `teacher`: the stages as a pipeline, from the group's tokens to each rank's signal. It knows no student.

Legend: g ranks of the group, which are the stages; B sequences of a rank's micro-batch, S tokens of each, E width.

A *parcel* is one micro-batch on its way: the bytes of its hidden states, then those of its digests, in one message. The
digests are taken where the tokens are read and leave the pipeline together with the hidden states, so a micro-batch
that is lost, doubled or delivered to the wrong rank does not answer that rank's batch.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from megadistill.comm.collectives import all_gather_rows, scatter_rows
from megadistill.comm.links import StageLink
from megadistill.comm.topology import Topology
from megadistill.errors import OperatorFault
from megadistill.records import TeacherSignal, TokenBatch, token_digest
from megadistill.teacher.stage import TeacherStage

_DIGEST_BYTES = torch.int64.itemsize


class TeacherPipeline:
    """The frozen teacher, one stage on each rank of the group."""

    def __init__(self, stage: TeacherStage, topology: Topology) -> None:
        assert (stage.stage, stage.stages) == (topology.group_rank, topology.group_size)
        self.stage = stage
        self.group = topology.pipeline_group
        self.link = StageLink(topology.pipeline_group, stage=stage.stage, stages=stage.stages)

    @torch.no_grad()
    def signal(self, batch: TokenBatch) -> TeacherSignal:
        """The teacher's final hidden states for this rank's `batch`. Collective; B and S are the same on every rank.

        Every rank's micro-batch passes through every stage. All ranks run a gather, their links and a scatter, in this
        order, and links point one way, so no two ranks wait for each other. The host waits for the device twice: on
        the first stage for the tokens' digests, before a layer is queued, and on every rank at the end.

        Raises:
            OperatorFault: this rank's hidden states are not finite: the teacher is broken, and a restart repeats it.
        """
        tokens_gBS = all_gather_rows(batch.tokens.to(self.stage.device), self.group)
        # Every stage needs to know where documents begin, and cannot tell from hidden states.
        positions = batch.positions
        if positions is not None:
            positions = all_gather_rows(positions.to(self.stage.device), self.group)
        finished = self._wave(tokens_gBS, positions)
        B, S = batch.tokens.shape
        parcel = scatter_rows(
            torch.stack(finished) if self.link.is_last else None,
            self._empty_parcel(B, S).unsqueeze(0),
            source=self.link.stages - 1,
            group=self.group,
        )[0]
        hidden_BSE, digests_B = self._unpack(parcel, B, S)
        # One number instead of B·S·E flags: a NaN or an infinity stays one in the sum. It crosses to the host with the
        # digests, after the last collective, so a rank that stops here leaves nobody waiting inside this call.
        finite = hidden_BSE.sum(dtype=torch.float32).isfinite()
        *digests, is_finite = torch.cat([digests_B, finite.long().unsqueeze(0)]).tolist()
        if not is_finite:
            raise OperatorFault(
                f"the teacher's hidden states are not finite in slots {batch.slots.tolist()}: check its weights and "
                f"its dtype ({self.stage.dtype}) before starting again"
            )
        return TeacherSignal(hidden=hidden_BSE.flatten(0, 1), slots=batch.slots, digests=torch.tensor(digests))

    def _wave(self, tokens_gBS: Tensor, positions_gBS: Tensor | None) -> list[Tensor]:
        """Each rank's micro-batch through this stage; g finished parcels on the last stage, else none."""
        finished, sends = [], []
        stages = self.link.stages
        positions = [None] * stages if positions_gBS is None else positions_gBS.chunk(stages)
        for (x, digests_B), positions_BS in zip(self._arrivals(tokens_gBS), positions, strict=True):
            parcel = _pack(self.stage(x, positions_BS), digests_B)
            if self.link.is_last:
                finished.append(parcel)
            else:
                sends.append(self.link.send(parcel))
        for send in sends:
            send.wait()
        return finished

    def _arrivals(self, tokens_gBS: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """What this stage reads, and its digests: tokens on the first stage, else hidden states, received one ahead."""
        micro_batches = tokens_gBS.chunk(self.link.stages)
        if self.link.is_first:
            digests_gB = token_digest(tokens_gBS).to(tokens_gBS.device)
            yield from zip(micro_batches, digests_gB.chunk(self.link.stages), strict=True)
            return
        B, S = micro_batches[0].shape
        coming = self.link.expect(self._empty_parcel(B, S))
        for left in reversed(range(self.link.stages)):
            parcel = coming.wait()
            if left:
                coming = self.link.expect(self._empty_parcel(B, S))
            yield self._unpack(parcel, B, S)

    def _empty_parcel(self, B: int, S: int) -> Tensor:
        hidden_bytes = torch.Size(self.stage.hidden_shape(B, S)).numel() * self.stage.dtype.itemsize
        return torch.empty(hidden_bytes + B * _DIGEST_BYTES, dtype=torch.uint8, device=self.stage.device)

    def _unpack(self, parcel: Tensor, B: int, S: int) -> tuple[Tensor, Tensor]:
        """Hidden states come first, aligned for matrix kernels; the tail is copied, to be aligned as well."""
        hidden_bytes = len(parcel) - B * _DIGEST_BYTES
        hidden_BSE = parcel[:hidden_bytes].view(self.stage.dtype).view(self.stage.hidden_shape(B, S))
        return hidden_BSE, parcel[hidden_bytes:].clone().view(torch.int64)


def _pack(hidden_BSE: Tensor, digests_B: Tensor) -> Tensor:
    return torch.cat([hidden_BSE.flatten().view(torch.uint8), digests_B.contiguous().view(torch.uint8)])
