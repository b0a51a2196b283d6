"""Every key of a recipe x hostile values: `train` refuses, or would start."""

from pathlib import Path

from megadistill.config.keys import keys
from tests.fuzz.harness import pairs, require_lines, table, value_of
from tests.fuzz.worker import Case


def _override(key: str, value: str) -> str:
    """`--set` of a key of a list's items gives a list with one."""
    section, is_list, item = key.partition("[].")
    return f"{section}=[{{{item}: {value}}}]" if is_list else f"{key}={value}"


def test_a_hostile_value_of_a_key_is_refused_in_a_line_or_would_run(folders: list[Path]) -> None:
    names = [key.name for key in keys()] + table("keys")
    overrides = [
        _override(name, value) for name, value in pairs(names, [value_of(text) for text in table("values")], each=7)
    ]
    require_lines([Case(override, ("train", "new.yaml", "--set", override)) for override in overrides], folders)
