"""The command `plan`, which computes the needs of a run before it starts."""

import argparse
from pathlib import Path
from typing import Any

from megadistill.cli.common import Commands, add_command, add_overrides, option

PLAN_EPILOG = """\
Nothing is started, and no GPU is needed: models are built on the meta device.

examples:
  megadistill plan recipes/smoke.yaml --nodes 1 --gpu h100
  megadistill plan RECIPE --nodes 64 --gpu h100 --sequence-length 8192 --teacher-config DIR   # data, teacher elsewhere

Exit code 2 also where no layout fits; the message then gives the missing memory, and settings that would help."""


def add(commands: Commands) -> None:
    summary = "memory, traffic, time and cost of a recipe on a cluster, and its best layouts"
    command = add_command(commands, "plan", summary, PLAN_EPILOG, _plan)
    command.add_argument("recipe", type=Path, metavar="RECIPE", help="a YAML recipe, such as recipes/smoke.yaml")
    add_plan_options(command, required=True)
    law = command.add_argument_group("the distillation scaling law")
    option(law, "--teacher-loss", "X", "the teacher's cross-entropy, nats per token", kind=float)
    option(law, "--teacher-tokens", "D", "or the number of tokens that it was trained on", kind=float)
    option(command, "--price", "X", "price of a GPU-hour, in your currency", kind=float)
    option(command, "--json", "FILE", "everything as JSON; - for stdout, in place of tables", kind=Path)


def add_plan_options(command: argparse.ArgumentParser, *, required: bool) -> None:
    """The options of `build_plan`: the cluster, and assumptions about it."""
    option(command, "--nodes", "N", "nodes of the cluster, all alike", kind=int, required=required)
    option(command, "--gpus-per-node", "N", "processes of a node, one per GPU", default=8)
    option(command, "--gpu", "KIND", "h100, a100-80gb, ... or a YAML file that describes one", required=required)
    add_overrides(command)
    option(command, "--sequence-length", "S", "if the data is not on this machine", kind=int)
    text = "folder with config.json, if teacher.path is not on this machine"
    option(command, "--teacher-config", "DIR", text, kind=Path)
    option(command, "--student-mfu", "X", "assumed MFU of the student's training", default=0.40)
    option(command, "--teacher-mfu", "X", "assumed MFU of the teacher's forward pass", default=0.45)


def build_plan(recipe: Path, options: argparse.Namespace) -> Any:
    """The plan (`plan.search.Plan`) of a recipe, by the options that `add_plan_options` adds.

    Raises:
        UserError: one line.
    """
    from megadistill.accelerators import accelerator
    from megadistill.plan.layouts import Cluster
    from megadistill.plan.plan_input import read_plan_input
    from megadistill.plan.search import plan
    from megadistill.plan.throughput import MfuAssumption

    cluster = Cluster(options.nodes, options.gpus_per_node, accelerator(options.gpu))
    mfu = MfuAssumption(options.student_mfu, options.teacher_mfu)
    inputs = read_plan_input(
        recipe, options.set, sequence_length=options.sequence_length, teacher_config=options.teacher_config
    )
    return plan(inputs, cluster, mfu)


def _plan(options: argparse.Namespace) -> int:
    import json
    import sys

    from rich.console import Console

    from megadistill.errors import UserError
    from megadistill.plan.output.plan_json import to_json
    from megadistill.plan.output.plan_tables import render
    from megadistill.plan.scaling_law import forecast
    from megadistill.plan.search import remedies

    if options.price is not None and not 0 <= options.price < float("inf"):
        raise UserError(f"--price {options.price}: give what a GPU-hour costs")
    plan = build_plan(options.recipe, options)
    law = None
    if plan.main is not None:
        law = forecast(plan.main.requirements, teacher_loss=options.teacher_loss, teacher_tokens=options.teacher_tokens)
    if options.json != Path("-"):
        Console(highlight=False).print(render(plan, law=law, price=options.price))
    if options.json is not None:
        content = json.dumps(to_json(plan, law=law, price=options.price), indent=1, allow_nan=False) + "\n"
        if options.json == Path("-"):
            sys.stdout.write(content)
        else:
            options.json.write_text(content, encoding="utf-8")
    if not plan.best:
        raise UserError(remedies(plan))
    return 0
