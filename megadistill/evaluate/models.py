"""The models of an evaluation: whether they fit a split, and their results on a batch.

Legend: N tokens of a batch that have a label, D width of a model.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megadistill.data import Manifest, missing_rows, tokenizer_difference, tokenizer_files
from megadistill.errors import UserError
from megadistill.loss import AgainstTeacher, Head, TokenTerms, VocabSlice, token_terms
from megadistill.models.families import decoder, forward_inputs, load_config, logit_transform
from megadistill.models.weights import check_weights
from megadistill.types import IGNORED_LABEL, TokenBatch


def check_model(folder: Path, manifest: Manifest) -> None:
    """Checks that the model in `folder` can be evaluated on a split. No weights are read.

    Raises:
        UserError: no model of a supported family, or of another vocabulary, tokenizer or length than the split.
    """
    config = load_config(folder, what=str(folder))
    problem = missing_rows(config.vocab_size, [manifest])
    if problem is not None:
        raise UserError(
            f"{folder}: {problem}; an evaluation reads no teacher.vocab_map: all models must have the split's ids"
        )
    if config.max_position_embeddings < manifest.sequence_length:
        raise UserError(
            f"{folder}: {config.max_position_embeddings} positions, the split has sequences of "
            f"{manifest.sequence_length} tokens"
        )
    difference = tokenizer_difference(folder, manifest) if tokenizer_files(folder) else None
    if difference is not None:
        raise UserError(
            f"{folder}: its tokenizer is not the one that the split was made with: {difference}; an evaluation reads "
            "no teacher.vocab_map: tokenize a split with this model's own (megadistill tokenize ... --tokenizer "
            f"{folder})"
        )
    check_weights(folder, config)


@torch.no_grad()
def batch_terms(
    models: Sequence[Any], batch: TokenBatch, vocab_size: int, *, first_is_teacher: bool
) -> list[TokenTerms]:
    """Each model's terms on the batch's N tokens with a label; against the first one, if that is the teacher."""
    labelled = batch.labels.flatten() != IGNORED_LABEL
    labels_N = batch.labels.flatten()[labelled]
    teacher, students = (models[0], models[1:]) if first_is_teacher else (None, models)
    vocab = VocabSlice.contiguous(0, vocab_size, size=vocab_size)
    terms: list[TokenTerms] = []
    teacher_head = None
    if teacher is not None:
        teacher_head = _head(teacher, batch, labelled, vocab_size)
        alone = token_terms(teacher_head, labels_N, vocab=vocab)
        none_N, all_N = torch.zeros_like(alone.entropy), torch.ones_like(alone.entropy)
        itself = AgainstTeacher(
            kl=none_N, jsd=none_N, acceptance=all_N, agreement=all_N, cross_entropy=alone.cross_entropy
        )
        terms.append(replace(alone, teacher=itself))
    for student in students:
        student_head = _head(student, batch, labelled, vocab_size)
        terms.append(token_terms(student_head, labels_N, vocab=vocab, teacher=teacher_head))
    return terms


def _head(model: Any, batch: TokenBatch, labelled: Tensor, vocab_size: int) -> Head:
    """Final hidden states [N, D] of the `labelled` tokens, and the LM head without padding rows."""
    inner = decoder(model)
    hidden: Tensor = inner(**forward_inputs(inner, batch.tokens, batch.positions)).last_hidden_state
    weight = model.get_output_embeddings().weight[:vocab_size]
    return Head(hidden.flatten(0, 1)[labelled], weight, transform=logit_transform(model.config))
