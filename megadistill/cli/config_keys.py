"""The command `config-keys`, which explains the keys of a recipe."""

import argparse

from megadistill.cli.common import Commands, add_command, print_tables

EPILOG = """\
examples:
  megadistill config-keys
  megadistill config-keys loss
  megadistill config-keys train.max_grad_norm"""


def add(commands: Commands) -> None:
    summary = "every key of a recipe: type, default, meaning"
    command = add_command(commands, "config-keys", summary, EPILOG, _config_keys)
    command.add_argument("key", nargs="?", metavar="KEY", help="a section or a key, as in loss or train.max_grad_norm")
    command.add_argument("--markdown", action="store_true", help="print all of them as the page docs/config-keys.md")


def _config_keys(options: argparse.Namespace) -> int:
    from megadistill.config.keys import markdown, tables

    if options.markdown:
        print(markdown(), end="")
        return 0
    print_tables(*tables(options.key))
    return 0
