"""Verbs that make a smaller model out of a larger one: prune."""

import argparse
from pathlib import Path

from megadistill.cli.common import EXIT_CODES, Verbs, add_verb

EPILOG = f"""\
One process and one device, which holds the whole teacher. What is kept is in pruning.json of the folder that comes out;
name that folder in student.weights and student.config, and distil from the teacher that it was cut from.

example: megadistill prune teacher/ --data data/mine/train/manifest.json --hidden-size 3072 --intermediate-size 9216 \\
    --output pruned

{EXIT_CODES}"""


def add(verbs: Verbs) -> None:
    verb = add_verb(
        verbs, "prune", "cut a teacher down to what does most on some of the data, for a student to start from", EPILOG
    )
    verb.add_argument("teacher", type=Path, metavar="TEACHER", help="a Hugging Face folder")
    verb.add_argument("--data", required=True, metavar="MANIFEST", help="manifest.json of the split to measure on")
    verb.add_argument("--output", type=Path, required=True, metavar="DIR", help="the folder to write")
    for option, metavar, what in (
        ("--hidden-size", "H", "channels of the hidden state"),
        ("--intermediate-size", "I", "neurons of each MLP"),
        ("--heads", "N", "query heads, by whole key-value groups"),
        ("--layers", "L", "layers"),
    ):
        verb.add_argument(option, type=int, metavar=metavar, help=f"{what} that stay (default: all)")
    verb.add_argument("--sequences", type=int, default=512, metavar="N", help="to measure on (default 512)")
    verb.add_argument("--batch", type=int, default=8, metavar="N", help="sequences of a forward pass (default 8)")
    verb.set_defaults(run=_prune)


def _prune(options: argparse.Namespace) -> int:
    from rich.console import Console

    from megadistill.data import Manifest, Mixture
    from megadistill.distributed.topology import local_device
    from megadistill.progress import console_progress
    from megadistill.prune.prune import prune

    with console_progress() as show:
        report = prune(
            options.teacher,
            Mixture.of(Manifest.load(options.data)),
            options.output,
            hidden_size=options.hidden_size,
            intermediate_size=options.intermediate_size,
            heads=options.heads,
            layers=options.layers,
            sequences=options.sequences,
            batch=options.batch,
            device=local_device(0),
            progress=show,
        )
    Console().print(report.table())
    print(report.line())
    return 0
