"""Killed at random instants and started again in worlds of other sizes, a stream delivers every slot exactly once."""

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megadistill.data import TokenStream
from tests.paths import ROOT
from tests.unit.data.reading import BATCH
from tests.unit.data.splits import random_sequences, write_split

BATCHES = 400


def _read(manifest: Path, output: Path, world: int, *, kill_after: float | None) -> bool:
    """One life of the process; whether it came to its end."""
    command = [sys.executable, "-m", "tests.unit.data.reading", manifest, output, str(world), str(BATCHES)]
    process = subprocess.Popen([str(part) for part in command], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if kill_after is not None:
        while not (output / "cursor.json").exists() and process.poll() is None:
            time.sleep(0.01)  # the first instants are all imports
        time.sleep(kill_after)
        process.kill()
    printed, _ = process.communicate(timeout=120)
    return printed == "done\n"


@pytest.mark.parametrize("seed", [0, 1])
def test_every_slot_is_delivered_exactly_once(tmp_path: Path, seed: int) -> None:
    split = write_split(tmp_path / "data", random_sequences(1000, seed=1), per_shard=130)
    output = tmp_path / "out"
    output.mkdir()
    draw = random.Random(seed)
    manifest, lives, positions = tmp_path / "data" / "manifest.json", [3, 8], []
    for world in lives:
        assert not _read(manifest, output, world, kill_after=draw.uniform(0.0, 0.4)), "it was too quick to be killed"
        positions.append(json.loads((output / "cursor.json").read_text())["next_slot"])
    assert _read(manifest, output, 2, kill_after=None)
    assert 0 < positions[0] <= positions[1] < BATCHES * BATCH
    rows = [row for path in sorted(output.glob("rows-*.json")) for row in json.loads(path.read_text())]
    assert [row[0] for row in rows] == list(range(BATCHES * BATCH))
    whole = TokenStream(split, seed=5, batch_slots=1, rank=0, world_size=1).batch(range(BATCHES * BATCH))
    assert [row[1:] for row in rows] == whole.tokens.tolist()
