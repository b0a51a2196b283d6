"""Commands that measure a model: evaluate, sample, lm-eval."""

import argparse
from pathlib import Path

from megadistill.cli.common import EXIT_CODES, Commands, add_command
from megadistill.errors import UserError

EVALUATE_EPILOG = f"""\
Several --data are measured together and each by itself; NAME=MANIFEST names one. Sequences are split over the ranks of
any launcher; the results do not depend on their number.

examples:
  megadistill evaluate student/ --teacher teacher/ --data data/mine/heldout/manifest.json
  torchrun --nproc_per_node 8 -m megadistill evaluate MODEL --teacher DIR --data MANIFEST

{EXIT_CODES}"""

SAMPLE_EPILOG = f"""\
MODEL is a Hugging Face folder with its tokenizer, such as `megadistill export` writes. The text depends on --seed
alone: the same command writes the same text.

examples:
  megadistill sample student/ --prompt 'def main():' --count 3 --temperature 0.8
  megadistill sample student/ --data data/mine/heldout/manifest.json --prompt-tokens 32

{EXIT_CODES}"""

LM_EVAL_EPILOG = f"""\
Needs lm-evaluation-harness: pip install 'megadistill[lm-eval]'. `lm-eval ls tasks` lists its tasks; most of them
download their questions from the Hugging Face hub, those of --include may read a local file. A task's file may name
Python code that is then run: include only files that you trust.

example: megadistill lm-eval student/ --tasks hellaswag arc_easy --fewshot 5 --json student-tasks.json

{EXIT_CODES}"""


def add(commands: Commands) -> None:
    _evaluate_parser(commands)
    _sample_parser(commands)
    _lm_eval_parser(commands)


def _evaluate_parser(commands: Commands) -> None:
    command = add_command(
        commands,
        "evaluate",
        "measure models on held-out text: cross-entropy, bits per byte, calibration, divergence from a teacher",
        EVALUATE_EPILOG,
    )
    command.add_argument("models", nargs="+", type=Path, metavar="MODEL", help="Hugging Face folders")
    command.add_argument(
        "--data",
        action="append",
        required=True,
        metavar="[NAME=]MANIFEST",
        help="manifest.json of a held-out split; may be repeated",
    )
    command.add_argument("--teacher", type=Path, metavar="DIR", help="the teacher's Hugging Face folder")
    command.add_argument("--batch", type=int, default=8, metavar="N", help="sequences of a forward pass (default 8)")
    command.add_argument("--json", type=Path, metavar="FILE", help="also write the results as JSON")
    command.add_argument("--plots", type=Path, metavar="DIR", help="also draw calibration.png and deciles.png there")
    command.set_defaults(run=_evaluate)


def _sample_parser(commands: Commands) -> None:
    command = add_command(commands, "sample", "generate continuations of prompts with a model", SAMPLE_EPILOG)
    command.add_argument("model", type=Path, metavar="MODEL", help="a Hugging Face folder with its tokenizer")
    command.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="a prompt; may be repeated")
    command.add_argument(
        "--prompt-file",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="a text file with one prompt; may be repeated",
    )
    command.add_argument(
        "--data", metavar="MANIFEST", help="manifest.json of a split; prompts are the beginnings of its sequences"
    )
    command.add_argument("--sequences", type=int, default=3, metavar="N", help="prompts from --data (default 3)")
    command.add_argument(
        "--prompt-tokens", type=int, default=32, metavar="P", help="tokens of each prompt from --data (default 32)"
    )
    command.add_argument(
        "--new-tokens", type=int, default=64, metavar="N", help="maximum tokens of a continuation (default 64)"
    )
    command.add_argument("--count", type=int, default=1, metavar="N", help="continuations of each prompt (default 1)")
    command.add_argument(
        "--temperature", type=float, default=1.0, metavar="X", help="0: the most likely token (default 1)"
    )
    command.add_argument(
        "--top-p", type=float, default=1.0, metavar="X", help="nucleus: probability mass to draw from (default 1: all)"
    )
    command.add_argument("--seed", type=int, default=1, metavar="N", help="seed of the draws (default 1)")
    command.add_argument("--json", type=Path, metavar="FILE", help="also write prompts and continuations as JSON")
    command.set_defaults(run=_sample)


def _lm_eval_parser(commands: Commands) -> None:
    command = add_command(commands, "lm-eval", "measure a model on tasks of lm-evaluation-harness", LM_EVAL_EPILOG)
    command.add_argument("model", type=Path, metavar="MODEL", help="a Hugging Face folder with its tokenizer")
    command.add_argument("--tasks", nargs="+", required=True, metavar="TASK", help="names of tasks or groups")
    command.add_argument("--include", type=Path, metavar="DIR", help="a folder with the YAML files of more tasks")
    command.add_argument("--fewshot", type=int, metavar="N", help="examples before a question (default: the task's)")
    command.add_argument("--limit", type=int, metavar="N", help="questions of each task (default: all)")
    command.add_argument("--batch", type=int, default=8, metavar="N", help="questions of a forward pass (default 8)")
    command.add_argument("--json", type=Path, metavar="FILE", help="also write the table as JSON")
    command.set_defaults(run=_lm_eval)


def _evaluate(options: argparse.Namespace) -> int:
    from rich.console import Console

    from megadistill.distributed.launch import Launch
    from megadistill.evaluate.evaluate import evaluate, ranks
    from megadistill.evaluate.evaluation import write_json
    from megadistill.evaluate.evaluation_tables import tables
    from megadistill.evaluate.splits import load_splits
    from megadistill.progress import console_progress

    splits = load_splits(options.data)
    with ranks(Launch.from_environment()) as topology, console_progress() as show:
        results = evaluate(
            options.models, splits, teacher=options.teacher, batch=options.batch, topology=topology, progress=show
        )
        if topology.is_first:
            if options.json:
                write_json(results, options.json)
            if options.plots:
                from megadistill.report.evaluation_plots import write_plots

                write_plots(results, options.plots)
            console = Console()
            for number, table in enumerate(tables(results)):
                if number:
                    console.print()
                console.print(table)
    return 0


def _sample(options: argparse.Namespace) -> int:
    from rich.console import Console

    if not (options.prompt or options.prompt_file or options.data):
        raise UserError("no prompt: give --prompt TEXT, --prompt-file FILE or --data MANIFEST")
    from megadistill.data import Manifest
    from megadistill.distributed.topology import local_device
    from megadistill.evaluate.prompts import held_out_prompts, typed_prompts
    from megadistill.evaluate.sample import load_for_sampling, samples, show, write_json
    from megadistill.models.sampling import Sampling

    sampling = Sampling(options.new_tokens, options.temperature, options.top_p, options.seed)
    manifest = Manifest.load(options.data) if options.data else None
    tokenizer = load_for_sampling(options.model, manifest)
    prompts = typed_prompts(options.prompt, options.prompt_file, tokenizer)
    if manifest is not None:
        prompts += held_out_prompts(
            manifest,
            tokenizer,
            sequences=options.sequences,
            prompt_tokens=options.prompt_tokens,
            new_tokens=options.new_tokens,
        )
    console, drawn = Console(), []
    results = samples(options.model, prompts, tokenizer, sampling, count=options.count, device=local_device(0))
    for number, sample in enumerate(results, start=1):
        drawn.append(sample)
        show(sample, console, title=f"prompt {number} of {len(prompts)}")
    if options.json:
        write_json(drawn, options.json)
    return 0


def _lm_eval(options: argparse.Namespace) -> int:
    from rich.console import Console

    from megadistill.distributed.topology import local_device
    from megadistill.evaluate.lm_eval import run_tasks

    results = run_tasks(
        options.model,
        options.tasks,
        include=options.include,
        fewshot=options.fewshot,
        batch=options.batch,
        limit=options.limit,
        device=local_device(0),
    )
    Console().print(results.table())
    if options.json:
        results.write_json(options.json)
    return 0
