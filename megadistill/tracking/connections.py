"""Connections to the trackers: a run of Weights & Biases, a run of MLflow.

Both take project, server and key from their own environment variables and files, so none is in a recipe.
"""

import os
import posixpath
import re
import secrets
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megadistill.tracking.groups import STEP

PROJECT = "megadistill"
"""Project of W&B, or experiment of MLflow, where its environment variable names none."""

MAX_PARAMETER = 500
"""Letters of a parameter's value in MLflow, whose servers differ in what they take."""

MLFLOW_BATCH = 100
"""Parameters that MLflow takes at once."""


@dataclass(frozen=True)
class RunToTrack:
    """The run that a tracker is opened for."""

    folder: Path
    recipe: dict[str, Any]
    """The resolved recipe, without secrets."""
    run_id: str | None
    """The tracker's id of the run, from an earlier connection; None: the first one."""


class Connection(Protocol):
    """An open run of a tracker. Every method may raise anything, or block."""

    run_id: str

    def log(self, step: int, time: float, numbers: Mapping[str, float]) -> None:
        """Numbers of a step by tag; `time` in seconds since 1970."""

    def close(self, *, done: bool) -> None:
        """Waits until everything is sent. `done`: the training run is complete, and will write nothing more."""


class WandbConnection:
    """A run of Weights & Biases, online or, with WANDB_MODE=offline, in RUN/tracking/wandb/ for `wandb sync`."""

    def __init__(self, run: RunToTrack) -> None:
        import wandb  # noqa: PLC0415  of the extra `wandb`

        self.run_id = run.run_id or secrets.token_hex(8)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            name=os.environ.get("WANDB_NAME") or run.folder.name,
            id=self.run_id,
            resume="allow",
            config=run.recipe,
            dir=os.environ.get("WANDB_DIR") or str(run.folder / "tracking"),
            # Nothing but what is logged: no copy of the code, of its remote's address, or of the terminal.
            settings=wandb.Settings(console="off", disable_git=True, disable_code=True, save_code=False, silent=True),
        )
        # A step of W&B's own can only rise: a line that comes late would be dropped.
        self._run.define_metric("*", step_metric=STEP)

    def log(self, step: int, time: float, numbers: Mapping[str, float]) -> None:
        self._run.log({**numbers, STEP: step})

    def close(self, *, done: bool) -> None:
        self._run.finish()


class MlflowConnection:
    """A run of MLflow, on the server or in the store of MLFLOW_TRACKING_URI."""

    def __init__(self, run: RunToTrack) -> None:
        from mlflow.entities import Metric, Param  # noqa: PLC0415  of the extra `mlflow`
        from mlflow.tracking import MlflowClient  # noqa: PLC0415

        self._metric, self._client = Metric, MlflowClient()
        if run.run_id is not None:
            self.run_id = run.run_id
            self._client.update_run(self.run_id, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
        experiment = self._client.get_experiment_by_name(name)
        experiment_id = self._client.create_experiment(name) if experiment is None else experiment.experiment_id
        self.run_id = self._client.create_run(experiment_id, run_name=run.folder.name).info.run_id
        named = {mlflow_name(key): str(value)[:MAX_PARAMETER] for key, value in _flat(run.recipe).items()}
        parameters = [Param(key, value) for key, value in named.items()]
        try:
            for start in range(0, len(parameters), MLFLOW_BATCH):
                self._client.log_batch(self.run_id, params=parameters[start : start + MLFLOW_BATCH])
        except Exception:  # the next attempt makes another run: nobody wants one of each
            with suppress(Exception):
                self._client.delete_run(self.run_id)
            raise

    def log(self, step: int, time: float, numbers: Mapping[str, float]) -> None:
        at = int(1000 * time)
        # MLflow takes 1,000 at once.
        metrics = [self._metric(mlflow_name(tag), value, at, step) for tag, value in numbers.items()]
        for start in range(0, len(metrics), 1000):
            self._client.log_batch(self.run_id, metrics=metrics[start : start + 1000])

    def close(self, *, done: bool) -> None:
        self._client.set_terminated(self.run_id, "FINISHED" if done else "KILLED")


CONNECTIONS: dict[str, Callable[[RunToTrack], Connection]] = {"wandb": WandbConnection, "mlflow": MlflowConnection}
"""Name of a tracker -> how its run is opened, anew or again. The name is also that of its package and extra."""


def mlflow_name(name: str) -> str:
    """A name of a metric or parameter that MLflow takes, which refuses others with all that is sent beside them.

    A data source may have any name: `by_source/c++/kl`.
    """
    return posixpath.normpath(re.sub(r"[^/\w.\- :]", "_", name)).lstrip("/")


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
