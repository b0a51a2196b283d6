"""Slices of a vocabulary: what a rank holds, its rows of ids, and that the ranks of a group share all of them.

Legend: V padded vocabulary, D width, w world, p ranks of a vocab group.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megadistill.distributed.vocab import VocabSlice, block_cyclic_ranges, padded_vocabulary
from megadistill.errors import UserError

LAYOUTS = [(w, p) for w in range(1, 17) for p in range(1, w + 1) if w % p == 0]


@st.composite
def slices(draw: st.DrawFn) -> VocabSlice:
    """Ranges that ascend; they may touch, be empty, and reach into the padding."""
    pairs = draw(st.integers(0, 4))
    bounds = sorted(draw(st.lists(st.integers(0, 40), min_size=2 * pairs, max_size=2 * pairs)))
    ranges = tuple(zip(bounds[::2], bounds[1::2], strict=True))
    return VocabSlice(ranges=ranges, size=draw(st.integers(1, 45)))


@given(slices())
def test_rows_and_ids_are_each_others_inverse(vocab: VocabSlice) -> None:
    ids = vocab.global_ids()
    held = [i for start, stop in vocab.ranges for i in range(start, stop)]
    assert ids.tolist() == held
    assert ids.dtype == torch.int64
    assert vocab.rows == len(held)
    assert vocab.true_rows == sum(i < vocab.size for i in held)
    rows = vocab.local_rows(ids)
    assert rows[: vocab.true_rows].tolist() == list(range(vocab.true_rows)), "true rows come first"
    assert (rows[vocab.true_rows :] == -1).all(), "nobody holds padding"


@given(slices())
def test_an_id_of_another_rank_has_no_row(vocab: VocabSlice) -> None:
    everything = torch.arange(-100, 60).reshape(2, 80)
    rows = vocab.local_rows(everything)
    assert rows.shape == everything.shape
    held = {i: row for row, i in enumerate(vocab.global_ids().tolist()) if i < vocab.size}
    assert rows.flatten().tolist() == [held.get(i, -1) for i in everything.flatten().tolist()]


@pytest.mark.parametrize("ranges", [((4, 2),), ((0, 3), (2, 5)), ((5, 8), (0, 3)), ((-1, 3),)])
def test_ranges_that_do_not_ascend_are_refused(ranges: tuple[tuple[int, int], ...]) -> None:
    with pytest.raises(ValueError, match="ascend without overlap"):
        VocabSlice(ranges=ranges, size=9)


@pytest.mark.parametrize("size", [0, -1])
def test_a_vocabulary_of_nothing_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"got size {size}"):
        VocabSlice.contiguous(0, 3, size=size)


@given(size=st.integers(1, 10_000), multiple=st.integers(1, 2048), ranks=st.integers(1, 96))
def test_padding_is_the_least_that_divides(size: int, multiple: int, ranks: int) -> None:
    padded = padded_vocabulary(size, multiple, ranks=1)
    assert padded % multiple == 0
    assert size <= padded < size + multiple
    assert padded_vocabulary(size, multiple, ranks=multiple) == padded, "ranks that divide it change nothing"
    of_ranks = padded_vocabulary(size, multiple, ranks=ranks)
    assert of_ranks % ranks == 0
    assert padded <= of_ranks < padded + ranks


@pytest.mark.parametrize(("world", "p"), LAYOUTS)
def test_each_group_holds_every_row_once(world: int, p: int) -> None:
    padded = 3 * world
    for first in range(0, world, p):
        ranges = [block_cyclic_ranges(padded, world, p, rank) for rank in range(first, first + p)]
        rows = [i for mine in ranges for start, stop in mine for i in range(start, stop)]
        assert sorted(rows) == list(range(padded))
        for mine in ranges:
            VocabSlice(ranges=mine, size=padded)


@pytest.mark.parametrize(("world", "p"), LAYOUTS)
def test_the_rows_are_the_pieces_that_zero_stores(world: int, p: int) -> None:
    """ZeRO-3 flattens [V, D] and gives each rank the same number of elements, in rank order."""
    padded, width = 3 * world, 2
    pieces_wn = torch.arange(padded * width).reshape(world, -1)
    for rank in range(world):
        same_place = [other for other in range(world) if other % p == rank % p]
        ids = VocabSlice(ranges=block_cyclic_ranges(padded, world, p, rank), size=padded).global_ids()
        stored = pieces_wn[same_place].reshape(-1, width)
        assert torch.equal(stored, torch.arange(padded * width).reshape(padded, width)[ids])
        assert rank in same_place, "a rank computes on what it stores"


@pytest.mark.parametrize(("world", "p"), LAYOUTS)
@pytest.mark.parametrize("padding", [0, 2, 7])
def test_rows_of_a_block_cyclic_slice_have_a_closed_form(world: int, p: int, padding: int) -> None:
    """Block s = id // size is of rank s mod p, as its (s // p)-th block."""
    size, padded = 3, 3 * world
    ids = torch.arange(-2, padded + 2)
    true = max(1, padded - padding)
    for rank in range(p):
        vocab = VocabSlice(block_cyclic_ranges(padded, world, p, rank), true)
        block = ids // size
        held = (block % p == rank) & (ids >= 0) & (ids < true)
        assert torch.equal(vocab.local_rows(ids), torch.where(held, block // p * size + ids % size, -1))


@given(slices())
def test_tables_are_made_once(vocab: VocabSlice) -> None:
    assert vocab.global_ids() is vocab.global_ids(torch.device("cpu"))
    assert vocab == VocabSlice(vocab.ranges, vocab.size), "a slice that was used is still equal to one that was not"


def test_a_group_that_does_not_divide_the_ranks_is_refused() -> None:
    with pytest.raises(UserError, match=r"distributed\.vocab_group is 3, .* 4 ranks"):
        block_cyclic_ranges(256, 4, 3, 0)
