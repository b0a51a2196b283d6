"""Commands that explain a run, before it starts or after: plan, timeline, config-keys."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megadistill.cli.common import Commands, add_command, add_overrides, option, print_tables, say
from megadistill.errors import UserError
from megadistill.io import write_json
from megadistill.outputs import require_writable_file, require_writable_folder

if TYPE_CHECKING:
    from megadistill.timeline.spans import Timeline

STEPS = 3
"""Steps that a timeline simulates where no option gives their number."""

PLAN_EPILOG = """\
Nothing is started, and no GPU is needed: models are built on the meta device.

examples:
  megadistill plan recipes/smoke.yaml --nodes 1 --gpu h100

Where data and teacher are elsewhere:

  megadistill plan RECIPE --nodes 64 --gpu h100 --sequence-length 8192 --teacher-config DIR

On several nodes each of the best layouts has the ranks of a replica of the
student (distributed.shard) that suit it best, by memory, latency and faults;
a table has the others for the recipe's own layout. To take another:

  megadistill plan RECIPE --nodes 64 --gpu h100 --set distributed.shard=64

Exit code 2 also where no layout fits; the message then gives the missing memory, and settings that would help."""

TIMELINE_EPILOG = """\
Of a run: the steps of run.timeline, [first, last], which each rank recorded in RUN/timeline/.

  megadistill train RECIPE --set 'run.timeline=[101,103]'
  megadistill timeline RUN

Of a plan: simulated from the seconds that `megadistill plan` expects.

  megadistill timeline RECIPE --nodes 8 --gpu h100 --output DIR

timeline.json opens in https://ui.perfetto.dev and chrome://tracing; timeline.png is a picture of the same."""

CONFIG_KEYS_EPILOG = """\
examples:
  megadistill config-keys
  megadistill config-keys loss
  megadistill config-keys train.max_grad_norm"""


def add(commands: Commands) -> None:
    summary = "memory, traffic, time and cost of a recipe on a cluster, and its best layouts"
    command = add_command(commands, "plan", summary, PLAN_EPILOG, _plan)
    command.add_argument("recipe", type=Path, metavar="RECIPE", help="a YAML recipe, such as recipes/smoke.yaml")
    add_plan_options(command, required=True)
    law = command.add_argument_group("the distillation scaling law")
    option(law, "--teacher-loss", "X", "the teacher's cross-entropy, nats per token", kind=float)
    option(law, "--teacher-tokens", "D", "or the number of tokens that it was trained on", kind=float)
    option(command, "--price", "X", "price of a GPU-hour, in your currency", kind=float)
    text = "mean hours between faults of the run, for the checkpoint interval (default: Llama 3's, by the GPUs)"
    option(command, "--fault-hours", "H", text, kind=float)
    option(command, "--json", "FILE", "complete plan as JSON; -: on stdout, in place of the tables", kind=Path)

    summary = "trace and picture of compute, waiting and communication per rank"
    command = add_command(commands, "timeline", summary, TIMELINE_EPILOG, _timeline)
    command.add_argument("source", type=Path, metavar="RUN|RECIPE", help="a run folder, or a YAML recipe")
    add_plan_options(command, required=False)  # a run recorded its own layout
    option(command, "--steps", "N", f"steps to simulate, for the timeline of a recipe (default {STEPS})", kind=int)
    option(command, "--output", "DIR", "folder of the output (of a run: by default RUN)", kind=Path)

    summary = "every key of a recipe: type, default, meaning"
    command = add_command(commands, "config-keys", summary, CONFIG_KEYS_EPILOG, _config_keys)
    command.add_argument("key", nargs="?", metavar="KEY", help="a section or a key, as in loss or train.max_grad_norm")
    command.add_argument("--markdown", action="store_true", help="print all of them as the page docs/config-keys.md")


def add_plan_options(command: argparse.ArgumentParser, *, required: bool) -> None:
    """The options of `build_plan`: the cluster, and assumptions about it."""
    option(command, "--nodes", "N", "nodes of the cluster, all alike", kind=int, required=required)
    option(command, "--gpus-per-node", "N", "processes of a node, one per GPU", default=8)
    option(command, "--gpu", "KIND", "h100, a100-80gb, ... or a YAML file that describes one", required=required)
    add_overrides(command)
    option(command, "--sequence-length", "S", "sequence length, needed if the data is not on this machine", kind=int)
    text = "folder with config.json, if teacher.path is not on this machine"
    option(command, "--teacher-config", "DIR", text, kind=Path)
    option(command, "--student-mfu", "X", "expected MFU of the student's training", default=0.18)
    option(command, "--teacher-mfu", "X", "expected MFU of the teacher's forward pass", default=0.18)


def build_plan(recipe: Path, options: argparse.Namespace, *, between_faults: float | None = None) -> Any:
    """The plan (`plan.search.Plan`) of a recipe, by the options that `add_plan_options` adds.

    `between_faults`: mean time (s) between faults of the run; None: by the number of GPUs.

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
    return plan(inputs, cluster, mfu, between_faults=between_faults)


def _plan(options: argparse.Namespace) -> None:
    import json

    from megadistill.plan.output.plan_json import to_json
    from megadistill.plan.output.plan_tables import render
    from megadistill.plan.scaling_law import forecast
    from megadistill.plan.search import remedies

    if options.price is not None and not 0 <= options.price < float("inf"):
        raise UserError(f"--price {options.price}: give what a GPU-hour costs")
    between_faults = None if options.fault_hours is None else 3600 * options.fault_hours
    if options.json != Path("-"):
        require_writable_file(options.json, "--json")
    plan = build_plan(options.recipe, options, between_faults=between_faults)
    law = None
    if plan.main is not None:
        law = forecast(plan.main.requirements, teacher_loss=options.teacher_loss, teacher_tokens=options.teacher_tokens)
    if options.json != Path("-"):
        print_tables(render(plan, law=law, price=options.price, between_faults=between_faults))
    if options.json is not None:
        values = to_json(plan, law=law, price=options.price, between_faults=between_faults)
        if options.json == Path("-"):
            print(json.dumps(values, indent=1, allow_nan=False))
        else:
            write_json(options.json, values)
    if not plan.best:
        raise UserError(remedies(plan))


def _timeline(options: argparse.Namespace) -> None:
    if not options.source.exists():
        raise UserError(f"{options.source} does not exist: name a run folder, or a recipe")
    (_of_run if options.source.is_dir() else _of_plan)(options)


def _of_run(options: argparse.Namespace) -> None:
    from megadistill.config.paths import wrong_path
    from megadistill.timeline.files import read_timeline

    for name in ("nodes", "gpu", "steps", "set", "sequence-length", "teacher-config"):
        if getattr(options, name.replace("-", "_")):
            raise UserError(
                f"--{name} belongs to a plan, and {options.source} is a run folder: name a recipe, or leave it out"
            )
    if not (options.source / "recipe.json").is_file() and (reason := wrong_path(options.source, "run")):
        raise UserError(reason)
    output = options.output or options.source
    require_writable_folder(output, "--output" if options.output else "RUN")
    _write(read_timeline(options.source), output)


def _of_plan(options: argparse.Namespace) -> None:
    for name in ("nodes", "gpu", "output"):
        if getattr(options, name) is None:
            raise UserError(f"the timeline of a plan needs --{name}, as in --nodes 8 --gpu h100 --output DIR")
    from dataclasses import replace

    from megadistill.config.recipe import MAX_TIMELINE_STEPS
    from megadistill.plan.output.plan_timeline import simulate
    from megadistill.plan.search import remedies

    if options.steps is not None and options.steps > MAX_TIMELINE_STEPS:
        raise UserError(f"--steps {options.steps}: a picture shows at most {MAX_TIMELINE_STEPS} steps")
    require_writable_folder(options.output, "--output")
    plan = build_plan(options.source, options)
    main = plan.main
    if main is None:
        raise UserError(remedies(plan))
    recipe = main.sharding.recipe
    where = f"{options.source}, {options.nodes} x {options.gpus_per_node} {options.gpu}"
    assumed = (
        f"at the expected MFU, {options.student_mfu:.0%} of the student and {options.teacher_mfu:.0%} of the teacher"
    )
    timeline = simulate(
        main.times,
        steps=STEPS if options.steps is None else options.steps,
        run_steps=recipe.train.steps,
        ranks_per_node=options.gpus_per_node,
    )
    title, note = f"{where}: {timeline.title}", f"{timeline.note}; {assumed}"
    _write(replace(timeline, title=title, note=note), options.output)
    if plan.no_forecast:
        say(f"the real times are longer: {plan.no_forecast}")
    settings = plan.settings(main)
    if settings:
        overrides = " ".join(f"--set {each}" for each in settings)
        say(f"the recipe's own layout is refused ({plan.refused}); this timeline is of {overrides}")


def _write(timeline: "Timeline", output: Path) -> None:
    from megadistill.timeline.picture import draw, table
    from megadistill.timeline.trace import write_trace

    print_tables(table(timeline))
    output.mkdir(parents=True, exist_ok=True)
    write_trace(timeline, output / "timeline.json")
    draw(timeline, output / "timeline.png")
    say(f"wrote {output / 'timeline.json'} and {output / 'timeline.png'}")


def _config_keys(options: argparse.Namespace) -> None:
    from megadistill.config.keys import markdown, tables

    if options.markdown:
        print(markdown(), end="")
    else:
        print_tables(*tables(options.key))
