"""Room `teacher`: a teacher that has ranks of its own, and how the student's ranks ask it. It knows no student.

Legend: B sequences of a client's micro-batch, S tokens of each, E width.

A client sends *requests* (tokens, slots), `queue` of them at most before the oldest is answered: that bounds what
waits on either side. The first stage takes one request of each client in turn; its *parcels* go from stage to stage,
each stage working as they come, and the last one sends the *answer* back: hidden states, slots, and the digests of the
tokens that the first stage read. Requests come in *conversations*, one for each `signals`, of which a server sees no
end: all clients of it ask as much in each. A client that will ask no more says stop.
"""

import time
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megadistill import timeline
from megadistill.distributed.bridge import Bridge, Message
from megadistill.errors import OperatorFault
from megadistill.teacher.codec import Wire
from megadistill.teacher.stage import TeacherStage
from megadistill.types import TeacherSignal, TokenBatch, token_digest

RECEIVES = 2
"""Parcels that a stage expects at a time."""

_STOP, _WORK, _RECORDED_WORK = 0, 1, 2
"""The first number of a request. Recorded: in a step that is; the stages then record what they do."""


@dataclass(frozen=True)
class RequestForm:
    """How a micro-batch travels: [1 + B·(1 + S)] int64, with positions [1 + B·(1 + 2·S)]."""

    B: int
    S: int
    masked: bool

    def __len__(self) -> int:
        return 1 + self.B * (1 + self.S * (2 if self.masked else 1))

    def written(self, batch: TokenBatch | None, device: torch.device) -> Tensor:
        """None: stop."""
        if batch is None:
            return torch.full((len(self),), _STOP, dtype=torch.int64, device=device)
        assert batch.tokens.shape == (self.B, self.S), "the micro-batches of a run have one shape"
        parts = [torch.tensor([_RECORDED_WORK if timeline.recording() else _WORK]), batch.slots, batch.tokens.flatten()]
        if self.masked:
            assert batch.positions is not None
            parts.append(batch.positions.flatten())
        return torch.cat(parts).to(device)

    def read(self, request: Tensor) -> tuple[bool, Tensor, Tensor, Tensor | None] | None:
        """Whether it is recorded, slots [B], tokens [B, S], positions [B, S]; None: stop."""
        asked = request[0].item()
        if asked == _STOP:
            return None
        slots, rest = request[1 : 1 + self.B], request[1 + self.B :].view(-1, self.B, self.S)
        return asked == _RECORDED_WORK, slots, rest[0], rest[1] if self.masked else None


class RemoteTeacher:
    """A client's side: what `TeacherPipeline` is where the teacher lives on the same ranks."""

    def __init__(self, bridge: Bridge, form: RequestForm, wire: Wire, *, queue: int, device: torch.device) -> None:
        roles = bridge.roles
        replica = roles.replica(bridge.rank)
        self._bridge, self._form, self._wire = bridge, form, wire
        self._first, self._last = roles.rank_of(replica, 0), roles.rank_of(replica, roles.stages - 1)
        self._queue = queue
        self._device = device
        self._asked: deque[tuple[TokenBatch, Message, Message]] = deque()
        self.waited = 0.0
        """Seconds that this rank has waited for answers."""

    @property
    def ahead(self) -> int:
        """Micro-batches that are asked for after one before it is answered."""
        return self._queue - 1

    def bytes_in_flight(self, B: int, S: int) -> int:
        """What a rank holds for answers under way, at most."""
        return self._queue * self._wire.bytes(B, S)

    def signals(self, batches: Iterator[TokenBatch]) -> Generator[TeacherSignal, None, None]:
        """As `TeacherPipeline.signals`. The teacher listens on when they end, or are closed early: see `dismiss`.

        Raises:
            OperatorFault: the hidden states are not finite.
        """
        self._drop()
        more = True
        while True:
            while more and len(self._asked) < self._queue:
                batch = next(batches, None)
                if batch is None:
                    more = False
                else:
                    self._asked.append(self._ask(batch))
            if not self._asked:
                return
            batch, request, answer = self._asked.popleft()
            request.wait()
            began = time.perf_counter()
            arrived = answer.wait()
            self.waited += time.perf_counter() - began
            yield self._signal(batch, arrived)

    def dismiss(self) -> None:
        """Tells the teacher that this client asks no more; it ends when all of them have. Once, at the end of a run."""
        self._drop()
        self._bridge.send(self._form.written(None, self._device), self._first, what="request").wait()

    def _drop(self) -> None:
        """Receives what the last conversation asked for and did not take.

        Not when it is closed: where an error closes it, other clients may ask no more, and their turn would be waited
        for.
        """
        while self._asked:
            _, request, answer = self._asked.popleft()
            request.wait()
            answer.wait()

    def _ask(self, batch: TokenBatch) -> tuple[TokenBatch, Message, Message]:
        empty = torch.empty(self._wire.bytes(self._form.B, self._form.S), dtype=torch.uint8, device=self._device)
        answer = self._bridge.expect(empty, self._last, what="answer")
        request = self._bridge.send(self._form.written(batch, self._device), self._first, what="request")
        return batch, request, answer

    def _signal(self, batch: TokenBatch, answer: Tensor) -> TeacherSignal:
        hidden_BSE, slots_B, digests_B = self._wire.unpack(answer, self._form.B, self._form.S)
        finite = hidden_BSE.sum(dtype=torch.float32).isfinite()
        *tags, is_finite = torch.cat([slots_B, digests_B, finite.long().unsqueeze(0)]).tolist()
        if not is_finite:
            raise OperatorFault(
                f"the teacher's hidden states are not finite in slots {batch.slots.tolist()}: check its weights and "
                "its dtype before starting again"
            )
        slots, digests = torch.tensor(tags[: self._form.B]), torch.tensor(tags[self._form.B :])
        return TeacherSignal(hidden=hidden_BSE.flatten(0, 1), slots=slots, digests=digests)


@dataclass(frozen=True)
class _Job:
    """A micro-batch on its way through the stages."""

    client: int
    recorded: bool
    slots_B: Tensor
    digests_B: Tensor
    positions_BS: Tensor | None
    x: Tensor
    """Tokens [B, S] on the first stage, hidden states [B, S, E] on the others."""


class TeacherServer:
    """A stage's side: answers until every client has dismissed it."""

    def __init__(self, stage: TeacherStage, bridge: Bridge, form: RequestForm, wire: Wire, *, queue: int) -> None:
        self._stage, self._bridge, self._form, self._wire, self._queue = stage, bridge, form, wire, queue
        roles = bridge.roles
        replica = roles.replica(bridge.rank)
        self._clients = list(roles.clients(replica))
        self._before = None if stage.is_first else roles.rank_of(replica, stage.stage - 1)
        self._after = None if stage.is_last else roles.rank_of(replica, stage.stage + 1)
        self._going: deque[Message] = deque()
        self._name = f"teacher stage {stage.stage}"

    @torch.no_grad()
    def answers(self) -> Iterator[int]:
        """Works until the last client has dismissed it; after each micro-batch, how many passed through this stage.

        On its way are two receives at most, and `queue` sends a client.
        """
        for answered, job in enumerate(self._jobs(), 1):
            timeline.follow(job.recorded)
            with timeline.span(timeline.COMPUTE, self._name, answered):
                y = self._stage(job.x, job.positions_BS)
                last = self._after is None
                message = self._wire.pack(y, job.slots_B, job.digests_B) if last else self._parcel(job, y)
            self._send(message, job.client if self._after is None else self._after)
            yield answered
        if self._after is not None:
            for _ in range(RECEIVES):  # one for each receive that is posted there
                self._send(self._parcel(None, None), self._after)
        while self._going:
            self._going.popleft().wait()

    def _jobs(self) -> Iterator[_Job]:
        return self._asked() if self._before is None else self._arrived()

    def _asked(self) -> Iterator[_Job]:
        """One request of each client in turn; the next one of each is always expected."""
        coming = {client: self._expected_request(client) for client in self._clients}
        while coming:
            for client in list(coming):
                found = self._form.read(coming[client].wait())
                if found is None:
                    del coming[client]
                    continue
                recorded, slots_B, tokens_BS, positions_BS = found
                coming[client] = self._expected_request(client)
                yield _Job(client, recorded, slots_B, token_digest(tokens_BS), positions_BS, tokens_BS)

    def _expected_request(self, client: int) -> Message:
        buffer = torch.empty(len(self._form), dtype=torch.int64, device=self._stage.device)
        return self._bridge.expect(buffer, client, what="request")

    def _arrived(self) -> Iterator[_Job]:
        """From the stage before, received ahead: one is worked on while the next one comes."""
        coming = deque(self._expected_parcel() for _ in range(RECEIVES))
        while (job := self._unpacked(coming.popleft().wait())) is not None:
            coming.append(self._expected_parcel())
            yield job
        for parcel in coming:
            parcel.wait()

    def _expected_parcel(self) -> Message:
        assert self._before is not None
        buffer = torch.empty(self._parcel_bytes, dtype=torch.uint8, device=self._stage.device)
        return self._bridge.expect(buffer, self._before, what="parcel")

    def _send(self, message: Tensor, to: int) -> None:
        self._going.append(self._bridge.send(message, to, what="answer" if self._after is None else "parcel"))
        if len(self._going) > self._queue * len(self._clients):
            self._going.popleft().wait()

    # A parcel: client (or -1 for stop), whether its step is recorded, slots, digests and positions as int64, then the
    # hidden states.

    @property
    def _head(self) -> int:
        """int64 numbers in front of the hidden states."""
        B, S = self._form.B, self._form.S
        return 2 + 2 * B + (B * S if self._form.masked else 0)

    @property
    def _parcel_bytes(self) -> int:
        elements = torch.Size(self._stage.hidden_shape(self._form.B, self._form.S)).numel()
        return 8 * self._head + elements * self._stage.dtype.itemsize

    def _parcel(self, job: _Job | None, hidden_BSE: Tensor | None) -> Tensor:
        parcel = torch.zeros(self._parcel_bytes, dtype=torch.uint8, device=self._stage.device)
        head = parcel[: 8 * self._head].view(torch.int64)
        if job is None or hidden_BSE is None:
            head[0] = -1
            return parcel
        parts = [head.new_tensor([job.client, job.recorded]), job.slots_B, job.digests_B]
        if job.positions_BS is not None:
            parts.append(job.positions_BS.flatten())
        head.copy_(torch.cat(parts))
        parcel[8 * self._head :] = hidden_BSE.flatten().view(torch.uint8)
        return parcel

    def _unpacked(self, parcel: Tensor) -> _Job | None:
        B, S = self._form.B, self._form.S
        head = parcel[: 8 * self._head].view(torch.int64)
        client, recorded = head[:2].tolist()
        if client < 0:
            return None
        hidden = parcel[8 * self._head :].view(self._stage.dtype).view(self._stage.hidden_shape(B, S))
        positions_BS = head[2 + 2 * B :].view(B, S) if self._form.masked else None
        return _Job(client, bool(recorded), head[2 : 2 + B], head[2 + B : 2 + 2 * B], positions_BS, hidden)
