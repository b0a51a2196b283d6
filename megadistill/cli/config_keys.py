"""The verb that explains a recipe's keys: reference."""

import argparse

from megadistill.cli.common import Verbs, add_verb


def add(verbs: Verbs) -> None:
    verb = add_verb(verbs, "reference", "every key of a recipe: its type, its default, what it means")
    verb.add_argument("key", nargs="?", metavar="KEY", help="a section or a key, as in loss or train.clip")
    verb.add_argument("--markdown", action="store_true", help="all of them as the page docs/reference.md")
    verb.set_defaults(run=_reference)


def _reference(options: argparse.Namespace) -> int:
    from rich.console import Console

    from megadistill.config.keys import markdown, tables

    if options.markdown:
        print(markdown(), end="")
        return 0
    for table in tables(options.key):
        Console().print(table)
    return 0
