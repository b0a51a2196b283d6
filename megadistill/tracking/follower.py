"""Sends the records of a run folder to a tracker as they are written, and resumes where it stopped."""

import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megadistill.errors import UserError
from megadistill.events import VALIDATIONS, is_event, metrics_from_end, read_events, read_metrics, read_validations
from megadistill.events.validations import numbers_of
from megadistill.io import read_json, write_json
from megadistill.redaction import names_a_secret, printable_line, redacted
from megadistill.tracking.connections import CONNECTIONS, Connection, RunToTrack
from megadistill.tracking.groups import tagged
from megadistill.units import number_of

POLL_SECONDS = 10.0
"""Time between two looks at the records."""

RETRY_SECONDS, MAX_RETRY_SECONDS = 30.0, 600.0
"""Time until a tracker that failed is tried again: doubled each time, up to the second."""

LAST_ATTEMPTS = 2
"""Times that a tracker is tried once nothing more will be written."""

READ_AT_ONCE = 10_000
"""Steps that are held in memory; a follower that is further behind reads the records from their begin."""

SAVE_EVERY = 500
"""Lines after which the position is stored."""

MAX_STATE_BYTES = 1 << 12
_RUN_ID = re.compile(r"[\w.-]{1,128}", flags=re.ASCII)

Wait = Callable[[float], bool]
"""Waits for some seconds, and tells whether nothing more will be written: then it returns at once."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Position:
    """How far a run has been sent to a tracker: RUN/tracking/TRACKER.json."""

    run_id: str | None = None
    """The tracker's own id of the run."""
    step: int = 0
    """The last step that was sent."""
    events: int = 0
    """Number of lines of events.jsonl that were sent."""
    validation: int = -1
    """Step of the last validation that was sent."""


class Follower:
    """Follows one run for one tracker."""

    def __init__(
        self, folder: Path, tracker: str, *, connect: Callable[[RunToTrack], Connection] | None = None
    ) -> None:
        self._folder, self._tracker = folder, tracker
        self._connect = connect or CONNECTIONS[tracker]
        self._path = folder / "tracking" / f"{tracker}.json"
        self._connection: Connection | None = None
        self._sizes: dict[str, int] = {}
        """Bytes of the files of events and validations when they were last read."""
        self.position = _read_position(self._path)
        self.sent = 0
        """Lines sent so far."""

    def follow(self, wait: Wait) -> bool:
        """Sends what is new, again and again, until `wait` or the run's DONE says that there will be no more.

        Returns whether everything was sent. An error of the tracker is logged, and the tracker opened anew later.
        """
        ended, failures = wait(0.0), 0
        while True:
            done = (self._folder / "DONE").exists()  # before reading: what is written until then is read
            try:
                self.send_new()
                failures = 0
                if ended or done:
                    self.close(done=done)
                    return True
            except Exception as error:  # a package of other people's may raise anything
                failures += 1
                with suppress(Exception):
                    self.close(done=False)
                self._connection, self._sizes = None, {}
                last = (ended or done) and failures >= LAST_ATTEMPTS
                what = f"it is tried again in {_retry_seconds(failures):g} s"
                if last:
                    folder = printable_line(str(self._folder))
                    what = f"no step is lost: `megadistill track {folder} --to {self._tracker} --once` sends the rest"
                logger.warning("tracker %s: %s; %s", self._tracker, reason_of(error), what)
                if last:
                    return False
            if ended and failures:
                continue  # nothing to wait for
            ended = wait(_retry_seconds(failures) if failures else POLL_SECONDS)

    def send_new(self) -> None:
        """Sends the steps and events that were written since the last position; opens the tracker if there are some."""
        unsaved = 0
        try:
            for step, time, numbers, position in self._new():
                if self._connection is None:
                    self._open()
                assert self._connection is not None
                self._connection.log(step, time, numbers)
                self.position = replace(position, run_id=self.position.run_id)
                self.sent, unsaved = self.sent + 1, unsaved + 1
                if unsaved >= SAVE_EVERY:
                    self._save()
                    unsaved = 0
        finally:
            if unsaved:
                self._save()

    def close(self, *, done: bool) -> None:
        """Waits until the tracker has everything."""
        if self._connection is not None:
            self._connection.close(done=done)
            self._connection = None

    def _open(self) -> None:
        recipe = read_json(self._folder / "recipe.json")["recipe"]
        self._connection = self._connect(RunToTrack(self._folder, redacted(recipe), self.position.run_id))
        self.position = replace(self.position, run_id=self._connection.run_id)
        self._save()

    def _save(self) -> None:
        try:
            self._path.parent.mkdir(exist_ok=True)
            if self._path.is_symlink():  # in a run folder of another user it may lead anywhere
                self._path.unlink()
            write_json(self._path, asdict(self.position))
        except OSError as error:  # the steps would be sent twice after a restart: no reason to send none
            logger.warning("%s: %s", self._path, error.strerror)

    def _new(self) -> Iterator[tuple[int, float, dict[str, float], Position]]:
        """Step, time and numbers of each new line, and the position behind it: steps, validations, then events."""
        position = self.position
        for values in _steps_after(self._folder, position.step):
            if values["step"] > position.step:
                position = replace(position, step=values["step"])
                yield values["step"], _time_of(values), tagged(values), position
        if self._has_grown(VALIDATIONS):
            for line in read_validations(self._folder):
                if line["step"] > position.validation:
                    position = replace(position, validation=line["step"])
                    yield line["step"], _time_of(line), tagged(numbers_of(line["splits"])), position
        if not self._has_grown("events.jsonl"):
            return
        counts: Counter[str] = Counter()
        for number, event in enumerate(read_events(self._folder), 1):
            counts[event["event"]] += 1
            if number > position.events and is_event(event):
                position = replace(position, events=number)
                numbers = tagged({f"events/{event['event']}": float(counts[event["event"]])})
                yield event["step"], _time_of(event), numbers, position

    def _has_grown(self, name: str) -> bool:
        """Whether a file differs in size from when it was last read. What an error has kept from being sent is read
        again, since a new connection begins with no sizes."""
        before, self._sizes[name] = self._sizes.get(name, 0), _size_of(self._folder / name)
        return self._sizes[name] != before


def _retry_seconds(failures: int) -> float:
    """Time after so many failures in a row."""
    doublings = min(failures - 1, 10)  # a server may be away for weeks
    return min(RETRY_SECONDS * 2.0**doublings, MAX_RETRY_SECONDS)


def _steps_after(folder: Path, step: int) -> Iterator[dict[str, Any]]:
    """The lines of metrics.jsonl with later steps, in order. Only the file's end is read where that is enough.

    Lines of steps that a resume or a rollback takes again replace the former ones, which may have been sent.
    """
    newer: list[dict[str, Any]] = []
    for _, values in metrics_from_end(folder):
        if values["step"] <= step:
            yield from reversed(newer)
            return
        newer.append(values)
        if len(newer) > READ_AT_ONCE:
            break
    else:
        yield from reversed(newer)
        return
    newer.clear()
    yield from (values for _, values in read_metrics(folder) if values["step"] > step)


def _time_of(values: dict[str, Any]) -> float:
    time = values.get("time")
    return float(time) if isinstance(time, int | float) and 0 <= time < 1e11 else 0.0


def _size_of(path: Path) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


def _read_position(path: Path) -> Position:
    """The stored position; a new one where there is none. One that is damaged is reported, and the run sent anew."""
    try:
        values = read_json(path, max_bytes=MAX_STATE_BYTES)
        position = Position(values["run_id"], values["step"], values["events"], values["validation"])
    except FileNotFoundError:
        return Position()
    except (OSError, ValueError, KeyError, TypeError):
        position = Position(step=-1)
    counts = (position.step, position.events, position.validation)
    is_id = position.run_id is None or (isinstance(position.run_id, str) and _RUN_ID.fullmatch(position.run_id))
    if not is_id or any(
        type(count) is not int or count < lowest for count, lowest in zip(counts, (0, 0, -1), strict=True)
    ):
        logger.warning("%s is damaged: the run is sent anew, as another run of the tracker", path)
        return Position()
    return position


def reason_of(error: BaseException) -> str:
    """The message of another package's error in one line, without the values of secret environment variables."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    for name, value in os.environ.items():
        if len(value) >= 6 and names_a_secret(name):
            text = text.replace(value, "***")
    return printable_line(text, limit=400)


def require_run_folder(folder: Path) -> None:
    """
    Raises:
        UserError: the folder is no run's.
    """
    if not (folder / "recipe.json").is_file():
        raise UserError(f"{folder} is no run folder (it has no recipe.json): name the run.folder of a recipe")


def describe(follower: Follower, tracker: str) -> str:
    """A line: lines sent, and how far."""
    position = follower.position
    return f"{number_of(follower.sent, 'line')} sent to {tracker}, up to step {position.step}" + (
        f" (run {position.run_id})" if position.run_id else ""
    )
