"""The command `timeline`, which shows compute, waiting and communication of each rank in a few steps."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from megadistill.cli.common import Commands, add_command, option, print_tables
from megadistill.cli.plan import add_plan_options, build_plan
from megadistill.errors import UserError

if TYPE_CHECKING:
    from megadistill.timeline.spans import Timeline

STEPS = 3

TIMELINE_EPILOG = """\
Of a run: the steps of run.timeline, [first, last], which each rank recorded in RUN/timeline/.

  megadistill train RECIPE --set 'run.timeline=[101,103]'
  megadistill timeline RUN

Of a plan: simulated from the seconds that `megadistill plan` expects.

  megadistill timeline RECIPE --nodes 8 --gpu h100 --output DIR

timeline.json opens in https://ui.perfetto.dev and chrome://tracing; timeline.png is a picture of the same."""


def add(commands: Commands) -> None:
    summary = "trace and picture of compute, waiting and communication per rank"
    command = add_command(commands, "timeline", summary, TIMELINE_EPILOG, _timeline)
    command.add_argument("source", type=Path, metavar="RUN|RECIPE", help="a run folder, or a YAML recipe")
    add_plan_options(command, required=False)  # a run recorded its own layout
    option(command, "--steps", "N", f"of a plan: steps to simulate (default {STEPS})", kind=int)
    option(command, "--output", "DIR", "folder of the output (of a run: by default RUN)", kind=Path)


def _timeline(options: argparse.Namespace) -> int:
    if options.source.is_dir():
        return _of_run(options)
    if not options.source.exists():
        raise UserError(f"{options.source} does not exist: name a run folder, or a recipe")
    return _of_plan(options)


def _of_run(options: argparse.Namespace) -> int:
    from megadistill.timeline.files import read_timeline

    for name in ("nodes", "gpu", "steps", "set", "sequence-length", "teacher-config"):
        if getattr(options, name.replace("-", "_")):
            raise UserError(
                f"--{name} belongs to a plan, and {options.source} is a run folder: name a recipe, or leave it out"
            )
    _write(read_timeline(options.source), options.output or options.source)
    return 0


def _of_plan(options: argparse.Namespace) -> int:
    for name in ("nodes", "gpu", "output"):
        if getattr(options, name) is None:
            raise UserError(f"the timeline of a plan needs --{name}, as in --nodes 8 --gpu h100 --output DIR")
    from dataclasses import replace

    from megadistill.plan.output.plan_timeline import simulate
    from megadistill.plan.search import remedies

    plan = build_plan(options.source, options)
    main = plan.main
    if main is None:
        raise UserError(remedies(plan))
    recipe = main.sharding.recipe
    where = f"{options.source}, {options.nodes} x {options.gpus_per_node} {options.gpu}"
    assumed = f"at {options.student_mfu:.0%} and {options.teacher_mfu:.0%} of the peak"
    timeline = simulate(
        main.times,
        steps=STEPS if options.steps is None else options.steps,
        run_steps=recipe.train.steps,
        ranks_per_node=options.gpus_per_node,
    )
    title, note = f"{where}: {timeline.title}", f"{timeline.note}; {assumed}"
    _write(replace(timeline, title=title, note=note), options.output)
    settings = plan.settings(main)
    if settings:
        overrides = " ".join(f"--set {each}" for each in settings)
        print(f"the recipe's own layout is refused ({plan.refused}); this timeline is of {overrides}")
    return 0


def _write(timeline: "Timeline", output: Path) -> None:
    from megadistill.timeline.picture import draw, table
    from megadistill.timeline.trace import write_trace

    output.mkdir(parents=True, exist_ok=True)
    write_trace(timeline, output / "timeline.json")
    draw(timeline, output / "timeline.png")
    print_tables(table(timeline))
    print(f"wrote {output / 'timeline.json'} and {output / 'timeline.png'}")
