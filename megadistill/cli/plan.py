"""Verbs that say what a run will need, before it costs anything: plan."""

import argparse
from pathlib import Path
from typing import Any

from megadistill.cli.common import EXIT_CODES, Verbs, add_verb

PLAN_EPILOG = f"""\
Nothing is started, and no GPU is needed: models are counted on meta. Where data or teacher are not on this machine:

  megadistill plan RECIPE --nodes 64 --gpu h100 --sequence-length 8192 --teacher-config DIR

Exit 2 also where no layout fits; the line then says by how much, and what would help.

{EXIT_CODES}"""


def add(verbs: Verbs) -> None:
    verb = add_verb(verbs, "plan", "what a recipe needs on a cluster, and the layouts that suit it best", PLAN_EPILOG)
    verb.add_argument("recipe", type=Path, metavar="RECIPE", help="a YAML recipe")
    add_plan_options(verb, required=True)
    law = verb.add_argument_group("the distillation scaling law")
    law.add_argument("--teacher-loss", type=float, metavar="X", help="the teacher's cross-entropy, nats a token")
    law.add_argument("--teacher-tokens", type=float, metavar="D", help="or the tokens that it was trained on")
    verb.add_argument("--price", type=float, metavar="X", help="of a GPU-hour, in your currency")
    verb.add_argument("--json", type=Path, metavar="FILE", help="everything as JSON; - for stdout, in place of tables")
    verb.set_defaults(run=_plan)


def add_plan_options(verb: argparse.ArgumentParser, *, required: bool) -> None:
    """What `planned` reads beside the recipe: the cluster, and what is assumed of it."""
    verb.add_argument("--nodes", type=int, required=required, metavar="N", help="nodes, of one kind")
    verb.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="processes of a node, one a GPU (8)")
    verb.add_argument(
        "--gpu", required=required, metavar="KIND", help="h100, a100-80gb, ... or a YAML file of your own"
    )
    verb.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the recipe")
    verb.add_argument("--sequence-length", type=int, metavar="S", help="where the data is not on this machine")
    verb.add_argument("--teacher-config", type=Path, metavar="DIR", help="with config.json, where teacher.path is not")
    verb.add_argument(
        "--student-mfu", type=float, default=0.40, metavar="X", help="assumed share of the peak in training (0.40)"
    )
    verb.add_argument(
        "--teacher-mfu", type=float, default=0.45, metavar="X", help="and in the teacher's forward pass (0.45)"
    )


def planned(recipe: Path, options: argparse.Namespace) -> Any:
    """The plan (`plan.search.Plan`) of a recipe, by the options that `add_plan_options` adds.

    Raises:
        UserError: one line.
    """
    from megadistill.accelerators import accelerator
    from megadistill.plan.layouts import Cluster
    from megadistill.plan.plan_input import read_subject
    from megadistill.plan.search import plan
    from megadistill.plan.throughput import Assumed

    cluster = Cluster(options.nodes, options.gpus_per_node, accelerator(options.gpu))
    assumed = Assumed(options.student_mfu, options.teacher_mfu)
    subject = read_subject(
        recipe, options.set, sequence_length=options.sequence_length, teacher_config=options.teacher_config
    )
    return plan(subject, cluster, assumed)


def _plan(options: argparse.Namespace) -> int:
    import json
    import sys

    from rich.console import Console

    from megadistill.errors import UserError
    from megadistill.plan.forecast import forecast
    from megadistill.plan.output.plan_json import values
    from megadistill.plan.output.plan_tables import told
    from megadistill.plan.search import what_would_help

    if options.price is not None and not 0 <= options.price < float("inf"):
        raise UserError(f"--price {options.price}: give what a GPU-hour costs")
    found = planned(options.recipe, options)
    shown = found.shown
    law = None
    if shown is not None:
        law = forecast(shown.needs, teacher_loss=options.teacher_loss, teacher_tokens=options.teacher_tokens)
    if options.json != Path("-"):
        Console(highlight=False).print(told(found, law=law, price=options.price))
    if options.json is not None:
        written = json.dumps(values(found, law=law, price=options.price), indent=1, allow_nan=False) + "\n"
        if options.json == Path("-"):
            sys.stdout.write(written)
        else:
            options.json.write_text(written, encoding="utf-8")
    if not found.best:
        raise UserError(what_would_help(found))
    return 0
