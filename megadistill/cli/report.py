"""The command `report`, which writes a page on one or several runs."""

import argparse
import time
from pathlib import Path

from megadistill.cli.common import EXIT_CODES, Commands, add_command

REPORT_EPILOG = f"""\
The page needs no network, and any browser shows it: curves over tokens and over
time, events, evaluations, recipes. A run may still be running, or have failed.

Evaluations are the files of `megadistill evaluate --json RUN/evaluation.json`: each
evaluation*.json in the run folders, and those that --evaluation names.

examples:
  megadistill report runs/smoke/distill
  megadistill report runs/smoke/labels runs/smoke/distill --output runs/smoke \\
      --evaluation runs/smoke/evaluation.json

{EXIT_CODES}"""


def add(commands: Commands) -> None:
    command = add_command(
        commands, "report", "write one HTML page on one or several runs, with its figures beside it", REPORT_EPILOG
    )
    command.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    command.add_argument(
        "--output",
        type=Path,
        metavar="PATH",
        help="an .html file, or a folder for report.html (default: the run's folder; several runs need it)",
    )
    command.add_argument(
        "--evaluation",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="another file of `evaluate --json` to show; repeatable",
    )
    command.set_defaults(run=_report)


def _report(options: argparse.Namespace) -> int:
    from megadistill.report.page import report

    path = report(options.runs, evaluations=options.evaluation, output=options.output, now=time.time())
    print(path)
    return 0
