"""A process that reads a stream until it is killed: each batch's rows, then the cursor behind it, committed at once.

    python -m tests.unit.data.reading MANIFEST OUTPUT WORLD BATCHES

The ranks of a world read one after the other here, as their order in time does not matter to the stream.
"""

import json
import os
import sys
from pathlib import Path

from megadistill.data import Manifest, TokenStream
from megadistill.types import Cursor

BATCH = 24


def main(manifest: Path, output: Path, world: int, batches: int) -> None:
    committed = output / "cursor.json"
    start = Cursor.from_state(json.loads(committed.read_text())) if committed.exists() else None
    ranks = [
        iter(
            TokenStream(
                Manifest.load(manifest),
                seed=5,
                batch_slots=BATCH,
                rank=rank,
                world_size=world,
                start=start,
                prefetch=rank % 3,
            )
        )
        for rank in range(world)
    ]
    position = start.next_slot if start else 0
    while position < batches * BATCH:
        parts = [next(rank) for rank in ranks]
        rows = [
            [slot, *tokens]
            for part, _ in parts
            for slot, tokens in zip(part.slots.tolist(), part.tokens.tolist(), strict=True)
        ]
        cursor = parts[0][1]
        position = cursor.next_slot
        # What a checkpoint is to a run: the rows count if and only if the cursor behind them is in place.
        (output / f"rows-{position:06d}.json").write_text(json.dumps(rows))
        (output / "cursor.tmp").write_text(json.dumps(cursor.state()))
        os.replace(output / "cursor.tmp", committed)
    print("done")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
