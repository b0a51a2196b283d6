"""The front door: one verb a job; it parses, calls, and exits with a clear code. It knows no mathematics.

A verb imports its room when it runs, so that `--help` and a mistyped option answer at once.
"""

import argparse
import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn, TypeAlias

from megadistill import __version__
from megadistill.errors import OperatorFault, RankUserError, RestartFault, UserError

EXIT_CODES = "exit codes: 0 done; 2 wrong input; 3 a fault that a restart can mend; 4 a fault that needs a person"

TOKENIZE_EPILOG = f"""\
examples:
  megadistill tokenize ~/text --include '*.txt' --vocab-size 32000 --sequence-length 2048 --output data/mine
  megadistill tokenize crawl/ --include '*.jsonl.zst' --tokenizer teacher/ --sequence-length 4096 --packer bestfit \\
      --output data/crawl

A run that was stopped, or that met a full disk, goes on by the same command: finished shards are kept.

{EXIT_CODES}"""

VERIFY_EPILOG = """\
Everything is checked, not just until the first fault: sizes and hashes of all files, and each sequence's bytes, type,
length and ids. One line a fault: shard, sequence, byte offset, what was expected and what was found.

exit codes: 0 all is well; 2 wrong input; 4 something is damaged"""

INDEX_EPILOG = f"""\
Any WebDataset tar whose samples have one member of tokens, all of one length L: .npy; .npz with one array, or with
several and --member npz:NAME; raw little-endian bytes with --member u16 --dtype uint16. A sequence is then L - 1
tokens, as the last one is only a label. The indices, the tokenizer and manifest.json go beside the tars. A member
bounds.npy, if there is one, says where documents begin: 0, the starts, the end.

example: megadistill shards index ~/tars --tokenizer teacher/ --member tokens.npy

{EXIT_CODES}"""

TRAIN_EPILOG = f"""\
The same verb under every launcher; rank, world size and rendezvous come from the one that started it:

  one process        megadistill train RECIPE
  torchrun           torchrun --nproc_per_node 8 -m megadistill train RECIPE
  deepspeed          deepspeed --num_gpus 8 --module megadistill train RECIPE

A run folder that already holds a checkpoint is gone on with; give the same command again.

{EXIT_CODES}"""


DOCTOR_EPILOG = """\
Started as the run will be: in one process, or under the launcher in the run's own allocation. It takes a minute at
most, and leaves nothing behind. After the table, where nodes are to blame, a last line `bad nodes: a,b` names them.

  torchrun --nproc_per_node 8 -m megadistill doctor RECIPE
  srun --ntasks-per-node 1 megadistill doctor RECIPE --node

exit codes: 0 nothing stands against the run; 2 something does"""

CACHE_EPILOG = f"""\
What is kept of the distribution is the recipe's loss.targets; `teacher.keep_targets` stores the same beside a live run.
A run learns from them with teacher.source=cache and teacher.targets=DIR, and equals the live run. Targets belong to a
tokenizer, an order of the data, a teacher and a seed: a run that differs is refused with what differs.

example: megadistill cache recipes/mine.yaml --set loss.targets.draws=50 --output targets (or under torchrun)

{EXIT_CODES}"""

GENERATE_EPILOG = f"""\
Sequence-level distillation: `objective: labels` trains on the shards that come out, unchanged. What is drawn depends on
(seed, sequence) alone, not on --batch or --jobs. Jobs write their shares in any order; the same command with --jobs 1
then keeps what is whole and writes the manifest.

example: megadistill generate teacher/ --data data/mine/train/manifest.json --sequences 10000 --prompt-tokens 64 \\
    --new-tokens 192 --output data/written

{EXIT_CODES}"""

SPEAKING_SECONDS = 10.0
"""How long a rank waits for the one that says what is wrong: launchers end all ranks when the first one leaves."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb; the exit code. Errors for people are one line without a traceback."""
    options = parser().parse_args(arguments)
    rank, local_rank = os.environ.get("RANK", "0"), os.environ.get("LOCAL_RANK", "0")
    speaks = not local_rank.isdigit() or int(local_rank) == 0  # what is wrong for all ranks of a node is said once
    try:
        code: int = options.run(options)
        return code
    except UserError as error:
        if speaks or isinstance(error, RankUserError):
            print(f"megadistill: {error}", file=sys.stderr)
        else:
            time.sleep(SPEAKING_SECONDS)
        return error.exit_code
    except (RestartFault, OperatorFault) as error:
        print(f"megadistill: rank {rank}: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:  # a folder that cannot be written, a disk that is full: a person's, and no trace helps
        print(f"megadistill: rank {rank}: {error}", file=sys.stderr)
        return OperatorFault.exit_code
    except KeyboardInterrupt:
        print("megadistill: interrupted; a run goes on from its newest checkpoint", file=sys.stderr)
        return RestartFault.exit_code
    except Exception:
        traceback.print_exc()
        return OperatorFault.exit_code


def entry() -> NoReturn:
    """What the console script and `python -m` run. A fault ends the process at once: the interpreter's own end would
    take down process groups whose peers are gone, and abort with a code that is none of ours."""
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    if code in (RestartFault.exit_code, OperatorFault.exit_code):
        os._exit(code)
    sys.exit(code)


def parser() -> argparse.ArgumentParser:
    """The verbs and their options."""
    top = argparse.ArgumentParser(
        prog="megadistill",
        description="Distil a large frozen teacher into a student, at pretraining scale or on a laptop.",
        epilog=EXIT_CODES,
    )
    top.add_argument("--version", action="version", version=__version__)
    # The deepspeed launcher puts this in front of the verb; the rank is read from the environment.
    top.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    verbs = top.add_subparsers(required=True, metavar="VERB")
    _tokenize_parser(verbs)
    _shards_parser(verbs)
    _train_parser(verbs)
    _doctor_parser(verbs)
    _cache_parser(verbs)
    _generate_parser(verbs)
    _export_parser(verbs)
    _evaluate_parser(verbs)
    _plan_parser(verbs)
    return top


Verbs: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def _verb(verbs: Verbs, name: str, summary: str, epilog: str = EXIT_CODES) -> argparse.ArgumentParser:
    return verbs.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _tokenize_parser(verbs: Verbs) -> None:
    verb = _verb(
        verbs,
        "tokenize",
        "turn text into WebDataset token shards with a manifest, a training and a held-out split",
        TOKENIZE_EPILOG,
    )
    verb.add_argument(
        "inputs",
        nargs="+",
        type=Path,
        metavar="PATH",
        help="a file, or a folder of them: .jsonl, .jsonl.gz, .jsonl.zst (a document a line), .parquet (a document a "
        "row), anything else is text (a document a file)",
    )
    verb.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="where train/, heldout/ and tokenizer/ go"
    )
    which = verb.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--vocab-size", type=int, metavar="N", help="train a SentencePiece model of N pieces on the text"
    )
    which.add_argument(
        "--tokenizer",
        type=Path,
        metavar="PATH",
        help="use this one: a SentencePiece .model, a tokenizer.json, or a folder that holds one of them",
    )
    verb.add_argument("--sequence-length", type=int, required=True, metavar="S", help="tokens of a sequence")
    verb.add_argument(
        "--packer",
        choices=("chunk", "bestfit"),
        default="chunk",
        help="chunk lays documents end to end and cuts; bestfit keeps those whole that fit, and pads (default chunk)",
    )
    verb.add_argument(
        "--text-field",
        default="text",
        metavar="NAME",
        help="the field of a JSON line, or the column of a table, that holds the text (default text)",
    )
    verb.add_argument(
        "--heldout-fraction",
        type=float,
        default=0.01,
        metavar="F",
        help="share of documents held out, by a hash of their text; 0: none (default 0.01)",
    )
    verb.add_argument(
        "--include",
        action="append",
        metavar="GLOB",
        help="files of a folder to read, by name (default: '*'); repeatable",
    )
    verb.add_argument(
        "--exclude", action="append", default=[], metavar="GLOB", help="relative paths to leave out; repeatable"
    )
    verb.add_argument(
        "--shard-mb",
        type=float,
        default=32,
        metavar="MB",
        help="text of a shard, which is also a worker's piece of work; each process holds about two (default 32)",
    )
    verb.add_argument(
        "--processes", type=int, metavar="N", help="that tokenize; the bytes are the same (default: this one's cores)"
    )
    verb.set_defaults(run=_tokenize)


def _shards_parser(verbs: Verbs) -> None:
    shards = _verb(verbs, "shards", "look at shards, verify them, or index those that somebody else made")
    actions = shards.add_subparsers(required=True, metavar="ACTION")
    where = "manifest.json, the folder of a split or of a data set, or a URL of a manifest.json"

    verify = _verb(actions, "verify", "check a split against its manifest", VERIFY_EPILOG)
    verify.add_argument("data", metavar="DATA", help=where)
    verify.add_argument("--quick", action="store_true", help="manifest, sizes and indices alone; reads no shard")
    verify.set_defaults(run=_shards_verify)

    info = _verb(actions, "info", "say what a split holds, from its manifest alone")
    info.add_argument("data", metavar="DATA", help=where)
    info.set_defaults(run=_shards_info)

    index = _verb(actions, "index", "index WebDataset tars that hold tokens, and write their manifest", INDEX_EPILOG)
    index.add_argument("folder", type=Path, metavar="DIR", help="the folder of the tars, which stay as they are")
    index.add_argument(
        "--tokenizer",
        type=Path,
        required=True,
        metavar="PATH",
        help="the tokenizer that made the ids: a .model, a tokenizer.json, or a folder that holds one",
    )
    index.add_argument(
        "--member", metavar="SUFFIX", help="the member of a sample with the tokens, such as tokens.npy or u16"
    )
    index.add_argument("--dtype", choices=("uint16", "uint32"), help="of a member of raw bytes")
    index.add_argument("--split", default="train", metavar="NAME", help="what the manifest calls it (default train)")
    index.set_defaults(run=_shards_index)


def _train_parser(verbs: Verbs) -> None:
    verb = _verb(verbs, "train", "train a student from labels, or by distillation from a teacher", TRAIN_EPILOG)
    verb.add_argument("recipe", type=Path, metavar="RECIPE", help="a YAML recipe, such as recipes/smoke.yaml")
    verb.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a key, as in --set train.steps=100"
    )
    verb.add_argument(
        "--stop-after",
        type=int,
        metavar="STEP",
        help="save and stop after this step; without it, a later start goes on",
    )
    verb.set_defaults(run=_train)


def _doctor_parser(verbs: Verbs) -> None:
    verb = _verb(verbs, "doctor", "look for what would stop a run, before it starts", DOCTOR_EPILOG)
    verb.add_argument("recipe", type=Path, metavar="RECIPE", help="a YAML recipe")
    verb.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the recipe")
    verb.add_argument(
        "--node", action="store_true", help="only what one node can say by itself: started by no launcher, once a node"
    )
    verb.add_argument("--json", type=Path, metavar="FILE", help="also write the table as JSON")
    verb.set_defaults(run=_doctor)


def _cache_parser(verbs: Verbs) -> None:
    verb = _verb(
        verbs, "cache", "store what a recipe's teacher says, for runs that keep no teacher in memory", CACHE_EPILOG
    )
    verb.add_argument("recipe", type=Path, metavar="RECIPE", help="a YAML recipe with a live teacher and loss.targets")
    verb.add_argument("--output", type=Path, required=True, metavar="DIR", help="where the targets go")
    verb.add_argument("--steps", type=int, metavar="N", help="of the first N steps alone (default: of train.steps)")
    verb.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the recipe")
    verb.set_defaults(run=_cache)


def _generate_parser(verbs: Verbs) -> None:
    verb = _verb(
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
    verb = _verb(verbs, "export", "write a run's student as a Hugging Face folder (one process, no GPU)")
    verb.add_argument("run_folder", type=Path, metavar="RUN", help="a run folder")
    verb.add_argument("--output", type=Path, required=True, metavar="DIR", help="the folder to write")
    verb.add_argument("--step", type=int, metavar="STEP", help="the checkpoint of this step (default: the newest)")
    verb.add_argument(
        "--max-shard-mb", type=int, default=4096, metavar="MB", help="largest safetensors file (default 4096)"
    )
    verb.set_defaults(run=_export)


def _evaluate_parser(verbs: Verbs) -> None:
    verb = _verb(
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


def _plan_parser(verbs: Verbs) -> None:
    verb = _verb(
        verbs, "plan", "what a recipe needs on a number of ranks: parameters, FLOPs, memory, bytes on the wire"
    )
    verb.add_argument("recipe", type=Path, metavar="RECIPE", help="a YAML recipe")
    verb.add_argument("--ranks", type=int, required=True, metavar="N", help="processes, one a GPU")
    verb.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the recipe")
    verb.set_defaults(run=_plan)


def _tokenize(options: argparse.Namespace) -> int:
    from rich.console import Console

    from megadistill.data import tokenize

    report = tokenize(
        options.inputs,
        options.output,
        tokenizer=options.tokenizer,
        vocab_size=options.vocab_size,
        sequence_length=options.sequence_length,
        packer=options.packer,
        text_field=options.text_field,
        heldout_fraction=options.heldout_fraction,
        include=options.include or ["*"],
        exclude=options.exclude,
        shard_mb=options.shard_mb,
        processes=options.processes,
    )
    Console().print(report.table())
    return 0


def _shards_verify(options: argparse.Namespace) -> int:
    from rich.console import Console

    from megadistill.data.verify import verify

    report = verify(options.data, quick=options.quick)
    for line in report.lines():
        print(line)
    Console().print(report.table())
    return 0 if report.ok else OperatorFault.exit_code


def _shards_info(options: argparse.Namespace) -> int:
    from rich.console import Console

    from megadistill.data.verify import info

    for table in info(options.data):
        Console().print(table)
    return 0


def _shards_index(options: argparse.Namespace) -> int:
    from megadistill.data.foreign import index

    manifest = index(
        options.folder, tokenizer=options.tokenizer, member=options.member, dtype=options.dtype, split=options.split
    )
    print(
        f"{options.folder}/manifest.json: {manifest.units:,} sequences of {manifest.sequence_length:,} tokens in "
        f"{len(manifest.shards):,} shards"
    )
    return 0


def _train(options: argparse.Namespace) -> int:
    from megadistill.config import load_recipe

    if options.stop_after is not None and options.stop_after < 1:
        raise UserError(f"--stop-after {options.stop_after}: steps count from 1")
    recipe = load_recipe(options.recipe, options.set)
    from megadistill.train.loop import train

    outcome = train(recipe, stop_after=options.stop_after)
    if outcome is not None and os.environ.get("RANK", "0") == "0":
        where = f"{recipe.run.folder}: step {outcome.step} of {recipe.train.steps}"
        if outcome.done:
            print(f"{where}, done")
        elif outcome.stopped_by is not None:
            print(f"{where}, stopped; the same command goes on")
        else:
            print(f"{where}, stopped as asked; without --stop-after it goes on")
    return RestartFault.exit_code if outcome is not None and outcome.stopped_by is not None else 0


def _doctor(options: argparse.Namespace) -> int:
    import json

    from rich.console import Console

    from megadistill.train.findings import Report

    def tell(report: Report) -> None:
        Console().print(report.table())
        if options.json:
            options.json.write_text(json.dumps(report.values(), indent=1) + "\n", encoding="utf-8")
        if report.bad_nodes:
            print(f"bad nodes: {','.join(report.bad_nodes)}", flush=True)

    if options.node:
        from megadistill.train.doctor import examine_node

        report = examine_node(options.recipe, options.set)
        tell(report)
        return 0 if report.ok else UserError.exit_code
    from megadistill.plan.needs import rank_memory
    from megadistill.train.doctor import examine

    well = examine(options.recipe, options.set, memory=rank_memory, tell=tell)
    return 0 if well else UserError.exit_code


def _cache(options: argparse.Namespace) -> int:
    from megadistill.config import load_recipe

    if options.steps is not None and options.steps < 1:
        raise UserError(f"--steps {options.steps}: give at least 1")
    recipe = load_recipe(options.recipe, options.set)
    from megadistill.train.cache import cache

    said = cache(recipe, options.output, steps=options.steps)
    if said is not None:
        print(said)
    return 0


def _generate(options: argparse.Namespace) -> int:
    from rich.console import Console

    if options.sequences < 1:
        raise UserError(f"--sequences {options.sequences}: give at least 1")
    from megadistill.comm.topology import local_device
    from megadistill.data import Manifest, Mixture
    from megadistill.data.progress import console_progress
    from megadistill.teacher.generate import Sampling, generate

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
    from megadistill.train.export import export_run

    step = export_run(
        options.run_folder, options.output, step=options.step, max_shard_bytes=options.max_shard_mb * 1_000_000
    )
    print(f"{options.output}: the student of {options.run_folder} at step {step}")
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from rich.console import Console

    from megadistill.report.evaluate import evaluate, table, write_json

    results = evaluate(options.models, options.data, teacher=options.teacher, batch=options.batch)
    Console().print(table(results))
    if options.json:
        write_json(results, options.json)
    return 0


def _plan(options: argparse.Namespace) -> int:
    from rich.console import Console

    from megadistill.plan.needs import read_needs, tables

    found = read_needs(options.recipe, options.set, ranks=options.ranks)
    for table in tables(found):
        Console().print(table)
    return 0
