"""Every argument of every command x hostile arguments."""

import argparse
import shlex
from collections.abc import Iterator
from pathlib import Path

from megadistill.cli.main import parser
from tests.fuzz.harness import pairs, require_lines, table, value_of
from tests.fuzz.worker import Case

WRITTEN = ("output", "json", "plots")
"""Places of output: writing to a pipe waits for its reader, as in any program."""


def _commands(
    top: argparse.ArgumentParser, names: tuple[str, ...] = ()
) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Name and parser of each command that does something."""
    below = [action for action in top._actions if isinstance(action, argparse._SubParsersAction)]
    if not below:
        yield " ".join(names), top
    for action in below:
        for name, command in action.choices.items():
            yield from _commands(command, (*names, name))


def _with(line: list[str], action: argparse.Action, first: int, value: str) -> list[str]:
    """The command line with another value of an argument. `first`: words of the command's name."""
    if not action.option_strings:
        return [*line[:first], value, *line[first + 1 :]]
    option = action.option_strings[-1]
    if option in line:
        place = line.index(option) + 1
        return [*line[:place], value, *line[place + 1 :]]
    return [*line, option, value]


def test_every_command_has_a_line_in_the_table() -> None:
    assert {name for name, _ in _commands(parser())} == set(table("commands"))


def test_a_hostile_argument_is_refused_in_a_line_or_taken(folders: list[Path]) -> None:
    lines = {name: shlex.split(line) for name, line in table("commands").items()}
    rows = [(name, action) for name, command in _commands(parser()) for action in command._actions if action.nargs != 0]
    cases = []
    for (name, action), value in pairs(rows, [value_of(text) for text in table("arguments")], each=3):
        if value == "fifo" and action.dest in WRITTEN:
            continue
        arguments = _with(lines[name], action, len(name.split()), value)
        cases.append(Case(shlex.join(arguments)[:300], tuple(arguments)))
    require_lines(cases, folders)
