"""The times of a step on a device whose queue the host is ahead of: each part is charged with its own work alone.

The device is simulated; student, teacher's stage and loss are doubles that queue work of known lengths. With a host's
clock in place of the device's, every one of these times is another.
"""

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megadistill import timeline
from megadistill.distributed.p2p import Message
from megadistill.models.experts import RouterCoefs
from megadistill.teacher import disaggregated, pipeline
from megadistill.teacher.codec import ActivationCodec
from megadistill.teacher.disaggregated import RemoteTeacher, RequestCodec
from megadistill.teacher.pipeline import TeacherPipeline
from megadistill.timeline.clock import DeviceClock, HostClock
from megadistill.timeline.stopwatch import StepSeconds
from megadistill.train import loop
from megadistill.train.hooks.hook import StepEvent
from megadistill.train.lookahead import StepBatches
from megadistill.train.objective import Objective
from megadistill.train.resilience import stragglers
from megadistill.train.resume_point import ResumePoint
from megadistill.train.teacher.protocol import Teacher
from megadistill.train.teacher.targets import StudentOutput, TargetedBatch
from megadistill.train.telemetry.rank_flops import RankFlops
from megadistill.types import METRIC_NAMES, Cursor, LogitTransform, LossTerms, TokenBatch, token_digest
from tests.unit.simulated_device import SimulatedDevice
from tests.unit.train.cases import recipe, step_shape, topology

B, S, E, ACCUMULATION = 2, 4, 3, 4
STAGE, FORWARD, LOSS, BACKWARD, OPTIMIZER, ACCUMULATE = 3.0, 5.0, 2.0, 11.0, 7.0, 0.5
TOKENS_WAIT, ANSWER_WAIT, REMOTE_WAIT, DATA = 0.25, 0.125, 13.0, 0.0625
STUDENT = ACCUMULATION * (FORWARD + BACKWARD) + (ACCUMULATION - 1) * ACCUMULATE + OPTIMIZER


@pytest.fixture(name="device")
def simulated_device(monkeypatch: pytest.MonkeyPatch) -> SimulatedDevice:
    device = SimulatedDevice()
    device.patch(monkeypatch)
    for module in (pipeline, disaggregated):  # the digests of a micro-batch are read from the device
        monkeypatch.setattr(module, "checked_signal", _before(module.checked_signal, device.synchronize))
    return device


def _before(function: Callable[..., Any], first: Callable[[], None]) -> Callable[..., Any]:
    def both(*arguments: Any, **named: Any) -> Any:
        first()
        return function(*arguments, **named)

    return both


@pytest.fixture(name="clock", params=["device", "host"])
def clock_of_the_step(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    clock = DeviceClock(torch.device("meta")) if request.param == "device" else HostClock()
    monkeypatch.setattr(loop, "clock_for", lambda _: clock)
    return str(request.param)


class _Stage:
    """The whole teacher in one stage."""

    stage, stages, is_first, is_last = 0, 1, True, True
    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, device: SimulatedDevice) -> None:
        self._simulated = device

    def __call__(self, x: Tensor, positions_BS: Tensor | None, tokens_BS: Tensor) -> Tensor:
        self._simulated.queue(STAGE)
        return torch.zeros(*tokens_BS.shape, E)

    def hidden_shape(self, batch: int, sequence: int) -> tuple[int, int, int]:
        return batch, sequence, E

    packet_shape = hidden_shape


@dataclass(frozen=True)
class _Target:
    device: SimulatedDevice

    def loss(self, student: StudentOutput) -> LossTerms:
        self.device.queue(LOSS)
        terms: dict[str, Any] = dict.fromkeys(METRIC_NAMES, torch.ones(()))
        return LossTerms(**terms)

    def complete(self) -> None:
        return None


class _Teacher(Teacher):
    def __init__(self, signals: Any, device: SimulatedDevice) -> None:
        self._signals, self._device = signals, device

    def teacher_targets(self, batches: Iterator[TokenBatch]) -> Generator[TargetedBatch, None, None]:
        in_flight = []

        def entering() -> Iterator[TokenBatch]:
            for batch in batches:
                in_flight.append(batch)
                yield batch

        for signal in self._signals(entering()):
            signal.hidden_for(in_flight[0])
            yield TargetedBatch(in_flight.pop(0), _Target(self._device))


def _student(device: SimulatedDevice) -> Any:
    steps = iter([ACCUMULATE] * (ACCUMULATION - 1) + [OPTIMIZER])

    def step(_: float) -> float | None:
        seconds = next(steps)
        device.queue(seconds)
        if seconds == OPTIMIZER:  # the gradient norm is read
            device.synchronize()
            return 1.0
        return None

    def routed_hidden(*_: Any, differentiable: bool) -> tuple[Tensor, None]:
        device.queue(FORWARD)
        return torch.zeros(B * S, E), None

    head = SimpleNamespace(weight=lambda: torch.zeros(1, E), gradient=lambda: None, vocab=None)
    backward = _before(lambda _: None, lambda: device.queue(BACKWARD))
    return SimpleNamespace(routers=None, routed_hidden=routed_hidden, head=head, backward=backward, step=step)


def _data(device: SimulatedDevice) -> Iterator[tuple[TokenBatch, Cursor]]:
    device.host_works(DATA)
    tokens = torch.arange(ACCUMULATION * B * S).view(-1, S)
    starts = torch.zeros_like(tokens, dtype=torch.bool)
    yield TokenBatch(tokens, tokens, torch.arange(len(tokens)), token_digest(tokens), starts), Cursor("", len(tokens))


def _step(device: SimulatedDevice, signals: Any) -> StepEvent:
    """One step of the training loop."""
    made = recipe(Path("manifest.json"), Path("run"), teacher=Path("teacher"))
    objective = Objective(
        loss=made.loss, length=made.train.steps, seed=0, student_logits=LogitTransform(), router_coefs=RouterCoefs()
    )
    shape = step_shape(sequence_length=S, global_batch=B)
    trainer: Any = SimpleNamespace(
        step=1,
        _setup=SimpleNamespace(recipe=made),
        _topology=topology(),
        _student=_student(device),
        _objective=objective,
        _stops=SimpleNamespace(counts=dict),
        _recovery=SimpleNamespace(flags=dict, tokens=0),
        _norms=None,
        _shape=shape,
        _shape_of=lambda batch: shape,
        _waiting=dict,
        _point=ResumePoint(),
    )
    batches = StepBatches(_data(device), _Teacher(signals, device), micro_batch=B)
    waits = device.waits
    event = loop.Trainer._take_step(trainer, batches, None)  # type: ignore[arg-type]
    # Of the double: a micro-batch's signal, and the gradient norm. The clocks add none.
    assert device.waits - waits == ACCUMULATION + 1
    return event


def _colocated(device: SimulatedDevice, monkeypatch: pytest.MonkeyPatch) -> TeacherPipeline:
    """A pipeline of one stage, whose exchanges take the stream some time, as if there were others."""
    for name, seconds in (("all_gather_rows", TOKENS_WAIT), ("scatter_rows", ANSWER_WAIT)):
        queue = _before(getattr(pipeline, name), partial(device.queue, seconds))
        monkeypatch.setattr(pipeline, name, queue)
    stage: Any = _Stage(device)
    return TeacherPipeline(stage, topology())


def test_a_colocated_teacher(device: SimulatedDevice, clock: str, monkeypatch: pytest.MonkeyPatch) -> None:
    event = _step(device, _colocated(device, monkeypatch).signals)
    wait = ACCUMULATION * (TOKENS_WAIT + ANSWER_WAIT)
    stage, loss = ACCUMULATION * STAGE, ACCUMULATION * LOSS
    assert event.seconds == STUDENT + loss + stage + wait + DATA, "the host's, of the whole step"
    assert event.data_seconds == DATA
    right = StepSeconds(student=STUDENT, loss=loss, teacher=stage + wait, wait=wait, stage=stage, rounds=ACCUMULATION)
    if clock == "device":
        assert event.parts == right
        flops = RankFlops(step=1000, stage_round=60)
        assert flops.mfus(event.parts, 100.0) == (1000 / (STUDENT + loss) / 100, 60 / STAGE / 100)
        assert flops.mfus(event.parts, None) == (None, None)
        return
    # The host waits for the device where it reads the signal, and there it finds the micro-batch before.
    before = (ACCUMULATION - 1) * (FORWARD + LOSS + BACKWARD + ACCUMULATE)
    assert event.parts.teacher == right.teacher + before
    assert event.parts.stage == event.parts.loss == 0.0


def test_a_remote_teacher(device: SimulatedDevice, clock: str) -> None:
    """NCCL's `wait` returns at once: the stream is what waits."""
    event = _step(device, _remote(device).signals)
    wait, loss = ACCUMULATION * REMOTE_WAIT, ACCUMULATION * LOSS
    assert event.seconds == STUDENT + loss + wait + DATA
    if clock == "device":
        assert event.parts == StepSeconds(student=STUDENT, loss=loss, teacher=wait, wait=wait)
        assert RankFlops(step=1000).mfus(event.parts, 100.0) == (1000 / (STUDENT + loss) / 100, None)
        return
    assert event.parts.wait == 0.0, "what a host's clock has of it"


def _remote(device: SimulatedDevice) -> RemoteTeacher:
    answers, requests = ActivationCodec(E, torch.float32), RequestCodec(B, S, masked=False)
    sent: list[Tensor] = []

    @dataclass
    class Work:
        buffer: Tensor

        def wait(self, timeout: timedelta | None = None) -> bool:
            if len(self.buffer) == answers.bytes(B, S):
                device.queue(REMOTE_WAIT)
                decoded = requests.decode(sent.pop(0))
                assert decoded is not None
                _, slots_B, tokens_BS, _ = decoded
                self.buffer.copy_(answers.encode(torch.zeros(B, S, E), slots_B, token_digest(tokens_BS)))
            return True

    def send(message: Tensor, to: int, *, label: str) -> Message:
        sent.append(message)
        work: Any = Work(message)
        return Message(message, work, label, timeline.MessageId(0, to, 0), is_sent=True)

    def post_recv(buffer: Tensor, source: int, *, label: str) -> Message:
        work: Any = Work(buffer)
        return Message(buffer, work, label, timeline.MessageId(source, 0, 0), is_sent=False)

    ends = SimpleNamespace(send=send, post_recv=post_recv)
    bridge: Any = SimpleNamespace(on_host=ends, on_device=ends, stages=range(1, 2))
    return RemoteTeacher(bridge, requests, answers, queue=1, device=torch.device("cpu"))


def test_a_rank_is_slow_by_its_own_product(device: SimulatedDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by what its stream does or waits for before."""
    products = []

    def product(*_: Tensor, out: Tensor) -> None:
        products.append(out)
        device.queue(0.5)

    monkeypatch.setattr(stragglers, "clock_for", lambda _: DeviceClock(torch.device("meta")))
    monkeypatch.setattr(torch, "mm", product)
    seconds = []
    for queued in (0.0, 1000.0):
        products.clear()
        device.queue(queued)
        seconds.append(stragglers.product_seconds(torch.device("cpu")))
    a_sample = seconds[0] / 0.5
    assert seconds[0] == seconds[1]
    assert len(products) % a_sample == 0
    assert len(products) > a_sample
