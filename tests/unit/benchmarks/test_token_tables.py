"""The tables that benchmarks/stream.py writes: each reader, ours in place among them, finds the same tokens there."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from benchmarks.stream import VOCAB, _index
from benchmarks.token_tables import TABLES, TokenTable
from megadistill.data import TokenStream

ROWS, LENGTH = 64, 32


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.format)
def test_every_reader_of_a_table_finds_the_tokens_that_were_written(table: TokenTable, tmp_path: Path) -> None:
    if importlib.util.find_spec(table.library) is None and table.format == "mds":
        pytest.skip("mosaic-streaming is not installed: pip install mosaicml-streaming")
    tokens = np.random.default_rng(0).integers(0, VOCAB, (ROWS, LENGTH + 1), dtype=np.uint16)
    path = table.write(tmp_path, tokens)
    manifest = _index(tmp_path, table.format, path, LENGTH)
    assert manifest.sequences == (tokens.size - 1) // LENGTH
    stream = TokenStream(manifest, seed=1, batch_slots=manifest.sequences, rank=0, world_size=1)
    batch, _ = next(iter(stream))
    flat = tokens.reshape(-1).astype(np.int64)
    sequences = flat[: manifest.sequences * LENGTH].reshape(-1, LENGTH)
    assert sorted(map(tuple, batch.tokens.tolist())) == sorted(map(tuple, sequences.tolist()))
    if importlib.util.find_spec(table.library) is not None:
        rows = sorted(tuple(np.asarray(row).tolist()) for row in table.rows(path))
        assert rows == sorted(map(tuple, tokens.tolist()))
