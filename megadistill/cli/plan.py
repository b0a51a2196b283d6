"""Verbs that say what a run will need, before it costs anything: plan."""

import argparse
from pathlib import Path

from megadistill.cli.verbs import Verbs, add_verb


def add(verbs: Verbs) -> None:
    _plan_parser(verbs)


def _plan_parser(verbs: Verbs) -> None:
    verb = add_verb(
        verbs, "plan", "what a recipe needs on a number of ranks: parameters, FLOPs, memory, bytes on the wire"
    )
    verb.add_argument("recipe", type=Path, metavar="RECIPE", help="a YAML recipe")
    verb.add_argument("--ranks", type=int, required=True, metavar="N", help="processes, one a GPU")
    verb.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the recipe")
    verb.set_defaults(run=_plan)


def _plan(options: argparse.Namespace) -> int:
    from rich.console import Console

    from megadistill.plan.needs import read_needs, tables

    found = read_needs(options.recipe, options.set, ranks=options.ranks)
    for table in tables(found):
        Console().print(table)
    return 0
