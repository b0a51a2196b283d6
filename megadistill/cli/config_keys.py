"""The command `config-keys`, which explains the keys of a recipe."""

import argparse

from megadistill.cli.common import EXIT_CODES, Commands, add_command

EPILOG = f"""\
examples:
  megadistill config-keys
  megadistill config-keys loss
  megadistill config-keys train.max_grad_norm

{EXIT_CODES}"""


def add(commands: Commands) -> None:
    command = add_command(commands, "config-keys", "every key of a recipe: type, default, meaning", EPILOG)
    command.add_argument("key", nargs="?", metavar="KEY", help="a section or a key, as in loss or train.max_grad_norm")
    command.add_argument("--markdown", action="store_true", help="print all of them as the page docs/config-keys.md")
    command.set_defaults(run=_config_keys)


def _config_keys(options: argparse.Namespace) -> int:
    from rich.console import Console

    from megadistill.config.keys import markdown, tables

    if options.markdown:
        print(markdown(), end="")
        return 0
    for table in tables(options.key):
        Console().print(table)
    return 0
