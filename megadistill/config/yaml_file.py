"""A YAML file with the line of each key. Mistakes of the syntax are located by line and column, with the text there."""

import re
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megadistill.config.mistakes import KeyPath
from megadistill.errors import UserError
from megadistill.io import read_file, reason_of
from megadistill.redaction import printable

MAX_RECIPE_BYTES = 1 << 20
MAX_DEPTH, MAX_VALUES = 32, 100_000
"""Sections within sections, and keys and items, aliases included: a recipe has far fewer."""
MAX_LETTERS = 40
"""Letters of a line of the file that a message shows."""

_TEXT_OR_NOTHING = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:null")

Lines = dict[KeyPath, int]
"""Path of a key, such as ("train", "steps") -> the line (from 1) that has it."""


def read_yaml(path: Path) -> tuple[Any, Lines, list[tuple[str, str]]]:
    """The values of a file (as OmegaConf's containers), the line of each key, and keys that are there twice.

    Those are mistakes (where, what); their first value counts.

    Raises:
        UserError: the file cannot be read, is too large, or is not YAML.
        FileNotFoundError, IsADirectoryError: there is no file.
    """
    try:
        text = read_file(path, max_bytes=MAX_RECIPE_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: cannot be read as YAML: byte {error.start} is not UTF-8") from None
    except ValueError:
        raise UserError(f"{path}: more than {MAX_RECIPE_BYTES:,} bytes are no recipe") from None
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise
    except OSError as error:
        raise UserError(f"{printable(str(path))}: cannot be read as YAML: {reason_of(error)}") from None
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except RecursionError:
        raise _too_deep(path) from None
    except yaml.MarkedYAMLError as error:
        raise UserError(f"{path}, {_syntax(error, text.splitlines())}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: cannot be read as YAML: {printable(first_line(error))}") from None
    if isinstance(root, yaml.ScalarNode) and root.tag not in _TEXT_OR_NOTHING:
        raise UserError(f"{path}: a mapping of keys is needed, found {printable(root.value[:40])}")
    lines: Lines = {}
    repeated = [(f"{path}, {where}", what) for where, what in _walk(root, (), lines, (), path)]
    if repeated:
        text = yaml.serialize(root, Dumper=yaml.SafeDumper)  # without them
    try:
        return OmegaConf.create(text), lines, repeated
    except (OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as YAML: {printable(first_line(error))}") from None


def _too_deep(file: Path) -> UserError:
    return UserError(f"{file}: nested too deeply for a recipe (at most {MAX_DEPTH} levels)")


def _walk(node: Any, path: KeyPath, lines: Lines, above: tuple[Any, ...], file: Path) -> list[tuple[str, str]]:
    """Fills in `lines`, and takes out each key that its mapping has twice; (where, what) for each of those.

    Raises:
        UserError: more than `MAX_DEPTH` levels or `MAX_VALUES` keys and items.
    """
    repeated: list[tuple[str, str]] = []
    if node in above:  # an alias of what holds it
        return repeated
    if len(path) > MAX_DEPTH:
        raise _too_deep(file)
    if len(lines) > MAX_VALUES:
        raise UserError(f"{file}: more than {MAX_VALUES:,} keys and items are no recipe")
    if isinstance(node, yaml.SequenceNode):
        for number, child in enumerate(node.value):
            lines[*path, str(number)] = child.start_mark.line + 1
            repeated += _walk(child, (*path, str(number)), lines, (*above, node), file)
    if isinstance(node, yaml.MappingNode):
        first: dict[str, Any] = {}
        for key, child in node.value:
            mark, name = key.start_mark, str(key.value)
            if name in first:
                full, before = printable(".".join((*path, name))), lines[*path, name]
                where = f"line {mark.line + 1}, column {mark.column + 1}"
                repeated.append((where, f"{full} is there twice (first in line {before}): keep one of them"))
                continue
            first[name] = (key, child)
            lines[*path, name] = mark.line + 1
            repeated += _walk(child, (*path, name), lines, (*above, node), file)
        node.value = list(first.values())
    return repeated


def _syntax(error: yaml.MarkedYAMLError, lines: list[str]) -> str:
    """`line L, column C: what is wrong, and what to write`."""
    mark, context, problem = error.problem_mark, error.context or "", error.problem or "not YAML"
    if error.context_mark is not None and (
        "quoted scalar" in context or "simple key" in context or ("flow" in context and "got" in problem)
    ):
        mark = error.context_mark  # where it began
    assert mark is not None
    number, column = mark.line, mark.column
    line = lines[number] if number < len(lines) else ""
    before = next((n for n in range(number - 1, -1, -1) if lines[n].split("#")[0].strip()), None)
    message = problem
    if "quoted scalar" in context:
        message = "a quote is opened here and not closed"
    elif "flow" in context:
        message = f"{line[column : column + 1]} is opened here and not closed, or a comma is missing behind it"
    elif "\t" in line[: len(line) - len(line.lstrip())]:
        message = "a tab: YAML is indented with spaces"
        column = line.index("\t")
    elif "simple key" in context:
        message = "a key without a colon: write key: value"
    elif "mapping values" in problem:
        if len(re.findall(r":(?=\s|$)", line.split("#")[0])) > 1:
            message = "two keys in one line: put the second in a line below, indented, or in braces, {key: value}"
        elif before is not None and re.match(r"\s*[\w.-]+:\S", lines[before]):
            number, line = before, lines[before]
            column = line.index(":")
            message = "a space is missing after the colon"
        elif before is not None and ":" not in lines[before]:
            number, line = before, lines[before]
            column = len(line) - len(line.lstrip())
            message = "a key without a colon: write key: value"
        else:
            column = len(line) - len(line.lstrip())
            message = "the indentation is deeper than that of the line above, which has a value already"
    elif re.match(r"\s*- ", line) or (before is not None and re.match(r"\s*- ", lines[before])):
        message = "a list item between keys: take the - away"
    elif "block" in context:
        message = "the indentation is that of no line above: give the keys of a section the same indentation"
    elif "cannot start any token" in problem:
        message = f"a value cannot begin with {line[column : column + 1]}: put it in quotes"
    elif "undefined alias" in problem:
        message = "a value that begins with * is an alias: put it in quotes"
    elif "another document" in problem:
        message = "a second document begins here: a recipe is one, without ---"
    there = line.strip() if len(line.strip()) <= MAX_LETTERS else line.strip()[: MAX_LETTERS - 1] + "…"
    at = f", at `{printable(there)}`" if there else ""
    return f"line {number + 1}, column {column + 1}: cannot be read as YAML{at}: {message}"


def first_line(error: Exception) -> str:
    """The first line of an error's message that is not empty."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
