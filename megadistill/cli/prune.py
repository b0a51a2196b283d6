"""The command `prune`, which cuts a smaller model out of a larger one."""

import argparse
from pathlib import Path

from megadistill.cli.common import Commands, add_command, option, print_tables

EPILOG = """\
One process and one device, which holds the whole teacher. The output folder is a Hugging Face model with a pruning.json
that lists the kept channels, neurons, heads and layers. Name it in student.weights and student.config, and distil from
the teacher that it was cut from.

example: megadistill prune teacher/ --data data/mine/train/manifest.json --hidden-size 3072 --intermediate-size 9216 \\
    --output pruned"""


def add(commands: Commands) -> None:
    summary = "structured pruning of a teacher by activation importance"
    command = add_command(commands, "prune", summary, EPILOG, _prune)
    command.add_argument("teacher", type=Path, metavar="TEACHER", help="a Hugging Face folder")
    option(command, "--data", "MANIFEST", "manifest.json of the split to measure on", required=True)
    option(command, "--output", "DIR", "the folder to write", kind=Path, required=True)
    for name, metavar, parts in (
        ("--hidden-size", "H", "channels of the hidden state"),
        ("--intermediate-size", "I", "neurons of each MLP"),
        ("--heads", "N", "query heads, by whole key-value groups"),
        ("--layers", "L", "layers"),
    ):
        option(command, name, metavar, f"{parts} to keep (default: all)", kind=int)
    option(command, "--sequences", "N", "sequences to measure on", default=512)
    option(command, "--batch", "N", "sequences of a forward pass", default=8)


def _prune(options: argparse.Namespace) -> int:
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
    print_tables(report.table())
    print(report.line())
    return 0
