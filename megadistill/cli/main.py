"""The front door: one verb a job; it parses, calls, and exits with a clear code. It knows no mathematics.

A verb imports its room when it runs, so that `--help` and a mistyped option answer at once.
"""

import argparse
import os
import sys
import time
import traceback
from collections.abc import Sequence
from typing import NoReturn

from megadistill import __version__
from megadistill.cli import config_keys, data, evaluate, models, plan, prune, report, run, timeline
from megadistill.cli.common import EXIT_CODES
from megadistill.errors import OperatorFault, RankUserError, RestartFault, UserError

SPEAKING_SECONDS = 10.0
"""How long a rank waits for the one that says what is wrong: launchers end all ranks when the first one leaves."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb; the exit code. Errors for people are one line without a traceback."""
    options = parser().parse_args(arguments)
    rank, local_rank = _environment("RANK", "SLURM_PROCID"), _environment("LOCAL_RANK", "SLURM_LOCALID")
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


def _environment(launchers: str, slurms: str) -> str:
    """A number as the launcher gave it, or srun inside a step, where no launcher did."""
    inside_a_step = "SLURM_STEP_ID" in os.environ
    return os.environ.get(launchers) or (os.environ.get(slurms) if inside_a_step else None) or "0"


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
    for group in (data, run, models, prune, evaluate, report, plan, timeline, config_keys):
        group.add(verbs)
    return top
