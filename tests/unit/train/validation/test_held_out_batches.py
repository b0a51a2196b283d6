"""The micro-batches of a validation: every sequence once, and the same ones, for any number of ranks."""

from collections import Counter

import pytest
import torch

from megadistill.heldout.splits import Split
from megadistill.train.validation.held_out_batches import NO_SOURCE, HeldOutBatches, Validations
from megadistill.types import IGNORED_LABEL
from tests.unit.data.splits import SEQUENCE, random_sequences, write_split
from tests.unit.train.cases import topology

LIMIT = 7


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> list[Split]:
    """Ten sequences, of which seven are read, and three that were packed by best fit."""
    folder = tmp_path_factory.mktemp("splits")
    web = write_split(folder / "web", random_sequences(10, seed=1))
    code = write_split(folder / "code", random_sequences(3, seed=2, full=False), packer="bestfit")
    return [Split("web", web, LIMIT), Split("code", code, LIMIT)]


def _read(splits: list[Split], world: int, *, rows: int, document_mask: bool = False) -> list[HeldOutBatches]:
    sizes = {"rows": [rows] * len(splits), "document_mask": document_mask}
    return [HeldOutBatches(splits, topology(rank=rank, world=world), **sizes) for rank in range(world)]  # type: ignore[arg-type]


@pytest.mark.parametrize(("world", "rows", "rounds"), [(1, 2, 6), (2, 2, 3), (3, 1, 4), (8, 4, 2)])
def test_the_ranks_read_each_sequence_once_and_one_split_at_a_time(
    splits: list[Split], world: int, rows: int, rounds: int
) -> None:
    ranks = [list(batches) for batches in _read(splits, world, rows=rows)]
    assert {len(batches) for batches in ranks} == {rounds}
    for of_round in zip(*ranks, strict=True):
        assert len({each.split for each in of_round}) == 1, "a round of the teacher's has one shape"
    labelled: Counter[tuple[int, int]] = Counter()
    for each in (each for batches in ranks for each in batches):
        assert each.batch.tokens.shape == (rows, SEQUENCE)
        has_label = (each.batch.labels != IGNORED_LABEL).any(dim=1)
        labelled.update((each.split, slot) for slot in each.batch.slots[has_label].tolist())
    assert labelled == Counter([*((0, slot) for slot in range(LIMIT)), *((1, slot) for slot in range(3))])


def test_documents_are_read_as_an_evaluation_reads_them_where_the_run_has_a_mask(splits: list[Split]) -> None:
    (batches,) = _read(splits, 1, rows=5, document_mask=True)
    web, *_, code = list(batches)
    assert web.batch.positions is not None
    assert web.batch.positions.tolist() == [list(range(SEQUENCE))] * 5, "an evaluation masks no document of its packer"
    expected = splits[1].stream().batch(range(3))
    assert expected.positions is not None
    assert code.batch.positions is not None
    assert torch.equal(code.batch.positions[:3], expected.positions)
    assert torch.equal(code.batch.labels[:3], expected.labels)
    (unmasked,) = _read(splits, 1, rows=5)
    assert all(each.batch.positions is None for each in unmasked)


def test_a_split_with_the_name_of_a_source_has_its_number(splits: list[Split]) -> None:
    batches = HeldOutBatches(splits, topology(), rows=[10, 10], document_mask=False, sources=["books", "code"])
    assert [{*each.batch.sources.tolist()} for each in batches] == [{NO_SOURCE}, {1}]


def test_validations_are_due_at_multiples_at_the_end_and_perhaps_at_the_beginning(splits: list[Split]) -> None:
    (batches,) = _read(splits, 1, rows=5)
    after_3 = Validations(batches, first_step=3, at_first=False, every=3, last=10)
    assert [step for step in range(3, 11) if after_3.due(step)] == [6, 9, 10]
    again = Validations(batches, first_step=3, at_first=True, every=3, last=10)
    assert again.due(3)
