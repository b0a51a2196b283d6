"""Every key of a recipe, from the models that validate it: type, bounds, default, meaning."""

import json
import math
import types
import typing
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import groupby
from typing import Annotated, Any, Literal, get_args, get_origin

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from rich.table import Table

from megadistill.config.other_names import EXPLAINED, OTHER_NAMES, key_of_option
from megadistill.config.recipe import Recipe, Section, sections_in
from megadistill.errors import UserError, nearest

PREFACE = """\
# Every key of a recipe

`megadistill config-keys --markdown` writes this page from the models that validate a recipe, and a test compares the
two; `megadistill config-keys loss` shows one section in a terminal. A key that a recipe leaves out has its default; an
unknown key is refused with the nearest one that exists. `--set section.key=value` overrides any of them.

"""

OTHER_NAMES_PREFACE = """\
## Names of other trainers

Of HF Trainer, TRL, Megatron-LM, torchtitan, DeepSpeed, NeMo and others. A recipe or an option that uses one of them is
refused with what is written here.

| there | here |
|---|---|
"""

_BOUNDS = {annotated_types.Ge: "≥", annotated_types.Gt: ">", annotated_types.Le: "≤", annotated_types.Lt: "<"}

ITEMS: dict[Any, str] = {list: "[]", dict: ".NAME"}
"""The mark of the items of a list, or of a mapping by name, in the names of their keys."""

_PLAIN = {"str": "text", "bool": "true or false", "int": "integer", "float": "number", "Any": "any"}


@dataclass(frozen=True)
class Key:
    """One key of a recipe."""

    name: str
    """Dotted name, as in `--set`."""
    type: str
    """Type and bounds, as text."""
    default: str
    """Default as JSON; `required` if there is none."""
    meaning: str

    @property
    def section(self) -> str:
        return self.name.rpartition(".")[0]


def keys() -> list[Key]:
    """All keys, section by section; those of a list's items as `section.list[].key`, by name as `teachers.NAME.key`."""
    merged: dict[str, Key] = {}
    for key in _keys(Recipe, ""):
        other = merged.setdefault(key.name, key)
        if key.name.endswith(".kind") and key != other:  # the sections of a union
            merged[key.name] = replace(other, type=f"{other.type} or {key.type}")
    return list(merged.values())


def _keys(model: type[BaseModel], prefix: str) -> Iterator[Key]:
    nested: list[tuple[type[BaseModel], str]] = []
    for name, field in model.model_fields.items():
        sections, items = sections_in(field.annotation), ITEMS.get(get_origin(field.annotation), "")
        nested += [(section, f"{prefix}{name}{items}.") for section in sections]
        if sections and (field.is_required() or (not items and field.default is not None)):
            continue
        yield Key(f"{prefix}{name}", _type_of(field), _default_of(field), _meaning_of(field))
    for section, path in nested:
        yield from _keys(section, path)


def _type_of(field: FieldInfo) -> str:
    return ", ".join([_type_name(field.annotation), *_bounds(field.metadata)])


def _bounds(metadata: Iterable[Any]) -> Iterator[str]:
    for each in metadata:
        if isinstance(each, FieldInfo):  # of an item of a list
            yield from _bounds(each.metadata)
        elif type(each) in _BOUNDS:
            yield f"{_BOUNDS[type(each)]} {_bound(getattr(each, type(each).__name__.lower()))}"


def _bound(number: float) -> str:
    """A bound as people write it: `1e9`, `1,000`, `0.001`."""
    power = round(math.log10(number)) if number > 0 else 0
    return f"1e{power}" if abs(power) > 4 and number == float(f"1e{power}") else f"{number:,}"


def _type_name(annotation: Any) -> str:
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return f"{_type_name(parts[0])} ({', '.join(_bounds(parts[1:]))})"
    if origin is Literal:
        return " or ".join(f"`{part}`" for part in parts)
    if origin in (types.UnionType, typing.Union):
        return " or ".join("null" if part is type(None) else _type_name(part) for part in parts)
    if origin is list:
        return f"list of {_type_name(parts[0])}"
    if origin is dict:
        return f"{_type_name(parts[0])} -> {_type_name(parts[1])}"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return "section"
    if isinstance(annotation, type) and issubclass(annotation, StrEnum):
        return " or ".join(f"`{member}`" for member in annotation)
    return _PLAIN[annotation.__name__]


def _default_of(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True)
    return default if isinstance(default, str) else json.dumps(default)


def _meaning_of(field: FieldInfo) -> str:
    """The description, with null, as YAML writes it, for Python's None."""
    return " ".join((field.description or "").split()).replace("None:", "null:")


def _by_section(some: Iterable[Key]) -> Iterator[tuple[str, Iterator[Key]]]:
    return groupby(some, key=lambda key: key.section)


def markdown() -> str:
    """The page docs/config-keys.md."""
    page = [PREFACE]
    for section, members in _by_section(keys()):
        page.append(f"## {section or 'the recipe itself'}\n\n| key | type | default | meaning |\n|---|---|---|---|\n")
        page += [f"| `{key.name}` | {key.type} | `{key.default}` | {_cell(key.meaning)} |\n" for key in members]
        page.append("\n")
    return "".join([*page, OTHER_NAMES_PREFACE, *_other_names()])


def _other_names() -> Iterator[str]:
    """Rows of the table of names of other trainers."""
    for here, there in [*((f"`{key}`", names) for key, names in OTHER_NAMES.items()), *EXPLAINED.items()]:
        yield f"| {', '.join(f'`{name}`' for name in there)} | {_cell(here)} |\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def tables(prefix: str | None) -> list[Table]:
    """Tables for a terminal, one per section: of all keys, or of the key or section named `prefix`.

    Raises:
        UserError: there is no such key.
    """
    selected = every = keys()
    if prefix is not None:
        selected = [key for key in every if key.name == prefix or key.name.startswith((f"{prefix}.", f"{prefix}[]."))]
        if not selected:
            known = {key.name for key in every} | {key.section for key in every if key.section}
            other = key_of_option(prefix)
            raise UserError(f"a recipe has no key {prefix}{nearest(prefix, known) if other is None else other.text}")
    return [_table(section, members) for section, members in _by_section(selected)]


def _table(section: str, members: Iterable[Key]) -> Table:
    table = Table(title=section or "the recipe itself", title_justify="left", show_lines=True)
    for heading in ("key", "type", "default", "meaning"):
        table.add_column(heading)
    for key in members:
        name = key.name.removeprefix(f"{section}.")
        table.add_row(name, key.type.replace("`", ""), key.default, key.meaning)
    return table
