"""Shared parts of the commands: how one and its options are added to the parser, the exit codes, printed tables."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from megadistill.cli.parser import count

EXIT_CODES = """\
exit codes: 0 done; 2 invalid input; 3 interrupted, or a fault that a restart may fix; 4 a fault that needs a person"""

NOTHING_WRITTEN = "nothing was written; the same command starts again"
RESUMES = "what is finished is kept; the same command resumes"

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
Options: TypeAlias = "argparse._ActionsContainer"
"""A parser, or a group of its options."""
Run = Callable[[argparse.Namespace], int | None]
"""Runs a command by its options, and returns its exit code; None: 0."""


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps line breaks of the epilog, and appends the default to an option's help."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        plain = action.default in (None, False, [], argparse.SUPPRESS) or "default" in str(action.help)
        return action.help if plain else f"{action.help} (default %(default)s)"


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
        formatter_class=_HelpFormatter,
    )
    command.set_defaults(run=run, on_interrupt=on_interrupt)
    return command


def option(
    options: Options, name: str, metavar: str, text: str, *, default: Any = None, kind: Any = None, **settings: Any
) -> None:
    """Adds an option with a value: of type `kind`, else of its default's (a number: from 1 on), else text."""
    kind = kind or (str if default is None else count if type(default) is int else type(default))
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


def add_sampling(command: Options, *, new_tokens: int | None = None) -> None:
    """The options of drawing continuations. --new-tokens is required if `new_tokens` gives no default."""
    required = new_tokens is None
    text = "maximum tokens of a continuation"
    option(command, "--new-tokens", "T", text, default=new_tokens, kind=count, required=required)
    option(command, "--temperature", "X", "0: the most likely token", default=1.0)
    option(command, "--top-p", "X", "nucleus: probability to draw from; 1: all", default=1.0)
    option(command, "--seed", "N", "seed of the draws", default=1, kind=int)


def print_tables(*tables: Any) -> None:
    """Prints tables and texts on the terminal, an empty line between two."""
    from rich.console import Console

    from megadistill import terminal_tables

    terminal_tables.print_tables(Console(highlight=False), *tables)
