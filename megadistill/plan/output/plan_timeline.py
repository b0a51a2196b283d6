"""A simulated timeline of the first steps of a plan, event by event, from the seconds of its parts.

It follows what `teacher.pipeline`, `teacher.disaggregated` and `train.step` do, on one pipeline and the ranks that it
serves. All ranks are equally fast, so it shows what the layout costs, not what an uneven machine does. The
optimizer's own step, logging and checkpoints take no time here.

Legend: P stages, g ranks that a pipeline serves, m micro-batches of a step; a *round* is one of each of the g ranks.
"""

from collections import Counter
from dataclasses import dataclass, field

from megadistill.errors import UserError
from megadistill.plan.throughput import StepTimes
from megadistill.timeline.spans import COMPUTE, SEND, WAIT, Kind, Lane, MessageId, Span, Step, Timeline

MAX_SPANS = 1_000_000


def simulate(times: StepTimes, *, steps: int, run_steps: int, ranks_per_node: int) -> Timeline:
    """The first `steps` of a run of `run_steps`.

    Raises:
        UserError: `steps` is not in the run, or gives more spans than a picture can show.
    """
    if not 1 <= steps <= run_steps:
        raise UserError(f"--steps {steps}: give 1 to {run_steps}, the steps of the run")
    spans = 8 * steps * times.micro_steps * max(1, times.clients)
    if spans > MAX_SPANS:
        raise UserError(
            f"--steps {steps}, of {times.micro_steps} micro-batches on {times.clients} ranks: some {spans:,} spans are "
            f"more than {MAX_SPANS:,}; give fewer steps"
        )
    simulation = _Simulation(times, steps, run_steps, ranks_per_node)
    simulation.run()
    ranks, all_ranks = simulation.students + simulation.servers, times.students + times.replicas * len(times.stages)
    others = f"; {len(ranks)} of {all_ranks} ranks, the others do the same" if all_ranks > len(ranks) else ""
    title = f"the first {steps} steps" if steps > 1 else "the first step"
    return Timeline(title, tuple(rank.lane() for rank in ranks), f"simulated{others}")


@dataclass
class _Rank:
    """A rank, which does one thing after the other."""

    rank: int
    role: str
    node: str
    now: float = 0.0
    spans: list[Span] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    link_free: float = 0.0
    """Time at which its last message has left: messages take turns on its link."""
    sent: Counter[int] = field(default_factory=Counter)

    def add(
        self, kind: Kind, name: str, seconds: float, *, number: int | None = None, message: MessageId | None = None
    ) -> None:
        if seconds > 0 or message is not None:
            self.spans.append(Span(kind, name, self.now, self.now + seconds, number=number, message=message))
            self.now += seconds

    def wait(self, name: str, until: float, *, message: MessageId | None = None) -> None:
        self.add(WAIT, name, max(0.0, until - self.now), message=message)

    def send(self, label: str, to: int, seconds: float) -> tuple[MessageId, float]:
        """A message, and its time of arrival. It travels while the rank goes on to its next work."""
        message = MessageId(self.rank, to, self.sent[to])
        self.sent[to] += 1
        self.link_free = max(self.link_free, self.now) + seconds
        self.add(SEND, f"send {label}", 0.0, message=message)
        return message, self.link_free

    def lane(self) -> Lane:
        return Lane(self.rank, self.role, self.node, tuple(self.spans), tuple(self.steps))


class _Simulation:
    """One pipeline of a plan, and the ranks that it serves."""

    def __init__(self, times: StepTimes, steps: int, run_steps: int, ranks_per_node: int) -> None:
        self._times, self._m = times, times.micro_steps
        self._rounds, self._run_rounds = steps * self._m, run_steps * self._m
        colocated = bool(times.stages) and not times.replicas
        self.students = [
            _Rank(rank, f"student, stage {rank}" if colocated else "student", f"node {rank // ranks_per_node}")
            for rank in range(times.clients or 1)
        ]
        first = times.students  # the teacher's own ranks are the last ones
        self.servers = [
            _Rank(first + stage, f"teacher stage {stage}", f"node {(first + stage) // ranks_per_node}")
            for stage in range(len(times.stages) if times.replicas else 0)
        ]
        self._packets: dict[tuple[int, int], tuple[MessageId, float]] = {}
        """(stage, number) -> the packet for that stage, and its time of arrival."""

    def run(self) -> None:
        if self.servers:
            self._run_disaggregated()
        elif self._times.stages:
            self._run_colocated()
        else:
            for round_ in range(self._rounds):
                self._micro_step(round_)

    def _run_colocated(self) -> None:
        """A tick is one round through every stage; then all ranks take a micro-step on the finished round."""
        P = len(self._times.stages)
        for tick in range(self._rounds + P - 1):
            for stage, rank in enumerate(self.students):
                if 0 <= tick - stage < self._run_rounds:
                    self._work(rank, stage, tick - stage)
            finished = tick - (P - 1)
            if finished >= 0:
                self._scatter_answers(finished)
                self._micro_step(finished)

    def _scatter_answers(self, round_: int) -> None:
        """The last stage sends each rank its own answer."""
        last, seconds = self.students[-1], self._times.clients * self._times.answer
        arrival = max(rank.now for rank in self.students) + seconds
        for rank in self.students[:-1]:
            rank.wait("wait for answer", arrival)
        last.wait("wait for the others", arrival - seconds)
        last.add(SEND, "send answers", seconds, number=round_)

    def _run_disaggregated(self) -> None:
        """Each rank requests `queue` rounds before the oldest is answered; the stages take requests as they come."""
        ends: list[float] = []  # of each round's micro-step
        g, queue = len(self.students), self._times.queue
        for round_ in range(min(self._rounds + queue, self._run_rounds)):
            requested = 0.0 if round_ < queue else ends[round_ - queue]
            answers = []
            for client, rank in enumerate(self.students):
                self.servers[0].wait("wait for request", requested)
                for stage, server in enumerate(self.servers):
                    self._work(server, stage, g * round_ + client)
                answers.append(self.servers[-1].send("answer", rank.rank, self._times.answer))
            if round_ < self._rounds:
                for rank, (message, arrival) in zip(self.students, answers, strict=True):
                    rank.wait("wait for answer", arrival, message=message)
                ends.append(self._micro_step(round_))
        for server in self.servers:
            server.wait("wait for request", ends[-1])

    def _work(self, rank: _Rank, stage: int, number: int) -> None:
        """A round through a colocated stage, or one client's part of it through a server's."""
        parts = 1 if self.servers else self._times.clients
        if stage > 0:
            message, arrival = self._packets.pop((stage, number))
            rank.wait("wait for packet", arrival, message=message)
        rank.add(COMPUTE, f"teacher stage {stage}", parts * self._times.stages[stage], number=number)
        if stage + 1 < len(self._times.stages):
            next_rank = (self.servers or self.students)[stage + 1].rank
            self._packets[stage + 1, number] = rank.send("packet", next_rank, parts * self._times.packet)

    def _micro_step(self, round_: int) -> float:
        """A micro-step of the student, in which ZeRO-3 keeps all ranks together; returns its end."""
        times, begin = self._times, max(rank.now for rank in self.students)
        for rank in self.students:
            rank.wait("wait for the others", begin)
            rank.add(COMPUTE, "student forward", times.forward)
            rank.add(WAIT, "vocabulary's exchange", times.vocabulary)
            rank.add(WAIT, "exchange of heads and tokens", times.sequences)
            rank.add(COMPUTE, "student backward", times.backward)
            rank.add(WAIT, "ZeRO-3's traffic, not hidden", times.exposed)
            rank.add(WAIT, "gradients across replicas", times.across)
            rank.add(WAIT, "latency of collectives", times.collective_latency)
            if (round_ + 1) % self._m == 0:
                rank.steps.append(Step((round_ + 1) // self._m, rank.steps[-1].end if rank.steps else 0.0, rank.now))
        return self.students[0].now
