"""Shared parts of the commands: how one is added to the parser, the recipe argument, and the exit codes."""

import argparse
from pathlib import Path
from typing import TypeAlias

EXIT_CODES = "exit codes: 0 done; 2 invalid input; 3 a fault that a restart may fix; 4 a fault that needs a person"

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_command(commands: Commands, name: str, summary: str, epilog: str) -> argparse.ArgumentParser:
    """A command, or an action of a command, with its summary as the first line of its help."""
    return commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_recipe(command: argparse.ArgumentParser, text: str = "a YAML recipe, such as recipes/smoke.yaml") -> None:
    """The arguments RECIPE and --set."""
    command.add_argument("recipe", type=Path, metavar="RECIPE", help=text)
    add_overrides(command)


def add_overrides(command: argparse.ArgumentParser) -> None:
    """The option --set of a command that reads a recipe."""
    text = "override a key of the recipe, as in --set train.steps=100; repeatable"
    command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=text)
