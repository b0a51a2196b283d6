"""Room `plan`: the first steps of a plan as a timeline, event by event, from the seconds that its parts take.

It plays what `teacher.pipeline`, `teacher.remote` and `train.step` do, on one pipeline and the ranks that it answers:
the others do the same. All ranks are as fast, so it shows what the layout costs, not what an uneven machine does. The
optimizer's own step, reports and checkpoints take no time here.

Legend: P stages, g ranks that a pipeline answers, m micro-batches of a step; a *round* is one of each of the g ranks.
"""

from collections import Counter
from dataclasses import dataclass, field
from enum import Enum

from megadistill.errors import UserError
from megadistill.plan.throughput import StepTimes
from megadistill.timeline.spans import COMPUTE, SEND, WAIT, Kind, Lane, MessageId, Span, Step, Timeline

MOST_SPANS = 1_000_000


class Pipeline(Enum):
    """What becomes of the teacher's pipeline between two steps."""

    RUNS_AHEAD = "the teacher runs ahead"
    DRAINS = "the teacher drains at every step"
    """As where it waits for the optimizer. For comparison: no recipe asks for it."""


def simulate(times: StepTimes, *, steps: int, run_steps: int, pipeline: Pipeline, ranks_per_node: int) -> Timeline:
    """The first `steps` of a run of `run_steps`.

    Raises:
        UserError: they are no steps of the run, or more than a picture can show.
    """
    if not 1 <= steps <= run_steps:
        raise UserError(f"--steps {steps}: give 1 to {run_steps}, the steps of the run")
    spans = 8 * steps * times.micro_steps * max(1, times.clients)
    if spans > MOST_SPANS:
        raise UserError(
            f"--steps {steps}, of {times.micro_steps} micro-batches on {times.clients} ranks: some {spans:,} spans are "
            f"more than {MOST_SPANS:,}; give fewer steps"
        )
    play = _Play(times, steps, run_steps, pipeline, ranks_per_node)
    play.play()
    ranks, everybody = play.students + play.apart, times.students + times.replicas * len(times.stages)
    note = "simulated" + (
        f"; {len(ranks)} of {everybody} ranks, the others do the same" if everybody > len(ranks) else ""
    )
    return Timeline(pipeline.value if times.stages else "no teacher", tuple(rank.lane() for rank in ranks), note)


@dataclass
class _Rank:
    """What a rank does, one thing after the other."""

    rank: int
    role: str
    node: str
    now: float = 0.0
    spans: list[Span] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    way_out: float = 0.0
    """When its last message has left: they take turns on its link."""
    sent: Counter[int] = field(default_factory=Counter)

    def does(
        self, kind: Kind, name: str, seconds: float, *, number: int | None = None, message: MessageId | None = None
    ) -> None:
        if seconds > 0 or message is not None:
            self.spans.append(Span(kind, name, self.now, self.now + seconds, number=number, message=message))
            self.now += seconds

    def waits(self, name: str, until: float, *, message: MessageId | None = None) -> None:
        self.does(WAIT, name, max(0.0, until - self.now), message=message)

    def sends(self, what: str, to: int, seconds: float) -> tuple[MessageId, float]:
        """A message, and when it is there. It travels beside what the rank does next."""
        message = MessageId(self.rank, to, self.sent[to])
        self.sent[to] += 1
        self.way_out = max(self.way_out, self.now) + seconds
        self.does(SEND, f"send {what}", 0.0, message=message)
        return message, self.way_out

    def lane(self) -> Lane:
        return Lane(self.rank, self.role, self.node, tuple(self.spans), tuple(self.steps))


class _Play:
    """One pipeline of a plan, and the ranks that it answers."""

    def __init__(self, times: StepTimes, steps: int, run_steps: int, pipeline: Pipeline, ranks_per_node: int) -> None:
        self._times, self._steps, self._queue = times, steps, times.queue
        self._m, self._drains = times.micro_steps, pipeline is Pipeline.DRAINS
        self._shown, self._rounds = steps * self._m, run_steps * self._m
        staged = bool(times.stages) and not times.replicas
        self.students = [
            _Rank(rank, f"student, stage {rank}" if staged else "student", f"node {rank // ranks_per_node}")
            for rank in range(times.clients or 1)
        ]
        first = times.students  # the teacher's own ranks are the last ones
        self.apart = [
            _Rank(first + stage, f"teacher stage {stage}", f"node {(first + stage) // ranks_per_node}")
            for stage in range(len(times.stages) if times.replicas else 0)
        ]
        self._packets: dict[tuple[int, int], tuple[MessageId, float]] = {}
        """(stage, number) -> what comes to that stage."""

    def play(self) -> None:
        if self.apart:
            self._play_apart()
        elif self._times.stages:
            self._play_colocated()
        else:
            for round_ in range(self._shown):
                self._learn(round_)

    def _play_colocated(self) -> None:
        """In a tick every stage works on one round; then all learn from the one that is answered."""
        P, m = len(self._times.stages), self._m
        entering = [(step * m, (step + 1) * m) for step in range(self._steps)] if self._drains else [(0, self._rounds)]
        for first, stop in entering:
            for tick in range(first, min(stop, self._shown) + P - 1):
                for stage, rank in enumerate(self.students):
                    if first <= tick - stage < stop:
                        self._work(rank, stage, tick - stage)
                if tick - (P - 1) >= first:
                    self._answer_all(tick - (P - 1))
                    self._learn(tick - (P - 1))

    def _answer_all(self, round_: int) -> None:
        """The last stage hands each rank its own."""
        last, seconds = self.students[-1], self._times.clients * self._times.answer
        there = max(rank.now for rank in self.students) + seconds
        for rank in self.students[:-1]:
            rank.waits("wait for answer", there)
        last.waits("wait for the others", there - seconds)
        last.does(SEND, "send answers", seconds, number=round_)

    def _play_apart(self) -> None:
        """Each rank asks for `queue` rounds before the oldest is answered; the stages take requests as they come."""
        learnt: list[float] = []  # when a round was
        g = len(self.students)
        for round_ in range(min(self._shown + self._queue, self._rounds)):
            asked = [0.0] if round_ < self._queue else [learnt[round_ - self._queue]]
            if self._drains and round_ >= self._m:
                before = round_ // self._m * self._m - 1
                if before >= len(learnt):
                    break
                asked.append(learnt[before])
            coming = []
            for client, rank in enumerate(self.students):
                self.apart[0].waits("wait for request", max(asked))
                for stage, server in enumerate(self.apart):
                    self._work(server, stage, g * round_ + client)
                coming.append(self.apart[-1].sends("answer", rank.rank, self._times.answer))
            if round_ < self._shown:
                for rank, (message, there) in zip(self.students, coming, strict=True):
                    rank.waits("wait for answer", there, message=message)
                learnt.append(self._learn(round_))
        for server in self.apart:
            server.waits("wait for request", learnt[-1])

    def _work(self, rank: _Rank, stage: int, number: int) -> None:
        """A round through a colocated stage, or one rank's part of it through one that is apart."""
        parts = 1 if self.apart else self._times.clients
        if stage > 0:
            message, there = self._packets.pop((stage, number))
            rank.waits("wait for packet", there, message=message)
        rank.does(COMPUTE, f"teacher stage {stage}", parts * self._times.stages[stage], number=number)
        if stage + 1 < len(self._times.stages):
            after = (self.apart or self.students)[stage + 1].rank
            self._packets[stage + 1, number] = rank.sends("packet", after, parts * self._times.packet)

    def _learn(self, round_: int) -> float:
        """A micro-step of the student, together: ZeRO-3 lets no rank go ahead. When it is done."""
        times, together = self._times, max(rank.now for rank in self.students)
        for rank in self.students:
            rank.waits("wait for the others", together)
            rank.does(COMPUTE, "student forward", times.student_forward)
            rank.does(WAIT, "vocabulary's exchange", times.vocabulary)
            rank.does(COMPUTE, "student backward", times.student_backward)
            rank.does(WAIT, "ZeRO-3's traffic, not hidden", times.exposed)
            if (round_ + 1) % self._m == 0:
                begin = rank.steps[-1].end if rank.steps else 0.0
                rank.steps.append(Step((round_ + 1) // self._m, begin, rank.now))
        return self.students[0].now
