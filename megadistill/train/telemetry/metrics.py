"""What a run says while it runs: metrics.jsonl, TensorBoard, and a bar or plain lines. It knows no model."""

import json
import os
import resource
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megadistill.accelerators import accelerator_of
from megadistill.config import Recipe
from megadistill.distributed.topology import Topology
from megadistill.events import JsonLines, read_lines
from megadistill.models.flops import flops_per_token
from megadistill.train.telemetry.histograms import Histogram
from megadistill.train.telemetry.tensorboard import Board
from megadistill.types import StepReport

WHOLE_DISTRIBUTION_METRICS = ("teacher_ce", "teacher_entropy", "agreement")
"""What a run with truncated targets does not know."""

TEACHER_METRICS = ("divergence", "kl", *WHOLE_DISTRIBUTION_METRICS, "teacher_seconds")
"""What a run from labels does not have."""


def peak_flops(device: torch.device, precision: str) -> float | None:
    """The peak of one device at a precision, or None where it is not known (every CPU)."""
    if device.type == "cpu":
        return None
    name = torch.get_device_module(device).get_device_name(device)
    kind = accelerator_of(name)
    return kind.peak_flops(precision) if kind is not None and precision in kind.peak_tflops else None


def peak_memory(device: torch.device) -> int:
    """Bytes: the peak allocated on an accelerator, the peak resident memory of the process on a CPU."""
    if device.type == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return int(torch.accelerator.max_memory_allocated(device))


class Meter:
    """Turns a step's numbers into a report: throughput, MFU, memory.

    Model FLOPs are what the mathematics needs (PaLM, 2204.02311, appendix B): recomputation does not count.
    """

    def __init__(
        self,
        *,
        student: Any,
        teacher: Any | None,
        sequence_length: int,
        tokens_per_step: int,
        precision: str,
        topology: Topology,
    ) -> None:
        forward = flops_per_token(student, sequence_length)
        frozen = flops_per_token(teacher, sequence_length).forward if teacher is not None else 0
        self._flops_per_token = 3 * forward.forward + frozen
        self._tokens_per_step = tokens_per_step
        self._device = topology.device
        peak = peak_flops(topology.device, precision)
        self._peak = peak * topology.world if peak is not None else None

    def report(
        self,
        step: int,
        metrics: dict[str, float],
        rate: float,
        grad_norm: float,
        seconds: float,
        data_seconds: float,
        teacher_seconds: float,
        diagnostics: dict[str, float] | None = None,
    ) -> StepReport:
        tokens_per_second = self._tokens_per_step / seconds
        return StepReport(
            step=step,
            tokens=step * self._tokens_per_step,
            **metrics,
            learning_rate=rate,
            grad_norm=grad_norm,
            seconds=seconds,
            tokens_per_second=tokens_per_second,
            data_seconds=data_seconds,
            teacher_seconds=teacher_seconds,
            mfu=tokens_per_second * self._flops_per_token / self._peak if self._peak else None,
            memory_bytes=peak_memory(self._device),
            diagnostics=diagnostics,
        )


class RunLog:
    """Writes one rank's view of a run; on every rank but the first it writes nothing.

    A resume keeps what was logged up to the checkpoint's step and drops what the killed run logged past it.
    """

    def __init__(self, folder: Path, recipe: Recipe, *, start_step: int, topology: Topology) -> None:
        self._active = topology.is_first
        self._steps = recipe.train.steps
        self._log_every = recipe.train.log_every
        self._loss = recipe.loss if recipe.objective == "distill" else None
        self._console = Console(stderr=False, soft_wrap=True)
        self._progress: Progress | None = None
        self._refused = False
        if not self._active:
            return
        path = folder / "metrics.jsonl"
        _keep_until(path, start_step)
        self._lines = JsonLines(path)
        self._board = Board(folder / "tensorboard", recipe, start_step=start_step)
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._progress = Progress(*columns, console=self._console)
            self._task = self._progress.add_task("training", total=self._steps, completed=start_step)
            self._progress.start()

    def say(self, line: str) -> None:
        """One line for a person, above the bar where there is one."""
        if not self._active:
            return
        try:
            self._console.print(line, markup=False, highlight=False)
        except (OSError, SystemExit):  # the reader is gone, as when a launcher was killed; rich would leave for that
            self._console.quiet = True

    def step(self, report: StepReport, *, weights: dict[str, float] | None = None) -> None:
        """Logs one step: a line of JSON (written at once, so that a kill loses nothing), TensorBoard, the terminal.

        `weights` are those of the loss's terms, by name, where a schedule moves them.
        """
        if not self._active:
            return
        values = {**self._values(report), **(weights or {})}
        problem = self._lines.append(values)
        if problem is not None and not self._refused:
            self.say(f"{self._lines.path}: {problem}; its lines wait until the disk takes them")
        self._refused = problem is not None
        self._board.numbers(report.step, _flat(values))
        if report.step % self._log_every == 0 or report.step == self._steps:
            self.say(self._line(report))
        if self._progress:
            self._progress.update(self._task, completed=report.step, description=f"loss {report.loss:.4f}")

    def histograms(self, step: int, found: dict[str, Histogram]) -> None:
        """For TensorBoard alone."""
        if self._active:
            self._board.histograms(step, found)

    def close(self) -> None:
        if not self._active:
            return
        if self._progress:
            self._progress.stop()
        self._board.close()

    def _values(self, report: StepReport) -> dict[str, Any]:
        hidden: tuple[str, ...] = ("diagnostics",) if report.diagnostics is None else ()
        if self._loss is None:
            hidden += TEACHER_METRICS
        elif self._loss.targets is not None:
            hidden += WHOLE_DISTRIBUTION_METRICS
        return {name: value for name, value in asdict(report).items() if name not in hidden}

    def _line(self, report: StepReport) -> str:
        teacher = ""
        if self._loss is not None:
            if self._loss.divergence != "forward_kl":
                teacher += f" | {self._loss.divergence} {report.divergence:.4f}"
            teacher += f" | kl {report.kl:.4f}"
            if self._loss.targets is None:
                teacher += f" | agree {report.agreement:.3f}"
        mfu = f" | mfu {report.mfu:.1%}" if report.mfu is not None else ""
        return (
            f"step {report.step}/{self._steps} | loss {report.loss:.4f} | ce {report.student_ce:.4f}{teacher}"
            f" | lr {report.learning_rate:.2e} | grad {report.grad_norm:.3f}"
            f" | {report.tokens_per_second:,.0f} tok/s{mfu}"
        )


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """The numbers of a step without nesting: those of `diagnostics` as `diagnostics/NAME`."""
    closer = values.get("diagnostics") or {}
    outer = {name: value for name, value in values.items() if name != "diagnostics"}
    return {**outer, **{f"diagnostics/{name}": value for name, value in closer.items()}}


def _keep_until(path: Path, step: int) -> None:
    """Rewrites metrics.jsonl up to `step`, atomically."""
    if not path.exists():
        return
    kept = [json.dumps(values) for values in read_lines(path) if values["step"] <= step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    os.replace(temporary, path)
