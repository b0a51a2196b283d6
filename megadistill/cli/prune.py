"""The command `prune`, which cuts a smaller model out of a larger one."""

import argparse
from pathlib import Path

from megadistill.cli.common import EXIT_CODES, Commands, add_command

EPILOG = f"""\
One process and one device, which holds the whole teacher. The output folder is a Hugging Face model with a pruning.json
that lists the kept channels, neurons, heads and layers. Name it in student.weights and student.config, and distil from
the teacher that it was cut from.

example: megadistill prune teacher/ --data data/mine/train/manifest.json --hidden-size 3072 --intermediate-size 9216 \\
    --output pruned

{EXIT_CODES}"""


def add(commands: Commands) -> None:
    command = add_command(commands, "prune", "structured pruning of a teacher by activation importance", EPILOG)
    command.add_argument("teacher", type=Path, metavar="TEACHER", help="a Hugging Face folder")
    command.add_argument("--data", required=True, metavar="MANIFEST", help="manifest.json of the split to measure on")
    command.add_argument("--output", type=Path, required=True, metavar="DIR", help="the folder to write")
    for option, metavar, what in (
        ("--hidden-size", "H", "channels of the hidden state"),
        ("--intermediate-size", "I", "neurons of each MLP"),
        ("--heads", "N", "query heads, by whole key-value groups"),
        ("--layers", "L", "layers"),
    ):
        command.add_argument(option, type=int, metavar=metavar, help=f"{what} to keep (default: all)")
    command.add_argument(
        "--sequences", type=int, default=512, metavar="N", help="sequences to measure on (default 512)"
    )
    command.add_argument("--batch", type=int, default=8, metavar="N", help="sequences of a forward pass (default 8)")
    command.set_defaults(run=_prune)


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
