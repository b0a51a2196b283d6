"""Verbs that look at what a model has learnt: evaluate."""

import argparse
from pathlib import Path

from megadistill.cli.verbs import Verbs, add_verb


def add(verbs: Verbs) -> None:
    _evaluate_parser(verbs)


def _evaluate_parser(verbs: Verbs) -> None:
    verb = add_verb(
        verbs,
        "evaluate",
        "measure models on a held-out split: cross-entropy, perplexity, bits a byte, KL and agreement with a teacher",
    )
    verb.add_argument("models", nargs="+", type=Path, metavar="MODEL", help="Hugging Face folders")
    verb.add_argument(
        "--data", type=Path, required=True, metavar="MANIFEST", help="manifest.json of the held-out split"
    )
    verb.add_argument("--teacher", type=Path, metavar="DIR", help="the teacher's Hugging Face folder")
    verb.add_argument("--batch", type=int, default=8, metavar="N", help="sequences of a forward pass (default 8)")
    verb.add_argument("--json", type=Path, metavar="FILE", help="also write the table as JSON")
    verb.set_defaults(run=_evaluate)


def _evaluate(options: argparse.Namespace) -> int:
    from rich.console import Console

    from megadistill.report.evaluate import evaluate, table, write_json

    results = evaluate(options.models, options.data, teacher=options.teacher, batch=options.batch)
    Console().print(table(results))
    if options.json:
        write_json(results, options.json)
    return 0
