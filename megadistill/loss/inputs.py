"""The inputs of a call of the loss, their checks, and the plan of its chunks, which all ranks share.

Legend: N this rank's tokens; g ranks of the vocab group; K sparse target ids of a token; v this rank's true rows of the
vocabulary.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from megadistill.distributed.collectives import all_gather_rows, group_size
from megadistill.distributed.vocab import VocabSlice
from megadistill.divergence import Divergence
from megadistill.loss.heads import Head
from megadistill.loss.options import LossOptions
from megadistill.types import IGNORED_LABEL, SparseTargets, to_device


@dataclass(frozen=True)
class LossInputs:
    """The arguments of a call, checked."""

    student: Head
    teacher: Head | None
    labels_N: Tensor
    weights_N: Tensor
    divergence: Divergence
    vocab: VocabSlice
    options: LossOptions
    targets: SparseTargets | None = None
    """Sparse targets in place of a teacher."""

    def __post_init__(self) -> None:
        tokens = self.labels_N.shape[0]
        self.student.require_fit("student", tokens, self.vocab, padding=True)
        if self.teacher is not None:
            self.teacher.require_fit("teacher", tokens, self.vocab, padding=False)
        if self.weights_N.shape != self.labels_N.shape:
            raise ValueError(f"{list(self.weights_N.shape)} token weights for {tokens} labels; pass one for each")
        if self.targets is not None and (
            self.targets.ids.shape[0] != tokens
            or self.targets.ids.shape != self.targets.probs.shape
            or self.targets.log_tail.shape != (tokens,)
        ):
            raise ValueError(
                f"target ids {list(self.targets.ids.shape)}, probs {list(self.targets.probs.shape)} and log_tail "
                f"{list(self.targets.log_tail.shape)} do not fit {tokens} labels; pass [{tokens}, K] twice, [{tokens}]"
            )
        assert self.vocab.size < 2**24, "ids travel among float32 statistics, which hold them exactly below 2**24"

    @property
    def heads(self) -> tuple[Head, ...]:
        """The student's, then the teacher's where there is one."""
        return (self.student,) if self.teacher is None else (self.student, self.teacher)

    @property
    def diagnostics(self) -> bool:
        """Whether they are computed: asked for, and there is a teacher."""
        return self.options.diagnostics and self.teacher is not None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of every accumulator: products, statistics, sums."""
        return torch.float64 if any(h.accumulator == torch.float64 for h in self.heads) else torch.float32

    @cached_property
    def weights(self) -> tuple[Tensor, ...]:
        """[v, D] of each head, as products take them."""
        return tuple(head.rows(self.vocab, self.dtype) for head in self.heads)

    @cached_property
    def ids_v(self) -> Tensor:
        """[v]: the global id of each true row, in the dtype of the statistics."""
        return self.vocab.global_ids(self.labels_N.device)[: self.vocab.true_rows].to(self.dtype)


@dataclass(frozen=True)
class ChunkPlan:
    """How the tokens are cut into chunks: the same on every rank of the vocab group."""

    longest: int
    """Tokens of the rank that has most."""
    chunk_tokens: int
    """Tokens that each rank gives to a chunk; the last one may have fewer."""
    in_flight: int
    """Chunks whose logits exist at a time: while the statistics of one are gathered, the next one's products run."""

    @classmethod
    def of(cls, longest: int, fitting: int, group_size: int, *, in_flight: int | None = None) -> "ChunkPlan":
        """Chunks of equal size, of at most `fitting` tokens of the whole group together, at least one of each rank.

        In flight are two chunks where there are ranks to gather from, unless `in_flight` is given.
        """
        in_flight = in_flight or (1 if group_size == 1 else 2)
        chunks = math.ceil(longest / max(1, fitting // (group_size * in_flight)))
        return cls(longest, math.ceil(longest / max(1, chunks)) or 1, in_flight)

    def spans(self) -> list[slice]:
        """The token range of each chunk, the same for every rank."""
        step = self.chunk_tokens
        return [slice(start, min(start + step, self.longest)) for start in range(0, self.longest, step)]


def fitting_tokens(logit_memory: int, *, models: int, itemsize: int, rows: int) -> int:
    """Tokens whose logits fit into `logit_memory` bytes, on a slice of so many true rows."""
    return logit_memory // (models * itemsize * max(1, rows))


def exchange_metadata(inputs: LossInputs, *, with_gradient: bool) -> tuple[ChunkPlan, int]:
    """One small all-gather of shapes, memory limits and checks, and the call's one host-device sync.

    Returns:
        The plan of the chunks; the largest K of a rank, 0 without sparse targets.

    Raises:
        ValueError: on every rank, where one has labels or ids outside of the vocabulary, the slices do not add up to
            it, or the ranks disagree about gradients.
    """
    labels_N, vocab, targets = inputs.labels_N, inputs.vocab, inputs.targets
    bad_labels = ((labels_N != IGNORED_LABEL) & ((labels_N < 0) | (labels_N >= vocab.size))).sum().view(1)
    bad_ids = torch.zeros_like(bad_labels) if targets is None else (targets.ids >= vocab.size).sum().view(1)
    own_K = 0 if targets is None else targets.ids.shape[1]
    fitting = fitting_tokens(
        inputs.options.logit_memory,
        models=len(inputs.heads),
        itemsize=inputs.dtype.itemsize,
        rows=vocab.true_rows,
    )
    counts = torch.tensor([labels_N.shape[0], vocab.true_rows, int(with_gradient), own_K, min(fitting, 1 << 40)])
    counts = to_device(counts, labels_N.device)
    gathered = all_gather_rows(torch.cat([counts, bad_labels, bad_ids]).view(1, -1), vocab.group)
    tokens, rows, gradients, Ks, fittings, labels, ids = zip(*gathered.tolist(), strict=True)
    require_whole_vocabulary(rows, vocab)
    if any(labels):
        raise ValueError(
            f"{list(labels)} labels (by rank) are neither ids below {vocab.size} nor {IGNORED_LABEL}; "
            f"mark positions without a label with {IGNORED_LABEL}"
        )
    if any(ids):
        raise ValueError(
            f"{list(ids)} target ids (by rank) are not below {vocab.size}; mark places without an id with -1"
        )
    if len(set(gradients)) > 1:
        raise ValueError(
            f"some ranks want gradients and some do not ({list(gradients)}); set requires_grad and the grad mode alike"
        )
    return ChunkPlan.of(int(max(tokens)), int(min(fittings)), group_size(vocab.group)), int(max(Ks))


def require_whole_vocabulary(rows: tuple[int, ...], vocab: VocabSlice) -> None:
    """
    Raises:
        ValueError: the true rows of all ranks do not add up to the vocabulary.
    """
    if sum(rows) != vocab.size:
        raise ValueError(f"the slices hold {list(rows)} true rows, which do not add up to a vocabulary of {vocab.size}")
