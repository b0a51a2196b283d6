"""Verbs that look at what a model has learnt: evaluate, sample, benchmark."""

import argparse
from pathlib import Path

from megadistill.cli.common import EXIT_CODES, Verbs, add_verb
from megadistill.errors import UserError

EVALUATE_EPILOG = f"""\
Several --data are measured together and one by one; NAME=MANIFEST gives one a name. Sequences are dealt out to the
ranks of any launcher, and the numbers are those of one process:

  torchrun --nproc_per_node 8 -m megadistill evaluate MODEL --teacher DIR --data MANIFEST

{EXIT_CODES}"""

SAMPLE_EPILOG = f"""\
MODEL is a Hugging Face folder with its tokenizer, such as `megadistill export` writes. The same command writes the same
text; --seed gives another.

example: megadistill sample student/ --prompt 'def main():' --count 3 --temperature 0.8
         megadistill sample student/ --data data/mine/heldout/manifest.json --prompt-tokens 32

{EXIT_CODES}"""

BENCHMARK_EPILOG = f"""\
Needs lm-evaluation-harness: pip install 'megadistill[lm-eval]'. `lm-eval ls tasks` lists its tasks; most of them fetch
their questions from the Hugging Face hub, those of --include may have them in a local file. A task's file may name
Python code that is run: include only what you trust.

example: megadistill benchmark student/ --tasks hellaswag arc_easy --fewshot 5 --json student-tasks.json

{EXIT_CODES}"""


def add(verbs: Verbs) -> None:
    _evaluate_parser(verbs)
    _sample_parser(verbs)
    _benchmark_parser(verbs)


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
    verb.add_argument("--plots", type=Path, metavar="DIR", help="also draw calibration.png and deciles.png there")
    verb.set_defaults(run=_evaluate)


def _sample_parser(verbs: Verbs) -> None:
    verb = add_verb(verbs, "sample", "let a model continue prompts, for a look at what it writes", SAMPLE_EPILOG)
    verb.add_argument("model", type=Path, metavar="MODEL", help="a Hugging Face folder with its tokenizer")
    verb.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="a prompt; may be repeated")
    verb.add_argument(
        "--prompt-file",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="a text file that is one prompt; may be repeated",
    )
    verb.add_argument("--data", metavar="MANIFEST", help="manifest.json of a split whose sequences begin the prompts")
    verb.add_argument("--sequences", type=int, default=3, metavar="N", help="prompts from --data (default 3)")
    verb.add_argument("--prompt-tokens", type=int, default=32, metavar="P", help="tokens of each (default 32)")
    verb.add_argument("--tokens", type=int, default=64, metavar="N", help="of a continuation, at most (default 64)")
    verb.add_argument("--count", type=int, default=1, metavar="N", help="continuations of each prompt (default 1)")
    verb.add_argument(
        "--temperature", type=float, default=1.0, metavar="X", help="0: the most likely token (default 1)"
    )
    verb.add_argument("--top-p", type=float, default=1.0, metavar="X", help="share that is drawn from (default 1: all)")
    verb.add_argument("--seed", type=int, default=1, metavar="N", help="of the draws (default 1)")
    verb.add_argument("--json", type=Path, metavar="FILE", help="also write prompts and continuations as JSON")
    verb.set_defaults(run=_sample)


def _benchmark_parser(verbs: Verbs) -> None:
    verb = add_verb(verbs, "benchmark", "measure a model on the tasks of lm-evaluation-harness", BENCHMARK_EPILOG)
    verb.add_argument("model", type=Path, metavar="MODEL", help="a Hugging Face folder with its tokenizer")
    verb.add_argument("--tasks", nargs="+", required=True, metavar="TASK", help="tasks or groups, by their names")
    verb.add_argument("--include", type=Path, metavar="DIR", help="a folder with the YAML files of more tasks")
    verb.add_argument("--fewshot", type=int, metavar="N", help="examples before a question (default: the task's)")
    verb.add_argument("--limit", type=int, metavar="N", help="questions of each task (default: all)")
    verb.add_argument("--batch", type=int, default=8, metavar="N", help="questions of a forward pass (default 8)")
    verb.add_argument("--json", type=Path, metavar="FILE", help="also write the table as JSON")
    verb.set_defaults(run=_benchmark)


def _evaluate(options: argparse.Namespace) -> int:
    from rich.console import Console

    from megadistill.distributed.topology import Launch
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
            for number, shown in enumerate(tables(results)):
                if number:
                    console.print()
                console.print(shown)
    return 0


def _sample(options: argparse.Namespace) -> int:
    from rich.console import Console

    if not (options.prompt or options.prompt_file or options.data):
        raise UserError("there is nothing to continue: give --prompt TEXT, --prompt-file FILE or --data MANIFEST")
    from megadistill.data import Manifest
    from megadistill.distributed.topology import local_device
    from megadistill.evaluate.prompts import held_out_prompts, typed_prompts
    from megadistill.evaluate.sample import Draws, load_for_sampling, samples, show, write_json

    draws = Draws(
        tokens=options.tokens,
        count=options.count,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
    )
    manifest = Manifest.load(options.data) if options.data else None
    tokenizer = load_for_sampling(options.model, manifest)
    prompts = typed_prompts(options.prompt, options.prompt_file, tokenizer)
    if manifest is not None:
        prompts += held_out_prompts(
            manifest,
            tokenizer,
            sequences=options.sequences,
            prompt_tokens=options.prompt_tokens,
            new_tokens=options.tokens,
        )
    console, found = Console(), []
    for number, sample in enumerate(samples(options.model, prompts, tokenizer, draws, local_device(0)), start=1):
        found.append(sample)
        show(sample, console, title=f"prompt {number} of {len(prompts)}")
    if options.json:
        write_json(found, options.json)
    return 0


def _benchmark(options: argparse.Namespace) -> int:
    from rich.console import Console

    from megadistill.distributed.topology import local_device
    from megadistill.evaluate.lm_eval import benchmark

    found = benchmark(
        options.model,
        options.tasks,
        include=options.include,
        fewshot=options.fewshot,
        batch=options.batch,
        limit=options.limit,
        device=local_device(0),
    )
    Console().print(found.table())
    if options.json:
        found.write_json(options.json)
    return 0
