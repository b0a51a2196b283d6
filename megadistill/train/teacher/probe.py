"""Room `train`: a probe that a run keeps, so that every start has the teacher that the first one had. No student.

One row of tokens goes through the teacher as a micro-batch does: through its stages, over the wire, and its hidden
states through the slices of its head. Wrong weights, a wrong stage, slice or map, and a device that computes wrongly
show at once.

Legend: B rows of a micro-batch, S tokens of a row, K of them kept, L whose hidden states are kept, E teacher width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from megadistill.config import Recipe
from megadistill.distributed.collectives import all_reduce_sum, everywhere
from megadistill.distributed.topology import Topology
from megadistill.distributed.vocab import VocabSlice
from megadistill.errors import OperatorFault
from megadistill.io import written_whole
from megadistill.loss import label_loss
from megadistill.train.setup.setup import Setup
from megadistill.train.teacher.targets import Teacher
from megadistill.types import IGNORED_LABEL, TokenBatch, token_digest

PROBE_FILE = "probe.safetensors"
KEPT_TOKENS, KEPT_STATES = 256, 64
MAX_PROBE_BYTES = 64 << 20

# What other kernels, another cut into stages or another shape may make of the same weights: float32 sums in another
# order err by 1e-7 an operation, bfloat16 by 2^-9, and a hundred layers wander apart by some ten times as much; a
# number in eight bits errs by 2^-4 at most. Other weights, another stage or other rows are off by the size of it all.
BOUNDS = {"float32": 1e-4, "bfloat16": 3e-2}
FLOAT8_BOUND = 1e-1


@dataclass(frozen=True)
class Question:
    """The tokens that are asked: [K] int64, the student's ids, on the host; `slot` of the stream begins with them."""

    slot: int
    tokens: Tensor

    @classmethod
    def of(cls, rows: TokenBatch, K: int) -> "Question":
        """The first row that is not masked, if there is one."""
        row = int((rows.labels != IGNORED_LABEL).any(dim=1).int().argmax())
        return cls(int(rows.slots[row]), rows.tokens[row, :K])

    def batch(self, *, rows: int, sequence: int, document_mask: bool) -> TokenBatch:
        """A micro-batch as the run has them, since a teacher on ranks of its own reads no other: the tokens repeated.

        No token sees a later one, so what stands behind the K tokens changes nothing of theirs.
        """
        row_S = self.tokens.repeat(-(-sequence // len(self.tokens)))[:sequence]
        tokens_BS = row_S.expand(rows, sequence).contiguous()
        starts_BS = torch.zeros_like(tokens_BS, dtype=torch.bool)
        starts_BS[:, 0] = True
        slots_B = torch.full((rows,), self.slot)
        return TokenBatch(tokens_BS, tokens_BS, slots_B, token_digest(tokens_BS), starts_BS, document_mask)


@dataclass(frozen=True)
class Answer:
    """What the teacher says of a question."""

    hidden: Tensor
    """[L, E] float32, of the first L tokens."""
    cross_entropy: Tensor
    """[] float64, nats: the mean of tokens 1 to K - 1."""

    def off(self, truth: "Answer") -> tuple[float, float]:
        """Errors of the hidden states, as a share of their norm, and of the cross-entropy, of itself or of one nat."""
        hidden = torch.linalg.vector_norm(self.hidden - truth.hidden) / torch.linalg.vector_norm(truth.hidden)
        entropy = (self.cross_entropy - truth.cross_entropy).abs() / truth.cross_entropy.clamp(min=1.0)
        return float(hidden), float(entropy)


def check_probe(
    setup: Setup, teacher: Teacher, vocab: VocabSlice, topology: Topology, *, rows: Callable[[], TokenBatch]
) -> str:
    """Compares the teacher with the probe of the run folder, or keeps one, at the first start; a line to log.

    `rows` gives the beginning of the run's stream; the first rank alone asks for it, where there is no probe. All ranks
    ask the teacher the same, so that every stage and every slice of each replica answers. Collective over the world,
    while no `lessons` are open.

    Raises:
        OperatorFault: on every rank, where one is answered something else, or the probe cannot be read.
    """
    path, K = setup.folder / PROBE_FILE, min(KEPT_TOKENS, setup.data.sequence_length)
    kept = _kept(path, K, teacher.head.shape[1], topology)
    question = Question(0, torch.zeros(K, dtype=torch.int64))
    if topology.is_first:
        question = kept[0] if kept is not None else Question.of(rows(), K)
    question, is_new = _told(question, kept is None, topology)
    found = _answer(question, setup, teacher, vocab)
    truth = _of_first(found if kept is None else kept[1], found, topology)
    off, bound = found.off(truth), _bound(setup.recipe)
    same = all(each <= bound for each in off)  # false for a NaN
    if not everywhere(same, topology.device, topology.world_group):
        problem = f"rank {topology.rank}: {_unlike(path, found, truth, off, bound, is_new=is_new)}"
        raise OperatorFault(problem if not same else "the teacher answers the probe otherwise on another rank")
    entropy = f"cross-entropy {float(found.cross_entropy):.4f}"
    if not is_new:
        exact = "to the last bit" if max(off) == 0 else f"off by {max(off):.1e}, at most {bound:g} is rounding"
        return f"the teacher answers the probe as when the run was started, {entropy}, {exact}"
    if topology.is_first:
        _write(path, question, found)
    return f"kept what the teacher answers to slot {question.slot} as a probe, {entropy}"


def _bound(recipe: Recipe) -> float:
    """The error up to which two answers are those of one teacher."""
    assert recipe.teacher is not None
    return FLOAT8_BOUND if recipe.teacher.wire == "float8" else BOUNDS[recipe.train.precision]


def read_probe(path: Path, *, K: int, E: int) -> tuple[Question, Answer] | None:
    """What a run folder keeps, on the host; None where it keeps nothing.

    Raises:
        OperatorFault: it cannot be read, or is no probe of such a run.
    """
    try:
        if path.stat().st_size > MAX_PROBE_BYTES:
            raise ValueError(f"{path.stat().st_size} bytes is no probe")
        tensors = load(path.read_bytes())
        slot, tokens, hidden, entropy = (tensors[name] for name in ("slot", "tokens", "hidden", "cross_entropy"))
        shapes = [tuple(tensor.shape) for tensor in (slot, tokens, hidden, entropy)]
        if shapes != [(), (K,), (min(K, KEPT_STATES), E), ()]:
            raise ValueError(f"its shapes are {shapes}: another teacher's, or another data set's")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise OperatorFault(
            f"{path} cannot be read ({error}): if the teacher is surely the one that the run was started with, remove "
            "the file, and the next start keeps another one"
        ) from None
    return Question(int(slot), tokens), Answer(hidden, entropy)


def _write(path: Path, question: Question, answer: Answer) -> None:
    tensors = {
        "slot": torch.tensor(question.slot),
        "tokens": question.tokens.contiguous(),
        "hidden": answer.hidden.cpu().contiguous(),
        "cross_entropy": answer.cross_entropy.cpu(),
    }
    with written_whole(path) as file:
        file.write(save(tensors))


def _kept(path: Path, K: int, E: int, topology: Topology) -> tuple[Question, Answer] | None:
    """The first rank's; None elsewhere. A fault that it meets is raised on all."""
    kept, fault = None, None
    if topology.is_first:
        try:
            kept = read_probe(path, K=K, E=E)
        except OperatorFault as caught:
            fault = caught
    if not everywhere(fault is None, topology.device, topology.world_group):
        raise fault or OperatorFault(f"{path} cannot be read: the first rank says why")
    return kept


def _told(question: Question, is_new: bool, topology: Topology) -> tuple[Question, bool]:
    """The first rank's question, and whether it is asked for the first time, on every rank."""
    numbers = torch.cat([torch.tensor([int(is_new), question.slot]), question.tokens]).to(topology.device)
    new, slot, *tokens = _sum_of_first(numbers, topology).tolist()
    return Question(slot, torch.tensor(tokens)), bool(new)


def _answer(question: Question, setup: Setup, teacher: Teacher, vocab: VocabSlice) -> Answer:
    B, S, K = setup.recipe.train.micro_batch, setup.data.sequence_length, len(question.tokens)
    batch = question.batch(rows=B, sequence=S, document_mask=setup.recipe.data.document_mask)
    ((_, said),) = teacher.lessons(iter([batch]))
    assert isinstance(said, Tensor)
    hidden_KE = said.view(B, S, -1)[0, :K]
    with torch.no_grad():
        terms = label_loss(
            hidden_KE[:-1],
            teacher.head,
            question.tokens[1:].to(said.device),
            token_weights=torch.full((K - 1,), 1 / (K - 1), device=said.device),
            vocab=vocab,
            student_bias=teacher.bias,
            student_logits=teacher.logits,
        )
    return Answer(hidden_KE[:KEPT_STATES].float(), terms.student_ce.double())


def _of_first(answer: Answer, shape: Answer, topology: Topology) -> Answer:
    """The first rank's answer on every rank; each gives one of the same shapes."""
    numbers = torch.cat([answer.cross_entropy.reshape(1), answer.hidden.flatten().double()]).to(topology.device)
    first = _sum_of_first(numbers, topology)
    return Answer(first[1:].float().view_as(shape.hidden), first[0])


def _sum_of_first(numbers: Tensor, topology: Topology) -> Tensor:
    return all_reduce_sum(numbers if topology.is_first else torch.zeros_like(numbers), topology.world_group)


def _unlike(path: Path, found: Answer, truth: Answer, off: tuple[float, float], bound: float, *, is_new: bool) -> str:
    numbers = (
        f"hidden states off by {off[0]:.1e} (at most {bound:g} is rounding), cross-entropy "
        f"{float(found.cross_entropy):.4f} in place of {float(truth.cross_entropy):.4f}"
    )
    if is_new:
        return (
            f"the teacher answers one row otherwise than on rank 0: {numbers}. A stage or a slice of its head is wrong "
            "here: see that its files are the same on every node, or leave the node out"
        )
    return (
        f"this is not the teacher that the run was started with, or a stage or a slice of its head is wrong: on the "
        f"row of {path}, {numbers}. Give teacher.path what it was, and see that its files are the same on every node"
    )
