"""Verbs of a run and around it, under any launcher: train, doctor, cache."""

import argparse
import os
from pathlib import Path

from megadistill.cli.common import EXIT_CODES, Verbs, add_verb
from megadistill.errors import RestartFault, UserError

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


def add(verbs: Verbs) -> None:
    _train_parser(verbs)
    _doctor_parser(verbs)
    _cache_parser(verbs)


def _train_parser(verbs: Verbs) -> None:
    verb = add_verb(verbs, "train", "train a student from labels, or by distillation from a teacher", TRAIN_EPILOG)
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
    verb = add_verb(verbs, "doctor", "look for what would stop a run, before it starts", DOCTOR_EPILOG)
    verb.add_argument("recipe", type=Path, metavar="RECIPE", help="a YAML recipe")
    verb.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the recipe")
    verb.add_argument(
        "--node", action="store_true", help="only what one node can say by itself: started by no launcher, once a node"
    )
    verb.add_argument("--json", type=Path, metavar="FILE", help="also write the table as JSON")
    verb.set_defaults(run=_doctor)


def _cache_parser(verbs: Verbs) -> None:
    verb = add_verb(
        verbs, "cache", "store what a recipe's teacher says, for runs that keep no teacher in memory", CACHE_EPILOG
    )
    verb.add_argument("recipe", type=Path, metavar="RECIPE", help="a YAML recipe with a live teacher and loss.targets")
    verb.add_argument("--output", type=Path, required=True, metavar="DIR", help="where the targets go")
    verb.add_argument("--steps", type=int, metavar="N", help="of the first N steps alone (default: of train.steps)")
    verb.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the recipe")
    verb.set_defaults(run=_cache)


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

    from megadistill.doctor.findings import Report

    def tell(report: Report) -> None:
        Console().print(report.table())
        if options.json:
            options.json.write_text(json.dumps(report.values(), indent=1) + "\n", encoding="utf-8")
        if report.bad_nodes:
            print(f"bad nodes: {','.join(report.bad_nodes)}", flush=True)

    if options.node:
        from megadistill.doctor.examine import examine_node

        report = examine_node(options.recipe, options.set)
        tell(report)
        return 0 if report.ok else UserError.exit_code
    from megadistill.doctor.examine import examine

    well = examine(options.recipe, options.set, tell=tell)
    return 0 if well else UserError.exit_code


def _cache(options: argparse.Namespace) -> int:
    from megadistill.config import load_recipe

    if options.steps is not None and options.steps < 1:
        raise UserError(f"--steps {options.steps}: give at least 1")
    recipe = load_recipe(options.recipe, options.set)
    from megadistill.datagen.store_targets import cache

    said = cache(recipe, options.output, steps=options.steps)
    if said is not None:
        print(said)
    return 0
