"""Where the host waits for the device in a step: at the places that docstrings name, and nowhere else."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megadistill.config.recipe import LossSection, TargetsSection
from megadistill.distributed.topology import Topology
from megadistill.distributed.vocab import VocabSlice
from megadistill.divergence import Divergence, DivergenceKind
from megadistill.loss import Elementwise, Head, LossOptions, distill_loss
from megadistill.models.families import build_causal_lm, decoder, forward_inputs, load_config
from megadistill.teacher.codec import ActivationCodec
from megadistill.teacher.disaggregated import RequestCodec, TeacherServer
from megadistill.teacher.pipeline import TeacherPipeline
from megadistill.teacher.stage import TeacherStage
from megadistill.train.lookahead import StepBatches
from megadistill.train.objective import Objective
from megadistill.train.step import train_step
from megadistill.train.teacher.live import LiveTeacher
from megadistill.types import Cursor, TokenBatch, token_digest
from tests.device_double import DEVICE, DeviceDouble, move
from tests.unit.models.cases import CASES, VOCAB

S, ROWS, MICRO = 12, 4, 2
LOSS = "to host in inputs.exchange_metadata"
SIGNAL = "to host in codec.checked_signal"


def _causal_lm(case: str) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2}
    config = load_config({"model_type": "llama", **CASES[case], **sizes}, what=case)
    return build_causal_lm(config, vocab_size=VOCAB, dtype=torch.float32)


def _topology(device: torch.device) -> Topology:
    return Topology(rank=0, world=1, local_rank=0, group_size=1, device=device)


def _batches(steps: int) -> Iterator[tuple[TokenBatch, Cursor]]:
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        tokens = torch.randint(VOCAB, (ROWS, S), generator=generator)
        starts = torch.zeros(ROWS, S, dtype=torch.bool)
        starts[:, 0] = starts[1, 5] = True
        slots = torch.arange(step * ROWS, (step + 1) * ROWS)
        batch = TokenBatch(tokens, tokens.roll(-1, 1), slots, token_digest(tokens), starts, document_mask=True)
        yield batch, Cursor("order", (step + 1) * ROWS)


@dataclass
class _Student:
    """`StudentEngine` as a step sees it, without ZeRO-3, whose own waits are DeepSpeed's."""

    model: Any
    gradients: list[Tensor] = field(default_factory=list)
    routers: None = None

    def __post_init__(self) -> None:
        weight = self.model.get_output_embeddings().weight
        vocab = VocabSlice.contiguous(0, VOCAB, size=VOCAB)
        self.head = SimpleNamespace(weight=lambda: weight, gradient=lambda: None, vocab=vocab)

    def routed_hidden(self, tokens: Tensor, positions: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        inner = decoder(self.model)
        hidden: Tensor = inner(**forward_inputs(inner, tokens, positions)).last_hidden_state
        return hidden.flatten(0, 1), None

    def backward(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self, learning_rate: float) -> float:
        self.gradients = [each.grad.clone() for each in self.model.parameters() if each.grad is not None]
        return 1.0


def _models() -> tuple[Any, Any]:
    """A student of Gemma 3's family and a teacher of Gemma 2's. Made outside of the double, whose draws are others."""
    return _causal_lm("gemma3"), _causal_lm("gemma2").eval()


def _steps(
    device: torch.device, models: tuple[Any, Any], loss: LossSection, count: int
) -> Iterator[tuple[list[Tensor], dict[str, float]]]:
    """Steps of distillation: the gradients and the metrics of each."""
    student, teacher = models
    if device == DEVICE:
        move(student)
        move(teacher)
    topology = _topology(device)
    pipeline = TeacherPipeline(TeacherStage(decoder(teacher), stage=0, stages=1), topology)
    live = LiveTeacher(pipeline, teacher.get_output_embeddings().weight.detach())
    objective = Objective(loss, length=count, seed=0)
    engine: Any = _Student(student)
    for step, batch in enumerate(StepBatches(_batches(count), live, micro_batch=MICRO)):
        outcome = train_step(
            engine,
            batch,
            step=step,
            learning_rate=0.1,
            objective=objective,
            topology=topology,
            flags=lambda: {"f": 1.0},
        )
        yield engine.gradients, outcome.metrics


def _section(**keys: Any) -> LossSection:
    return LossSection(elementwise="eager", logit_memory_mb=1, **keys)


@pytest.mark.parametrize("kind", DivergenceKind)
def test_a_call_of_the_loss_waits_once_however_many_chunks_it_has(kind: DivergenceKind) -> None:
    vocab = VocabSlice.contiguous(0, VOCAB, size=VOCAB)
    with DeviceDouble() as double:
        hidden, weight, labels = torch.randn(24, 8).to(DEVICE), torch.randn(VOCAB, 8).to(DEVICE), torch.arange(24)
        labels, weights = labels.to(DEVICE), torch.full((24,), 1 / 24, device=DEVICE)
        vocab.global_ids(DEVICE)  # its tables are made once
        for chunks in (1, 6):
            double.clear()
            student = Head(hidden.clone().requires_grad_(), weight.clone().requires_grad_())
            distill_loss(
                student,
                Head(hidden, weight),
                labels,
                token_weights=weights,
                divergence=Divergence(kind=kind, z_loss=1e-3, ce_weight=0.1),
                vocab=vocab,
                options=LossOptions(2 * 4 * VOCAB * 24 // chunks, Elementwise.EAGER, diagnostics=True),
            ).loss.backward()  # type: ignore[no-untyped-call]
            assert double.counts == {LOSS: 1}
            assert len(double.queued) == 1, "the counts of its metadata"


def test_a_tick_of_the_pipeline_waits_once_at_its_end() -> None:
    with DeviceDouble() as double:
        teacher = _causal_lm("gemma2")
        move(teacher)
        pipeline = TeacherPipeline(TeacherStage(decoder(teacher), stage=0, stages=1), _topology(DEVICE))
        micro_batches = [micro for batch, _ in _batches(2) for micro in batch.micro_batches(MICRO)]
        signals = pipeline.signals(iter(micro_batches))
        for micro in micro_batches:
            double.clear()
            next(signals).hidden_for(micro)
            assert double.counts == {SIGNAL: 1}


@pytest.mark.parametrize(
    "loss",
    [
        _section(),
        _section(diagnostics_every=1, kd_weight=0.5, ce_weight=0.5, label_fraction=0.25),
    ],
    ids=["forward KL", "labels and diagnostics"],
)
def test_a_step_waits_twice_a_micro_batch_and_once_for_its_numbers(loss: LossSection) -> None:
    truth = list(_steps(torch.device("cpu"), _models(), loss, 2))
    micro_batches, models = ROWS // MICRO, _models()
    with DeviceDouble() as double:
        steps = _steps(DEVICE, models, loss, 2)
        for (their_gradients, their_metrics), (gradients, metrics) in zip(truth, steps, strict=True):
            assert double.counts == {LOSS: micro_batches, SIGNAL: micro_batches, "to host in step._reduced": 1}
            copied = [place for place in double.queued if place.startswith("types.")]
            assert len(copied) >= 3 * micro_batches, "tokens, labels and starts, of each micro-batch"
            for ours, theirs in zip(gradients, their_gradients, strict=True):
                torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-4, atol=1e-5)
            assert metrics == pytest.approx(their_metrics, rel=1e-4)
            double.clear()


def test_saved_targets_wait_once_more_a_micro_batch() -> None:
    loss = _section(targets=TargetsSection(select="top_k", k=4))
    models = _models()
    with DeviceDouble() as double:
        for _ in _steps(DEVICE, models, loss, 1):
            assert double.counts["to host in sparse_targets._exchange_metadata"] == ROWS // MICRO
            double.clear()


class _Link:
    """An endpoint: what is received was sent before, and what is sent is kept."""

    def __init__(self, messages: list[Tensor]) -> None:
        self._messages, self.sent = deque(messages), list[Tensor]()

    def post_recv(self, *_: Any, **__: Any) -> Any:
        return SimpleNamespace(wait=self._messages.popleft)

    def send(self, message: Tensor, *_: Any, **__: Any) -> Any:
        self.sent.append(message)
        return SimpleNamespace(wait=lambda: message)


def _served(decoder: Any, stage: int, messages: list[Tensor]) -> list[Tensor]:
    """What a stage of two sends, for requests or packets and a stop."""
    requests, answers = RequestCodec(MICRO, S, masked=True), ActivationCodec(32, torch.float32)
    on_host, on_device = _Link(messages if stage == 0 else []), _Link(messages if stage else [])
    bridge: Any = SimpleNamespace(clients=range(1), stages=range(1, 3), on_host=on_host, on_device=on_device)
    server = TeacherServer(TeacherStage(decoder, stage=stage, stages=2), bridge, requests, answers, queue=2)
    assert list(server.serve()) == [1, 2]
    return on_device.sent


def test_a_server_waits_once_a_packet_and_never_on_its_first_stage() -> None:
    micro_batches = [micro for batch, _ in _batches(1) for micro in batch.micro_batches(MICRO)]
    requests = RequestCodec(MICRO, S, masked=True)
    sent = [requests.encode(micro) for micro in (*micro_batches, None)]
    inner = decoder(_causal_lm("gemma2"))
    truth = _served(inner, 1, _served(inner, 0, sent))
    with DeviceDouble() as double:
        move(inner)
        token_digest(torch.zeros(1, S, dtype=torch.int64).to(DEVICE))  # its numbers are made once
        double.clear()
        packets = _served(inner, 0, sent)
        assert double.counts == {}
        assert len(double.queued) == 2 * 4, "slots, tokens, positions and what a packet begins with"
        answers = _served(inner, 1, packets)
        assert double.counts == {"to host in disaggregated._decode_job": 3}
        assert all(torch.equal(ours.cpu(), theirs) for ours, theirs in zip(answers, truth, strict=True))
