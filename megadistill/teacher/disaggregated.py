"""A teacher with ranks of its own: its server, and the client on the student's ranks.

Legend: B sequences of a client's micro-batch, S tokens of each, E width.

A client sends *requests* (tokens, slots; in host memory, where they are made), at most `queue` of them before the
oldest is answered: that bounds what waits on either side. The first stage takes one request of each client in turn; its
*packets* go from stage to stage, each stage working as they come, and the last one sends the *answer* back: hidden
states, slots, and the digests of the tokens that the first stage read. Requests come in *streams*, one for each call of
`signals`, which a server cannot tell apart: all its clients send as many requests in each. A client that has no more
requests sends a stop.
"""

import math
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megadistill import timeline
from megadistill.distributed.bridge import Bridge
from megadistill.distributed.p2p import Message
from megadistill.teacher.codec import INT64_BYTES, ActivationCodec, checked_signal, pack, unpack
from megadistill.teacher.stage import Stage
from megadistill.types import TeacherSignal, TokenBatch, to_device, token_digest

_STOP, _WORK, _RECORDED_WORK = 0, 1, 2
"""Kinds of requests. Recorded: the client records a timeline of the step, so the stages do too."""

_KINDS = 3
"""Number of kinds. The first number of a request is its kind, plus this times the number of its shape."""

TAGS = 3
"""Numbers in a packet's header before those of its rows."""


@dataclass(frozen=True)
class RequestCodec:
    """The packet of a request: [1 + B·(1 + S)] int64, with positions [1 + B·(1 + 2·S)].

    All packets have the size of the largest shape: a receive is posted before the shape is known.
    """

    B: int
    S: int
    masked: bool
    more: tuple[tuple[int, int], ...] = ()
    """Other shapes (B, S) that micro-batches may have, those of further curriculum entries."""

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """(B, S) of every micro-batch, by number."""
        return ((self.B, self.S), *self.more)

    def __len__(self) -> int:
        return 1 + max(B * (1 + S * (2 if self.masked else 1)) for B, S in self.shapes)

    def encode(self, batch: TokenBatch | None) -> Tensor:
        """The request for a batch, on the host; for None a stop."""
        if batch is None:
            return torch.full((len(self),), _STOP, dtype=torch.int64)
        B, S = batch.tokens.shape
        assert (B, S) in self.shapes, f"micro-batches have the shapes {self.shapes}, not {(B, S)}"
        first = _KINDS * self.shapes.index((B, S)) + (_RECORDED_WORK if timeline.recording() else _WORK)
        parts = [torch.tensor([first]), batch.slots, batch.tokens.flatten()]
        if self.masked:
            assert batch.positions is not None
            parts.append(batch.positions.flatten())
        packet = torch.cat(parts)
        return torch.nn.functional.pad(packet, (0, len(self) - len(packet))) if self.more else packet

    def decode(self, request: Tensor) -> tuple[bool, Tensor, Tensor, Tensor | None] | None:
        """Whether the step is recorded, slots [B], tokens [B, S], positions [B, S]; None for a stop."""
        number, work = divmod(int(request[0].item()), _KINDS)
        if work == _STOP:
            return None
        B, S = self.shapes[number]
        slots, rest = request[1 : 1 + B], request[1 + B :][: B * S * (2 if self.masked else 1)].view(-1, B, S)
        return work == _RECORDED_WORK, slots, rest[0], rest[1] if self.masked else None


class RemoteTeacher:
    """The client: takes the place of `TeacherPipeline` where the teacher has ranks of its own."""

    def __init__(
        self, bridge: Bridge, requests: RequestCodec, answers: ActivationCodec, *, queue: int, device: torch.device
    ) -> None:
        self._bridge, self._requests, self._answers = bridge, requests, answers
        self._first, self._last = bridge.stages[0], bridge.stages[-1]
        self._queue = queue
        self._device = device
        self._in_flight: deque[tuple[Message, Message, tuple[int, int]]] = deque()
        """Request, answer and shape (B, S) of each micro-batch, the oldest first."""

    @property
    def ahead(self) -> int:
        """Micro-batches that are requested after one before it is answered."""
        return self._queue - 1

    def bytes_in_flight(self, B: int, S: int) -> int:
        """Upper bound on the bytes of answers under way that a rank holds."""
        return self._queue * self._answers.bytes(B, S)

    def signals(self, batches: Iterator[TokenBatch]) -> Generator[TeacherSignal, None, None]:
        """Like `TeacherPipeline.signals`. The server keeps running when they end, or are closed early: see `close`.

        Raises:
            OperatorFault: the hidden states are not finite.
        """
        self._drop_answers()
        more = True
        while True:
            while more and len(self._in_flight) < self._queue:
                batch = next(batches, None)
                if batch is None:
                    more = False
                else:
                    self._send_request(batch)
            if not self._in_flight:
                return
            request, answer, shape = self._in_flight.popleft()
            request.wait()
            yield checked_signal(*self._answers.decode(answer.wait(), *shape))

    def close(self) -> None:
        """Sends a stop to the server, which ends when all clients have. Call it once, at the end of a run."""
        self._drop_answers()
        self._bridge.on_host.send(self._requests.encode(None), self._first, label="request").wait()

    def _drop_answers(self) -> None:
        """Receives the answers that the last stream requested and did not take.

        Not done when a stream is closed: where an error closes it, other clients may send no more requests, and the
        answers would have to wait for their turn.
        """
        while self._in_flight:
            request, answer, _ = self._in_flight.popleft()
            request.wait()
            answer.wait()

    def _send_request(self, batch: TokenBatch) -> None:
        request = self._bridge.on_host.send(self._requests.encode(batch), self._first, label="request")
        B, S = batch.tokens.shape
        size = self._answers.bytes(B, S)
        buffer = torch.empty(size, dtype=torch.uint8, device=self._device)
        answer = self._bridge.on_device.post_recv(buffer, self._last, label="answer")
        self._in_flight.append((request, answer, (B, S)))


@dataclass(frozen=True)
class _Job:
    """A micro-batch on its way through the stages."""

    client: int
    """Its place in the bridge's groups."""
    is_recorded: bool
    slots_B: Tensor
    digests_B: Tensor
    positions_BS: Tensor | None
    tokens_BS: Tensor | None
    """None on later stages, but of a teacher whose layers read inputs of their own."""
    x: Tensor
    """Tokens [B, S] on the first stage, hidden states [B, S, E] on the others."""
    shape: tuple[int, int]
    """(B, S)"""


class TeacherServer:
    """The server: one stage, at work until every client has sent a stop."""

    def __init__(
        self, stage: Stage, bridge: Bridge, requests: RequestCodec, answers: ActivationCodec, *, queue: int
    ) -> None:
        self._stage, self._bridge, self._requests, self._answers = stage, bridge, requests, answers
        self._queue = queue
        self._previous = None if stage.is_first else bridge.stages[stage.stage - 1]
        self._next = None if stage.is_last else bridge.stages[stage.stage + 1]
        self._outgoing: deque[Message] = deque()
        self._name = f"teacher stage {stage.stage}"

    @torch.no_grad()
    def serve(self) -> Iterator[int]:
        """Works until the last client has sent a stop; yields the number of micro-batches done after each.

        Under way are `queue` sends a client at most, and one receive of a packet, posted behind the send of the one
        before: a device may run all messages in the order of issue, and clients need not request more before that
        one is answered. The host waits for the device where it reads a packet's header, so not on the first stage.
        """
        jobs = self._jobs_of_clients() if self._previous is None else self._jobs_of_stage(self._previous)
        for done, job in enumerate(jobs, 1):
            timeline.follow(job.is_recorded)
            with timeline.span(timeline.COMPUTE, self._name, done):
                y = self._stage(job.x, job.positions_BS, job.tokens_BS)
                if self._next is None:
                    message = self._answers.encode(y, job.slots_B, job.digests_B)
                else:
                    message = self._encode_job(job, y)
            self._send(message, job.client if self._next is None else self._next)
            yield done
        if self._next is not None:
            stop = torch.full((self._packet_bytes,), 0xFF, dtype=torch.uint8, device=self._stage.device)
            self._send(stop, self._next)
        while self._outgoing:
            self._outgoing.popleft().wait()

    def _jobs_of_clients(self) -> Iterator[_Job]:
        """One request of each client in turn; the receive of each one's next request is always posted."""
        device = self._stage.device
        requests = {client: self._receive_request(client) for client in self._bridge.clients}
        while requests:
            for client in list(requests):
                request = self._requests.decode(requests[client].wait())
                if request is None:
                    del requests[client]
                    continue
                is_recorded, slots_B, tokens_BS, positions_BS = request
                requests[client] = self._receive_request(client)
                slots_B, tokens_BS = to_device(slots_B, device), to_device(tokens_BS, device)
                if positions_BS is not None:
                    positions_BS = to_device(positions_BS, device)
                digests_B, (B, S) = token_digest(tokens_BS), tokens_BS.shape
                yield _Job(client, is_recorded, slots_B, digests_B, positions_BS, tokens_BS, tokens_BS, (B, S))

    def _receive_request(self, client: int) -> Message:
        buffer = torch.empty(len(self._requests), dtype=torch.int64)
        return self._bridge.on_host.post_recv(buffer, client, label="request")

    def _jobs_of_stage(self, previous: int) -> Iterator[_Job]:
        while (job := self._decode_job(self._receive_packet(previous).wait())) is not None:
            yield job

    def _receive_packet(self, previous: int) -> Message:
        buffer = torch.empty(self._packet_bytes, dtype=torch.uint8, device=self._stage.device)
        return self._bridge.on_device.post_recv(buffer, previous, label="packet")

    def _send(self, message: Tensor, to: int) -> None:
        label = "answer" if self._next is None else "packet"
        self._outgoing.append(self._bridge.on_device.send(message, to, label=label))
        if len(self._outgoing) > self._queue * len(self._bridge.clients):
            self._outgoing.popleft().wait()

    # The header of a packet: client (-1: stop), whether its step is recorded, the number of its shape, slots, digests,
    # positions and tokens. All packets have the size of the largest.

    def _header_numbers(self, B: int, S: int) -> int:
        return TAGS + 2 * B + B * S * (self._requests.masked + self._stage.reads_tokens)

    def _payload_bytes(self, B: int, S: int) -> int:
        return math.prod(self._stage.packet_shape(B, S)) * self._stage.dtype.itemsize

    @property
    def _packet_bytes(self) -> int:
        return max(
            INT64_BYTES * self._header_numbers(B, S) + self._payload_bytes(B, S) for B, S in self._requests.shapes
        )

    def _encode_job(self, job: _Job, hidden_BSE: Tensor) -> Tensor:
        B, S = job.shape
        number = self._requests.shapes.index(job.shape)
        tags = to_device(torch.tensor([job.client, job.is_recorded, number]), job.slots_B.device)
        header = [tags, job.slots_B, job.digests_B]
        if job.positions_BS is not None:
            header.append(job.positions_BS.flatten())
        if self._stage.reads_tokens:
            assert job.tokens_BS is not None, "the stage before has sent them"
            header.append(job.tokens_BS.flatten())
        numbers = torch.cat(header)
        packet = torch.empty(self._packet_bytes, dtype=torch.uint8, device=self._stage.device)
        pack(numbers, hidden_BSE, out=packet[: INT64_BYTES * len(numbers) + self._payload_bytes(B, S)])
        return packet

    def _decode_job(self, packet: Tensor) -> _Job | None:
        client, is_recorded, number = unpack(packet, TAGS)[0].tolist()
        if client < 0:
            return None
        B, S = self._requests.shapes[number]
        header, payload = unpack(packet, self._header_numbers(B, S))
        payload = payload[: self._payload_bytes(B, S)]
        header = header[TAGS:]
        further = list(header[2 * B :].view(-1, B, S))
        positions_BS = further.pop(0) if self._requests.masked else None
        tokens_BS = further.pop(0) if self._stage.reads_tokens else None
        hidden_BSE = payload.view(self._stage.dtype).view(self._stage.packet_shape(B, S))
        slots_B, digests_B = header[:B], header[B : 2 * B]
        return _Job(client, bool(is_recorded), slots_B, digests_B, positions_BS, tokens_BS, hidden_BSE, (B, S))
