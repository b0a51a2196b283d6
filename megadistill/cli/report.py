"""The verb `report`: a page on one or several runs."""

import argparse
import time
from pathlib import Path

from megadistill.cli.common import EXIT_CODES, Verbs, add_verb

REPORT_EPILOG = f"""\
The page needs no network, and any browser shows it: curves over tokens and over
time, events, evaluations, recipes. A run may be going on, or broken.

Evaluations are those of `megadistill evaluate --json RUN/evaluation.json`: files
evaluation*.json in the run folders, and what --evaluation names.

examples:
  megadistill report runs/smoke/distill
  megadistill report runs/smoke/labels runs/smoke/distill --output runs/smoke \\
      --evaluation runs/smoke/evaluation.json

{EXIT_CODES}"""


def add(verbs: Verbs) -> None:
    verb = add_verb(
        verbs, "report", "write one HTML page on one or several runs, with its figures beside it", REPORT_EPILOG
    )
    verb.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    verb.add_argument(
        "--output",
        type=Path,
        metavar="PATH",
        help="an .html file, or a folder for report.html (default: the run's folder; several runs need it)",
    )
    verb.add_argument(
        "--evaluation",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="also show what `evaluate --json` wrote here; repeatable",
    )
    verb.set_defaults(run=_report)


def _report(options: argparse.Namespace) -> int:
    from megadistill.report.page import report

    path = report(options.runs, evaluations=options.evaluation, output=options.output, now=time.time())
    print(path)
    return 0
