"""Room `timeline`: the files in which ranks keep what they recorded, and one timeline from them. It starts no ranks.

`RUN/timeline/rank-00000.json` is one rank's, by its own clock: `CLOCK_MONOTONIC` of its node, which all processes of
that node share. Nodes are compared where all their ranks left a barrier together; see `_offsets`.
"""

import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megadistill.errors import UserError
from megadistill.timeline.spans import Kind, Lane, MessageId, Span, Step, Timeline, first_unnested

FOLDER = "timeline"
MAX_RANKS = 1 << 17
MAX_RANK_BYTES = 64 << 20

Seconds = Annotated[float, Field(ge=0, lt=1e10)]
Name = Annotated[str, Field(min_length=1, max_length=80)]
Number = Annotated[int, Field(ge=0, lt=1 << 53)]


class _Stored(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class StoredSpan(_Stored):
    kind: Kind
    name: Name
    begin: Seconds
    end: Seconds
    depth: Annotated[int, Field(ge=0, le=32)] = 0
    number: Number | None = None
    message: Annotated[list[Number], Field(min_length=3, max_length=3)] | None = None
    """From rank, to rank, which of those."""

    def span(self, offset: float) -> Span:
        message = None if self.message is None else MessageId(*self.message)
        return Span(self.kind, self.name, self.begin - offset, self.end - offset, self.depth, self.number, message)


class StoredStep(_Stored):
    number: Number
    begin: Seconds
    end: Seconds


class RankFile(_Stored):
    """What a rank keeps. Times are seconds of its node's monotonic clock."""

    format: Literal[1] = 1
    rank: Number
    world: Annotated[int, Field(ge=1, le=MAX_RANKS)]
    """Ranks of the launch."""
    role: Literal["student", "teacher"]
    stage: Number | None = None
    """Of the teacher, which it holds."""
    node: Name
    clock: Literal["host", "device"]
    window: Annotated[list[Number], Field(min_length=2, max_length=2)]
    """The first and the last step that the recipe asks for."""
    met: Seconds | None = None
    """When student and teacher, of ranks of their own, met at the begin of the launch."""
    began: Seconds | None = None
    """When the student's ranks left the barrier before the first step."""
    ended: Seconds | None = None
    """When they left one behind the last step."""
    steps: list[StoredStep]
    spans: list[StoredSpan]


def rank_path(folder: Path, rank: int) -> Path:
    return folder / FOLDER / f"rank-{rank:05d}.json"


def stored_spans(spans: Iterable[Span]) -> list[StoredSpan]:
    return [
        StoredSpan(
            kind=span.kind,
            name=span.name,
            begin=span.begin,
            end=span.end,
            depth=span.depth,
            number=span.number,
            message=None if span.message is None else list(span.message),
        )
        for span in spans
    ]


def write_rank(folder: Path, kept: RankFile) -> None:
    """Whole or not at all. Raises OSError: the disk refuses it."""
    path = rank_path(folder, kept.rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(kept.model_dump_json(exclude_none=True) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def forget_ranks(folder: Path) -> None:
    """Deletes what an earlier recording left, of which this one might not overwrite all."""
    for path in (folder / FOLDER).glob("rank-*.json"):
        path.unlink(missing_ok=True)


def read_timeline(folder: Path) -> Timeline:
    """The timeline of a run folder, all ranks on one clock, which is 0 at the begin of the first step.

    Raises:
        UserError: the run has recorded none, not all of its ranks have, or a file is damaged.
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
        raise UserError(f"{first}: no step has been recorded to its end; record again")
    offsets = _offsets(files)
    lanes = tuple(_lane(kept, offsets[kept.node], rank_path(folder, kept.rank)) for kept in files)
    numbers = [step.number for step in lanes[0].steps]
    what = f"step {numbers[0]}" if len(numbers) == 1 else f"steps {numbers[0]} to {numbers[-1]}"
    return Timeline(f"{folder}: {what}", lanes, _note(files, lanes))


def _read(path: Path, rank: int) -> RankFile:
    try:
        size = path.stat().st_size
        if size > MAX_RANK_BYTES:
            raise ValueError(f"{size:,} bytes are more than {MAX_RANK_BYTES:,}")
        kept = RankFile.model_validate_json(path.read_bytes())
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
        raise UserError(f"{path} cannot be read ({error}): remove the folder and record again") from None
    if kept.rank != rank:
        raise UserError(f"{path} says that it is rank {kept.rank}'s: remove the folder and record again")
    return kept


def _lane(kept: RankFile, offset: float, path: Path) -> Lane:
    spans = tuple(stored.span(offset) for stored in kept.spans)
    wrong = first_unnested(spans)
    if wrong is not None:
        raise UserError(
            f"{path} is damaged: {wrong.name!r} at {wrong.begin:.6f} s overlaps what is around it; remove the folder "
            "and record again"
        )
    steps = tuple(Step(step.number, step.begin - offset, step.end - offset) for step in kept.steps)
    if any(not step.begin <= step.end for step in steps):
        raise UserError(f"{path} is damaged: a step ends before it begins; remove the folder and record again")
    stage = "" if kept.stage is None else f" stage {kept.stage}" if kept.role == "teacher" else f", stage {kept.stage}"
    return Lane(kept.rank, f"{kept.role}{stage}", kept.node, spans, steps)


def _offsets(files: Sequence[RankFile]) -> dict[str, float]:
    """What each node's clock shows at the begin of the first step on the first rank.

    Ranks leave a barrier together, but for the way of its last message; of a node's, the earliest counts. Where a node
    holds ranks of the teacher alone, its clock was compared at the begin of the launch, and has run on since.
    """
    zero = files[0].steps[0].begin
    home = files[0].node
    began, met = _earliest(files, "began"), _earliest(files, "met")
    offsets = {home: zero}
    for node in {kept.node for kept in files} - {home}:
        if node in began and home in began:
            offsets[node] = zero + began[node] - began[home]
        elif node in met and home in met:
            offsets[node] = zero + met[node] - met[home]
        else:
            raise UserError(f"the clock of {node!r} was never compared with that of {home!r}: record again")
    return offsets


def _earliest(files: Sequence[RankFile], mark: Literal["met", "began", "ended"]) -> dict[str, float]:
    """Node -> the first moment at which one of its ranks left a barrier."""
    found: dict[str, float] = {}
    for kept in files:
        moment: float | None = getattr(kept, mark)
        if moment is not None:
            found[kept.node] = min(moment, found.get(kept.node, moment))
    return found


def _note(files: Sequence[RankFile], lanes: Sequence[Lane]) -> str:
    clocks = "device time" if files[0].clock == "device" else "host time"
    nodes = {kept.node for kept in files}
    if len(nodes) == 1:
        return f"{clocks}; one node, one clock"
    return f"{clocks}; {len(nodes)} nodes, clocks apart by at least {1000 * _error(files, lanes):.3g} ms"


def _error(files: Sequence[RankFile], lanes: Sequence[Lane]) -> float:
    """Seconds by which the nodes' clocks are known to differ: at the second barrier, and where messages arrive before
    they are sent."""
    began, ended, home = _earliest(files, "began"), _earliest(files, "ended"), files[0].node
    drifts = [ended[node] - began[node] - (ended[home] - began[home]) for node in began if node in ended]
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
