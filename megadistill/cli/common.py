"""Shared parts of the commands: how one and its options are added to the parser, the exit codes, printed tables."""

import argparse
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from megadistill.cli.numbers import number_type
from megadistill.redaction import printable_lines

EXIT_CODES = """\
exit codes: 0 done; 2 invalid input; 3 interrupted, or a fault that a restart may fix; 4 a fault that needs a person"""

NOTHING_WRITTEN = "nothing was written; the same command starts again"
RESUMES = "what is finished is kept; the same command resumes"

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
Options: TypeAlias = "argparse._ActionsContainer"
"""A parser, or a group of its options."""
Run = Callable[[argparse.Namespace], int | None]
"""Runs a command by its options, and returns its exit code; None: 0."""


MAX_WIDTH = 100
"""Columns of a help text on a wide terminal."""


class HelpFormatter(argparse.HelpFormatter):
    """Fills prose to the terminal's width, keeps commands whole, and appends the default to an option's help."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        width = min(width, MAX_WIDTH)
        lines: list[str] = []
        for block in text.split("\n\n"):
            prose: list[str] = []
            for line in [*re.sub(r" \\\n *", " ", block).splitlines(), ""]:
                is_command = line.startswith((" ", "example"))
                if prose and (is_command or not line):
                    lines += textwrap.wrap(" ".join(prose), width, break_long_words=False, break_on_hyphens=False)
                    prose = []
                if is_command:
                    lines += _continued(line, width)
                elif line:
                    prose.append(line)
            lines.append("")
        return "\n".join(indent + line for line in lines[:-1])

    def _get_help_string(self, action: argparse.Action) -> str | None:
        plain = action.default in (None, False, [], argparse.SUPPRESS) or "default" in str(action.help)
        return action.help if plain else f"{action.help} (default %(default)s)"


def _continued(command: str, width: int) -> list[str]:
    """A command in lines of a width, each but the last with the backslash that a shell needs; broken before options."""
    if len(command) <= width:
        return [command]
    indent = " " * (len(command) - len(command.lstrip()) + 4)
    lines = [""]
    for part in re.split(r" (?=--)", command):
        if lines[-1] and len(lines[-1]) + len(part) + 3 > width:
            lines[-1] += " \\"
            lines.append(indent + part)
        else:
            lines[-1] = f"{lines[-1]} {part}" if lines[-1] else part
    return lines


def add_command(
    commands: Commands,
    name: str,
    summary: str,
    epilog: str,
    run: Run | None = None,
    *,
    exit_codes: str = EXIT_CODES,
    on_interrupt: str = NOTHING_WRITTEN,
) -> argparse.ArgumentParser:
    """A command, or an action of one. Its help has the summary, the options, the epilog and the exit codes.

    `on_interrupt` is what it prints when it is interrupted.
    """
    command = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=f"{epilog}\n\n{exit_codes}",
        formatter_class=HelpFormatter,
    )
    command.set_defaults(run=run, on_interrupt=on_interrupt)
    return command


def option(
    options: Options, name: str, metavar: str, text: str, *, default: Any = None, kind: Any = None, **settings: Any
) -> None:
    """Adds an option with a value: of type `kind`, else of its default's, else text. Numbers have bounds."""
    kind = kind or (str if default is None else type(default))
    if kind in (int, float):
        kind = number_type(kind, name)
    options.add_argument(name, metavar=metavar, help=text, default=default, type=kind, **settings)


def repeatable(options: Options, name: str, metavar: str, text: str, *, kind: Any = str, **settings: Any) -> None:
    """Adds an option that may be given several times; its value is a list."""
    text = f"{text}; repeatable"
    options.add_argument(name, metavar=metavar, help=text, default=[], type=kind, action="append", **settings)


def add_recipe(command: Options, text: str = "a YAML recipe, such as recipes/smoke.yaml") -> None:
    """The arguments RECIPE and --set."""
    command.add_argument("recipe", type=Path, metavar="RECIPE", help=text)
    add_overrides(command)


def add_overrides(command: Options) -> None:
    """The option --set of a command that reads a recipe."""
    repeatable(command, "--set", "KEY=VALUE", "override a key of the recipe, as in --set train.steps=100")


def add_insert_bos(command: Options) -> None:
    """The option --insert-bos of a command that reads shards."""
    text = "put BOS in front of sequences that do not begin with it (as data.insert_bos of a recipe)"
    command.add_argument("--insert-bos", action="store_true", help=text)


def add_sampling(command: Options, *, new_tokens: int | None = None) -> None:
    """The options of drawing continuations. --new-tokens is required if `new_tokens` gives no default."""
    required = new_tokens is None
    text = "maximum tokens of a continuation"
    option(command, "--new-tokens", "T", text, default=new_tokens, kind=int, required=required)
    option(command, "--temperature", "X", "0: the most likely token", default=1.0)
    option(command, "--top-p", "X", "nucleus: probability to draw from; 1: all", default=1.0)
    option(command, "--seed", "N", "seed of the draws", default=1)


def say(line: Any = "") -> None:
    """Prints a line on standard output, without what a name in it would do to a terminal."""
    print(printable_lines(str(line)), flush=True)


def print_tables(*tables: Any) -> None:
    """Prints tables and texts on the terminal, an empty line between two."""
    from rich.console import Console

    from megadistill import terminal_tables

    terminal_tables.print_tables(Console(highlight=False), *tables)
