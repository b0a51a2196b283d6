"""A stand-in for the package wandb, in the process beside a run. FAKE_WANDB says what it does, FAKE_FOLDER where."""

import json
import os
import sys
import time
from pathlib import Path

FOREVER = 1e6


class Settings:
    def __init__(self, **settings: object) -> None:
        self.settings = settings


def _reach(place: str) -> None:
    """Leaves a mark, and does what this stand-in is to do there."""
    (Path(os.environ["FAKE_FOLDER"]) / place).touch()
    behaviour = os.environ["FAKE_WANDB"]
    if behaviour == f"raises in {place}":
        raise RuntimeError(f"no {place} with the key {os.environ['WANDB_API_KEY']}")
    if behaviour == f"blocks in {place}":
        time.sleep(FOREVER)


class Run:
    def define_metric(self, name: str, *, step_metric: str) -> None:
        assert (name, step_metric) == ("*", "step")

    def log(self, numbers: dict[str, float]) -> None:
        _reach("log")
        with open(Path(os.environ["FAKE_FOLDER"]) / "logged.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(numbers) + "\n")

    def finish(self) -> None:
        _reach("finish")


def init(**options: object) -> Run:
    print("chatter with a secret:", os.environ["WANDB_API_KEY"], file=sys.stderr, flush=True)
    _reach("init")
    return Run()
