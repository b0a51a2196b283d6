"""Verbs that look at what a model has learnt: evaluate."""

import argparse
from pathlib import Path

from megadistill.cli.verbs import EXIT_CODES, Verbs, add_verb

EVALUATE_EPILOG = f"""\
Several --data are measured together and one by one; NAME=MANIFEST gives one a name. Sequences are dealt out to the
ranks of any launcher, and the numbers are those of one process:

  torchrun --nproc_per_node 8 -m megadistill evaluate MODEL --teacher DIR --data MANIFEST

{EXIT_CODES}"""


def add(verbs: Verbs) -> None:
    _evaluate_parser(verbs)


def _evaluate_parser(verbs: Verbs) -> None:
    verb = add_verb(
        verbs,
        "evaluate",
        "measure models on held-out text: cross-entropy, bits a byte, calibration, and the distance from a teacher",
        EVALUATE_EPILOG,
    )
    verb.add_argument("models", nargs="+", type=Path, metavar="MODEL", help="Hugging Face folders")
    verb.add_argument(
        "--data",
        action="append",
        required=True,
        metavar="[NAME=]MANIFEST",
        help="manifest.json of a held-out split; may be repeated",
    )
    verb.add_argument("--teacher", type=Path, metavar="DIR", help="the teacher's Hugging Face folder")
    verb.add_argument("--batch", type=int, default=8, metavar="N", help="sequences of a forward pass (default 8)")
    verb.add_argument("--json", type=Path, metavar="FILE", help="also write what was found as JSON")
    verb.set_defaults(run=_evaluate)


def _evaluate(options: argparse.Namespace) -> int:
    from rich.console import Console

    from megadistill.comm.topology import Launch
    from megadistill.report.evaluate import evaluate, ranks
    from megadistill.report.evaluation import write_json
    from megadistill.report.evaluation_table import tables
    from megadistill.report.progress import token_progress
    from megadistill.report.splits import load_splits

    splits = load_splits(options.data)
    with ranks(Launch.from_environment()) as topology, token_progress() as show:
        results = evaluate(
            options.models, splits, teacher=options.teacher, batch=options.batch, topology=topology, progress=show
        )
        if topology.is_first:
            if options.json:
                write_json(results, options.json)
            console = Console()
            for shown in tables(results):
                console.print(shown, end="\n\n")
    return 0
