"""Types shared between packages: batches, the teacher's signal, loss terms, step reports.

Legend: B sequences of this rank in a micro-batch (or step), S tokens of a sequence, N = B·S tokens, E teacher width.
"""

import json
import math
from collections.abc import Collection
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

IGNORED_LABEL = -100
"""The label of a position that carries no loss (torch's convention)."""

_FIRST_SOURCE = torch.zeros((), dtype=torch.int64)
_NO_SURPLUS = torch.zeros((), dtype=torch.bool)


@dataclass(frozen=True)
class Cursor:
    """A position in the token stream: some hundred bytes, the same on every rank, whatever the position.

    `fingerprint` names the order and `order` describes it, as JSON (sources, curriculum, seed), so that a resume can
    tell an edit of what is to come from one of what was read. `next_slot` is the first slot not yet delivered.
    `masked_slots` were delivered empty because their sequence was damaged; `skips` are ranges [start, stop) of slots
    that were left out on purpose. Both hold on a resume, even where the shard or the recipe has changed since.
    """

    fingerprint: str
    next_slot: int
    masked_slots: tuple[int, ...] = ()
    skips: tuple[tuple[int, int], ...] = ()
    order: str = "{}"

    def state(self) -> dict[str, Any]:
        return {
            "fingerprint": self.fingerprint,
            "next_slot": self.next_slot,
            "masked_slots": list(self.masked_slots),
            "skips": [list(skip) for skip in self.skips],
            "order": json.loads(self.order),
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "Cursor":
        return cls(
            fingerprint=str(state["fingerprint"]),
            next_slot=int(state["next_slot"]),
            masked_slots=tuple(int(slot) for slot in state["masked_slots"]),
            skips=tuple((int(start), int(stop)) for start, stop in state["skips"]),
            order=json.dumps(state["order"], sort_keys=True),
        )


@dataclass(frozen=True)
class SequencePart:
    """A rank's tokens of each sequence: part `place` of `parts` equal, contiguous ones."""

    place: int = 0
    parts: int = 1

    def of(self, values: Tensor) -> Tensor:
        """[B, S, ...] -> [B, S / parts, ...], contiguous. `parts` divides S."""
        assert values.shape[1] % self.parts == 0, f"{values.shape[1]} tokens do not divide into {self.parts} parts"
        return values if self.parts == 1 else values.chunk(self.parts, dim=1)[self.place].contiguous()


@dataclass(frozen=True)
class TokenBatch:
    """This rank's rows of a batch; the student and the teacher read the same one.

    tokens [B, S] int64; labels [B, S] int64, the next token, `IGNORED_LABEL` where there is none;
    slots [B] int64, the stream position of each row; digests [B] int64 of each row's tokens (`token_digest`);
    starts [B, S] bool, where a document begins; `document_mask`: whether attention is limited to a document;
    sources [B] int64, the number of each row's source: its index in `Mixture.names`.
    """

    tokens: Tensor
    labels: Tensor
    slots: Tensor
    digests: Tensor
    starts: Tensor
    document_mask: bool = False
    faults: tuple[tuple[int, str], ...] = ()
    """(slot, reason) of this rank's rows that failed their check in this batch; they are masked from now on."""
    part: SequencePart = SequencePart()
    """The tokens of each sequence that this rank has. Of a part, tokens and labels are [B, S / parts]; starts and
    digests are those of whole sequences."""
    sources: Tensor = _FIRST_SOURCE
    """[B]; a scalar given to the constructor is the source of all rows."""
    peer_sources: Tensor = _FIRST_SOURCE
    """[B, g] int64: the sources of the same rows of the g ranks that share a teacher, in rank order. By default this
    rank's alone."""
    peer_rows: tuple[int, ...] | None = None
    """Number of rows of each of these ranks in this micro-batch; None: as many as here."""
    surplus: Tensor = _NO_SURPLUS
    """[B] bool: rows past the end of the global batch, which does not divide over the ranks. They repeat its last slot
    without labels, and count for nothing. A scalar given to the constructor is the value of all rows."""
    _on_device: dict[torch.device, "TokenBatch"] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.sources.dim() == 0:
            object.__setattr__(self, "sources", self.sources.expand(len(self)))
        if self.peer_sources.dim() == 0:
            object.__setattr__(self, "peer_sources", self.sources.unsqueeze(1))
        if self.surplus.dim() == 0:
            object.__setattr__(self, "surplus", self.surplus.expand(len(self)))

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def micro_batches(self, size: int) -> list["TokenBatch"]:
        """The rows in micro-batches of `size`, in order. `size` divides B."""
        assert len(self) % size == 0, f"{len(self)} rows do not divide into micro-batches of {size}"
        return [
            replace(self, faults=(), **{name: rows[start : start + size] for name, rows in self._by_row().items()})
            for start in range(0, len(self), size)
        ]

    def of_sources(self, numbers: Collection[int]) -> "TokenBatch":
        """The rows of these sources, in order, with `peer_rows`; the batch itself where they are all rows of all."""
        chosen_Bg = torch.isin(self.peer_sources, torch.tensor(sorted(numbers)))
        if bool(chosen_Bg.all()):
            return self
        chosen_B = torch.isin(self.sources, torch.tensor(sorted(numbers)))
        rows: dict[str, Any] = {name: tensor[chosen_B] for name, tensor in self._by_row().items()}
        return replace(self, **rows, peer_rows=tuple(chosen_Bg.sum(dim=0).tolist()))

    def of_part(self, part: SequencePart) -> "TokenBatch":
        """A rank's tokens of each sequence, of a batch of whole ones. Labels are the next tokens across its end too."""
        assert self.part.parts == 1, "a part of whole sequences"
        if part.parts == 1:
            return self
        return replace(self, tokens=part.of(self.tokens), labels=part.of(self.labels), part=part)

    def _by_row(self) -> dict[str, Any]:
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def pinned(self) -> "TokenBatch":
        """The batch with its models' inputs in pinned memory, for a host that has an accelerator."""
        return replace(
            self, tokens=self.tokens.pin_memory(), labels=self.labels.pin_memory(), starts=self.starts.pin_memory()
        )

    def to(self, device: torch.device) -> "TokenBatch":
        """The models' inputs on `device`; slots, digests and sources stay on the host, where they are compared.

        Copied once, by `to_device`: teacher and student get the same copy, which lives as long as this batch.
        """
        if device not in self._on_device:
            self._on_device[device] = replace(
                self,
                tokens=to_device(self.tokens, device),
                labels=to_device(self.labels, device),
                starts=to_device(self.starts, device),
            )
        return self._on_device[device]

    @property
    def valid_tokens(self) -> int:
        """Number of positions with a label."""
        return int((self.labels != IGNORED_LABEL).sum())

    @property
    def positions(self) -> Tensor | None:
        """[B, S] int64: position of each token in its document, with `document_mask`; else None. Whole sequences'."""
        return document_positions(self.starts) if self.document_mask else None


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`, as it is where it is there. The host does not wait for the device.

    From pinned memory, which is the tensor's own or a copy: torch gives such memory out again when the device has read
    it. The tensor must not be written to before that.
    """
    if device.type == "cpu" or tensor.device.type != "cpu":
        return tensor.to(device)
    return (tensor if tensor.is_pinned() else tensor.pin_memory()).to(device, non_blocking=True)


def use_device(device: torch.device | None) -> None:
    """Makes an accelerator that of the calling thread; nothing for None and a CPU.

    A new thread has the node's first one, whichever its process uses, and may take memory there for a context, some
    hundred megabytes for each rank of the node, where it only waits for an event.
    """
    if device is not None and device.type != "cpu":
        torch.accelerator.set_device_index(device)


def document_positions(starts: Tensor) -> Tensor:
    """[B, S] int64: distance of each token from the start of its document, for `starts` [B, S] bool."""
    positions = torch.arange(starts.shape[1], device=starts.device).expand(starts.shape)
    return positions - torch.where(starts, positions, 0).cummax(dim=1).values


def token_digest(tokens: Tensor) -> Tensor:
    """[B] int64 on the tokens' device: Σ tokens[s] · m[s] mod 2^64 for each row of `tokens` [B, S], with odd m.

    A single changed token always changes it. A checksum against mistakes, not a cryptographic hash.
    """
    multipliers = _multipliers(tokens.shape[1], tokens.device)
    if tokens.device.type == "cpu":  # einsum allocates no product as large as the tokens
        return torch.from_numpy(np.einsum("bs,s->b", tokens.to(torch.int64).numpy(), multipliers.numpy()))
    return (tokens.to(torch.int64) * multipliers).sum(dim=1)


@lru_cache(maxsize=8)
def _multipliers(length: int, device: torch.device) -> Tensor:
    """[length] int64: odd numbers, by an affine recurrence mod 2^64 (MMIX's; Knuth, 1997)."""
    numbers, state = [], 1
    for _ in range(length):
        state = (state * 6364136223846793005 + 1442695040888963407) % (1 << 64)
        numbers.append((state | 1) - (1 << 63))  # as int64, still odd
    return to_device(torch.tensor(numbers, dtype=torch.int64), device)


@dataclass(frozen=True)
class TeacherSignal:
    """The teacher's output for a micro-batch: final hidden states (after the last norm, before the head).

    hidden [B·S, E]; slots and digests [B] identify the batch.
    """

    hidden: Tensor
    slots: Tensor
    digests: Tensor

    def hidden_for(self, batch: TokenBatch) -> Tensor:
        """Returns `hidden`, if this signal belongs to `batch`.

        Raises:
            SignalMismatch: the slots or the digests differ.
        """
        if not torch.equal(self.slots, batch.slots):
            raise SignalMismatch(
                f"the teacher's signal is of slots {self.slots.tolist()}, the student's batch of {batch.slots.tolist()}"
            )
        if not torch.equal(self.digests, batch.digests):
            raise SignalMismatch(f"teacher and student read different tokens in slots {batch.slots.tolist()}")
        return self.hidden


class SignalMismatch(AssertionError):
    """A teacher's signal belongs to another batch than the student's: the loss would compare different tokens."""


@dataclass(frozen=True)
class LogitTransform:
    """Transform of the head's products before the softmax: `softcap · tanh(scale · (x Wᵀ + bias) / softcap)`.

    Without a softcap `scale · (x Wᵀ + bias)`. The order is that of the Hugging Face models: Gemma 2 has a softcap
    (`final_logit_softcapping`), Cohere a scale (`logit_scale`), Granite the inverse of one (`logits_scaling`).

    Raises:
        ValueError: a softcap that is not positive, or a scale that is zero or not finite.
    """

    softcap: float | None = None
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.softcap is not None and not (math.isfinite(self.softcap) and self.softcap > 0):
            raise ValueError(f"softcap is {self.softcap}; it bounds the logits, so pass a positive number, or None")
        if not (math.isfinite(self.scale) and self.scale != 0):
            raise ValueError(f"scale is {self.scale}; it multiplies the logits, so pass a finite number other than 0")


@dataclass
class WeightGradient:
    """The gradient of losses with respect to a head's weight, added up in memory of the caller's."""

    memory: Tensor
    """[w, D], in the dtype of the loss's sums."""
    empty: bool = True
    """Whether no loss has written yet. What is in the memory then counts for nothing."""


class Tail(Enum):
    """Treatment of the probability outside the selected ids."""

    OTHER = "other"
    """One more event, "any other id": a lower bound of the full KL (log-sum inequality)."""
    RENORMALISED = "renormalised"
    """Scales the selected probabilities to 1. Biased for the most likely ids; exact for counts of independent draws."""
    DROPPED = "dropped"
    """Sums over the selected ids only. Their probabilities are unchanged, and add up to less than 1."""


@dataclass(frozen=True)
class SparseTargets:
    """The selected part of the teacher's distribution, for the N tokens of one rank.

    ids [N, K] int64 global ids, distinct in a row, -1 where a row has fewer than K; probs [N, K] their targets, 0 where
    there is no id: the teacher's own probabilities, or for `Tail.RENORMALISED` numbers that add up to 1 (counts/draws).
    log_tail [N] is the log of the probability outside the selected ids, summed directly: `1 - Σ` has no digits left
    when the tail is small. It is -inf for `Tail.RENORMALISED`. Both were made at `temperature`.
    """

    ids: Tensor
    probs: Tensor
    log_tail: Tensor
    tail: Tail
    temperature: float = 1.0

    def __len__(self) -> int:
        return self.ids.shape[0]

    def to(self, device: torch.device | str) -> "SparseTargets":
        to = torch.device(device)
        ids, probs, log_tail = (to_device(each, to) for each in (self.ids, self.probs, self.log_tail))
        return replace(self, ids=ids, probs=probs, log_tail=log_tail)


DECILES = 10
"""Parts of equal size of the tokens, from the lowest entropy of the teacher to the highest."""

TOP_K = (16, 64, 256)
"""The k of `Diagnostics.top_k_mass`."""

DIAGNOSTIC_NAMES = (
    "forward_kl",
    "acceptance",
    "reverse_kl",
    "jsd",
    *(f"top_{k}_mass" for k in TOP_K),
    *(f"kl_entropy_decile_{decile}" for decile in range(1, DECILES + 1)),
)
"""Names of the means of `Diagnostics`, as they are logged. `forward_kl` is at temperature 1, as all are."""


EXPERT_METRICS = ("max_load", "min_load", "entropy", "idle", "router_aux_loss", "router_z_loss")
"""Names of the numbers of a student's routers in a step: highest and lowest load of an expert relative to an even one;
entropy of the load over its maximum, mean of the layers; fraction of experts without a token; the load-balancing loss
and the z-loss, without their weights."""


NORM_KINDS = ("gradient", "update", "weight")
"""The gradient before clipping; the change of the weights, weight decay included; the weights after it. All float32."""

NORM_NUMBERS = ("clipped_steps", "expected_logit")
"""Numbers beside the norms of a step: fraction of the steps since the last norms whose gradient was clipped; mean over
tokens of the logit that the student expects, Σ_v q_v z_v = log Z - H(q), which grows with the scale of the logits."""


@dataclass(frozen=True)
class Diagnostics:
    """Extra diagnostics of teacher and student, at temperature 1: sums like those of `LossTerms`, detached."""

    acceptance: Tensor
    """Σ min(p_t, p_s): the acceptance rate of speculative decoding, 1 - total variation."""
    reverse_kl: Tensor
    jsd: Tensor
    """Jensen-Shannon divergence, β = 0.5."""
    top_k_mass: Tensor
    """[3]: the teacher's probability of its `TOP_K` most likely ids."""
    kl_by_entropy_decile: Tensor
    """[DECILES]: forward KL of the tokens in each tenth of the vocab group's tokens of a call, from the lowest teacher
    entropy to the highest. They add up to the forward KL."""

    @property
    def kl(self) -> Tensor:
        """Forward KL of the complete distributions at temperature 1."""
        return self.kl_by_entropy_decile.sum()


@dataclass(frozen=True)
class LossTerms:
    """Sums over this rank's tokens, each token times its weight; with weights 1/count they are means.

    `loss` is differentiable; the rest are detached scalars. Natural logarithms throughout. Terms that the objective
    does not have (those of the teacher, when training from labels or from stored targets) are zero.
    """

    loss: Tensor
    divergence: Tensor
    """The recipe's divergence, over all tokens, at the loss's temperature (no T² factor); that against sparse targets,
    where the loss has them."""
    kl: Tensor
    """Forward KL of the complete distributions, for any divergence of the recipe, at the loss's temperature."""
    student_ce: Tensor
    teacher_ce: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    agreement: Tensor
    """1 where teacher and student have the same most likely token."""
    log_z: Tensor
    """Log of the student's partition function, which the z-loss keeps near zero."""
    diagnostics: Diagnostics | None = None
    per_token: Tensor | None = None
    """[N, 5], detached: `PER_TOKEN_NAMES` of each of this rank's tokens, times its weight; None where not asked for."""
    by_teacher: Tensor | None = None
    """[teachers, sources, 6] float64, detached: of each group of tokens the number with a label, and the sums of
    `PER_TOKEN_NAMES`; None for one teacher."""

    def metrics(self) -> Tensor:
        """[9] float64: the values of `METRIC_NAMES`, for one reduction over ranks."""
        return torch.stack([getattr(self, name).detach().double() for name in METRIC_NAMES])


METRIC_NAMES = tuple(
    each.name for each in fields(LossTerms) if each.name not in ("diagnostics", "per_token", "by_teacher")
)
"""The scalar terms, in the order of `LossTerms.metrics`."""

PER_TOKEN_NAMES = ("divergence", "kl", "student_ce", "teacher_ce", "agreement")
"""The terms of `LossTerms.per_token`."""


@dataclass(frozen=True)
class StepReport:
    """Log record of an optimizer step: means over the step's tokens of all ranks."""

    step: int
    tokens: int
    """Tokens since the start of the run, including this step: all that are read, padding and others without a label
    too. Throughput and MFU count the same."""
    loss: float
    divergence: float
    """The loss's divergence; see `LossTerms`."""
    kl: float
    """See `LossTerms`: at the loss's temperature, and 0 with truncated targets. metrics.jsonl has one meaning only."""
    student_ce: float
    teacher_ce: float
    student_entropy: float
    teacher_entropy: float
    agreement: float
    log_z: float
    learning_rate: float
    grad_norm: float
    seconds: float
    tokens_per_second: float
    data_seconds: float
    """Seconds that rank 0 waited for its batch in the step."""
    student_seconds: float
    """Seconds of the student's forward and backward pass and its optimizer, on rank 0's device as the next ones."""
    loss_seconds: float
    """Seconds of the loss, with both heads."""
    teacher_seconds: float
    """Seconds until the teacher's signals were there: the work of rank 0's own stage, if it has one, and waiting."""
    wait_seconds: float
    """The part of `teacher_seconds` that waits for other ranks."""
    mfu: float | None
    """Model FLOPs over peak FLOPs, both models together; None if the device's peak is unknown."""
    student_mfu: float | None
    """FLOPs of student and loss, recomputation included, over the peak in their seconds; None as for `mfu`."""
    teacher_mfu: float | None
    """The same of rank 0's stage of the teacher, without waiting; None where it has none."""
    memory_bytes: int
    """Peak of rank 0: device memory on an accelerator, resident memory on a CPU."""
    labels: int = 0
    """Tokens of this step that have a label, which the means are over."""
    diagnostics: dict[str, float] | None = None
    """The extra diagnostics by name, on the steps that compute them."""
    experts: dict[str, float] | None = None
    """Numbers of the routers by `EXPERT_METRICS`, of a student with experts."""
    expert_load: dict[str, list[float]] | None = None
    """Number of a layer -> load of each of its experts relative to an even one, on some steps."""
    norms: dict[str, Any] | None = None
    """Gradient, update and weight norms by group of parameters, and `NORM_NUMBERS`, on some steps."""
