"""Commands of a training run, under any launcher: train, doctor, store-targets."""

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from megadistill.cli.common import Commands, add_command, add_recipe, option, print_tables, say
from megadistill.distributed.launch import Launch, environment_rank
from megadistill.errors import RestartFault, Superseded, UserError
from megadistill.io import write_json
from megadistill.outputs import require_writable_file, require_writable_folder
from megadistill.redaction import command_line

if TYPE_CHECKING:
    from megadistill.config.recipe import Recipe
    from megadistill.train.loop import RunOutcome

TRAIN_EPILOG = """\
The same command under every launcher, which sets rank, world size and rendezvous:

  one process        megadistill train RECIPE
  torchrun           torchrun --nproc_per_node 8 -m megadistill train RECIPE
  deepspeed          deepspeed --num_gpus 8 --module megadistill train RECIPE

A run folder that already holds a checkpoint resumes automatically: give the same command again. A run that is running
is not started a second time, and a finished one not at all: both are answered with what to do.

example: megadistill train recipes/smoke.yaml --set distributed.vocab_group=1 --set train.steps=20"""

DOCTOR_EPILOG = """\
Start it as the run: in one process, or under the launcher in the run's own allocation. It takes at most a minute and
leaves no files behind. If nodes are at fault, the last line after the table is `bad nodes: a,b`.

examples:
  megadistill doctor recipes/smoke.yaml --set distributed.vocab_group=1
  torchrun --nproc_per_node 8 -m megadistill doctor RECIPE
  srun --ntasks-per-node 1 megadistill doctor RECIPE --node"""

STORE_TARGETS_EPILOG = """\
The recipe's loss.targets selects the part of the distribution to store; `teacher.save_targets` stores the same during a
run with a live teacher. A run with teacher.source=stored and teacher.targets=DIR reads them, and computes the same
losses as with the live teacher. Targets belong to a tokenizer, an order of the data, a teacher and a seed: a run that
differs in one of these is refused.

examples:
  megadistill store-targets recipes/mine.yaml --set loss.targets.draws=50 --output targets
  torchrun --nproc_per_node 8 -m megadistill store-targets recipes/mine.yaml --output targets"""


def add(commands: Commands) -> None:
    summary = "train a student from labels, or by distillation from a teacher"
    on_interrupt = "no step is lost; the same command starts the run, or resumes it"
    command = add_command(commands, "train", summary, TRAIN_EPILOG, _train, on_interrupt=on_interrupt)
    add_recipe(command)
    text = "save a checkpoint and stop after this step; rerun without it to continue"
    option(command, "--stop-after", "STEP", text, kind=int)
    text = "start although the run is running elsewhere; that attempt ends at its next step, without a checkpoint"
    command.add_argument("--take-over", action="store_true", help=text)

    summary = "check machine, data and recipe for what would stop a run, before it starts"
    codes = "exit codes: 0 all checks passed; 2 a check failed; 3 interrupted"
    command = add_command(commands, "doctor", summary, DOCTOR_EPILOG, _doctor, exit_codes=codes)
    add_recipe(command)
    text = "only the checks of one node by itself; start it without a launcher, once per node"
    command.add_argument("--node", action="store_true", help=text)
    option(command, "--json", "FILE", "also write the table as JSON", kind=Path)

    summary = "store a teacher's targets, for runs without the teacher in memory"
    command = add_command(commands, "store-targets", summary, STORE_TARGETS_EPILOG, _store_targets)
    add_recipe(command, "a YAML recipe with a live teacher and loss.targets")
    option(command, "--output", "DIR", "folder of the targets", kind=Path, required=True)
    option(command, "--steps", "N", "targets of the first N steps only (default: train.steps)", kind=int)


def _train(options: argparse.Namespace) -> int:
    from megadistill.config.load import load_recipe

    recipe = load_recipe(options.recipe, options.set)
    from megadistill.train.checkpoint.heartbeat import refuse_running
    from megadistill.train.setup.next_start import how_to_resume, nothing_to_do

    folder, first_rank = Path(recipe.run.folder), environment_rank() == 0
    answer = nothing_to_do(recipe, stop_after=options.stop_after)
    if answer is not None:
        if answer.recipe_differs:
            from megadistill.train.setup.run_folder import refuse_other_recipe

            refuse_other_recipe(folder, recipe.snapshot())
        if first_rank:
            say(f"{folder}: {answer.line}")
        return 0
    launch = Launch.from_environment()
    # A replica that is a launch of its own may join the run: it learns whether it is running from the others.
    after = None if options.take_over else 0 if launch.separate is not None else refuse_running(folder)
    command = None if launch.world > 1 or launch.separate is not None else _resuming_command(options)
    from megadistill.train.loop import train

    try:
        outcome = train(recipe, stop_after=options.stop_after, after=after)
    except (UserError, Superseded):
        raise
    except Exception as error:
        if first_rank:
            error.add_note(how_to_resume(folder, command, after_fault=not isinstance(error, RestartFault)))
        raise
    if outcome is None:  # a rank of the teacher's own, or a replica that came when the run had ended
        if launch.separate is not None and first_rank:
            say(f"{folder}: the run had ended when this replica came")
        return 0
    if first_rank:
        say(f"{folder}: {_outcome_line(outcome, recipe, options, command)}")
    return RestartFault.exit_code if outcome.stopped_by is not None else 0


def _resuming_command(options: argparse.Namespace) -> str:
    """The command that resumes this run, for a shell."""
    settings = [part for setting in options.set for part in ("--set", setting)]
    return shlex.join(["megadistill", "train", *command_line([str(options.recipe), *settings])])


def _outcome_line(outcome: "RunOutcome", recipe: "Recipe", options: argparse.Namespace, command: str | None) -> str:
    from megadistill.train.setup.next_start import DIVERGED

    resumes = "the same command resumes" if command is None else f"`{command}` resumes"
    if outcome.done:
        line = f"step {outcome.step} of {recipe.train.steps or outcome.step}, done"
    elif outcome.plateau:
        line = (
            f"ended at step {outcome.step}: validation.patience is used up (validation.stop); with a larger patience, "
            f"or without stop, {resumes}"
        )
    elif outcome.stopped_by is not None:
        line = f"stopped at step {outcome.step} ({outcome.stopped_by}); {resumes}"
    elif outcome.step > options.stop_after:
        line = f"already at step {outcome.step}, past --stop-after {options.stop_after}; rerun without it to continue"
    else:
        line = f"stopped at --stop-after {outcome.step}; rerun without it to continue"
    return f"{line}. {DIVERGED}" if outcome.diverged else line


def _doctor(options: argparse.Namespace) -> int:
    from megadistill.doctor.examine import examine, examine_node
    from megadistill.doctor.rank_report import Report

    def show(report: Report) -> None:
        print_tables(report.table())
        try:
            if options.json:
                write_json(options.json, report.to_json())
        finally:
            if report.bad_nodes:
                say(f"bad nodes: {','.join(report.bad_nodes)}")

    if options.node or environment_rank() == 0:
        require_writable_file(options.json, "--json")
    if options.node:
        report = examine_node(options.recipe, options.set)
        show(report)
        return 0 if report.ok else UserError.exit_code
    return 0 if examine(options.recipe, options.set, publish=show) else UserError.exit_code


def _store_targets(options: argparse.Namespace) -> None:
    from megadistill.config.load import load_recipe

    recipe = load_recipe(options.recipe, options.set)
    from megadistill.datagen.store_targets import store_targets

    if environment_rank() == 0:
        require_writable_folder(options.output, "--output")

    summary = store_targets(recipe, options.output, steps=options.steps)
    if summary is not None:
        say(summary)
