"""The command line: parses a command, runs it, and exits with a code that tells who has to act.

A command imports its package when it runs, so that `--help` and a mistyped option answer at once.
"""

import argparse
import logging
import os
import sys
import time
import traceback
from collections.abc import Sequence
from typing import NoReturn

from megadistill import __version__, logs
from megadistill.cli import data, evaluate, init, models, plan, track, train
from megadistill.cli.common import EXIT_CODES, HelpFormatter
from megadistill.cli.interrupt import Interrupts
from megadistill.cli.parser import Parser
from megadistill.distributed.launch import environment_local_rank, environment_rank, environment_replica
from megadistill.errors import OperatorFault, RankUserError, RestartFault, UserError
from megadistill.outputs import one_line
from megadistill.redaction import printable_line, printable_lines

EPILOG = f"""\
megadistill COMMAND --help shows the options of a command, with an example.

{EXIT_CODES}"""

RENAMED = {"benchmark": "lm-eval", "cache": "store-targets", "reference": "config-keys"}
"""Former name of a command -> its name now."""

logger = logging.getLogger(__name__)

EXIT_DELAY_SECONDS = 10.0
"""Delay before a rank exits that prints nothing: a launcher ends all ranks when the first one leaves, and the error of
the node's first rank has to be printed before."""


def main() -> NoReturn:
    """Runs the command of this process's arguments, and exits with its code.

    A fault ends the process at once: the interpreter's own shutdown would destroy process groups whose peers are gone,
    and abort with another code. So does a run that recorded a profile: behind torch's profiler that shutdown ends some
    of them by a segmentation fault, when all is stored. And so does each of several replicas that are launches of their
    own, whose thread that waits in torch's store for the loss of another would abort, if it ended now.
    """
    interrupts = Interrupts()
    try:
        interrupts.handle()
        code = run_command(sys.argv[1:], interrupts)
    except KeyboardInterrupt:  # behind the command, or while its error is printed
        code = RestartFault.exit_code
    sys.stdout.flush()
    sys.stderr.flush()
    ends_at_once = code in (RestartFault.exit_code, OperatorFault.exit_code)
    if ends_at_once or environment_replica() is not None or _has_recorded_profile():
        os._exit(code)
    sys.exit(code)


def _has_recorded_profile() -> bool:
    capture = sys.modules.get("megadistill.train.telemetry.profile_capture")
    return capture is not None and bool(capture.ProfileCapture.has_recorded)


def run_command(arguments: Sequence[str], interrupts: Interrupts | None = None) -> int:
    """Runs one command and returns its exit code. Errors for people are one line without a traceback."""
    on_interrupt = ""
    logs.configure(environment_rank(), replica=environment_replica())
    prints = environment_local_rank() == 0  # the same error on all ranks of a node: print it once
    try:
        if not arguments:
            parser().print_help(sys.stderr)
            return UserError.exit_code
        _refuse_renamed(arguments)
        options = parser().parse_args(arguments)
        on_interrupt = options.on_interrupt
        return options.run(options) or 0
    except UserError as error:
        if error.prints if isinstance(error, RankUserError) else prints:
            lines = map(printable_line, error.lines or [str(error)])  # arguments and files may hold anything
            print("megadistill:", "\n".join(lines), file=sys.stderr)
        else:
            time.sleep(EXIT_DELAY_SECONDS)
        return error.exit_code
    except (RestartFault, OperatorFault) as error:
        if error.prints:
            logger.error("%s", error)
        _print_notes(error)
        return error.exit_code
    except OSError as error:  # such as a full disk or a folder without write permission: a traceback does not help
        logger.error("%s", one_line(error))
        _print_notes(error)
        return OperatorFault.exit_code
    except KeyboardInterrupt:
        return _interrupted(interrupts, on_interrupt, prints)
    except Exception as error:
        if interrupts is not None and interrupts.name is not None:  # an import that was interrupted fails otherwise
            return _interrupted(interrupts, on_interrupt, prints)
        notes, error.__notes__ = getattr(error, "__notes__", []), []
        print(printable_lines(traceback.format_exc()), end="", file=sys.stderr)
        error.__notes__ = notes
        _print_notes(error)
        return OperatorFault.exit_code


def _interrupted(interrupts: Interrupts | None, on_interrupt: str, prints: bool) -> int:
    if prints:
        name = "" if interrupts is None or interrupts.name is None else f" ({interrupts.name})"
        print(f"megadistill: interrupted{name}: {on_interrupt or 'nothing was started'}", file=sys.stderr)
    return RestartFault.exit_code


def parser() -> argparse.ArgumentParser:
    """The parser of all commands and their options."""
    top = Parser(
        prog="megadistill",
        description="Distil a large frozen teacher into a student, at pretraining scale or on a laptop.",
        epilog=EPILOG,
        formatter_class=HelpFormatter,
    )
    top.add_argument("--version", action="version", version=__version__)
    # The deepspeed launcher puts this in front of the command; the rank is read from the environment.
    top.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    for group in (init, data, train, track, models, evaluate, plan):
        group.add(commands)
    return top


def _print_notes(error: Exception) -> None:
    """Prints what an error's notes say to type next. Not to stderr, whose last line is the reason of the end."""
    for note in getattr(error, "__notes__", ()):
        print(printable_line(note), flush=True)


def _refuse_renamed(arguments: Sequence[str]) -> None:
    command = next((each for each in arguments if not each.startswith("-") and not each.isdigit()), "")
    if command in RENAMED:
        raise UserError(f"the command {command} is now {RENAMED[command]}: use the new name")
