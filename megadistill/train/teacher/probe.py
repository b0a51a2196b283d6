"""The teacher's consistency check: each start of a run compares the teacher with a recorded reference output.

One row of tokens goes through the teacher as a micro-batch does: through its stages, between ranks, and its hidden
states through the slices of its head. Wrong weights, a wrong stage, slice or map, and a device that computes wrongly
show at once.

Legend: B rows of a micro-batch, S tokens of a row, K of them in the probe, L of those with recorded hidden states, E
teacher width.
"""

import math
from collections.abc import Callable
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from megadistill.config.recipe import TeacherSection
from megadistill.distributed.collectives import broadcast_object
from megadistill.distributed.topology import Topology
from megadistill.io import read_file, write_file
from megadistill.train.resilience.sdc import raise_everywhere
from megadistill.train.setup.setup import Setup
from megadistill.train.teacher.float8_check import Float8Difference, require_close
from megadistill.types import IGNORED_LABEL, TokenBatch, token_digest

PROBE_FILE = "probe.safetensors"
PROBE_TOKENS, PROBE_STATES = 256, 64
MAX_PROBE_BYTES = 64 << 20

# What other kernels, another cut into stages or another shape may make of the same weights: float32 sums in another
# order err by 1e-7 an operation, bfloat16 by 2^-9, and a hundred layers wander apart by some ten times as much; a
# number in eight bits errs by 2^-4 at most. Other weights, another stage or other rows are off by the size of it all.
BOUNDS = {"float32": 1e-4, "bfloat16": 3e-2}
FLOAT8_BOUND = 1e-1
# Products of e4m3, whose steps are d = 2^-3.5, turn an error e of their operands into sqrt(d e), since a part e / d of
# the roundings goes the other way: 3e-4 for float32, 1e-2 for bfloat16, a product. Ten times that again.
FLOAT8_PRODUCT_BOUNDS = {"float32": 1e-2, "bfloat16": 1e-1}


@dataclass(frozen=True)
class ProbeInput:
    """The tokens of the check."""

    slot: int
    """The sample of the stream that begins with them."""
    tokens: Tensor
    """[K] int64, the student's ids, on the host."""

    @classmethod
    def of(cls, rows: TokenBatch, K: int) -> "ProbeInput":
        """The first row that is not masked, if there is one."""
        row = int((rows.labels != IGNORED_LABEL).any(dim=1).int().argmax())
        return cls(int(rows.slots[row]), rows.tokens[row, :K])

    @classmethod
    def shared(cls, topology: Topology, first: Callable[[], "ProbeInput"]) -> "ProbeInput":
        """The result of `first`, which is called on rank 0 alone, on all ranks. Collective."""
        probe = broadcast_object(first() if topology.is_first else None, topology.world_group)
        assert probe is not None, "the first rank has one"
        return probe

    def batch(self, *, rows: int, sequence: int, document_mask: bool) -> TokenBatch:
        """A micro-batch of the run's shape, since a teacher on ranks of its own reads no other: the tokens repeated.

        No token sees a later one, so the filling behind the K tokens changes nothing of theirs.
        """
        row_S = self.tokens.repeat(-(-sequence // len(self.tokens)))[:sequence]
        tokens_BS = row_S.expand(rows, sequence).contiguous()
        starts_BS = torch.zeros_like(tokens_BS, dtype=torch.bool)
        starts_BS[:, 0] = True
        slots_B = torch.full((rows,), self.slot)
        return TokenBatch(tokens_BS, tokens_BS, slots_B, token_digest(tokens_BS), starts_BS, document_mask)


@dataclass(frozen=True)
class ProbeOutput:
    """The teacher's output for a probe, on the host."""

    hidden: Tensor
    """[L, E] float32: final hidden states of the first L tokens."""
    cross_entropy: Tensor
    """[] float64, nats: the mean over tokens 1 to K - 1."""

    def error_to(self, expected: "ProbeOutput") -> tuple[float, float]:
        """Errors of the hidden states, relative to their norm, and of the cross-entropy, relative to max(1 nat, it)."""
        hidden = torch.linalg.vector_norm(self.hidden - expected.hidden) / torch.linalg.vector_norm(expected.hidden)
        entropy = (self.cross_entropy - expected.cross_entropy).abs() / expected.cross_entropy.clamp(min=1.0)
        return float(hidden), float(entropy)


@dataclass(frozen=True)
class TeacherCheck:
    """The result of the check at a start."""

    is_new: bool
    """Whether this start recorded the reference output."""

    line: str
    """A log line."""
    cross_entropy: float
    """Cross-entropy of the teacher on the probe's tokens, in nats a token."""
    float8: Float8Difference | None = None
    """Difference of a float8 teacher from the native one; None for a native teacher."""
    name: str | None = None
    """Name of the teacher, where there are several."""


class RecordedProbe(NamedTuple):
    """Content of a run folder's probe file."""

    input: ProbeInput
    output: ProbeOutput
    float8: Float8Difference | None


def worse_than_uniform(cross_entropy: float, vocab_size: int) -> str | None:
    """A line for a teacher whose cross-entropy (nats a token) on real text is above ln(`vocab_size`); None otherwise.

    No teacher of the text's own tokenizer is that bad, so every such teacher is worth a loud line.
    """
    uniform = math.log(vocab_size)
    if cross_entropy <= uniform:
        return None
    return (
        f"the teacher's cross-entropy on the first tokens of the data is {cross_entropy:.2f} nats, worse than the "
        f"{uniform:.2f} of a uniform guess over {vocab_size:,} ids: most likely its ids are not those of the shards (a "
        "tokenizer was copied into its folder, or teacher.vocab_map is wrong), or its weights are random. Tokenize the "
        "text with the tokenizer that the teacher was trained with: megadistill tokenize ... --tokenizer TEACHER"
    )


def check_probe(
    setup: Setup,
    topology: Topology,
    *,
    width: int,
    rows: Callable[[], TokenBatch],
    forward: Callable[[ProbeInput], ProbeOutput],
    compare: Callable[[ProbeInput], Float8Difference] | None = None,
) -> TeacherCheck:
    """Compares the teacher with the probe of the run folder; the first start records it. Collective over the world.

    Args:
        width: E.
        rows: reads the beginning of the run's stream; called on rank 0 alone, where there is no probe.
        forward: runs the teacher; on all ranks with the same probe, so that every stage, slice and replica takes part.
        compare: compares a teacher in float8 with the native one, where nothing is recorded; None for other teachers.

    Raises:
        UserError: on every rank, where the float8 teacher is too far from the native one; nothing is recorded then.
        OperatorFault: on every rank, where the output differs on one, or the probe cannot be read.
    """
    path, K = setup.folder / probe_file(setup), min(PROBE_TOKENS, setup.shapes[0].sequence_length)
    recorded = _read_on_first(path, K, width, topology)
    is_new = broadcast_object(recorded is None, topology.world_group)
    probe = ProbeInput.shared(topology, lambda: ProbeInput.of(rows(), K) if recorded is None else recorded.input)
    output = forward(probe)
    expected = broadcast_object(output if recorded is None else recorded.output, topology.world_group)
    errors, bound = output.error_to(expected), _bound(setup)
    problem = None
    if not all(error <= bound for error in errors):  # so for a NaN
        problem = f"rank {topology.rank}: {_mismatch(path, output, expected, errors, bound, is_new=is_new)}"
    raise_everywhere(problem, "teacher check failed on another rank", topology)
    float8 = None
    if compare is not None:
        float8 = broadcast_object(None if recorded is None else recorded.float8, topology.world_group)
        float8 = compare(probe) if float8 is None else float8
        require_close(float8, _section(setup).float8_max_kl, topology)
    cross_entropy = float(output.cross_entropy)
    if is_new:
        if topology.is_first:
            _write(path, probe, output, float8)
        line = f"teacher check: recorded reference output (sample {probe.slot}, CE {cross_entropy:.4f})"
    elif max(errors) == 0:
        line = f"teacher check passed: bitwise identical to the first start (CE {cross_entropy:.4f})"
    else:
        line = f"teacher check passed: relative error {max(errors):.1e}, at most {bound:g} allowed"
        line = f"{line} (CE {cross_entropy:.4f})"
    return TeacherCheck(is_new, line, cross_entropy, float8)


def probe_file(setup: Setup) -> str:
    """Name of the file in the run folder: of one of several teachers, `probe-NAME.safetensors`."""
    return PROBE_FILE if setup.teacher_name is None else f"probe-{setup.teacher_name}.safetensors"


def _section(setup: Setup) -> TeacherSection:
    assert setup.recipe.teacher is not None, "a run from labels has no teacher to check"
    return setup.recipe.teacher


def _bound(setup: Setup) -> float:
    """The error up to which two outputs are those of one teacher."""
    section, precision = _section(setup), setup.recipe.train.precision
    if section.transfer_dtype == "float8":
        return FLOAT8_BOUND
    return FLOAT8_PRODUCT_BOUNDS[precision] if section.precision == "float8" else BOUNDS[precision]


def _read(path: Path, *, K: int, E: int) -> RecordedProbe | None:
    try:
        tensors = load(read_file(path, max_bytes=MAX_PROBE_BYTES))
    except FileNotFoundError:
        return None
    slot, tokens, hidden, entropy = (tensors[name] for name in ("slot", "tokens", "hidden", "cross_entropy"))
    shapes = [tuple(tensor.shape) for tensor in (slot, tokens, hidden, entropy)]
    if shapes != [(), (K,), (min(K, PROBE_STATES), E), ()]:
        raise ValueError(f"its shapes are {shapes}: another teacher's, or another data set's")
    float8 = tensors.get("float8")
    if float8 is not None and float8.shape != (3,):
        raise ValueError(f"its float8 values have the shape {tuple(float8.shape)} instead of (3,)")
    difference = None if float8 is None else Float8Difference(*float8.tolist())
    return RecordedProbe(ProbeInput(int(slot), tokens), ProbeOutput(hidden, entropy), difference)


def _write(path: Path, probe: ProbeInput, output: ProbeOutput, float8: Float8Difference | None) -> None:
    tensors = {
        "slot": torch.tensor(probe.slot),
        "tokens": probe.tokens.contiguous(),
        "hidden": output.hidden.contiguous(),
        "cross_entropy": output.cross_entropy,
        **({} if float8 is None else {"float8": torch.tensor(astuple(float8), dtype=torch.float64)}),
    }
    write_file(path, save(tensors))


def _read_on_first(path: Path, K: int, E: int, topology: Topology) -> RecordedProbe | None:
    """The probe of a run folder on rank 0, where there is one; None elsewhere. Collective.

    Raises:
        OperatorFault: on every rank, where it cannot be read, or is no probe of such a run.
    """
    recorded, problem = None, None
    if topology.is_first:
        try:
            recorded = _read(path, K=K, E=E)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            problem = (
                f"{path} cannot be read ({error}): if the teacher is surely the one that the run was started with, "
                "remove the file, and the next start records another one"
            )
    raise_everywhere(problem, f"{path} cannot be read", topology)
    return recorded


def _mismatch(
    path: Path, output: ProbeOutput, expected: ProbeOutput, errors: tuple[float, float], bound: float, *, is_new: bool
) -> str:
    numbers = (
        f"hidden states differ by {errors[0]:.1e} (at most {bound:g} is rounding), cross-entropy is "
        f"{float(output.cross_entropy):.4f} instead of {float(expected.cross_entropy):.4f}"
    )
    if is_new:
        return (
            f"the teacher's output for one row differs from rank 0's: {numbers}. A stage or a slice of its head is "
            "wrong here: see that its files are the same on every node, or leave the node out"
        )
    return (
        f"this is not the teacher that the run was started with, or a stage or a slice of its head is wrong: on the "
        f"row of {path}, {numbers}. Give teacher.path the value it had, and see that its files are the same on every "
        "node"
    )
