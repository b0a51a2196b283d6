"""Seconds of a micro-step from FLOPs and bytes: what runs after each other, and which traffic is hidden.

Legend: G the student's ranks.
"""

from dataclasses import dataclass, replace

from megadistill.errors import UserError


@dataclass(frozen=True)
class MfuAssumption:
    """Shares of the GPU's peak that the models' matrix products reach, assumed until a run has measured them.

    They count the FLOPs that are computed, recomputation included, as a run's `student_mfu` and `teacher_mfu` do. The
    defaults are the best that is published for distillation at scale: 6.3B tokens of Nemotron Nano 9B into 7B in 600
    hours of H100s, 17.6 % by 6 N_student + 2 N_teacher FLOPs a token (NVIDIA Model-Optimizer's tutorials; its 30B-A3B
    into 22B-A3B is 7.9 %). Nobody publishes a share of each model, so both have the same.

    Raises:
        UserError: a share is not above 0, or is above 1.
    """

    student_mfu: float = 0.18
    """Share of the student's training and of the loss, with both heads."""
    teacher_mfu: float = 0.18
    """Share of the teacher's stages."""

    def __post_init__(self) -> None:
        for option, share in (("--student-mfu", self.student_mfu), ("--teacher-mfu", self.teacher_mfu)):
            if not 0 < share <= 1:
                raise UserError(f"{option} {share:g}: a share of the peak is above 0, and 1 at most")

    def optimistic(self, *, student_compiled: bool, teacher_compiled: bool) -> "MfuAssumption":
        """`OPTIMISTIC` by whether the models' layers are compiled, or these where they are higher."""
        return MfuAssumption(
            max(self.student_mfu, OPTIMISTIC[student_compiled]), max(self.teacher_mfu, OPTIMISTIC[teacher_compiled])
        )


OPTIMISTIC = {False: 0.33, True: 0.39}
"""Share of sharded training without a teacher, by whether its layers are compiled: torchtitan, Llama 3.1 8B on 8 H100s
(5,762 and 6,667 tokens/s a GPU). Tuned training with tensor parallelism reaches 41 to 48 % (Megatron-LM)."""

FLOAT8_SPEEDUP = 1.28
"""Throughput of compiled training with float8 products over that in bfloat16, at the same peak: torchtitan, the same
model and GPUs (8,532 of 6,667 tokens/s a GPU)."""


@dataclass(frozen=True)
class StepTimes:
    """Seconds of each part of a micro-step by itself; the properties put them together.

    A micro-step is one micro-batch's forward and backward pass on every rank of the student.
    """

    students: int
    """G: the student's ranks."""
    micro_steps: int
    """Micro-steps of an optimizer step."""
    student_forward: float
    """Seconds of the forward pass, with both models' head products, which the loss computes."""
    student_backward: float
    """Seconds of the backward pass, recomputation included."""
    gather: float
    """Seconds of ZeRO-3's gathering of the weights, for both passes."""
    reduce: float
    """Seconds of ZeRO-3's reduction of the gradients."""
    vocabulary: float
    """Seconds of the vocab group's exchange in the loss, which nothing hides."""
    sequences: float = 0.0
    """Seconds of the exchange of heads and tokens in attention by ranks that share sequences, which nothing hides."""
    across: float = 0.0
    """Seconds of the all-reduce of the gradients across replicas of the student, in the mean of a step's micro-steps.
    It is waited for: see `plan.shards`."""
    collective_latency: float = 0.0
    """Seconds of the latency of collectives that compute does not hide, in the mean of a step's micro-steps."""
    scores_forward: float = 0.0
    """Seconds of the memory traffic of the student's attention scores in the forward pass, where they are in memory."""
    scores_backward: float = 0.0
    """Likewise in the backward pass."""
    recompute: float = 0.0
    """Seconds of the memory traffic by which selective checkpointing recomputes elementwise work."""
    stages: tuple[float, ...] = ()
    """Seconds of each stage for *one* rank's micro-batch, its scores' traffic included; empty where no teacher is
    live."""
    teacher_scores: float = 0.0
    """Seconds of that traffic in the largest stage, for one rank's micro-batch."""
    packet: float = 0.0
    """Seconds of sending one micro-batch's hidden states from a stage to the next."""
    answer: float = 0.0
    """Seconds of sending one micro-batch's hidden states from the last stage to the student's rank."""
    replicas: int = 0
    """Pipelines of a teacher on ranks of its own; 0 where its stages are on the student's ranks."""
    queue: int = 1
    """Micro-batches that a rank requests ahead from a teacher on ranks of its own."""

    @property
    def forward(self) -> float:
        """The student's forward pass, with the memory traffic beside its products."""
        return self.student_forward + self.scores_forward

    @property
    def backward(self) -> float:
        """The student's backward pass, likewise."""
        return self.student_backward + self.scores_backward + self.recompute

    @property
    def compute(self) -> float:
        """The student's forward and backward pass."""
        return self.forward + self.backward

    @property
    def exposed(self) -> float:
        """ZeRO-3's traffic that the student's compute does not hide: it runs in parallel, weights a layer ahead."""
        return max(0.0, self.gather + self.reduce - self.compute)

    @property
    def student(self) -> float:
        """The student's own part of a micro-step."""
        waits = self.vocabulary + self.sequences + self.across + self.collective_latency
        return self.compute + self.exposed + waits

    @property
    def clients(self) -> int:
        """Ranks of the student that one pipeline serves."""
        return self.students // self.replicas if self.replicas else len(self.stages)

    @property
    def tick(self) -> float:
        """The slowest stage's time for a round, one micro-batch of each client. Packets are sent in parallel."""
        return self.clients * max(*self.stages, self.packet) if self.stages else 0.0

    @property
    def latency(self) -> float:
        """Seconds between the requests of all clients and the last answer of a teacher on ranks of its own."""
        hops = len(self.stages) - 1
        return sum(self.stages) + (self.clients - 1) * max(self.stages) + hops * self.packet + self.answer

    @property
    def micro_step(self) -> float:
        """Seconds between two micro-steps of a filled pipeline.

        A teacher on ranks of its own computes in parallel with the student, and answers are sent in parallel with both,
        if enough is requested ahead: a rank requests the last micro-batch of `queue` when it takes the first, and
        computes once more before it takes the next. A colocated teacher and the student take turns, and its answers are
        waited for.
        """
        if self.replicas:
            prefetch_limit = (self.latency + self.student) / self.queue
            return max(self.student, self.tick, self.clients * self.answer, prefetch_limit)
        return self.student + self.tick + (self.clients * self.answer)

    @property
    def without_latency(self) -> "StepTimes":
        """Arithmetic and bytes alone."""
        return replace(self, collective_latency=0.0)

    @property
    def step(self) -> float:
        """Seconds of an optimizer step."""
        return self.micro_steps * self.micro_step

    def seconds(self, steps: int) -> float:
        """Seconds of a whole run, whose pipeline is filled once."""
        return steps * self.step + max(0, len(self.stages) - 1) * self.tick
