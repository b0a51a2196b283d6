"""Commands that measure models and runs: evaluate, sample, lm-eval, follow, report."""

import argparse
import time
from pathlib import Path

from megadistill.cli.common import (
    RESUMES,
    Commands,
    Options,
    add_command,
    add_insert_bos,
    add_sampling,
    option,
    print_tables,
    repeatable,
    say,
)
from megadistill.errors import UserError
from megadistill.io import write_json
from megadistill.outputs import require_writable_file, require_writable_folder

EVALUATE_EPILOG = """\
Several --data are measured together and each by itself; NAME=MANIFEST names one. Sequences are split over the ranks of
any launcher; the results do not depend on their number.

examples:
  megadistill evaluate student/ --teacher teacher/ --data data/mine/heldout/manifest.json
  torchrun --nproc_per_node 8 -m megadistill evaluate MODEL --teacher DIR --data MANIFEST"""

SAMPLE_EPILOG = """\
MODEL is a Hugging Face folder with its tokenizer, such as `megadistill export` writes. The text depends on --seed
alone: the same command writes the same text.

examples:
  megadistill sample student/ --prompt 'def main():' --count 3 --temperature 0.8
  megadistill sample student/ --data data/mine/heldout/manifest.json --prompt-tokens 32"""

LM_EVAL_EPILOG = """\
Needs lm-evaluation-harness: pip install 'megadistill[lm-eval]'. `lm-eval ls tasks` lists its tasks; most of them
download their questions from the Hugging Face hub, those of --include may read a local file. A task's file may name
Python code that is then run: include only files that you trust.

example: megadistill lm-eval student/ --tasks hellaswag arc_easy --fewshot 5 --json student-tasks.json"""

FOLLOW_EPILOG = """\
Each checkpoint is exported, measured and sampled, the oldest first, and gets a row in RUN/follow/follow.jsonl, which
`megadistill report` shows. It ends with the run. What has a row is not measured again, so the same command resumes;
with other tasks or prompts checkpoints are measured again. The run waits for nothing of it, and may delete a checkpoint
that is being read. On the machine of the run, leave it its devices: CUDA_VISIBLE_DEVICES names one for the follower.

examples:
  megadistill follow runs/mine --tasks hellaswag arc_easy --limit 500
  megadistill follow runs/mine --prompt 'def main(' --once"""

REPORT_EPILOG = """\
The page needs no network, and any browser shows it: curves over tokens and over
time, events, evaluations, recipes. A run may still be running, or have failed.

Evaluations are the files of `megadistill evaluate --json RUN/evaluation.json`: each
evaluation*.json in the run folders, and those that --evaluation names.

examples:
  megadistill report runs/smoke/distill
  megadistill report runs/smoke/labels runs/smoke/distill --output runs/smoke \\
      --evaluation runs/smoke/evaluation.json"""


def add(commands: Commands) -> None:
    summary = "measure models on held-out text: cross-entropy, bits per byte, calibration, divergence from a teacher"
    command = add_command(commands, "evaluate", summary, EVALUATE_EPILOG, _evaluate)
    command.add_argument("models", nargs="+", type=Path, metavar="MODEL", help="Hugging Face folders")
    repeatable(command, "--data", "[NAME=]MANIFEST", "manifest.json of a held-out split", required=True)
    add_insert_bos(command)
    option(command, "--teacher", "DIR", "the teacher's Hugging Face folder", kind=Path)
    option(command, "--limit", "N", "sequences of each split, the same for every model (default: all)", kind=int)
    option(command, "--batch", "N", "sequences of a forward pass", default=8)
    option(command, "--json", "FILE", "also write the results as JSON", kind=Path)
    option(command, "--plots", "DIR", "also draw calibration.png and deciles.png there", kind=Path)

    command = add_command(commands, "sample", "generate continuations of prompts with a model", SAMPLE_EPILOG, _sample)
    command.add_argument("model", type=Path, metavar="MODEL", help="a Hugging Face folder with its tokenizer")
    repeatable(command, "--prompt", "TEXT", "a prompt")
    repeatable(command, "--prompt-file", "FILE", "a text file with one prompt", kind=Path)
    option(command, "--data", "MANIFEST", "manifest.json of a split; prompts are the beginnings of its sequences")
    add_insert_bos(command)
    option(command, "--sequences", "N", "prompts from --data", default=3)
    option(command, "--prompt-tokens", "P", "tokens of each prompt from --data", default=32)
    option(command, "--count", "N", "continuations of each prompt", default=1)
    add_sampling(command, new_tokens=64)
    option(command, "--json", "FILE", "also write prompts and continuations as JSON", kind=Path)

    summary = "measure a model on tasks of lm-evaluation-harness"
    command = add_command(commands, "lm-eval", summary, LM_EVAL_EPILOG, _lm_eval)
    command.add_argument("model", type=Path, metavar="MODEL", help="a Hugging Face folder with its tokenizer")
    _add_tasks(command, required=True)
    option(command, "--json", "FILE", "also write the table as JSON", kind=Path)

    summary = "measure each new checkpoint of a run: lm-eval tasks, samples, exports"
    command = add_command(commands, "follow", summary, FOLLOW_EPILOG, _follow, on_interrupt=RESUMES)
    command.add_argument("run_folder", type=Path, metavar="RUN", help="a run folder")
    _add_tasks(command, required=False)
    repeatable(command, "--prompt", "TEXT", "a prompt to continue")
    add_sampling(command, new_tokens=64)
    command.add_argument("--keep-exports", action="store_true", help="keep each export, in RUN/follow/exports")
    command.add_argument("--once", action="store_true", help="measure the checkpoints that are there, and end")

    summary = "write one HTML page on one or several runs, with its figures beside it"
    command = add_command(commands, "report", summary, REPORT_EPILOG, _report)
    command.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    text = "an .html file, or a folder for report.html (default: the run's folder; several runs need it)"
    option(command, "--output", "PATH", text, kind=Path)
    repeatable(command, "--evaluation", "FILE", "another file of `evaluate --json` to show", kind=Path)


def _add_tasks(command: Options, *, required: bool) -> None:
    """The options of tasks of lm-evaluation-harness."""
    option(command, "--tasks", "TASK", "names of tasks or groups", nargs="+", required=required)
    option(command, "--include", "DIR", "a folder with the YAML files of more tasks", kind=Path)
    option(command, "--fewshot", "N", "examples before a question (default: the task's)", kind=int)
    option(command, "--limit", "N", "questions of each task (default: all)", kind=int)
    option(command, "--batch", "N", "questions of a forward pass", default=8)


def _evaluate(options: argparse.Namespace) -> None:
    from megadistill.distributed.launch import Launch, environment_rank
    from megadistill.evaluate.evaluate import evaluate, ranks
    from megadistill.evaluate.evaluation_tables import tables
    from megadistill.heldout.splits import load_splits
    from megadistill.progress import console_progress

    if environment_rank() == 0:
        require_writable_file(options.json, "--json")
        require_writable_folder(options.plots, "--plots")
    splits = load_splits(options.data, options.limit, insert_bos=options.insert_bos)
    with ranks(Launch.from_environment()) as topology:
        with console_progress() as show:
            results = evaluate(
                options.models, splits, teacher=options.teacher, batch=options.batch, topology=topology, progress=show
            )
        if topology.is_first:
            print_tables(*tables(results))
            try:
                if options.json:
                    write_json(options.json, results)
            finally:
                if options.plots:
                    from megadistill.report.sections.evaluation_section import write_plots

                    write_plots(results, options.plots)


def _sample(options: argparse.Namespace) -> None:
    from rich.console import Console

    if not (options.prompt or options.prompt_file or options.data):
        raise UserError("no prompt: give --prompt TEXT, --prompt-file FILE or --data MANIFEST")
    from megadistill.data import Manifest
    from megadistill.distributed.topology import local_device
    from megadistill.evaluate.prompts import held_out_prompts, typed_prompts
    from megadistill.evaluate.sample import load_for_sampling, samples, show
    from megadistill.models.sampling import Sampling

    require_writable_file(options.json, "--json")
    sampling = Sampling(options.new_tokens, options.temperature, options.top_p, options.seed)
    manifest = Manifest.load(options.data) if options.data else None
    tokenizer = load_for_sampling(options.model, manifest, insert_bos=options.insert_bos)
    prompts = typed_prompts(options.prompt, options.prompt_file, tokenizer)
    if manifest is not None:
        prompts += held_out_prompts(
            manifest,
            tokenizer,
            sequences=options.sequences,
            prompt_tokens=options.prompt_tokens,
            new_tokens=options.new_tokens,
            insert_bos=options.insert_bos,
        )
    console, drawn = Console(), []
    results = samples(options.model, prompts, tokenizer, sampling, count=options.count, device=local_device(0))
    for number, sample in enumerate(results, start=1):
        drawn.append(sample)
        show(sample, console, title=f"prompt {number} of {len(prompts)}")
    if options.json:
        write_json(options.json, drawn)


def _lm_eval(options: argparse.Namespace) -> None:
    from megadistill.distributed.topology import local_device
    from megadistill.evaluate.lm_eval import run_tasks

    require_writable_file(options.json, "--json")
    results = run_tasks(
        options.model,
        options.tasks,
        include=options.include,
        fewshot=options.fewshot,
        batch=options.batch,
        limit=options.limit,
        device=local_device(0),
    )
    print_tables(results.table())
    if options.json:
        write_json(options.json, results)


def _follow(options: argparse.Namespace) -> None:
    from megadistill.distributed.topology import local_device
    from megadistill.evaluate.checkpoint_scores import FOLLOW
    from megadistill.export.follow import Measurements, follow
    from megadistill.models.sampling import Sampling

    require_writable_folder(options.run_folder / FOLLOW, "RUN")
    measurements = Measurements(
        tasks=tuple(options.tasks or ()),
        include=options.include,
        fewshot=options.fewshot,
        limit=options.limit,
        batch=options.batch,
        prompts=tuple(options.prompt),
        sampling=Sampling(options.new_tokens, options.temperature, options.top_p, options.seed),
        keep_exports=options.keep_exports,
    )
    rows = follow(options.run_folder, measurements, once=options.once, device=local_device(0))
    say(f"{options.run_folder / FOLLOW}: {rows} new rows; megadistill report {options.run_folder} shows them")


def _report(options: argparse.Namespace) -> None:
    from megadistill.report.page import report

    path = report(options.runs, evaluations=options.evaluation, output=options.output, now=time.time())
    say(path)
