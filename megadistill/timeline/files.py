"""The files in which ranks store their recordings, and the timeline that is read from them.

`RUN/timeline/rank-00000.json` is one rank's, by its own clock: `CLOCK_MONOTONIC` of its node, which all processes of
that node share. Clocks of nodes are compared where all their ranks left a barrier together; see `_offsets`.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megadistill.errors import UserError
from megadistill.io import read_file, reason_of, write_file
from megadistill.timeline.spans import Lane, MessageId, Name, Number, Seconds, Span, Step, Timeline, first_unnested
from megadistill.units import short

FOLDER = "timeline"
MAX_RANKS = 1 << 17
MAX_RANK_BYTES = 64 << 20


class RankFile(BaseModel):
    """The recording of a rank. Times are seconds of its node's monotonic clock."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    format: Literal[1] = 1
    rank: Number
    world: Annotated[int, Field(ge=1, le=MAX_RANKS)]
    """Ranks of the launch."""
    role: Literal["student", "teacher"]
    stage: Number | None = None
    """The teacher's stage on this rank."""
    replica: Number | None = None
    """Number of this rank's replica of the student; None where there is one."""
    node: Name
    clock: Literal["host", "device"]
    window: tuple[Number, Number]
    """First and last step of the recipe's `run.timeline`."""
    rendezvous: Seconds | None = None
    """When all ranks of the launch had joined the bridge; None without ranks of the teacher's own."""
    barriers: tuple[Seconds, Seconds] | None = None
    """When the student's ranks left the barriers before the first step and after the last one; None for a server."""
    steps: list[Step]
    spans: list[Span]


def rank_path(folder: Path, rank: int) -> Path:
    return folder / FOLDER / f"rank-{rank:05d}.json"


def write_rank(folder: Path, recording: RankFile) -> None:
    """Stores a recording in a run folder. Raises OSError: the disk refuses it."""
    path = rank_path(folder, recording.rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, recording.model_dump_json(exclude_none=True) + "\n")


def remove_recordings(folder: Path) -> None:
    """Deletes earlier recordings, of which a new one might not overwrite all."""
    for path in (folder / FOLDER).glob("rank-*.json"):
        path.unlink(missing_ok=True)


def read_timeline(folder: Path) -> Timeline:
    """The timeline of a run folder, all ranks on one clock, which is 0 at the begin of the first step.

    Raises:
        UserError: the run has no recording, some of its ranks have none, or a file is damaged.
    """
    first = rank_path(folder, 0)
    if not first.is_file():
        raise UserError(
            f"{folder} holds no timeline ({first} is missing): record one with --set 'run.timeline=[101,103]', "
            "the first and the last step"
        )
    files = [_read(first, 0)]
    for rank in range(1, files[0].world):
        files.append(_read(rank_path(folder, rank), rank))
        if (files[-1].world, files[-1].window) != (files[0].world, files[0].window):
            raise UserError(
                f"{rank_path(folder, rank)} is of another recording than rank 0's: its ranks and steps are "
                f"{files[-1].world} and {files[-1].window}, not {files[0].world} and {files[0].window}; record again"
            )
    if not files[0].steps:
        raise UserError(f"{first}: no step was recorded to its end; record again")
    offsets = _offsets(files)
    lanes = tuple(_lane(file, offsets[file.node], rank_path(folder, file.rank)) for file in files)
    numbers = [step.number for step in lanes[0].steps]
    steps = f"step {numbers[0]}" if len(numbers) == 1 else f"steps {numbers[0]} to {numbers[-1]}"
    return Timeline(f"{folder}: {steps}", lanes, _note(files, lanes))


def _read(path: Path, rank: int) -> RankFile:
    try:
        file = RankFile.model_validate_json(read_file(path, max_bytes=MAX_RANK_BYTES))
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing: rank {rank} has not recorded (yet); wait for the end of the recorded steps, or record "
            "again"
        ) from None
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(str(part) for part in problem["loc"])
        raise UserError(
            f"{path} is damaged ({place}: {problem['msg'].lower()}): remove the folder and record again"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({reason_of(error)}): remove the folder and record again") from None
    if file.rank != rank:
        raise UserError(f"{path} is the file of rank {file.rank}: remove the folder and record again")
    return file


def _lane(file: RankFile, offset: float, path: Path) -> Lane:
    spans = tuple(replace(span, begin=span.begin - offset, end=span.end - offset) for span in file.spans)
    steps = tuple(replace(step, begin=step.begin - offset, end=step.end - offset) for step in file.steps)
    wrong = first_unnested(spans)
    if wrong is not None:
        raise UserError(
            f"{path} is damaged: {wrong.name!r} at {wrong.begin:.6f} s overlaps the span around it; remove the folder "
            "and record again"
        )
    if any(not step.begin <= step.end for step in steps):
        raise UserError(f"{path} is damaged: a step ends before it begins; remove the folder and record again")
    return Lane(file.rank, _role(file), file.node, spans, steps)


def _role(file: RankFile) -> str:
    """`student`, with its replica and the teacher's stage where they have a number; `teacher stage 1`."""
    if file.role == "teacher":
        return "teacher" if file.stage is None else f"teacher stage {file.stage}"
    replica = "" if file.replica is None else f", replica {file.replica}"
    return f"student{replica}{'' if file.stage is None else f', stage {file.stage}'}"


def _offsets(files: Sequence[RankFile]) -> dict[str, float]:
    """Each node's clock at the begin of the first step on the first rank.

    Ranks leave a barrier together, up to the delay of its last message; of a node's, the earliest counts. Where a node
    holds ranks of the teacher alone, its clock was compared at the begin of the launch, and has run on since.
    """
    zero, home = files[0].steps[0].begin, files[0].node
    rendezvous = _earliest((file.node, file.rendezvous) for file in files if file.rendezvous is not None)
    barrier = _earliest((file.node, file.barriers[0]) for file in files if file.barriers is not None)
    offsets = {home: zero}
    for node in {file.node for file in files} - {home}:
        for times in (barrier, rendezvous):
            if node in times and home in times:
                offsets[node] = zero + times[node] - times[home]
                break
        else:
            raise UserError(f"the clock of {node!r} was never compared with that of {home!r}: record again")
    return offsets


def _earliest(times: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Node -> the first time at which one of its ranks left a barrier."""
    earliest: dict[str, float] = {}
    for node, time in times:
        earliest[node] = min(time, earliest.get(node, time))
    return earliest


def _note(files: Sequence[RankFile], lanes: Sequence[Lane]) -> str:
    clocks = "device time" if files[0].clock == "device" else "host time"
    nodes = {file.node for file in files}
    if len(nodes) == 1:
        return f"{clocks}; one node, one clock"
    return f"{clocks}; {len(nodes)} nodes, clocks apart by at least {short(1000 * _clock_error(files, lanes))} ms"


def _clock_error(files: Sequence[RankFile], lanes: Sequence[Lane]) -> float:
    """Lower bound (s) on how far the nodes' clocks differ: from the last barrier, and from messages that seem to arrive
    before they are sent."""
    barriers = [(file.node, file.barriers) for file in files if file.barriers is not None]
    first, last = (_earliest((node, times[end]) for node, times in barriers) for end in (0, 1))
    home = files[0].node
    drifts = [last[node] - first[node] - (last[home] - first[home]) for node in first if home in first]
    sent: dict[MessageId, float] = {}
    arrived: dict[MessageId, float] = defaultdict(lambda: float("inf"))
    for lane in lanes:
        for span in lane.spans:
            if span.message is not None and span.kind == "send":
                sent[span.message] = min(span.begin, sent.get(span.message, span.begin))
            elif span.message is not None and span.kind == "wait":
                arrived[span.message] = span.end
    early = [begin - arrived[message] for message, begin in sent.items() if message in arrived]
    return max(0.0, *(abs(drift) for drift in drifts), *early)
