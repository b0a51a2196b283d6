"""The models of an evaluation: whether they go with a split, and what they say of its tokens. It knows no sums.

Legend: N tokens of a batch that have a label, D width of a model.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megadistill.data import Manifest, tokenizer_sha256
from megadistill.errors import UserError
from megadistill.loss import AgainstTeacher, TokenTerms, VocabSlice, token_terms
from megadistill.models.families import decoder, load_config, logit_transform, reading
from megadistill.models.weights import check_weights
from megadistill.types import IGNORED_LABEL, LogitTransform, TokenBatch


def check_model(folder: Path, manifest: Manifest) -> None:
    """Whether the model in `folder` can be measured on a split; reads no weights.

    Raises:
        UserError: it is no model of a supported family, or its vocabulary, positions or tokenizer are not the split's.
    """
    config = load_config(folder, what=str(folder))
    if config.vocab_size < manifest.vocab_size:
        raise UserError(
            f"{folder}: a vocabulary of {config.vocab_size} ids, the split was made with {manifest.vocab_size}; "
            "an evaluation reads no teacher.vocab_map: all models must have the split's ids"
        )
    if config.max_position_embeddings < manifest.sequence_length:
        raise UserError(
            f"{folder}: {config.max_position_embeddings} positions, the split has sequences of "
            f"{manifest.sequence_length} tokens"
        )
    found = tokenizer_sha256(folder, prefer=manifest.tokenizer.kind)
    if found is not None and found != (manifest.tokenizer.kind, manifest.tokenizer.sha256):
        file = manifest.tokenizer.file.rpartition("/")[2]
        raise UserError(
            f"{folder}: its {file} is not the one that the split was made with, and an evaluation reads no "
            "teacher.vocab_map: tokenize a split with this model's own"
        )
    check_weights(folder, config)


@torch.no_grad()
def token_numbers(
    models: Sequence[Any], batch: TokenBatch, vocab_size: int, *, first_teaches: bool
) -> list[TokenTerms]:
    """What each model says of the batch's N tokens with a label; against the first one, if that is the teacher."""
    learned = batch.labels.flatten() != IGNORED_LABEL
    labels_N = batch.labels.flatten()[learned]
    teacher, students = (models[0], models[1:]) if first_teaches else (None, models)
    vocab = VocabSlice.contiguous(0, vocab_size, size=vocab_size)
    found: list[TokenTerms] = []
    told: dict[str, Any] = {}
    if teacher is not None:
        taught_ND, head, logits = _read(teacher, batch, learned, vocab_size)
        told = {"teacher_hidden": taught_ND, "teacher_weight": head, "teacher_logits": logits}
        alone = token_terms(taught_ND, head, labels_N, vocab=vocab, student_logits=logits)
        none_N, all_N = torch.zeros_like(alone.entropy), torch.ones_like(alone.entropy)
        found.append(replace(alone, teacher=AgainstTeacher(kl=none_N, jsd=none_N, acceptance=all_N, agreement=all_N)))
    for student in students:
        hidden_ND, head, logits = _read(student, batch, learned, vocab_size)
        found.append(token_terms(hidden_ND, head, labels_N, vocab=vocab, student_logits=logits, **told))
    return found


def _read(model: Any, batch: TokenBatch, learned: Tensor, vocab_size: int) -> tuple[Tensor, Tensor, LogitTransform]:
    """Final hidden states [N, D] of the tokens that are `learned`, the head without padding rows, and its transform."""
    hidden: Tensor = decoder(model)(**reading(batch.tokens, batch.positions)).last_hidden_state
    head = model.get_output_embeddings().weight[:vocab_size]
    return hidden.flatten(0, 1)[learned], head, logit_transform(model.config)
