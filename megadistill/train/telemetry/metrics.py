"""Metrics of each step: metrics.jsonl, TensorBoard, log lines and a progress bar."""

import logging
import os
import resource
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn

from megadistill.accelerators import accelerator_of
from megadistill.config.recipe import Recipe
from megadistill.distributed.topology import Topology
from megadistill.divergence import DivergenceKind
from megadistill.events import (
    ALL,
    VALIDATIONS,
    JsonLines,
    LineFromEnd,
    drop_validations_after,
    metrics_from_end,
    numbers_of,
)
from megadistill.models.flops import flops_per_token
from megadistill.progress import short_bar
from megadistill.timeline.stopwatch import StepSeconds
from megadistill.train.setup.step_shape import StepShape
from megadistill.train.telemetry.histograms import Histogram, histogram
from megadistill.train.telemetry.rank_flops import RankFlops
from megadistill.train.telemetry.tensorboard import TensorBoardLog
from megadistill.types import DIAGNOSTIC_NAMES, EXPERT_METRICS, NORM_KINDS, NORM_NUMBERS, StepReport
from megadistill.units import count, left, short

OUT_OF_ORDER_BYTES = 1 << 16
"""Bytes of earlier steps before the end of metrics.jsonl in which a resume looks for steps that are out of order."""

WHOLE_DISTRIBUTION_METRICS = ("teacher_ce", "teacher_entropy", "agreement")
"""Metrics of the teacher's complete distribution: a run with truncated targets has them on diagnosed steps only."""

HELD_OUT_MEASURES = ("cross_entropy", "calibration_error")
HELD_OUT_TEACHER_MEASURES = ("kl", "teacher_cross_entropy", "agreement", "acceptance")
"""Measures of a validation that have charts; the second, with a teacher that runs."""

TEACHER_METRICS = ("divergence", "kl", *WHOLE_DISTRIBUTION_METRICS, "teacher_seconds", "wait_seconds", "teacher_mfu")
"""Metrics that a run from labels does not have."""

PACE_STEPS = 50
"""Steps whose pace tells the time that is left."""

logger = logging.getLogger(__name__)


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Peak FLOP/s of one device at a precision; None where it is not known (every CPU)."""
    if device.type == "cpu":
        return None
    name = torch.get_device_module(device).get_device_name(device)
    kind = accelerator_of(name)
    return kind.peak_flops(precision) if kind is not None and precision in kind.peak_tflops else None


def peak_memory(device: torch.device) -> int:
    """Peak bytes allocated on an accelerator; on a CPU, the peak resident memory of the process."""
    if device.type == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return int(torch.accelerator.max_memory_allocated(device))


def logged_names(recipe: Recipe, *, has_experts: bool = False) -> set[str]:
    """Names of the numbers that a run of this recipe logs, on every step or on some; see `RunLog.step`.

    `has_experts`: whether the student has experts.
    """
    loss, diagnosed = recipe.loss, recipe.loss.diagnostics_every > 0
    names = {field.name for field in fields(StepReport)} - {"step", "diagnostics", "experts", "expert_load", "norms"}
    if recipe.train.norms_every > 0:  # those of each layer too, for which there is no chart
        names |= {f"norms/{name}" for name in NORM_NUMBERS} | {f"norms/{kind}/total" for kind in NORM_KINDS}
    if recipe.validation is not None:
        has_teacher = bool(recipe.teachers) if recipe.teacher is None else recipe.teacher.is_live
        measures = (*HELD_OUT_MEASURES, *(HELD_OUT_TEACHER_MEASURES if has_teacher else ()))
        names |= {f"validation/{name}/{split}" for name in measures for split in (ALL, *recipe.validation.data)}
    if has_experts:
        names |= {f"experts/{name}" for name in EXPERT_METRICS}
    if recipe.objective == "labels":
        return names - {*TEACHER_METRICS}
    if loss.targets is not None:
        names = names - {"divergence"} | {"targets_kl"}
        if not diagnosed:
            names -= {"kl", *WHOLE_DISTRIBUTION_METRICS}
    elif loss.temperature != 1.0 and not diagnosed:
        names -= {"kl"}
    if diagnosed:
        names |= {f"diagnostics/{name}" for name in DIAGNOSTIC_NAMES if name != "forward_kl"}
    if recipe.has_scheduled_weights:
        names |= {"kd_weight", "ce_weight"}
    return names


class Meter:
    """Computes a step's report: throughput, MFU, memory.

    Model FLOPs are counted without recomputation (PaLM, 2204.02311, appendix B), those of `flops` with it.
    """

    def __init__(
        self,
        *,
        student: Any,
        teachers: Sequence[tuple[float, Any]],
        precision: str,
        topology: Topology,
        flops: Callable[[StepShape], RankFlops],
    ) -> None:
        """
        Args:
            teachers: config of each live teacher, and the fraction of the tokens that it reads.
            flops: those of this rank, for each shape of a step.
        """
        self._student, self._teachers = student, teachers
        self._device = topology.device
        peak = peak_flops(topology.device, precision)
        self._own_peak = peak
        self._peak = peak * topology.world if peak is not None else None
        self._rank_flops = flops
        self._shape: StepShape | None = None

    def _begin_entry(self, shape: StepShape) -> None:
        self._shape, length = shape, shape.sequence_length
        forward = flops_per_token(self._student, length)
        frozen = sum(share * flops_per_token(config, length).forward for share, config in self._teachers)
        self._flops_per_token = 3 * forward.forward + frozen
        self._flops = self._rank_flops(shape)

    def report(
        self,
        step: int,
        metrics: dict[str, Any],
        *,
        shape: StepShape,
        tokens: int,
        seconds: float,
        parts: StepSeconds,
        **values: Any,
    ) -> StepReport:
        """The report of a step that took `seconds`. `metrics`, `values`: the fields that are not computed here.

        `tokens`: those of all steps up to this one.
        """
        if shape != self._shape:
            self._begin_entry(shape)
        tokens_per_second = shape.tokens / seconds
        student_mfu, teacher_mfu = self._flops.mfus(parts, self._own_peak)
        return StepReport(
            step=step,
            tokens=tokens,
            seconds=seconds,
            tokens_per_second=tokens_per_second,
            mfu=tokens_per_second * self._flops_per_token / self._peak if self._peak else None,
            student_mfu=student_mfu,
            teacher_mfu=teacher_mfu,
            student_seconds=parts.student,
            loss_seconds=parts.loss,
            teacher_seconds=parts.teacher,
            wait_seconds=parts.wait,
            memory_bytes=peak_memory(self._device),
            **metrics,
            **values,
        )


class RunLog:
    """Writes the metrics of a run on the first rank; does nothing on other ranks.

    A resume drops the lines of metrics.jsonl after the checkpoint's step, whose steps are taken again.
    """

    def __init__(
        self,
        folder: Path,
        recipe: Recipe,
        *,
        start_step: int,
        start_tokens: int,
        topology: Topology,
        epoch_tokens: int | None = None,
        has_experts: bool = False,
    ) -> None:
        """
        Args:
            epoch_tokens: tokens of the data; None: unknown, or a mixture, whose sources have epochs of their own.
            has_experts: whether the student has experts.
        """
        self._active = topology.is_first
        self._steps = recipe.train.steps
        self._log_every = recipe.train.log_every
        self._loss = recipe.loss if recipe.objective == "distill" else None
        self._progress: Progress | None = None
        self._disk_refused = False
        self._epoch_tokens = epoch_tokens
        self._ends: deque[tuple[int, float]] = deque(maxlen=PACE_STEPS + 1)
        if not self._active:
            return
        path = folder / "metrics.jsonl"
        drop_after(path, start_step)
        drop_validations_after(folder, start_step)
        self._validations = JsonLines(folder / VALIDATIONS)
        self._lines = JsonLines(path)
        names = logged_names(recipe, has_experts=has_experts)
        self._tensorboard = None
        if "tensorboard" in recipe.track:
            self._tensorboard = TensorBoardLog(folder, recipe, names, start_step=start_step, start_tokens=start_tokens)
        console = Console()
        if console.is_terminal and not console.is_dumb_terminal:
            columns = (
                TextColumn("{task.description}"),
                short_bar(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[pace]}"),
            )
            self._progress = Progress(*columns, console=console)
            self._task = self._progress.add_task("training", total=self._steps, completed=start_step, pace="")
            self._progress.start()

    def step(
        self, report: StepReport, *, tokens_per_step: int | None = None, more: dict[str, Any] | None = None
    ) -> None:
        """Writes one step to metrics.jsonl (at once, so that a kill loses nothing), TensorBoard and the log.

        Args:
            tokens_per_step: the share of them that have labels is in the log line, where some have none.
            more: numbers beside the report's by name: the weights of the loss's terms, where they change, the number
                of the curriculum entry, and those by source and by teacher.
        """
        if not self._active:
            return
        values = {"time": round(time.time(), 3), **self._values(report), **(more or {})}
        problem = self._lines.append(values)
        if problem is not None and not self._disk_refused:
            logger.warning("%s: %s; its lines are written once the disk has space", self._lines.path, problem)
        self._disk_refused = problem is not None
        if self._tensorboard is not None:
            self._tensorboard.numbers(report.step, _flat(values))
        if report.expert_load is not None:
            loads = report.expert_load.items()
            self.histograms(report.step, {f"expert_load/layer_{n}": histogram(load) for n, load in loads})
        self._ends.append((report.step, time.perf_counter()))
        if report.step % self._log_every == 0 or report.step == self._steps:
            logger.info("%s", self._line(report, tokens_per_step))
        if self._progress:
            pace = ", ".join(filter(None, (f"{report.tokens_per_second:,.0f} tokens/s", self._left(report))))
            self._progress.update(self._task, completed=report.step, description=f"loss {report.loss:.4f}", pace=pace)

    def validation(self, step: int, *, tokens: int, seconds: float, splits: Mapping[str, Mapping[str, float]]) -> None:
        """Writes the measures of a validation, by split, to validation.jsonl and TensorBoard.

        `tokens`: those of all steps up to this one. `seconds`: the time of the validation.
        """
        if not self._active:
            return
        line = {"time": round(time.time(), 3), "step": step, "tokens": tokens, "seconds": round(seconds, 3)}
        problem = self._validations.append({**line, "splits": splits})
        if problem is not None:
            logger.warning("%s: %s; its lines are written once the disk has space", self._validations.path, problem)
        if self._tensorboard is not None:
            self._tensorboard.numbers(step, numbers_of(splits))

    def histograms(self, step: int, histograms: dict[str, Histogram]) -> None:
        """Writes histograms of tensors by tag, to TensorBoard alone."""
        if self._active and self._tensorboard is not None:
            self._tensorboard.histograms(step, histograms)

    def close(self) -> None:
        if not self._active:
            return
        if self._progress:
            self._progress.stop()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def _values(self, report: StepReport) -> dict[str, Any]:
        values = asdict(report)
        diagnostics = values.pop("diagnostics")
        hidden: tuple[str, ...] = ()
        if self._loss is None:
            hidden = TEACHER_METRICS
        else:
            values["kl"] = self._kl(report)
            if self._loss.targets is not None:
                values["targets_kl"] = values.pop("divergence")
                hidden = WHOLE_DISTRIBUTION_METRICS if diagnostics is None else ()
            if values["kl"] is None:
                hidden += ("kl",)
        hidden += tuple(name for name in ("experts", "expert_load", "norms") if values[name] is None)
        if diagnostics is not None:
            values["diagnostics"] = {name: value for name, value in diagnostics.items() if name != "forward_kl"}
        return {name: value for name, value in values.items() if name not in hidden}

    def _kl(self, report: StepReport) -> float | None:
        """Forward KL of the complete distributions at temperature 1: one number, whatever the loss is.

        None on a step that did not compute it: the loss has truncated targets, or another temperature, and the step no
        diagnostics.
        """
        assert self._loss is not None
        if self._loss.targets is None and self._loss.temperature == 1.0:
            return report.kl
        return (report.diagnostics or {}).get("forward_kl")

    def _line(self, report: StepReport, tokens_per_step: int | None) -> str:
        teacher = ""
        if self._loss is not None:
            kl = self._kl(report)
            if self._loss.targets is not None:
                teacher += f" | targets_kl {report.divergence:.4f}"
            elif self._loss.divergence is not DivergenceKind.FORWARD_KL or self._loss.temperature != 1.0:
                teacher += f" | {self._loss.divergence} {report.divergence:.4f}"
            if kl is not None:
                teacher += f" | kl {kl:.4f}"
            if self._loss.targets is None or report.diagnostics is not None:
                teacher += f" | agree {report.agreement:.1%}"
        mfu = f" | mfu {report.mfu:.1%}" if report.mfu is not None else ""
        epoch = f", epoch {short(report.tokens / self._epoch_tokens)}" if self._epoch_tokens else ""
        labels, rate = "", f"{report.tokens_per_second:,.0f} tokens/s"
        if tokens_per_step is not None and report.labels < tokens_per_step:
            labels = f", {report.labels / tokens_per_step:.1%} of the step's with a label"
        remaining = f" | {self._left(report)}" if report.step < self._steps else ""
        return (
            f"step {report.step}/{self._steps} | loss {report.loss:.4f} | ce {report.student_ce:.4f}{teacher}"
            f" | lr {short(report.learning_rate)} | grad {short(report.grad_norm)}"
            f" | {count(report.tokens)} tokens{epoch}{labels} | {rate}{mfu}{remaining}"
        )

    def _left(self, report: StepReport) -> str:
        """The time that the other steps take at the pace of the last ones, checkpoints included."""
        (first, begin), (last, end) = self._ends[0], self._ends[-1]
        pace = (end - begin) / (last - first) if last > first else report.seconds
        return left(pace * (self._steps - report.step)) if report.step < self._steps else ""


NESTED = ("diagnostics", "experts", "norms", "by_source", "by_teacher")
"""Groups of numbers in a line of metrics.jsonl."""


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """The numbers of a step without nesting, as `diagnostics/NAME` or `norms/KIND/GROUP`; no load of each expert."""
    nested = {group: values.get(group) or {} for group in NESTED}
    outer = {name: value for name, value in values.items() if name not in (*nested, "expert_load")}
    return outer | {f"{group}/{name}": value for group, inner in nested.items() for name, value in _leaves(inner)}


def _leaves(values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from ((f"{name}/{inner}", each) for inner, each in value.items())
        else:
            yield name, value


def drop_after(path: Path, step: int) -> None:
    """Cuts the lines after `step` off metrics.jsonl, of which only the end is read.

    Its steps are in order, but for lines that an attempt wrote when it had been replaced: an earlier step among those
    that are cut off is written again.
    """
    if not path.exists():
        return
    cut, earlier, again = 0, list[LineFromEnd](), 0
    for line, values in metrics_from_end(path.parent):
        if values["step"] > step:
            cut, again = line.offset, len(earlier)
        else:
            cut = cut or line.end
            earlier.append(line)
            if earlier[0].end - line.offset > OUT_OF_ORDER_BYTES:
                break
    with open(path, "r+b") as file:
        contents = []
        for line in reversed(earlier[:again]):
            file.seek(line.offset)
            contents.append(file.read(line.end - line.offset).removesuffix(b"\n") + b"\n")
        file.truncate(cut)
        file.seek(0, os.SEEK_END)
        file.writelines(contents)
