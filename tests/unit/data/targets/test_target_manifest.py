"""Slots of a target set are bounded, whatever its numbers are."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import TypeAdapter, ValidationError

from megadistill.data.targets.target_manifest import SCAN_SLOTS, SlotMap, TargetKey, TargetShard

SHARDS: TypeAdapter[TargetShard] = TypeAdapter(TargetShard)
TABLE: list[dict[str, Any]] = yaml.safe_load(Path(__file__).with_name("hostile_slots.yaml").read_text())


def shard(slots: list[Any], sequences: Any) -> TargetShard:
    file = {"name": "a.tar", "sequences": sequences, "bytes": 1, "sha256": "0" * 64, "index_sha256": "0" * 64}
    return SHARDS.validate_json(json.dumps({"file": file, "slots": slots}))


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row["name"])
def test_ranges_without_an_end_are_refused(row: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        shard(row["slots"], row["sequences"])


def test_a_range_of_billions_of_slots_is_searched_in_little_memory() -> None:
    slots = SlotMap([shard([[5, 1 << 31, 1 << 32, 2]], 1 << 32)])
    tracemalloc.start()
    try:
        assert slots.first_missing(5, 5 + 3 * SCAN_SLOTS) == 5 + 3 * SCAN_SLOTS
        assert slots.first_missing(5 + (1 << 31) - 10, 5 + (1 << 31) + 10) == 5 + (1 << 31)
        assert slots.first_missing(0, 10) == 0
        assert slots.first_missing(5 + (1 << 32), 9 + (1 << 32)) == 9 + (1 << 32)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("order", ["", "[]", "{", "[" * 100_000, '{"a": NaN}'])
def test_an_order_that_is_no_object_is_refused(order: str) -> None:
    with pytest.raises(ValidationError, match="order"):
        TargetKey.model_validate({"order": order})
