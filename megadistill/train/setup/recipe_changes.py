"""Differences of a recipe from the one in a run folder, key by key."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megadistill.config.load import dotted
from megadistill.io import read_json
from megadistill.redaction import printable


def recipe_changes(before: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Key -> values before and now, for each key in which two snapshots of recipes differ; None: no such key."""
    old, new = dotted(before), dotted(now)
    keys = sorted(old.keys() | new.keys())
    return {key: (old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)}


def changes_since(folder: Path, recipe: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Differences from the recipe that the folder's last attempt has written; nothing in a new folder."""
    try:
        return recipe_changes(read_json(folder / "recipe.json")["recipe"], recipe)
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def describe_changes(changes: Mapping[str, tuple[Any, Any]]) -> str:
    """A line: `train.steps 400 -> 800, train.schedule.decay_steps 40 -> 80`."""
    values = (f"{key} {json.dumps(was)} -> {json.dumps(now)}" for key, (was, now) in changes.items())
    return printable(", ".join(values))
