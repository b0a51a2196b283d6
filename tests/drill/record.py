"""The state of a run in numbers, to compare two runs by."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megadistill.config.load import validate_recipe
from megadistill.events import read_events, read_metrics
from megadistill.student.optimizer import state_kinds
from megadistill.train.checkpoint.folders import checkpoint_folders
from megadistill.train.checkpoint.format import newest_checkpoint


@dataclass(frozen=True)
class Record:
    """State of a run folder at its newest checkpoint."""

    step: int
    parameters: str
    """sha256 of all master weights and optimizer states."""
    cursor: dict[str, Any]
    steps: dict[int, tuple[float, float]]
    """Step -> loss and gradient norm, as logged."""
    events: list[dict[str, Any]]

    @classmethod
    def of(cls, folder: Path) -> "Record":
        checkpoint = newest_checkpoint(folder / "checkpoints")
        assert checkpoint is not None, f"{folder} has no checkpoint"
        checkpoint.verify()
        manifest, digest = checkpoint.manifest, hashlib.sha256()
        kinds = state_kinds(validate_recipe(manifest.recipe, source=str(folder)).train.optimizer)
        for name, shape in sorted(manifest.parameters.items()):
            elements = 1
            for size in shape:
                elements *= size
            for kind in kinds:
                digest.update(checkpoint.read(f"{kind}/{name}", 0, elements).numpy().tobytes())
        lines = [line for _, line in read_metrics(folder)]
        steps = {int(line["step"]): (float(line["loss"]), float(line["grad_norm"])) for line in lines}
        assert len(steps) == len(lines), "a step is logged twice"
        return cls(manifest.step, digest.hexdigest(), manifest.cursor, steps, list(read_events(folder)))

    def require_same(self, truth: "Record") -> str:
        """Bit for bit. Raises AssertionError."""
        assert self.step == truth.step, f"ended at step {self.step}, not {truth.step}"
        assert self.cursor == truth.cursor, f"consumed {self.cursor}, not {truth.cursor}"
        wrong = [step for step in truth.steps if self.steps.get(step) != truth.steps[step]]
        assert not wrong, f"steps {wrong} have other numbers"
        assert self.steps.keys() == truth.steps.keys(), "other steps are logged"
        assert self.parameters == truth.parameters, "the parameters are other ones"
        return "bitwise"

    def require_close(self, truth: "Record") -> str:
        """Losses within 1e-6 of themselves, and the same sequences. Raises AssertionError."""
        assert self.step == truth.step, f"ended at step {self.step}, not {truth.step}"
        assert self.cursor["next_slot"] == truth.cursor["next_slot"], "consumed other sequences"
        off = max(abs(self.steps[step][0] - loss) / loss for step, (loss, _) in truth.steps.items())
        assert off <= 1e-6, f"a loss is off by {off:.1e}"
        return f"losses within {off:.0e}"

    def named(self, event: str) -> list[dict[str, Any]]:
        return [each for each in self.events if each["event"] == event]


def lost_steps(folder: Path) -> int:
    """Steps that were taken twice, by the events."""
    return sum(int(event["lost_steps"]) for event in read_events(folder) if event["event"] == "resumed")


def names(folder: Path) -> list[str]:
    return [path.name for path in checkpoint_folders(folder / "checkpoints").values()]
