"""The verb that shows who computes, waits and sends in a few steps: timeline."""

import argparse
from pathlib import Path

from megadistill.cli.verbs import EXIT_CODES, Verbs, add_verb
from megadistill.errors import UserError

TIMELINE_EPILOG = f"""\
A run records the steps that its recipe names, [first, last], and keeps what each rank did in RUN/timeline/:

  megadistill train recipes/mine.yaml --set 'run.timeline=[101,103]'
  megadistill timeline runs/mine

timeline.json loads in https://ui.perfetto.dev and chrome://tracing; timeline.png is the same as a picture.

{EXIT_CODES}"""


def add(verbs: Verbs) -> None:
    verb = add_verb(
        verbs, "timeline", "who computes, waits and sends in a few steps: a trace and a picture", TIMELINE_EPILOG
    )
    verb.add_argument("run_folder", type=Path, metavar="RUN", help="the folder of a run with run.timeline")
    verb.add_argument("--output", type=Path, metavar="DIR", help="where both files go (default: RUN)")
    verb.set_defaults(run=_timeline)


def _timeline(options: argparse.Namespace) -> int:
    from rich.console import Console

    from megadistill.timeline.files import read_timeline
    from megadistill.timeline.picture import draw, table
    from megadistill.timeline.trace import write_trace

    if not options.run_folder.is_dir():
        raise UserError(f"{options.run_folder} is no folder: name a run")
    found = read_timeline(options.run_folder)
    output = options.output or options.run_folder
    output.mkdir(parents=True, exist_ok=True)
    write_trace(found, output / "timeline.json")
    draw([found], output / "timeline.png")
    Console().print(table(found))
    print(f"{output / 'timeline.json'}, {output / 'timeline.png'}")
    return 0
