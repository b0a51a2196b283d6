"""Host-device syncs: none in a chunk of the loss and in a stage's forward pass, the named ones in a call and a tick.

Where a sync is an error, one raises; where syncs are counted, torch warns of each.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from megadistill.distributed.topology import Topology
from megadistill.distributed.vocab import VocabSlice
from megadistill.divergence import Divergence
from megadistill.loss import Elementwise, Head, LossOptions, distill_loss
from megadistill.loss.in_flight import GroupTokens, iter_chunks
from megadistill.loss.inputs import LossInputs, exchange_metadata
from megadistill.models.families import build_causal_lm, decoder, load_config, rebuild_buffers
from megadistill.teacher.pipeline import TeacherPipeline
from megadistill.teacher.stage import TeacherStage
from megadistill.types import TokenBatch, to_device, token_digest
from tests.gpu.device import Device
from tests.gpu.results import Record

GEMMA2: dict[str, Any] = {
    "model_type": "gemma2",
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "sliding_window": 64,
}


@contextmanager
def _counted(device: Device) -> Iterator[list[str]]:
    """The syncs in this context, one text each; on a stand-in none."""
    syncs: list[str] = []
    if device.stand_in:
        yield syncs
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield syncs
        finally:
            torch.cuda.set_sync_debug_mode("default")
    # Not torch's remark, once a process, that the mode does not see all synchronizing operations.
    syncs += [str(each.message) for each in caught if "called a synchronizing" in str(each.message)]


def _stage(device: Device) -> TeacherStage:
    config = load_config(GEMMA2, what="the check's model")
    model = build_causal_lm(config, vocab_size=GEMMA2["vocab_size"], dtype=torch.bfloat16)
    rebuild_buffers(model.to(device.torch_device))
    return TeacherStage(decoder(model.requires_grad_(False)), stage=0, stages=1)


def loss_syncs(device: Device, record: Record) -> None:
    """A chunk of the loss under "error"; the syncs of a whole call, eager."""
    N, V, D = 256, GEMMA2["vocab_size"], GEMMA2["hidden_size"]
    vocab = VocabSlice.contiguous(0, V, size=V)
    labels = to_device(torch.arange(N), device.torch_device)
    weights = torch.full((N,), 1 / N, device=device.torch_device)
    student = Head(device.random(N, D).requires_grad_(), device.random(V, D, deviation=D**-0.5).requires_grad_())
    teacher = Head(device.random(N, D), device.random(V, D, deviation=D**-0.5))
    options = LossOptions(logit_memory=2 * 4 * V * N // 4, elementwise=Elementwise.EAGER, diagnostics=True)

    def call() -> None:
        terms = distill_loss(
            student, teacher, labels, token_weights=weights, divergence=Divergence(), vocab=vocab, options=options
        )
        terms.loss.backward()  # type: ignore[no-untyped-call]

    call()  # tables, and the libraries' own start
    inputs = LossInputs(student, teacher, labels, weights, Divergence(), vocab, options)
    with torch.no_grad():
        plan, K = exchange_metadata(inputs, with_gradient=False)
        with device.syncs_are_errors():
            tokens = GroupTokens.gather(inputs, plan)
            for chunk in iter_chunks(inputs, plan, tokens, K=K):
                chunk.wait(inputs).write_dlogits(None)
    with _counted(device) as syncs:
        call()
    record("a call of the loss", "syncs", float(len(syncs)))


def teacher_syncs(device: Device, record: Record, stage: TeacherStage) -> None:
    """A stage's forward pass under "error", with documents and without; the syncs of a tick of the pipeline."""
    B, S, V = 2, 128, GEMMA2["vocab_size"]
    starts = torch.zeros(B, S, dtype=torch.bool)
    starts[:, 0] = starts[0, 50] = True
    tokens = torch.randint(V, (B, S))
    batches = [
        TokenBatch(tokens, tokens.roll(-1, 1), torch.arange(i, i + B), token_digest(tokens), starts, document_mask=True)
        for i in (0, B, 2 * B)
    ]
    moved = batches[0].to(device.torch_device)
    stage(moved.tokens, moved.positions)
    with device.syncs_are_errors():
        for positions in (moved.positions, None):
            stage(moved.tokens, positions)
    topology = Topology(rank=0, world=1, local_rank=0, group_size=1, device=device.torch_device)
    if not device.stand_in:
        batches = [batch.pinned() for batch in batches]
    signals = TeacherPipeline(stage, topology).signals(iter(batches))
    next(signals)
    with _counted(device) as syncs:
        next(signals)
    record("a tick of the teacher", "syncs", float(len(syncs)))


def run(device: Device, record: Record) -> None:
    stage = _stage(device)
    with record.part("a call of the loss"):
        loss_syncs(device, record)
    with record.part("a tick of the teacher"):
        teacher_syncs(device, record, stage)
