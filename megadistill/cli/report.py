"""The command `report`, which writes a page on one or several runs."""

import argparse
import time
from pathlib import Path

from megadistill.cli.common import Commands, add_command, option, repeatable

REPORT_EPILOG = """\
The page needs no network, and any browser shows it: curves over tokens and over
time, events, evaluations, recipes. A run may still be running, or have failed.

Evaluations are the files of `megadistill evaluate --json RUN/evaluation.json`: each
evaluation*.json in the run folders, and those that --evaluation names.

examples:
  megadistill report runs/smoke/distill
  megadistill report runs/smoke/labels runs/smoke/distill --output runs/smoke \\
      --evaluation runs/smoke/evaluation.json"""


def add(commands: Commands) -> None:
    summary = "write one HTML page on one or several runs, with its figures beside it"
    command = add_command(commands, "report", summary, REPORT_EPILOG, _report)
    command.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    text = "an .html file, or a folder for report.html (default: the run's folder; several runs need it)"
    option(command, "--output", "PATH", text, kind=Path)
    repeatable(command, "--evaluation", "FILE", "another file of `evaluate --json` to show", kind=Path)


def _report(options: argparse.Namespace) -> int:
    from megadistill.report.page import report

    path = report(options.runs, evaluations=options.evaluation, output=options.output, now=time.time())
    print(path)
    return 0
