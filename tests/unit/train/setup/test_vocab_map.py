"""Maps from the student's ids to the teacher's: what is refused with which words, and what the teacher then reads."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megadistill import io
from megadistill.errors import UserError
from megadistill.train.setup.vocab_map import read_vocab_map, translated
from megadistill.types import IGNORED_LABEL, TokenBatch, token_digest


def _read(path: Path) -> list[int]:
    return list(read_vocab_map(path, student_ids=4, teacher_ids=7).tolist())


def test_a_map_is_a_list_of_the_teachers_ids(tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    path.write_text("[6, -1, 0, -1]", encoding="utf-8")
    assert _read(path) == [6, -1, 0, -1]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "does not exist"),
        ("[1, 2", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        ('{"0": 1}', "holds a dict, not a list"),
        ("[1, 2, 3]", "has 3 entries, the shards were made with 4 ids"),
        ("[1, 2, 3, 7]", "maps id 3 to 7; the teacher has ids 0 to 6"),
        ("[1, -2, 3, 4]", "maps id 1 to -2"),
        ("[1, 2.0, 3, 4]", "maps id 1 to 2.0"),
        ("[true, 2, 3, 4]", "maps id 0 to True"),
        ("[1, null, 3, 4]", "maps id 1 to None"),
        ("[1, 2, -1, 1]", "maps both 0 and 3 to 1"),
        ("[-1, -1, -1, -1]", "maps no id"),
    ],
)
def test_a_wrong_map_is_refused_in_one_line(tmp_path: Path, text: str | None, says: str) -> None:
    path = tmp_path / "map.json"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        _read(path)
    message = str(caught.value)
    assert message.startswith("teacher.vocab_map: ")
    assert says in message
    assert "\n" not in message


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    with path.open("wb") as file:
        file.truncate(io.MAX_JSON_BYTES + 1)
    with pytest.raises(UserError, match="larger than"):
        _read(path)


def _batch(tokens: list[int], labels: list[int]) -> TokenBatch:
    rows = torch.tensor([tokens])
    starts = torch.zeros_like(rows, dtype=torch.bool)
    return TokenBatch(rows, torch.tensor([labels]), torch.tensor([17]), token_digest(rows), starts)


def test_the_teacher_reads_its_own_ids_and_answers_for_them() -> None:
    ids = torch.tensor([5, 9, -1, 0])
    batch = translated(_batch([3, 0, 1], [0, 1, IGNORED_LABEL]), ids)
    assert batch.tokens.tolist() == [[0, 5, 9]]
    assert batch.labels.tolist() == [[5, 9, IGNORED_LABEL]]
    assert torch.equal(batch.digests, token_digest(batch.tokens))
    assert batch.slots.tolist() == [17]


def test_a_damaged_sequence_needs_no_id_of_the_teachers() -> None:
    """Its tokens are zeros, whose id the teacher may not have; another row with one is refused."""
    damaged = _batch([0, 0, 0], [IGNORED_LABEL] * 3)
    ids = torch.tensor([-1, 9, 4, 0])
    batch = translated(damaged, ids)
    assert {*batch.tokens.flatten().tolist()} <= {9, 4, 0}
    assert torch.equal(batch.digests, token_digest(batch.tokens))
    starts = torch.ones_like(damaged.starts)
    with pytest.raises(UserError, match="for 0, which is token 0 of slot 17"):
        translated(replace(damaged, starts=starts), ids)


@pytest.mark.parametrize(
    ("tokens", "labels", "says"),
    [([3, 2, 1], [2, 1, 0], "for 2, which is token 1 of slot 17"), ([3, 0, 1], [0, 1, 2], "for 2, which is label 2")],
)
def test_an_id_that_the_teacher_does_not_know_is_named(tokens: list[int], labels: list[int], says: str) -> None:
    with pytest.raises(UserError, match=says):
        translated(_batch(tokens, labels), torch.tensor([5, 9, -1, 0]))
