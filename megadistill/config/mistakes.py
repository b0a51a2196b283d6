"""All mistakes of a recipe's values, a line each: what is wrong, what was found, what to write.

pydantic stops checking a section whose keys are wrong. So each mistake is corrected as its line proposes (or left out),
and the rest is checked again.
"""

import copy
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from megadistill.config.other_names import WayOut, nearest_value, way_out
from megadistill.config.recipe import Recipe, Section, sections_in

KeyPath = tuple[str, ...]
"""Path of a key, such as ("train", "steps")."""

_EXPECTED = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "dict_type": "a mapping of keys",
    "model_type": "a section: keys, indented below it",
    "model_attributes_type": "a section: keys, indented below it",
    "finite_number": "a finite number",
}
"""pydantic's type of an error -> the value that is needed."""

_BOUNDS = {"greater_than_equal": ("at least", "ge"), "greater_than": ("more than", "gt"),
    "less_than_equal": ("at most", "le"), "less_than": ("less than", "lt")}  # fmt: skip
"""pydantic's type of an error -> the words for the bound, and its name in the error's context."""

MAX_LETTERS = 200
"""Letters of a value that a message shows."""

_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")

_FIRST_KEYS = {
    "run": "folder",
    "data": "manifest",
    "student": "config",
    "teacher": "path",
    "loss": "divergence",
    "loss.targets": "select",
    "train.optimizer": "kind",
    "train.schedule": "kind",
}
"""Section -> the key that is meant by a text in its place."""

MAX_ROUNDS = 8
Correction = Callable[[Any], None]
"""Corrects a mistake in the values of a recipe."""

_NOTHING: Any = object()
"""No correction is known."""


@dataclass(frozen=True)
class Mistake:
    """A mistake of a recipe."""

    path: KeyPath
    """Key; empty: of several sections."""
    text: str
    """One line, which begins with the key."""
    of_value: bool = True
    """Whether it is about the value of the key itself, not about keys that do not fit together."""
    is_missing: bool = False
    """Whether the key is required and not there."""


def find_mistakes(values: Any) -> tuple[Recipe | None, list[Mistake]]:
    """The recipe of plain values, or its mistakes. `values` are not changed."""
    mistakes: dict[KeyPath, Mistake] = {}
    changed: set[KeyPath] = set()
    values = copy.deepcopy(values)
    for _ in range(MAX_ROUNDS):
        try:
            recipe = Recipe.model_validate(values)
            if not mistakes:
                return recipe, []
            break
        except ValidationError as error:
            before, corrections = len(mistakes), []
            for each in sorted(error.errors(), key=lambda each: each["type"] == "missing"):  # a name may be mistyped
                path, siblings = _locate(each["loc"], values, missing=each["type"] == "missing")
                if path not in mistakes and path not in changed and not _follows(each, path, changed):
                    mistakes[path], target, correct = _explained(each, path, siblings)
                    changed |= {path, target}
                    corrections.append(correct)
            for correct in corrections:
                correct(values)
            if len(mistakes) == before:
                break
    return None, [each for each in mistakes.values() if not _is_given_elsewhere(each, changed)]


def _is_given_elsewhere(mistake: Mistake, changed: set[KeyPath]) -> bool:
    """Whether a section is missing into which the correction of another mistake moves a key."""
    length = len(mistake.path)
    return mistake.is_missing and any(len(path) > length and path[:length] == mistake.path for path in changed)


def _follows(error: ErrorDetails, path: KeyPath, changed: set[KeyPath]) -> bool:
    """Whether an error may only come from the correction of another: it is about a key that was `changed`."""
    if error["type"] == "missing":
        return path in changed
    names = {each[-1] for each in changed if each}
    return error["type"] == "value_error" and any(re.search(rf"\b{re.escape(name)}\b", error["msg"]) for name in names)


def _explained(error: ErrorDetails, path: KeyPath, siblings: list[str]) -> tuple[Mistake, KeyPath, Correction]:
    """The mistake, the key that its correction sets, and the correction."""
    key, kind, value = ".".join(path), error["type"], error["input"]
    message, corrected = str(error["msg"]), _NOTHING
    if kind == "extra_forbidden":
        by_name = path[0] == "teacher" and len(path) == 2 and isinstance(value, dict)
        solution = WayOut("; several teachers by name are teachers") if by_name else way_out(path, siblings)
        target = path if solution.key is None else tuple(solution.key.split("."))
        return Mistake(path, f"{key}: no such key{solution.text}"), target, partial(_move, path, target, value)
    if kind == "missing":
        return Mistake(path, f"{key}: is required", of_value=False, is_missing=True), path, lambda values: None
    if kind == "value_error":
        message = message.removeprefix("Value error, ")
        mistake = Mistake(path, f"{key}: {message}" if key else message, of_value=False)
    elif kind in ("literal_error", "enum", "union_tag_invalid"):
        context = error["ctx"]
        expected = context["expected_tags"] if "tag" in context else context["expected"]
        if "tag" in context:
            path, value = (*path, context["discriminator"].strip("'")), context["tag"]
        listed = re.findall(r"'([^']*)'", expected)
        actual = (
            f"found {repr(value) if isinstance(value, str) else _described(value)}{nearest_value(str(value), listed)}"
        )
        mistake = Mistake(path, f"{'.'.join(path)}: input should be {expected}, {actual}")
    elif kind in _EXPECTED:
        corrected = _converted(value, kind)
        actual = f"found {_described(value)}{_to_write(path, value, kind, corrected)}"
        mistake = Mistake(path, f"{key}: give {_EXPECTED[kind]}, {actual}")
    elif kind in _BOUNDS:
        words, name = _BOUNDS[kind]
        bound = error["ctx"][name]
        bound = f"{bound:,}" if bound >= 1 else _yaml(bound)
        mistake = Mistake(path, f"{key}: give {words} {bound}, found {_described(value)}")
    else:
        mistake = Mistake(path, f"{key}: {message[0].lower()}{message[1:]}, found {_described(value)}")
    return mistake, path, partial(_put, path, corrected)


def _converted(value: Any, kind: str) -> Any:
    """The value of the right type that is probably meant; `_NOTHING`: it is not clear."""
    if kind in ("int_type", "int_from_float", "float_type") and isinstance(value, str | float):
        number = _number(value)
        if number is not None and kind != "float_type":
            return int(number) if number.is_integer() else _NOTHING
        return _NOTHING if number is None else number
    if kind == "bool_type" and str(value).lower() in (*_TRUE, *_FALSE):
        return str(value).lower() in _TRUE
    if kind == "string_type" and isinstance(value, int | float):
        return str(value)
    if kind == "list_type" and isinstance(value, int | float | str):
        return [value]
    return _NOTHING


def _number(value: str | float) -> float | None:
    """10,000 and 1 000 and 10k as people write them."""
    text = re.sub(r"(?<=\d)[,_ ](?=\d{3}\b)", "", str(value).strip().strip("'\"")).replace("_", "")
    for suffix, factor in (("k", 1e3), ("M", 1e6), ("B", 1e9)):
        if text.endswith(suffix):
            text, scale = text.removesuffix(suffix), factor
            break
    else:
        scale = 1.0
    try:
        return float(text) * scale
    except ValueError:
        return None


def _to_write(path: KeyPath, value: Any, kind: str, corrected: Any) -> str:
    if corrected is not _NOTHING:
        if isinstance(value, bool) and kind == "string_type":
            return " (which yes, no, on and off are in YAML): put it in quotes"
        written = f"'{corrected}'" if isinstance(corrected, str) else _yaml(corrected)
        quoted = isinstance(value, str) and kind != "list_type" and value.replace(".", "").replace("-", "").isalnum()
        return f": write {written}{', without quotes' if quoted and value[-1:] not in 'kMB' else ''}"
    if value is None:
        remedy = "indent the lines below it" if kind.startswith("model") else "give it a value"
        return f": {remedy}{'' if _is_required(path) else ', or remove the key'}"
    if isinstance(value, str) and kind.startswith("model") and re.match(r"\w+:\S", value):
        return f": a space is missing after the colon, write {value.replace(':', ': ', 1)}"
    if isinstance(value, str) and (first := _FIRST_KEYS.get(".".join(path))):
        return f": write {path[-1]}: {{{first}: {value}}}"
    return ""


def _is_required(path: KeyPath) -> bool:
    """Whether a key has no default in its section."""
    sections: list[type[Section]] = [Recipe]
    for part in path[:-1]:
        fields = [section.model_fields[part] for section in sections if part in section.model_fields]
        sections = [inner for field in fields for inner in sections_in(field.annotation)]
    return any(section.model_fields[path[-1]].is_required() for section in sections if path[-1] in section.model_fields)


def _yaml(value: Any) -> str:
    """A value as a recipe has it: `3.0e-4`, which every YAML parser reads as a number, not `0.0003`."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value and math.isfinite(value) and not 1e-3 <= abs(value) < 1e6:
        digits, _, exponent = f"{value:e}".partition("e")
        whole, _, fraction = digits.partition(".")
        return f"{whole}.{fraction.rstrip('0') or '0'}e{int(exponent)}"
    return repr(value)


def _described(value: Any) -> str:
    if isinstance(value, str):
        return f"the text {_shortened(value)!r}" if value.strip() else "an empty text"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return f"the keys {', '.join(map(repr, list(value)[:3]))}{', …' if len(value) > 3 else ''}"
    return "nothing" if value is None else _shortened(repr(value))


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_LETTERS else f"{text[:MAX_LETTERS]}…"


def _locate(location: Sequence[str | int], values: Any, *, missing: bool) -> tuple[KeyPath, list[str]]:
    """The key path of pydantic's location, without its marks of a union's members, and the keys beside its last one."""
    sections: list[type[Section]] = [Recipe]
    path: list[str] = []
    siblings = list(Recipe.model_fields)
    for number, part in enumerate(location):
        inside = isinstance(values, dict) and part in values
        in_list = isinstance(values, list) and isinstance(part, int) and part < len(values)
        if not inside and not in_list and not (missing and number == len(location) - 1):
            of_kind = [
                each for each in sections if "kind" in each.model_fields and each.model_fields["kind"].default == part
            ]
            sections = of_kind or sections
            continue
        values = values[part] if inside or in_list else None
        path.append(str(part))
        if in_list:
            continue
        siblings = [key for section in sections for key in section.model_fields]
        fields = [section.model_fields[str(part)] for section in sections if str(part) in section.model_fields]
        sections = [inner for field in fields for inner in sections_in(field.annotation)] or sections
    return tuple(path), siblings


def _put(path: KeyPath, value: Any, values: Any) -> None:
    """Puts a value at a path of `values`, or takes the key away for `_NOTHING`."""
    if not path:
        return
    *above, last = path
    for part in above:
        if isinstance(values, dict) and values.get(part) is None:
            values[part] = {}
        values = values[int(part)] if isinstance(values, list) else values[part] if isinstance(values, dict) else None
    if isinstance(values, list):
        values[int(last)] = None if value is _NOTHING else value
    elif isinstance(values, dict) and value is _NOTHING:
        values.pop(last, None)
    elif isinstance(values, dict):
        values[last] = value


def _move(path: KeyPath, target: KeyPath, value: Any, values: Any) -> None:
    """Moves the value of an unknown key to the key that is meant, unless that has one."""
    _put(path, _NOTHING, values)
    there = values
    for part in target:
        there = there.get(part) if isinstance(there, dict) else None
    if target != path and there is None:
        _put(target, value, values)


def flattened(values: Any, prefix: KeyPath = ()) -> Iterator[KeyPath]:
    """The paths of all keys of nested mappings."""
    if isinstance(values, dict):
        for key, child in values.items():
            yield (*prefix, str(key))
            yield from flattened(child, (*prefix, str(key)))
