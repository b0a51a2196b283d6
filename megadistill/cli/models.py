"""Commands on models: models, and those that write text or weights of one, generate, export, average, prune."""

import argparse
from pathlib import Path

from megadistill.cli.common import (
    RESUMES,
    Commands,
    add_command,
    add_insert_bos,
    add_sampling,
    option,
    print_tables,
    say,
)
from megadistill.outputs import require_writable_folder
from megadistill.precision import PRECISIONS

GENERATE_EPILOG = """\
Sequence-level distillation: `objective: labels` trains on these shards as on any others. Draws depend on
(seed, sequence) alone, not on --batch or --jobs. Jobs write their shares in any order; the same command with --jobs 1
then keeps finished shards and writes the manifest.

example: megadistill generate teacher/ --data data/mine/train/manifest.json --sequences 10000 --prompt-tokens 64 \\
    --new-tokens 192 --output data/written"""

EXPORT_EPILOG = """\
A checkpoint of any number of ranks is read tensor by tensor; memory holds --max-shard-mb and one tensor. The folder
loads with transformers' AutoModelForCausalLM and AutoTokenizer; its README.md is a model card with the data, the
teacher and the hyperparameters that the run recorded.

example: megadistill export runs/mine/checkpoints/step-00010000 --output mine-10000 --dtype bfloat16"""

AVERAGE_EPILOG = """\
Sums are float64, in the order of the steps. The average is a checkpoint of weights alone in RUN/averages, which
`megadistill export` reads like any other; no run resumes from it. Memory holds a file of 1 GiB. The run may be running.

examples:
  megadistill average runs/mine --last 5
  megadistill average runs/mine --ema 0.9"""

PRUNE_EPILOG = """\
One process and one device, which holds the whole teacher. The output folder is a Hugging Face model with a pruning.json
that lists the kept channels, neurons, heads and layers. Name it in student.weights and student.config, and distil from
the teacher that it was cut from.

example: megadistill prune teacher/ --data data/mine/train/manifest.json --hidden-size 3072 --intermediate-size 9216 \\
    --output pruned"""


MODELS_EPILOG = """\
Of a folder, config.json and the headers of all files of weights are checked, as they are when a run starts.

examples:
  megadistill models
  megadistill models models/teacher"""


def add(commands: Commands) -> None:
    summary = "the families of models that are supported, or what a model's folder holds"
    command = add_command(commands, "models", summary, MODELS_EPILOG, _models)
    command.add_argument("folder", nargs="?", type=Path, metavar="FOLDER", help="a Hugging Face folder to check")
    command.add_argument("--markdown", action="store_true", help="print the families as the page docs/models.md")

    summary = "generate continuations of prompts with a teacher, as token shards to train on"
    command = add_command(commands, "generate", summary, GENERATE_EPILOG, _generate, on_interrupt=RESUMES)
    command.add_argument("teacher", type=Path, metavar="TEACHER", help="a Hugging Face folder")
    option(command, "--data", "MANIFEST", "manifest.json of the prompts' split", required=True)
    add_insert_bos(command)
    option(command, "--output", "DIR", "folder of train/ and tokenizer/", kind=Path, required=True)
    option(command, "--sequences", "N", "prompts: the first N of the stream", kind=int, required=True)
    option(command, "--prompt-tokens", "P", "tokens of a prompt", kind=int, required=True)
    add_sampling(command)
    option(command, "--order-seed", "N", "seed of the order of the stream", default=1)
    option(command, "--batch", "N", "continuations at a time", default=32)
    option(command, "--job", "K", "number of this job, from 0", default=0)
    option(command, "--jobs", "N", "jobs that share the work", default=1)

    summary = "write a checkpoint's student as a Hugging Face folder (one process, no GPU)"
    command = add_command(commands, "export", summary, EXPORT_EPILOG, _export)
    command.add_argument("source", type=Path, metavar="RUN", help="a run folder, or one of its checkpoints/step-…")
    option(command, "--output", "DIR", "the folder to write", kind=Path, required=True)
    option(command, "--step", "STEP", "the checkpoint of this step (default: the latest)", kind=int)
    option(command, "--max-shard-mb", "MB", "largest safetensors file", default=4096)
    command.add_argument("--dtype", choices=PRECISIONS, help="type of the weights (default: the run's precision)")

    summary = "average the weights of a run's checkpoints: their mean, or an exponential moving average"
    command = add_command(commands, "average", summary, AVERAGE_EPILOG, _average)
    command.add_argument("run_folder", type=Path, metavar="RUN", help="a run folder")
    option(command, "--last", "K", "the K newest checkpoints (with --ema: default all)", kind=int)
    option(command, "--ema", "DECAY", "decay of a moving average, a checkpoint (default: the mean)", kind=float)

    summary = "structured pruning of a teacher by activation importance"
    command = add_command(commands, "prune", summary, PRUNE_EPILOG, _prune)
    command.add_argument("teacher", type=Path, metavar="TEACHER", help="a Hugging Face folder")
    option(command, "--data", "MANIFEST", "manifest.json of the split to measure on", required=True)
    add_insert_bos(command)
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


def _models(options: argparse.Namespace) -> None:
    from megadistill.doctor.supported_models import folder_table, markdown, table

    if options.markdown:
        print(markdown(), end="")
    else:
        print_tables(table() if options.folder is None else folder_table(options.folder))


def _generate(options: argparse.Namespace) -> None:
    from megadistill.data import Manifest, Mixture
    from megadistill.datagen.generate import generate
    from megadistill.distributed.topology import local_device
    from megadistill.models.sampling import Sampling
    from megadistill.progress import console_progress

    require_writable_folder(options.output, "--output")
    with console_progress() as show:
        report = generate(
            options.teacher,
            Mixture.of(Manifest.load(options.data), insert_bos=options.insert_bos),
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
    print_tables(report.table())


def _export(options: argparse.Namespace) -> None:
    from megadistill.export.export_run import export_run

    require_writable_folder(options.output.parent, "--output", given=options.output)
    step = export_run(
        options.source,
        options.output,
        step=options.step,
        max_shard_bytes=options.max_shard_mb * 1_000_000,
        dtype=options.dtype,
    )
    say(f"{options.output}: exported from {options.source}, step {step}")


def _average(options: argparse.Namespace) -> None:
    from megadistill.export.average import AVERAGES, average_run

    require_writable_folder(options.run_folder / AVERAGES, "RUN")
    folder = average_run(options.run_folder, last=options.last, decay=options.ema)
    say(f"{folder}: export it with megadistill export {folder} --output DIR")


def _prune(options: argparse.Namespace) -> None:
    from megadistill.data import Manifest, Mixture
    from megadistill.distributed.topology import local_device
    from megadistill.progress import console_progress
    from megadistill.prune.prune import prune

    require_writable_folder(options.output.parent, "--output", given=options.output)
    with console_progress() as show:
        report = prune(
            options.teacher,
            Mixture.of(Manifest.load(options.data), insert_bos=options.insert_bos),
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
    say(report.line())
