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

ENDLESS = 10**9
"""Batches of a life that is killed: it cannot come to its end before, on the fastest machine."""


def _reads(manifest: Path, output: Path, world: int, batches: int) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "tests.unit.data.reading", manifest, output, str(world), str(batches)]
    return subprocess.Popen([str(part) for part in command], cwd=ROOT, stdout=subprocess.PIPE, text=True)


def _position(output: Path) -> int:
    """The slot behind the last batch that counts."""
    cursor = output / "cursor.json"
    return int(json.loads(cursor.read_text())["next_slot"]) if cursor.exists() else 0


@pytest.mark.parametrize("seed", [0, 1])
def test_every_slot_is_delivered_exactly_once(tmp_path: Path, seed: int) -> None:
    split = write_split(tmp_path / "data", random_sequences(1000, seed=1), per_shard=130)
    output = tmp_path / "out"
    output.mkdir()
    draw = random.Random(seed)
    manifest = tmp_path / "data" / "manifest.json"
    for world in (3, 8):
        goal = _position(output) + draw.randint(1, 100) * BATCH
        process = _reads(manifest, output, world, ENDLESS)
        while _position(output) < goal:
            assert process.poll() is None, "it was to read on"
            time.sleep(0.002)
        time.sleep(draw.uniform(0.0, 0.02))  # any instant, of writing too
        process.kill()
        process.communicate()
        assert _position(output) >= goal
    batches = _position(output) // BATCH + 50
    assert _reads(manifest, output, 2, batches).communicate(timeout=120)[0] == "done\n"
    rows = [row for path in sorted(output.glob("rows-*.json")) for row in json.loads(path.read_text())]
    assert [row[0] for row in rows] == list(range(batches * BATCH))
    whole = TokenStream(split, seed=5, batch_slots=1, rank=0, world_size=1).batch(range(batches * BATCH))
    assert [row[1:] for row in rows] == whole.tokens.tolist()
