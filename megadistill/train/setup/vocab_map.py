"""The map from the student's token ids to the teacher's, where each has a tokenizer of its own.

Legend: U ids of the student, B sequences, S tokens of a sequence.
"""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from megadistill.errors import UserError
from megadistill.io import read_given_json
from megadistill.types import IGNORED_LABEL, TokenBatch, token_digest


def read_vocab_map(path: Path, *, student_ids: int, teacher_ids: int) -> Tensor:
    """[U] int64: the teacher's id for each of the student's, -1 for none. The file is a JSON list of U numbers.

    Raises:
        UserError: the file is missing or wrong.
    """
    values = read_given_json(path, list, what="teacher.vocab_map", way_out="give a list of the teacher's ids")
    if len(values) != student_ids:
        raise UserError(
            f"teacher.vocab_map: {path} has {len(values)} entries, the shards were made with {student_ids} ids: "
            "write one for each, -1 where the teacher has none"
        )
    first: dict[int, int] = {}
    for student_id, teacher_id in enumerate(values):
        if type(teacher_id) is not int or not -1 <= teacher_id < teacher_ids:
            raise UserError(
                f"teacher.vocab_map: {path} maps id {student_id} to {teacher_id!r}; the teacher has ids 0 to "
                f"{teacher_ids - 1}, and -1 means that it has none"
            )
        if teacher_id >= 0 and first.setdefault(teacher_id, student_id) != student_id:
            raise UserError(
                f"teacher.vocab_map: {path} maps both {first[teacher_id]} and {student_id} to {teacher_id}: two ids "
                "would share one probability; give the teacher's id to one of them and -1 to the other"
            )
    if not first:
        raise UserError(f"teacher.vocab_map: {path} maps no id: the teacher would give no probabilities")
    return torch.tensor(values, dtype=torch.int64)


def translated(batch: TokenBatch, ids_U: Tensor) -> TokenBatch:
    """The batch in the teacher's ids, with their digests. On the host, where batches are made.

    Raises:
        UserError: a token or a label has no teacher's id.
    """
    tokens_BS = ids_U[batch.tokens]
    unlabelled_BS = batch.labels == IGNORED_LABEL
    damaged_B = ~batch.starts.any(dim=1) & unlabelled_BS.all(dim=1)
    if bool(damaged_B.any()):  # zeros in place of a sequence, whatever id that is: the teacher reads one that it has
        tokens_BS[damaged_B] = ids_U.max()
    labels_BS = torch.where(unlabelled_BS, IGNORED_LABEL, ids_U[batch.labels.masked_fill(unlabelled_BS, 0)])
    for kind, ours_BS, theirs_BS in (("token", batch.tokens, tokens_BS), ("label", batch.labels, labels_BS)):
        unknown_2 = (theirs_BS == -1).nonzero()[:1].flatten().tolist()
        if unknown_2:
            row, place = unknown_2
            in_row = batch.part.place * batch.tokens.shape[1] + place
            raise UserError(
                f"teacher.vocab_map has no teacher's id for {int(ours_BS[row, place])}, which is {kind} {in_row} of "
                f"slot {int(batch.slots[row])}: map it, or tokenize the text without it"
            )
    return replace(batch, tokens=tokens_BS, labels=labels_BS, digests=token_digest(tokens_BS))
