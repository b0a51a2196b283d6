"""The stream on real ranks: equal global batches for every world, micro-batch, accumulation and reading ahead."""

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megadistill.data import Manifest, Mixture, TokenStream
from megadistill.data.stream.order import CurriculumEntry
from megadistill.distributed.collectives import all_gather_rows
from megadistill.distributed.topology import Topology
from megadistill.train.resilience.masked_samples import gather_masked_slots
from megadistill.types import TokenBatch
from tests.ranks.harness import run_ranks
from tests.unit.data.splits import random_sequences, write_split

SLOTS = 48
STEPS = 6
SKIPS = [(60, 71)]
CURRICULUM = (CurriculumEntry(100, {"a": 0.8, "b": 0.2}), CurriculumEntry(None, {"a": 0.3, "b": 0.7}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stream")
    for seed, name in enumerate("ab"):
        write_split(folder / name, random_sequences(150, seed=seed))
    return folder


def _mixture(folder: Path) -> Mixture:
    return Mixture({name: Manifest.load(folder / name / "manifest.json") for name in "ab"}, CURRICULUM)


def _rows(batch: TokenBatch) -> Tensor:
    """[B, 3·S + 2]: everything that a batch holds."""
    numbers = [batch.slots[:, None], batch.digests[:, None], batch.tokens, batch.labels, batch.starts.long()]
    return torch.cat(numbers, dim=1)


def _global_batches(topology: Topology, folder: Path) -> dict[tuple[int, int], list[Tensor]]:
    """Steps of each (micro-batch, prefetch)."""
    rows = SLOTS // topology.world
    micros = [size for size in range(1, rows + 1) if rows % size == 0]
    settings = [*((micro, 0) for micro in micros), (micros[0], 3), (micros[-1], 1)]
    return {(micro, prefetch): _steps(topology, folder, micro, prefetch) for micro, prefetch in settings}


def _steps(topology: Topology, folder: Path, micro: int, prefetch: int) -> list[Tensor]:
    """Each step as its micro-batches arrive at the models: accumulation round by accumulation round, all ranks."""
    stream = TokenStream(
        _mixture(folder),
        seed=7,
        batch_slots=SLOTS,
        rank=topology.rank,
        world_size=topology.world,
        document_mask=True,
        skips=SKIPS,
        prefetch=prefetch,
    )
    steps = []
    for batch, cursor in itertools.islice(stream, STEPS):
        rounds = [all_gather_rows(_rows(part), topology.world_group) for part in batch.micro_batches(micro)]
        steps.append(torch.cat([*rounds, torch.full((1, rounds[0].shape[1]), cursor.next_slot)]))
    return steps


@pytest.fixture(scope="module")
def truth(folder: Path) -> list[Tensor]:
    """One process reads the slots outside of the skipped ranges, one by one."""
    slots = [slot for slot in range(STEPS * SLOTS + 20) if not any(a <= slot < b for a, b in SKIPS)]
    stream = TokenStream(_mixture(folder), seed=7, batch_slots=1, rank=0, world_size=1, document_mask=True)
    rows = torch.cat([_rows(stream.batch(range(slot, slot + 1))) for slot in slots[: STEPS * SLOTS]])
    return [
        torch.cat([part, torch.full((1, part.shape[1]), slots[SLOTS * (step + 1) - 1] + 1)])
        for step, part in enumerate(rows.chunk(STEPS))
    ]


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_equal_global_batches(world: int, folder: Path, truth: list[Tensor]) -> None:
    """Micro-batches of every size that divides a rank's rows, so every accumulation, with and without reading ahead."""
    for batches in run_ranks(world, _global_batches, folder):
        assert {micro for micro, _ in batches} >= {1, SLOTS // world}
        for setting, steps in batches.items():
            for step, expected in zip(steps, truth, strict=True):
                in_slots = torch.cat([step[:-1][step[:-1, 0].argsort()], step[-1:]])
                assert torch.equal(in_slots, expected), setting


def _masked(topology: Topology) -> list[int]:
    slots = torch.arange(4) + 4 * topology.rank
    nothing = torch.zeros(4, 1, dtype=torch.int64)
    faults = ((5, "slot 5: damaged"), (6, "slot 6: damaged")) if topology.rank == 1 else ()
    batch = TokenBatch(nothing, nothing, slots, slots, nothing.bool(), faults=faults)
    return gather_masked_slots(batch, topology)


def test_a_slot_masked_on_one_rank_is_known_to_all() -> None:
    assert run_ranks(3, _masked) == [[5, 6]] * 3
