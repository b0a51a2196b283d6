"""Commands that write text or weights of a model: generate, export."""

import argparse
from pathlib import Path

from megadistill.cli.common import EXIT_CODES, Commands, add_command
from megadistill.errors import UserError
from megadistill.precision import PRECISIONS

GENERATE_EPILOG = f"""\
Sequence-level distillation: `objective: labels` trains on these shards as on any others. Draws depend on
(seed, sequence) alone, not on --batch or --jobs. Jobs write their shares in any order; the same command with --jobs 1
then keeps finished shards and writes the manifest.

example: megadistill generate teacher/ --data data/mine/train/manifest.json --sequences 10000 --prompt-tokens 64 \\
    --new-tokens 192 --output data/written

{EXIT_CODES}"""

EXPORT_EPILOG = f"""\
A checkpoint of any number of ranks is read tensor by tensor; memory holds --max-shard-mb and one tensor. The folder
loads with transformers' AutoModelForCausalLM and AutoTokenizer; its README.md is a model card with the data, the
teacher and the hyperparameters that the run recorded.

example: megadistill export runs/mine/checkpoints/step-00010000 --output mine-10000 --dtype bfloat16

{EXIT_CODES}"""


def add(commands: Commands) -> None:
    _generate_parser(commands)
    _export_parser(commands)


def _generate_parser(commands: Commands) -> None:
    command = add_command(
        commands,
        "generate",
        "generate continuations of prompts with a teacher, as token shards to train on",
        GENERATE_EPILOG,
    )
    command.add_argument("teacher", type=Path, metavar="TEACHER", help="a Hugging Face folder")
    command.add_argument("--data", required=True, metavar="MANIFEST", help="manifest.json of the prompts' split")
    command.add_argument("--output", type=Path, required=True, metavar="DIR", help="where train/ and tokenizer/ go")
    command.add_argument("--sequences", type=int, required=True, metavar="N", help="prompts: the first N of the stream")
    command.add_argument("--prompt-tokens", type=int, required=True, metavar="P", help="tokens of a prompt")
    command.add_argument("--new-tokens", type=int, required=True, metavar="T", help="maximum tokens of a continuation")
    command.add_argument(
        "--temperature", type=float, default=1.0, metavar="X", help="0: the most likely token (default 1)"
    )
    command.add_argument(
        "--top-p", type=float, default=1.0, metavar="X", help="nucleus: probability mass to draw from (default 1: all)"
    )
    command.add_argument("--seed", type=int, default=1, metavar="N", help="seed of the draws (default 1)")
    command.add_argument(
        "--order-seed", type=int, default=1, metavar="N", help="seed of the order of the stream (default 1)"
    )
    command.add_argument("--batch", type=int, default=32, metavar="N", help="continuations at a time (default 32)")
    command.add_argument("--job", type=int, default=0, metavar="K", help="number of this job, from 0 (default 0)")
    command.add_argument("--jobs", type=int, default=1, metavar="N", help="jobs that share the work (default 1)")
    command.set_defaults(run=_generate)


def _export_parser(commands: Commands) -> None:
    command = add_command(
        commands, "export", "write a checkpoint's student as a Hugging Face folder (one process, no GPU)", EXPORT_EPILOG
    )
    command.add_argument("source", type=Path, metavar="RUN", help="a run folder, or one of its checkpoints/step-…")
    command.add_argument("--output", type=Path, required=True, metavar="DIR", help="the folder to write")
    command.add_argument("--step", type=int, metavar="STEP", help="the checkpoint of this step (default: the latest)")
    command.add_argument(
        "--max-shard-mb", type=int, default=4096, metavar="MB", help="largest safetensors file (default 4096)"
    )
    command.add_argument(
        "--dtype",
        choices=PRECISIONS,
        help="type of the weights (default: the run's precision)",
    )
    command.set_defaults(run=_export)


def _generate(options: argparse.Namespace) -> int:
    from rich.console import Console

    if options.sequences < 1:
        raise UserError(f"--sequences {options.sequences}: give at least 1")
    from megadistill.data import Manifest, Mixture
    from megadistill.datagen.generate import generate
    from megadistill.distributed.topology import local_device
    from megadistill.models.sampling import Sampling
    from megadistill.progress import console_progress

    with console_progress() as show:
        report = generate(
            options.teacher,
            Mixture.of(Manifest.load(options.data)),
            options.output,
            slots=range(options.sequences),
            order_seed=options.order_seed,
            prompt_tokens=options.prompt_tokens,
            sampling=Sampling(options.new_tokens, options.temperature, options.top_p, options.seed),
            batch=options.batch,
            device=local_device(0),
            progress=show,
            rank=options.job,
            world=options.jobs,
        )
    Console().print(report.table())
    return 0


def _export(options: argparse.Namespace) -> int:
    from megadistill.export.export_run import export_run

    step = export_run(
        options.source,
        options.output,
        step=options.step,
        max_shard_bytes=options.max_shard_mb * 1_000_000,
        dtype=options.dtype,
    )
    print(f"{options.output}: the student of {options.source} at step {step}")
    return 0
