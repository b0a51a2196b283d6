"""Command of other people's trackers: track."""

import argparse
import time
from contextlib import suppress
from pathlib import Path

from megadistill.cli.common import Commands, add_command, say
from megadistill.config.recipe import EXTERNAL_TRACKERS
from megadistill.errors import RestartFault, UserError

TRACK_EPILOG = """\
Sends the steps, validations and events of a run, in the groups of TensorBoard, with its recipe, to a run of the
tracker; the position is in RUN/tracking/, so that the same command resumes. It only reads the run's records: one that
trains on another machine, or is over, is sent the same way. It ends with the run.

Project, server and key are the tracker's own: WANDB_PROJECT, WANDB_MODE=offline, `wandb login`; MLFLOW_TRACKING_URI,
MLFLOW_EXPERIMENT_NAME. Needs pip install 'megadistill[wandb]' or 'megadistill[mlflow]'. A recipe with track: [wandb]
does the same from the run.

example: megadistill track runs/smoke/distill --to wandb"""


def add(commands: Commands) -> None:
    summary = "send a run's metrics to Weights & Biases or MLflow, while it is running or afterwards"
    on_interrupt = "what is sent is recorded; the same command resumes"
    command = add_command(commands, "track", summary, TRACK_EPILOG, _track, on_interrupt=on_interrupt)
    command.add_argument("run_folder", type=Path, metavar="RUN", help="a run folder")
    command.add_argument("--to", required=True, choices=EXTERNAL_TRACKERS, help="the tracker")
    command.add_argument("--once", action="store_true", help="send what is there and end, though the run is not done")


def _track(options: argparse.Namespace) -> int:
    from importlib.util import find_spec

    from megadistill.io import locked_folder
    from megadistill.tracking.follower import Follower, describe, require_run_folder

    folder, tracker = options.run_folder, options.to
    require_run_folder(folder)
    if find_spec(tracker) is None:
        raise UserError(f"--to {tracker}: {tracker} is not installed: pip install 'megadistill[{tracker}]'")

    def wait(seconds: float) -> bool:
        if not options.once:
            time.sleep(seconds)
        return bool(options.once)

    problem = f"{folder} is sent to {tracker} already, by another process on this machine: there is nothing to do"
    with locked_folder(folder / "tracking" / f"{tracker}.lock", problem=problem):
        follower = Follower(folder, tracker)
        try:
            complete = follower.follow(wait)
        except KeyboardInterrupt:  # a tracker may still be sending what counts as sent
            with suppress(Exception):
                follower.close(done=False)
            raise
    say(describe(follower, tracker))
    return 0 if complete else RestartFault.exit_code
