"""A run folder as a run writes it, with a clock of its own that says when each step truly ended."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RECIPE: dict[str, Any] = {
    "objective": "distill",
    "run": {"folder": "runs/written"},
    "data": {"manifest": "data/train/manifest.json"},
    "student": {"config": {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 96}},
    "teacher": {"path": "models/teacher-hf"},
    "train": {"steps": 40, "global_batch": 8, "micro_batch": 2, "optimizer": {"learning_rate": 0.004}},
}

TOKENS_PER_STEP = 1024


@dataclass
class WrittenRun:
    """Writes what a run writes, by the same rules: a resume drops the lines past its checkpoint."""

    folder: Path
    now: float = 1_700_000_000.0
    attempt: int = 0
    lines: list[dict[str, Any]] = field(default_factory=list)
    ended: dict[int, float] = field(default_factory=dict)
    """When each step that counts truly ended."""

    def begin(self, *, step: int = 0, seconds: float = 3.0) -> None:
        """An attempt that goes on after `step`."""
        self.attempt += 1
        self.event("attempt_started", 0, world_size=2, attempt_record=f"attempts/{self.attempt:05d}.json")
        self.restart(step=step, seconds=seconds)

    def restart(self, *, step: int, seconds: float) -> None:
        """Resumes: before the first step of an attempt, and after a rollback."""
        self.now += seconds
        lost = max(0, len(self.lines) - step)
        self.lines = [line for line in self.lines if line["step"] <= step]
        self.ended = {each: when for each, when in self.ended.items() if each <= step}
        self.event("resumed", step, startup_seconds=seconds, lost_steps=lost)

    def steps(self, first: int, last: int, *, seconds: float = 0.5, **values: Any) -> None:
        for step in range(first, last + 1):
            self.now += seconds
            self.ended[step] = self.now
            self.lines.append({"time": self.now, **step_line(step, seconds), **values})

    def save(self, step: int, *, stall: float = 0.25) -> None:
        self.now += stall
        self.event("checkpoint_saved", step, stall_seconds=stall, write_seconds=0.5, bytes=1000, removed=[])

    def event(self, event: str, step: int, **values: Any) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        line = {"time": self.now, "attempt": self.attempt, "event": event, "step": step, **values}
        with open(self.folder / "events.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def write(self, recipe: dict[str, Any] = RECIPE) -> Path:
        """The folder, with all records so far."""
        self.folder.mkdir(parents=True, exist_ok=True)
        described = {"recipe": recipe, "deepspeed": {}, "versions": {"torch": "2.13.0"}}
        (self.folder / "recipe.json").write_text(json.dumps(described), encoding="utf-8")
        text = "".join(json.dumps(line) + "\n" for line in self.lines)
        (self.folder / "metrics.jsonl").write_text(text, encoding="utf-8")
        return self.folder


def step_line(step: int, seconds: float) -> dict[str, Any]:
    """A line of metrics.jsonl: a distillation from all of the teacher's distribution."""
    loss = 4.0 / (1 + step / 10)
    return {
        "step": step,
        "tokens": step * TOKENS_PER_STEP,
        "loss": loss,
        "divergence": loss,
        "kl": loss,
        "student_ce": 3.0 + loss,
        "teacher_ce": 3.0,
        "student_entropy": 3.5,
        "teacher_entropy": 3.2,
        "agreement": 1 - loss / 5,
        "log_z": 8.0,
        "learning_rate": 0.004,
        "grad_norm": 1.0,
        "seconds": seconds,
        "tokens_per_second": TOKENS_PER_STEP / seconds,
        "data_seconds": 0.1 * seconds,
        "teacher_seconds": 0.2 * seconds,
        "mfu": None,
        "memory_bytes": 2**30,
    }


def run_with_faults(folder: Path) -> WrittenRun:
    """Two attempts and a rollback: a kill, a pause, a skipped step, a spike."""
    run = WrittenRun(folder)
    run.begin()
    run.steps(1, 5)
    run.save(5)
    run.steps(6, 10)
    run.save(10)
    run.steps(11, 14)
    run.event("attempt_failed", 14, rank=1, reason="rank 1 is gone", exit_code=3)
    run.now += 60
    run.begin(step=10, seconds=4.0)
    run.steps(11, 20, seconds=0.7)
    run.save(20)
    run.steps(21, 25)
    run.event("loss_spike", 25, loss=9.0, median=1.0, zscore=50.0)
    run.event("rollback", 25, to_step=20, skipped_slots=[160, 200])
    run.restart(step=20, seconds=1.5)
    run.steps(21, 30)
    run.now += 0.5
    run.event("step_skipped", 31, reason="loss is nan")
    run.steps(32, 40)
    run.save(40)
    run.event("completed", 40)
    return run
