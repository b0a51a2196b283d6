"""Verbs that write what models are or say: generate, export."""

import argparse
from pathlib import Path

from megadistill.cli.common import EXIT_CODES, Verbs, add_verb
from megadistill.errors import UserError
from megadistill.precision import PRECISIONS

GENERATE_EPILOG = f"""\
Sequence-level distillation: `objective: labels` trains on the shards that come out, unchanged. What is drawn depends on
(seed, sequence) alone, not on --batch or --jobs. Jobs write their shares in any order; the same command with --jobs 1
then keeps what is whole and writes the manifest.

example: megadistill generate teacher/ --data data/mine/train/manifest.json --sequences 10000 --prompt-tokens 64 \\
    --new-tokens 192 --output data/written

{EXIT_CODES}"""

EXPORT_EPILOG = f"""\
A checkpoint of any number of ranks is read tensor by tensor; --max-shard-mb, and one tensor more, is what is held in
memory. The folder loads with transformers' AutoModelForCausalLM and AutoTokenizer; its README.md says what the model
was trained on, as far as the run wrote it down.

example: megadistill export runs/mine/checkpoints/step-00010000 --output mine-10000 --dtype bfloat16

{EXIT_CODES}"""


def add(verbs: Verbs) -> None:
    _generate_parser(verbs)
    _export_parser(verbs)


def _generate_parser(verbs: Verbs) -> None:
    verb = add_verb(
        verbs,
        "generate",
        "let a teacher continue prompts from the stream, as token shards to train on",
        GENERATE_EPILOG,
    )
    verb.add_argument("teacher", type=Path, metavar="TEACHER", help="a Hugging Face folder")
    verb.add_argument("--data", required=True, metavar="MANIFEST", help="manifest.json of the prompts' split")
    verb.add_argument("--output", type=Path, required=True, metavar="DIR", help="where train/ and tokenizer/ go")
    verb.add_argument("--sequences", type=int, required=True, metavar="N", help="prompts: the first N of the stream")
    verb.add_argument("--prompt-tokens", type=int, required=True, metavar="P", help="tokens of a prompt")
    verb.add_argument("--new-tokens", type=int, required=True, metavar="T", help="tokens of a continuation, at most")
    verb.add_argument(
        "--temperature", type=float, default=1.0, metavar="X", help="0: the most likely token (default 1)"
    )
    verb.add_argument("--top-p", type=float, default=1.0, metavar="X", help="share that is drawn from (default 1: all)")
    verb.add_argument("--seed", type=int, default=1, metavar="N", help="of the draws (default 1)")
    verb.add_argument("--order-seed", type=int, default=1, metavar="N", help="of the order of the stream (default 1)")
    verb.add_argument("--batch", type=int, default=32, metavar="N", help="continuations at a time (default 32)")
    verb.add_argument("--job", type=int, default=0, metavar="K", help="which of --jobs this is, from 0 (default 0)")
    verb.add_argument("--jobs", type=int, default=1, metavar="N", help="that share the work (default 1)")
    verb.set_defaults(run=_generate)


def _export_parser(verbs: Verbs) -> None:
    verb = add_verb(
        verbs, "export", "write a checkpoint's student as a Hugging Face folder (one process, no GPU)", EXPORT_EPILOG
    )
    verb.add_argument("source", type=Path, metavar="RUN", help="a run folder, or one of its checkpoints/step-…")
    verb.add_argument("--output", type=Path, required=True, metavar="DIR", help="the folder to write")
    verb.add_argument("--step", type=int, metavar="STEP", help="the checkpoint of this step (default: the newest)")
    verb.add_argument(
        "--max-shard-mb", type=int, default=4096, metavar="MB", help="largest safetensors file (default 4096)"
    )
    verb.add_argument(
        "--dtype",
        choices=PRECISIONS,
        help="of the weights that are written (default: the run's precision)",
    )
    verb.set_defaults(run=_export)


def _generate(options: argparse.Namespace) -> int:
    from rich.console import Console

    if options.sequences < 1:
        raise UserError(f"--sequences {options.sequences}: give at least 1")
    from megadistill.data import Manifest, Mixture
    from megadistill.datagen.generate import Sampling, generate
    from megadistill.distributed.topology import local_device
    from megadistill.progress import console_progress

    sampling = Sampling(
        prompt_tokens=options.prompt_tokens,
        new_tokens=options.new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
    )
    with console_progress() as show:
        report = generate(
            options.teacher,
            Mixture.of(Manifest.load(options.data)),
            options.output,
            slots=range(options.sequences),
            order_seed=options.order_seed,
            sampling=sampling,
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
