"""The verb that shows who computes, waits and sends in a few steps: timeline."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megadistill.cli.common import EXIT_CODES, Verbs, add_verb
from megadistill.cli.plan import add_plan_options, planned
from megadistill.errors import UserError

STEPS = 3

TIMELINE_EPILOG = f"""\
Of a run: the steps that its recipe named, [first, last], of which each rank kept what it did in RUN/timeline/.

  megadistill train RECIPE --set 'run.timeline=[101,103]'
  megadistill timeline RUN

Of a plan: simulated from the seconds that `megadistill plan` expects, and beside it a teacher that drains.

  megadistill timeline RECIPE --nodes 8 --gpu h100 --output DIR

timeline.json loads in https://ui.perfetto.dev and chrome://tracing; timeline.png is the same as a picture.

{EXIT_CODES}"""


def add(verbs: Verbs) -> None:
    verb = add_verb(
        verbs, "timeline", "who computes, waits and sends in a few steps: a trace and a picture", TIMELINE_EPILOG
    )
    verb.add_argument("source", type=Path, metavar="RUN|RECIPE", help="a run folder, or a YAML recipe")
    add_plan_options(verb, required=False)  # a run says by itself where it ran
    verb.add_argument("--steps", type=int, metavar="N", help=f"of a plan: its first N (default {STEPS})")
    verb.add_argument("--output", type=Path, metavar="DIR", help="where the files go (of a run: by default RUN)")
    verb.set_defaults(run=_timeline)


def _timeline(options: argparse.Namespace) -> int:
    if options.source.is_dir():
        return _of_run(options)
    if not options.source.exists():
        raise UserError(f"{options.source} is not there: name a run folder, or a recipe")
    return _of_plan(options)


def _of_run(options: argparse.Namespace) -> int:
    from megadistill.timeline.files import read_timeline

    for option in ("nodes", "gpu", "steps", "set", "sequence_length", "teacher_config"):
        if getattr(options, option):
            name = option.replace("_", "-")
            raise UserError(
                f"--{name} belongs to a plan, and {options.source} is a run folder: name a recipe, or leave it out"
            )
    _write([read_timeline(options.source)], options.output or options.source)
    return 0


def _of_plan(options: argparse.Namespace) -> int:
    for option in ("nodes", "gpu", "output"):
        if getattr(options, option) is None:
            raise UserError(f"the timeline of a plan needs --{option}, as in --nodes 8 --gpu h100 --output DIR")
    from dataclasses import replace

    from megadistill.plan.output.plan_timeline import Pipeline, simulate
    from megadistill.plan.search import what_would_help

    plan = planned(options.source, options)
    shown = plan.shown
    if shown is None:
        raise UserError(what_would_help(plan))
    recipe = shown.placed.recipe
    pipelines = list(Pipeline) if shown.times.stages else [Pipeline.RUNS_AHEAD]
    where = f"{options.source}, {options.nodes} x {options.gpus_per_node} {options.gpu}"
    assumed = f"at {options.student_mfu:.0%} and {options.teacher_mfu:.0%} of the peak"
    found = [
        simulate(
            shown.times,
            steps=STEPS if options.steps is None else options.steps,
            run_steps=recipe.train.steps,
            pipeline=pipeline,
            ranks_per_node=options.gpus_per_node,
        )
        for pipeline in pipelines
    ]
    _write(
        [replace(each, title=f"{where}: {each.title}", note=f"{each.note}; {assumed}") for each in found],
        options.output,
    )
    settings = plan.settings(shown)
    if settings:
        shown_as = " ".join(f"--set {each}" for each in settings)
        print(f"the recipe's own layout is refused ({plan.refused}); this is {shown_as}")
    return 0


def _write(timelines: Sequence[Any], output: Path) -> None:
    """The first one's trace, and a picture of all."""
    from rich.console import Console

    from megadistill.timeline.picture import draw, table
    from megadistill.timeline.trace import write_trace

    output.mkdir(parents=True, exist_ok=True)
    write_trace(timelines[0], output / "timeline.json")
    draw(timelines, output / "timeline.png")
    for timeline in timelines:
        Console().print(table(timeline))
    print(f"wrote {output / 'timeline.json'} and {output / 'timeline.png'}")
