"""From FLOPs and bytes to seconds: what a micro-step takes, and what of its traffic hides. It knows no recipe.

Legend: G student's ranks, P stages of a teacher's pipeline, m micro-batches.
"""

from dataclasses import dataclass

from megadistill.errors import UserError


@dataclass(frozen=True)
class Assumed:
    """Shares of the peak that the models' products reach: assumptions, until a run has measured them.

    Of the FLOPs that are done: recomputed activations count as work, unlike in a run's own `mfu`.

    Raises:
        UserError: it is no share.
    """

    student_mfu: float = 0.40
    teacher_mfu: float = 0.45
    """Forward passes alone, of large frozen matrices."""

    def __post_init__(self) -> None:
        for option, share in (("--student-mfu", self.student_mfu), ("--teacher-mfu", self.teacher_mfu)):
            if not 0 < share <= 1:
                raise UserError(f"{option} {share:g}: a share of the peak is above 0, and 1 at most")


@dataclass(frozen=True)
class StepTimes:
    """Seconds that each part of a micro-step takes by itself; the properties say what comes one after the other.

    A micro-step is one micro-batch's forward and backward pass, on every rank of the student at once.
    """

    students: int
    """G"""
    micro_steps: int
    """Of an optimizer step."""
    student_forward: float
    """With both models' head products, which are the loss's."""
    student_backward: float
    """With what is recomputed."""
    gather: float
    """ZeRO-3: the weights, for both passes."""
    reduce: float
    """ZeRO-3: the gradients."""
    vocabulary: float
    """What the vocab group exchanges in the loss: nothing hides it."""
    stages: tuple[float, ...] = ()
    """Each stage's time for *one* rank's micro-batch; empty where no teacher is live."""
    parcel: float = 0.0
    """One micro-batch's hidden states, from a stage to the next."""
    answer: float = 0.0
    """One micro-batch's hidden states, from the last stage to the rank that asked."""
    replicas: int = 0
    """Pipelines of a teacher on ranks of its own; 0 where its stages are on the student's ranks."""
    queue: int = 1
    """Of a teacher on ranks of its own: micro-batches that a rank asks for before the oldest is answered."""

    @property
    def compute(self) -> float:
        """Of the student."""
        return self.student_forward + self.student_backward

    @property
    def exposed(self) -> float:
        """ZeRO-3's traffic that the student's compute does not hide: it runs beside it, weights a layer ahead."""
        return max(0.0, self.gather + self.reduce - self.compute)

    @property
    def student(self) -> float:
        """The student's own part of a micro-step."""
        return self.compute + self.exposed + self.vocabulary

    @property
    def clients(self) -> int:
        """Ranks of the student that one pipeline answers."""
        return self.students // self.replicas if self.replicas else len(self.stages)

    @property
    def beat(self) -> float:
        """The slowest stage's work on a round: one micro-batch of each client. Parcels travel beside it."""
        return self.clients * max(*self.stages, self.parcel) if self.stages else 0.0

    @property
    def latency(self) -> float:
        """From asking a teacher on ranks of its own, all clients at once, to the last one's answer."""
        hops = len(self.stages) - 1
        return sum(self.stages) + (self.clients - 1) * max(self.stages) + hops * self.parcel + self.answer

    @property
    def micro_step(self) -> float:
        """Between two micro-steps of a filled pipeline. A teacher on ranks of its own works beside the student, and
        answers travel beside both, if enough is asked ahead: a rank asks for the last of `queue` when it comes for the
        first, and computes once more before it comes for the one behind it. A colocated teacher takes its turn, and its
        answers are waited for."""
        if self.replicas:
            asked = (self.latency + self.student) / self.queue
            return max(self.student, self.beat, self.clients * self.answer, asked)
        return self.student + self.beat + (self.clients * self.answer)

    @property
    def step(self) -> float:
        """An optimizer step."""
        return self.micro_steps * self.micro_step

    def seconds(self, steps: int) -> float:
        """A whole run: the pipeline is filled once."""
        return steps * self.step + max(0, len(self.stages) - 1) * self.beat


def drained_bubble(stages: int, micro_batches: int) -> float:
    """The idle share of a pipeline that drains at each optimizer step: (P - 1) / (m + P - 1).

    One that runs ahead has the same share with m the micro-batches of the whole run.
    """
    return (stages - 1) / (micro_batches + stages - 1)


def hiding_tokens(*, traffic: float, bandwidth: float, flops: float, mfu: float, peak: float) -> float:
    """The smallest micro-step, in tokens, whose compute takes as long as `traffic` bytes over the slowest link.

    `flops`: a token's. With 6 N bytes and 8 N FLOPs (full recomputation) it is 0.75 · mfu · peak / bandwidth.
    """
    return traffic / bandwidth * mfu * peak / flops
