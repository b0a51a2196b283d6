"""The checks, most valuable first: the question of each, its time limit, and the bars that its figures must meet."""

from dataclasses import dataclass
from fnmatch import fnmatchcase


@dataclass(frozen=True)
class Bar:
    """A limit of a figure. Figures without a bar are measurements alone."""

    figure: str
    """Name of the figure, or a pattern of names (`fnmatch`)."""
    unit: str = ""
    at_most: float | None = None
    at_least: float | None = None
    case: str = "*"
    """Cases that it is a bar of: a name, or a pattern."""
    of_a_gpu: bool = False
    """Of speed or memory: a stand-in does not have to meet it."""

    def covers(self, case: str, figure: str) -> bool:
        return fnmatchcase(case, self.case) and fnmatchcase(figure, self.figure)

    def is_met(self, value: float) -> bool:
        """Never by NaN."""
        above = self.at_least is None or value >= self.at_least
        below = self.at_most is None or value <= self.at_most
        return value == value and above and below

    def __str__(self) -> str:
        parts = [f"≥ {self.at_least:g}"] if self.at_least is not None else []
        parts += [f"≤ {self.at_most:g}"] if self.at_most is not None else []
        return " and ".join(parts) + (f" {self.unit}" if self.unit else "")


@dataclass(frozen=True)
class Check:
    """A module of this folder, started as a process of its own."""

    name: str
    question: str
    seconds: float
    """Time limit: at its end the process is killed, and what it had measured is kept."""
    bars: tuple[Bar, ...] = ()

    def bar(self, case: str, figure: str) -> Bar | None:
        """The first one that covers the figure."""
        return next((bar for bar in self.bars if bar.covers(case, figure)), None)


CHECKS = (
    Check(
        "ceilings",
        "What do the device's own matrix products and copies reach? Rates below are to be read beside these.",
        seconds=15,
    ),
    Check(
        "loss_numerics",
        "Is the loss in bf16 right, eager and compiled, against float64; does it keep to its memory; how many kernels "
        "does a chunk start?",
        seconds=75,
        bars=(
            Bar("error of the loss", at_most=1e-4),
            Bar("error of d?", at_most=4e-3),
            Bar("the same, to logit_memory", at_most=1.25, of_a_gpu=True),
            # At least one: a profiler that sees no kernels is no answer.
            Bar("kernels a chunk", at_least=1, at_most=300, case="eager, *", of_a_gpu=True),
            Bar("kernels a chunk", at_least=1, at_most=100, case="compiled, *", of_a_gpu=True),
        ),
    ),
    Check(
        "loss_speed",
        "How long does the loss take at 8,192 tokens x 128,256 ids x (4,096 | 8,192), beside its own products and "
        "beside other losses?",
        seconds=80,
        bars=(
            Bar("time", "ms", at_most=66, case="ours, compiled, *", of_a_gpu=True),
            Bar("rate", "TFLOP/s", at_least=650, case="ours, compiled, *", of_a_gpu=True),
            Bar("error of d?", at_most=4e-3, case="ours, *"),
            Bar("error of d?", at_most=4e-3, case="labels: ours, *"),
        ),
    ),
    Check(
        "nccl_pair",
        "Do a student and a teacher with a rank each end under NCCL, in the package's order of messages? In the former "
        "order, which hangs under NCCL's rules?",
        seconds=90,
        bars=(Bar("ends", at_least=1, case="*package order"),),
    ),
    Check(
        "attention",
        "What does Gemma 2's attention take at 8,192 tokens, by each implementation, in time and memory, and how exact "
        "is it?",
        seconds=75,
        bars=(
            Bar("error of *", at_most=2e-2, case="transformers' *flex*"),  # the first that fits: a whole model in bf16
            Bar("error of *", at_most=1e-2, case="*flex"),
        ),
    ),
    Check(
        "package_layers",
        "What do layers of Gemma 2 27B take as a run has them: the student's with each way of checkpointing, compiled, "
        "and the teacher's stage, compiled and in float8?",
        seconds=75,
        bars=(
            Bar("error of dW of q, to the first", at_most=2e-2),
            Bar("error of the output, to the first", at_most=2e-2, case="*, compiled"),
            Bar("error of the output, to the first", at_most=0.15, case="*, float8"),
            Bar(
                "peak memory, to the first", at_most=0.95, case="student, eager, checkpointing selective", of_a_gpu=True
            ),
            Bar("peak memory, to the first", at_most=0.8, case="student, eager, checkpointing full", of_a_gpu=True),
        ),
    ),
    Check(
        "zero",
        "Does ZeRO-3 in a world of one train in bf16, by `megadistill train`, and resume after SIGKILL to the bit; is "
        "its memory what `plan` says?",
        seconds=85,
        bars=(
            Bar("largest relative difference", at_most=0, case="undisturbed, again"),
            Bar("difference beyond twice that of the undisturbed runs", at_most=0),
            Bar("loss of the last step to that of the first", at_most=0.999),
            Bar("the plan, to the peak", at_least=0.9, at_most=1.3, of_a_gpu=True),
        ),
    ),
    Check(
        "syncs",
        "Does the host wait for the device in a call of the loss and in a tick of the teacher once each, and nowhere "
        "in a chunk or a stage's forward pass?",
        seconds=25,
        bars=(Bar("syncs", at_most=1),),
    ),
    Check(
        "layer",
        "What rate has one layer of Gemma 2 27B at 8,192 tokens: its products in bf16 and in float8, and the layer?",
        seconds=25,
        bars=(
            Bar("error of one of them", at_most=5e-2),
            Bar("rate", "TFLOP/s", at_least=600, case="products: forward, bf16", of_a_gpu=True),
        ),
    ),
    Check(
        "copies",
        "How fast does a checkpoint's share of 1.7 GB get to the host, by pageable and by pinned memory?",
        seconds=15,
        bars=(
            Bar("equal to the source", at_least=1),
            Bar("rate", "GB/s", at_least=20, case="*kept pinned memory", of_a_gpu=True),
        ),
    ),
)


def named(name: str) -> Check:
    """
    Raises:
        KeyError: there is no such check.
    """
    return {check.name: check for check in CHECKS}[name]
