"""Jobs of commands, run side by side: finished ones are skipped, and a failure stops no other job."""

import subprocess
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import IO

POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Step:
    """A command."""

    command: tuple[str, ...]
    product: Path
    """File that the command writes atomically at its end."""


@dataclass(frozen=True)
class Job:
    """Steps in order. Those whose product exists are skipped."""

    name: str
    steps: tuple[Step, ...]
    log: Path
    """File that the commands' output is appended to."""
    weight: float
    """Estimated cost in seconds of one core."""
    fraction: Callable[[], float]
    """Progress of an unfinished job, from 0 to 1."""

    @property
    def done(self) -> bool:
        return all(step.product.exists() for step in self.steps)


@dataclass(frozen=True)
class Ended:
    """A job that has ended."""

    job: Job
    seconds: float
    failure: str | None
    """Reason of a failure in one line; None for a job that is done."""


@dataclass
class _Running:
    job: Job
    steps: deque[Step]
    log: IO[bytes]
    began: float = field(default_factory=time.monotonic)
    process: subprocess.Popen[bytes] | None = None

    def advance(self) -> Ended | None:
        """Starts the next step when the one before has ended. Returns the job's end, or None while it runs."""
        if self.process is not None:
            code = self.process.poll()
            if code is None:
                return None
            step = self.steps.popleft()
            if code != 0 or not step.product.exists():
                reason = f"exit code {code}" if code else f"it left no {step.product}"
                last = f"; last line: {line}" if (line := last_line(self.job.log)) else ""
                return self._ended(f"{' '.join(step.command)}: {reason}{last} (see {self.job.log})")
        if not self.steps:
            return self._ended(None)
        # A process group of its own: Ctrl-C reaches `run` alone, which sends one signal; at a second one a training run
        # would end without a checkpoint.
        self.process = subprocess.Popen(
            self.steps[0].command,
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
        return None

    def _ended(self, failure: str | None) -> Ended:
        return Ended(self.job, time.monotonic() - self.began, failure)


def run(jobs: Sequence[Job], *, side_by_side: int) -> Generator[Ended | None, None, None]:
    """Runs the jobs that are not done. Yields each as it ends, and None in between, to show progress.

    When the iterator is closed or interrupted, the running commands get SIGTERM and are waited for.
    """
    waiting = deque(job for job in jobs if not job.done)
    running: list[_Running] = []
    try:
        while waiting or running:
            while waiting and len(running) < side_by_side:
                running.append(_begin(waiting.popleft()))
            for one in list(running):
                if (ended := one.advance()) is not None:
                    running.remove(one)
                    one.log.close()
                    yield ended
            yield None
            time.sleep(POLL_SECONDS)
    finally:
        alive = [one.process for one in running if one.process is not None]
        for process in alive:
            process.terminate()
        for process in alive:
            process.wait()
        for one in running:
            one.log.close()


def _begin(job: Job) -> _Running:
    job.log.parent.mkdir(parents=True, exist_ok=True)
    return _Running(job, deque(step for step in job.steps if not step.product.exists()), job.log.open("ab"))


def last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else ""


@dataclass
class Pace:
    """Estimate of the time left, by the progress since its construction."""

    jobs: Sequence[Job]
    began: float = field(default_factory=time.monotonic)
    at_first: float = field(init=False)

    def __post_init__(self) -> None:
        self.at_first = self.done

    @property
    def total(self) -> float:
        return sum(job.weight for job in self.jobs)

    @property
    def done(self) -> float:
        return sum(job.weight if job.done else job.weight * job.fraction() for job in self.jobs)

    def left(self) -> str:
        """Time left as text; empty before a hundredth of the work is done."""
        done = self.done
        if done - self.at_first < self.total / 100:
            return ""
        seconds = (self.total - done) * (time.monotonic() - self.began) / (done - self.at_first)
        return f"about {timedelta(seconds=round(seconds))} left"
