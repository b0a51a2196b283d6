"""Shared types: a batch in parts is the batch, and a signal for another batch is refused.

Legend: B sequences, S tokens of a sequence, N = B·S, E teacher width.
"""

import json
from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from megadistill.types import (
    IGNORED_LABEL,
    METRIC_NAMES,
    Cursor,
    LossTerms,
    SequencePart,
    SignalMismatch,
    StepReport,
    TeacherSignal,
    TokenBatch,
    document_positions,
    token_digest,
)
from tests.device_double import DEVICE, DeviceDouble

B, S, E = 6, 4, 3


def _batch() -> TokenBatch:
    units = torch.arange(B * (S + 1)).reshape(B, S + 1)
    labels = units[:, 1:].clone()
    labels[2, 1:] = IGNORED_LABEL
    tokens = units[:, :-1]
    starts = torch.zeros_like(tokens, dtype=torch.bool)
    starts[:, 0] = starts[1, 2] = True
    return TokenBatch(
        tokens=tokens, labels=labels, slots=torch.arange(10, 10 + B), digests=token_digest(tokens), starts=starts
    )


def _signal(batch: TokenBatch) -> TeacherSignal:
    return TeacherSignal(hidden=torch.randn(B * S, E), slots=batch.slots.clone(), digests=batch.digests.clone())


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_micro_batches_are_the_batch_in_order(size: int) -> None:
    batch = _batch()
    parts = batch.micro_batches(size)
    assert [len(part) for part in parts] == [size] * (B // size)
    for name in ("tokens", "labels", "slots", "digests", "starts"):
        whole = torch.cat([getattr(part, name) for part in parts])
        assert torch.equal(whole, getattr(batch, name)), name
    assert sum(part.valid_tokens for part in parts) == batch.valid_tokens == B * S - 3


def test_parts_of_sequences_are_the_batch_and_labels_go_on_across_their_ends() -> None:
    batch = _batch()
    parts = [batch.of_part(SequencePart(place, 2)) for place in range(2)]
    assert batch.of_part(SequencePart()) is batch
    assert torch.equal(torch.cat([each.tokens for each in parts], dim=1), batch.tokens)
    assert torch.equal(torch.cat([each.labels for each in parts], dim=1), batch.labels)
    assert sum(each.valid_tokens for each in parts) == batch.valid_tokens
    for each in parts:
        assert torch.equal(each.slots, batch.slots)
        assert torch.equal(each.digests, batch.digests)
        assert torch.equal(each.starts, batch.starts), "of whole sequences, for masks"
        assert each.tokens.is_contiguous()


def test_a_batch_that_does_not_divide_is_a_bug() -> None:
    with pytest.raises(AssertionError, match="6 rows do not divide into micro-batches of 4"):
        _batch().micro_batches(4)


def test_slots_and_digests_stay_on_the_host() -> None:
    with DeviceDouble():
        moved = _batch().to(DEVICE)
    assert {moved.tokens.device, moved.labels.device, moved.starts.device} == {DEVICE}
    assert (moved.slots.device.type, moved.digests.device.type) == ("cpu", "cpu")


def test_a_digest_tells_every_change_of_one_token_and_every_swap() -> None:
    row = torch.tensor([5, 2, 9, 2, 0, 65_535])
    others = [row.clone() for _ in range(6 * 3)]
    for place in range(6):
        for kind, value in enumerate((1, 70_000, 1 << 23)):
            others[3 * place + kind][place] += value
    others += [row[[1, 0, 2, 3, 4, 5]], row[[0, 1, 2, 3, 5, 4]]]
    digests = token_digest(torch.stack([row, *others]))
    assert len(set(digests.tolist())) == len(others) + 1


def test_a_digest_is_of_the_ids_whatever_their_type_and_place_in_memory() -> None:
    tokens = torch.tensor([[1, 2, 3], [1, 2, 4]])
    assert token_digest(tokens).tolist() == token_digest(tokens.int()).tolist()
    assert token_digest(tokens[:, :2]).tolist() == [token_digest(torch.tensor([[1, 2]])).item()] * 2, "not contiguous"
    odd = token_digest(torch.eye(2048, dtype=torch.int64)) % 2
    assert odd.all(), "an even multiplier would lose a high bit"


def test_positions_restart_where_a_document_begins() -> None:
    starts = torch.tensor([[1, 0, 0, 1, 1, 0], [0, 0, 1, 0, 0, 0]], dtype=torch.bool)
    assert document_positions(starts).tolist() == [[0, 1, 2, 0, 0, 1], [0, 1, 0, 1, 2, 3]]
    batch = _batch()
    assert batch.positions is None
    assert replace(batch, document_mask=True).positions is not None


def test_a_cursor_survives_json() -> None:
    cursor = Cursor("f", 17, masked_slots=(3, 9), skips=((1, 2), (5, 6)), order=json.dumps({"seed": 1}))
    assert Cursor.from_state(json.loads(json.dumps(cursor.state()))) == cursor


def test_a_signal_that_answers_the_batch_is_its_hidden_states() -> None:
    batch = _batch()
    signal = _signal(batch)
    assert signal.hidden_for(batch) is signal.hidden


def test_a_signal_for_other_slots_or_other_tokens_is_refused() -> None:
    batch = _batch()
    signal = _signal(batch)
    with pytest.raises(SignalMismatch, match=r"slots \[10, .*15\], the student's batch of \[11, .*16\]"):
        signal.hidden_for(replace(batch, slots=batch.slots + 1))
    with pytest.raises(SignalMismatch, match=r"different tokens in slots \[10, "):
        signal.hidden_for(replace(batch, digests=batch.digests.flip(0)))
    with pytest.raises(SignalMismatch):
        signal.hidden_for(batch.micro_batches(3)[0])


def test_metrics_are_the_terms_by_name_and_carry_no_gradient() -> None:
    numbers: dict[str, Any] = {name: torch.tensor(float(i)) for i, name in enumerate(METRIC_NAMES)}
    terms = LossTerms(**numbers)
    terms = replace(terms, loss=torch.tensor(9.0, requires_grad=True))
    metrics = terms.metrics()
    assert dict(zip(METRIC_NAMES, metrics.tolist(), strict=True))["loss"] == 9.0
    assert metrics.tolist()[1:] == [float(i) for i in range(1, len(METRIC_NAMES))]
    assert metrics.dtype == torch.float64
    assert not metrics.requires_grad
    assert {*METRIC_NAMES, "diagnostics", "per_token", "by_teacher"} == {field.name for field in fields(LossTerms)}
    assert set(METRIC_NAMES) < {field.name for field in fields(StepReport)}, "every term is reported"
