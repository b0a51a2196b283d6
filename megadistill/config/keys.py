"""Every key of a recipe, from the models that validate it: type, bounds, default, meaning. It knows no room."""

import json
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from rich.markup import escape
from rich.table import Table

from megadistill.config import Recipe, Section
from megadistill.errors import UserError, nearest

PREFACE = """\
# Every key of a recipe

`megadistill reference --markdown` writes this page from the models that validate a recipe, and a test holds it against
them; `megadistill reference loss` shows one section in a terminal. A key that a recipe does not say has its default;
one that does not exist is refused with the nearest that does. `--set section.key=value` overrides any of them.

"""

_BOUNDS = {annotated_types.Ge: "≥", annotated_types.Gt: ">", annotated_types.Le: "≤", annotated_types.Lt: "<"}

_PLAIN = {"str": "text", "bool": "true or false", "int": "integer", "float": "number", "Any": "any"}


@dataclass(frozen=True)
class Key:
    """One key of a recipe."""

    name: str
    """Dotted, as in `--set`."""
    type: str
    default: str
    """`required` where there is none."""
    meaning: str

    @property
    def section(self) -> str:
        return self.name.rpartition(".")[0]


def keys() -> list[Key]:
    """All keys, section by section; those of a list's items as `section.list[].key`."""
    return list(_keys(Recipe, ""))


def _keys(model: type[BaseModel], prefix: str) -> Iterator[Key]:
    inner: list[tuple[type[BaseModel], str]] = []
    for name, field in model.model_fields.items():
        found, many = _section_of(field.annotation)
        if found is not None:
            inner.append((found, f"{prefix}{name}{'[]' if many else ''}."))
            if field.is_required() or (not many and field.default is not None):
                continue
        yield Key(f"{prefix}{name}", _type_of(field), _default_of(field), _meaning_of(field))
    for section, deeper in inner:
        yield from _keys(section, deeper)


def _section_of(annotation: Any) -> tuple[type[Section] | None, bool]:
    """The section that a key holds, or holds a list of."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation, False
    for part in get_args(annotation):
        found, many = _section_of(part)
        if found is not None:
            return found, many or get_origin(annotation) is list
    return None, False


def _type_of(field: FieldInfo) -> str:
    bounds = [
        f"{_BOUNDS[type(each)]} {getattr(each, type(each).__name__.lower())}"
        for each in field.metadata
        if type(each) in _BOUNDS
    ]
    return ", ".join([_named(field.annotation), *bounds])


def _named(annotation: Any) -> str:
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " or ".join(f"`{part}`" for part in parts)
    if origin in (types.UnionType, typing.Union):
        return " or ".join("null" if part is type(None) else _named(part) for part in parts)
    if origin is list:
        return f"list of {_named(parts[0])}"
    if origin is dict:
        return f"{_named(parts[0])} -> {_named(parts[1])}"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return "section"
    return _PLAIN[annotation.__name__]


def _default_of(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True)
    return default if isinstance(default, str) else json.dumps(default)


def _meaning_of(field: FieldInfo) -> str:
    """In the words of a recipe, where Python's None is null."""
    return " ".join((field.description or "").split()).replace("None:", "null:")


def _sections(found: Sequence[Key]) -> dict[str, list[Key]]:
    grouped: dict[str, list[Key]] = {}
    for key in found:
        grouped.setdefault(key.section, []).append(key)
    return grouped


def markdown() -> str:
    """The page docs/reference.md."""
    page = [PREFACE]
    for section, found in _sections(keys()).items():
        page.append(f"## {section or 'the recipe itself'}\n\n| key | type | default | meaning |\n|---|---|---|---|\n")
        page += [
            f"| `{key.name}` | {_cell(key.type)} | `{_cell(key.default)}` | {_cell(key.meaning)} |\n" for key in found
        ]
        page.append("\n")
    return "".join(page).rstrip() + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def tables(prefix: str | None) -> list[Table]:
    """For a terminal: all sections, or the key or section of this name.

    Raises:
        UserError: there is no such key.
    """
    found = keys()
    if prefix is not None:
        asked = [key for key in found if key.name == prefix or key.name.startswith((f"{prefix}.", f"{prefix}[]."))]
        if not asked:
            known = {key.name for key in found} | {key.section for key in found if key.section}
            raise UserError(f"a recipe has no key {prefix}{nearest(prefix, known)}")
        found = asked
    return [_table(section, held) for section, held in _sections(found).items()]


def _table(section: str, found: Sequence[Key]) -> Table:
    table = Table(title=section or "the recipe itself", title_justify="left", show_lines=True)
    for heading in ("key", "type", "default", "meaning"):
        table.add_column(heading, overflow="fold", ratio=2 if heading == "meaning" else 1)
    for key in found:
        name = key.name.removeprefix(f"{section}.")
        table.add_row(*(escape(text) for text in (name, key.type.replace("`", ""), key.default, key.meaning)))
    return table
