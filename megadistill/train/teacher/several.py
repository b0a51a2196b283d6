"""Several teachers: each sees the rows of the sources that it teaches, and the loss of a row is against its own.

A row with several teachers has the weighted sum of their divergences, Σ_t w_t D(p_t ‖ q) with Σ_t w_t = 1. For forward
KL at temperature 1 its gradient is that of KL(Σ_t w_t p_t ‖ q): the two differ by a constant, the teachers' own
Jensen-Shannon divergence.

Legend: B sequences of a micro-batch, S tokens of a sequence, N = B·S; n tokens that a teacher teaches; T teachers, K
sources, M numbers of a group of tokens.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, fields, replace
from itertools import count

import torch
from torch import Tensor

from megadistill.distributed.topology import Topology
from megadistill.distributed.vocab import VocabSlice
from megadistill.loss import Head
from megadistill.train.resilience.sdc import FrozenWeights
from megadistill.train.setup.setup import Setup
from megadistill.train.teacher.probe import TeacherCheck
from megadistill.train.teacher.protocol import Teacher
from megadistill.train.teacher.targets import StudentOutput, TargetedBatch
from megadistill.types import IGNORED_LABEL, PER_TOKEN_NAMES, Diagnostics, LossTerms, TokenBatch, to_device

M = 1 + len(PER_TOKEN_NAMES)
"""Numbers of a group of tokens: how many have a label, then `PER_TOKEN_NAMES`."""


@dataclass(frozen=True)
class Member:
    """One of several teachers."""

    name: str
    teacher: Teacher
    weights: Mapping[int, float]
    """Number of a source that it teaches -> its share in the divergence of that source's rows."""
    setup: Setup
    """Setup of a run with this teacher alone."""


@dataclass(frozen=True)
class SeveralTeachers(Teacher):
    """Teachers by source, or a mixture of them for the same rows."""

    members: Sequence[Member]
    sources: int
    """K: number of the data's sources."""

    @property
    def answers_any_tokens(self) -> bool:
        return all(member.teacher.answers_any_tokens for member in self.members)

    def teacher_targets(self, batches: Iterator[TokenBatch]) -> Generator[TargetedBatch, None, None]:
        """See `Teacher`. A micro-batch without a row of a teacher on any rank of its group costs that one nothing."""
        waiting: deque[TokenBatch] = deque()
        entering: list[deque[TokenBatch]] = [deque() for _ in self.members]

        def of_member(number: int) -> Iterator[TokenBatch]:
            own = entering[number]
            while own or self._read(batches, waiting, entering):
                yield own.popleft()

        with ExitStack() as stack:
            streams = [
                stack.enter_context(closing(member.teacher.teacher_targets(of_member(number))))
                for number, member in enumerate(self.members)
            ]
            for first in streams[0]:
                others = [next(stream) for stream in streams[1:]]
                batch = waiting.popleft()
                parts = [TargetedRows(*pair) for pair in zip(self.members, (first, *others), strict=True)]
                yield TargetedBatch(batch, SeveralTargets(batch, parts, self.sources))

    def _read(
        self, batches: Iterator[TokenBatch], waiting: deque[TokenBatch], entering: list[deque[TokenBatch]]
    ) -> bool:
        batch = next(batches, None)
        if batch is None:
            return False
        waiting.append(batch)
        for member, own in zip(self.members, entering, strict=True):
            own.append(batch.of_sources(member.weights))
        return True

    def start(self) -> None:
        for member in self.members:
            member.teacher.start()

    def check(
        self, setup: Setup, vocab: VocabSlice, topology: Topology, *, rows: Callable[[Setup], TokenBatch]
    ) -> list[TeacherCheck]:
        checks = []
        for member in self.members:
            of_member = member.teacher.check(member.setup, vocab, topology, rows=rows)
            checks += [replace(each, line=f"{member.name}: {each.line}", name=member.name) for each in of_member]
        return checks

    def describe_prefetch(self, *, micro_batch: int, sequence_length: int) -> str | None:
        shape = {"micro_batch": micro_batch, "sequence_length": sequence_length}
        lines = {member.name: member.teacher.describe_prefetch(**shape) for member in self.members}
        return "; ".join(f"{name}: {line}" for name, line in lines.items() if line) or None

    def frozen_weights(self) -> FrozenWeights | None:
        held = {member.name: member.teacher.frozen_weights() for member in self.members}
        named = [(name, each) for name, each in held.items() if each is not None]
        if not named:
            return None
        tensors = [(f"{what} of {name}", tensor) for name, each in named for what, tensor in each.tensors]
        return FrozenWeights(tuple(tensors), torch.cat([each.digests for _, each in named]))

    def close(self) -> None:
        for member in self.members:
            member.teacher.close()


@dataclass(frozen=True)
class TargetedRows:
    """A teacher and its target of the rows that it teaches."""

    member: Member
    targeted: TargetedBatch

    @property
    def is_empty(self) -> bool:
        """Whether no rank of the group has such a row."""
        batch = self.targeted.batch
        return not any(batch.peer_rows or (len(batch),))


@dataclass(frozen=True)
class SeveralTargets:
    """The targets of a micro-batch's rows, each of the teachers of its source."""

    batch: TokenBatch
    parts: Sequence[TargetedRows]
    sources: int

    def loss(self, student: StudentOutput) -> LossTerms:
        """The sum of the teachers' losses, each over its rows. Collective over the vocab group: see `distill_loss`."""
        sums = torch.zeros(len(self.parts), self.sources, M, dtype=torch.float64, device=student.labels.device)
        terms: LossTerms | None = None
        for sums_KM, part in zip(sums, self.parts, strict=True):
            if not part.is_empty:
                rows = self._rows(student, part)
                of_part = part.targeted.target.loss(rows)
                _add_by_source(sums_KM, part.targeted.batch, rows.labels, of_part)
                terms = of_part if terms is None else _sum(terms, of_part)
        assert terms is not None, "every source has a teacher"
        return replace(terms, per_token=None, by_teacher=sums)

    def complete(self) -> Head | None:
        """The distribution of the one teacher of all rows; None where they have several, or none."""
        parts = [part for part in self.parts if not part.is_empty]
        one = parts[0].targeted if len(parts) == 1 else None
        return one.target.complete() if one is not None and len(one.batch) == len(self.batch) else None

    def _rows(self, student: StudentOutput, part: TargetedRows) -> StudentOutput:
        """The student's output for the tokens of a part, whose weights are shared out to their teachers."""
        batch, options = part.targeted.batch, replace(student.options, per_token=True)
        hidden, labels, weights = student.head.hidden, student.labels, student.token_weights
        if len(batch) < len(self.batch):
            rows = torch.isin(self.batch.sources, torch.tensor(sorted(part.member.weights))).nonzero().flatten()
            S = self.batch.tokens.shape[1]
            tokens_n = to_device((rows.unsqueeze(1) * S + torch.arange(S)).flatten(), labels.device)
            hidden, labels, weights = (each.index_select(0, tokens_n) for each in (hidden, labels, weights))
        shares = [part.member.weights[source] for source in batch.sources.tolist()]
        if any(share != 1.0 for share in shares):
            shares_B = to_device(torch.tensor(shares, dtype=weights.dtype), weights.device)
            weights = (weights.view(len(shares), -1) * shares_B.unsqueeze(1)).flatten()
        head = replace(student.head, hidden=hidden)
        return replace(student, head=head, labels=labels, token_weights=weights, options=options)


def _add_by_source(sums_KM: Tensor, batch: TokenBatch, labels_n: Tensor, terms: LossTerms) -> None:
    """Adds numbers by source: tokens with a label, then `PER_TOKEN_NAMES`. On a GPU `index_add_` has no fixed order."""
    assert terms.per_token is not None
    has_label_n1 = (labels_n != IGNORED_LABEL).double().unsqueeze(1)
    values_nM = torch.cat([has_label_n1, terms.per_token.double()], dim=1)
    of_rows_BM = values_nM.view(len(batch), batch.tokens.shape[1], M).sum(dim=1)
    is_of_KB1 = (torch.arange(len(sums_KM)).unsqueeze(1) == batch.sources).unsqueeze(2)
    sums_KM += torch.where(to_device(is_of_KB1, sums_KM.device), of_rows_BM, 0.0).sum(dim=1)


def _sum(one: LossTerms, other: LossTerms) -> LossTerms:
    """Term by term. A teacher without diagnostics, one whose targets are stored, adds nothing to them."""
    names = [each.name for each in fields(LossTerms) if each.name not in ("diagnostics", "per_token", "by_teacher")]
    diagnostics = one.diagnostics or other.diagnostics
    if one.diagnostics is not None and other.diagnostics is not None:
        of_both = {
            each.name: getattr(one.diagnostics, each.name) + getattr(other.diagnostics, each.name)
            for each in fields(Diagnostics)
        }
        diagnostics = Diagnostics(**of_both)
    return replace(one, diagnostics=diagnostics, **{name: getattr(one, name) + getattr(other, name) for name in names})


@dataclass(frozen=True)
class RowGroups:
    """The names of the groups of a step's tokens, and their means."""

    teachers: Mapping[str, Mapping[str, float]]
    """Name -> `Setup.teaches`."""
    sources: Sequence[str]
    names: Mapping[str, str]
    """Name in `PER_TOKEN_NAMES` of each number that is logged -> the name under which it is logged."""

    @classmethod
    def of(cls, setup: Setup) -> "RowGroups | None":
        """Those of a run; None for one without several teachers."""
        if not setup.teachers:
            return None
        names = {name: name for name in PER_TOKEN_NAMES}
        if setup.recipe.loss.targets is not None:  # what is unknown of truncated distributions is 0 in the sums
            names = {"divergence": "targets_kl", "student_ce": "student_ce"}
        elif setup.recipe.loss.temperature != 1.0:  # a KL in the metrics is at temperature 1
            del names["kl"]
        return cls({name: each.teaches for name, each in setup.teachers.items()}, setup.data.names, names)

    def means(self, sums: Sequence[float], *, labels: int) -> dict[str, dict[str, dict[str, float]]]:
        """`by_source` and `by_teacher`: name of a group with tokens in the step -> its numbers.

        `sums` [T·K·M]: `LossTerms.by_teacher`, summed over micro-batches and ranks; each token had the weight 1/labels
        times its teacher's share. Of a source with several teachers the means are weighted by their shares, of a
        teacher they are plain.
        """
        by_source: dict[str, list[float]] = {}
        by_teacher: dict[str, list[float]] = {}
        place = count(0, M)
        for name, shares in self.teachers.items():
            for source in self.sources:
                start = next(place)
                tokens, *values = sums[start : start + M]
                if tokens:
                    share = shares[source]
                    _add(by_source.setdefault(source, []), [share * tokens, *(labels * each for each in values)])
                    _add(by_teacher.setdefault(name, []), [tokens, *(labels * each / share for each in values)])
        return {"by_source": self._means(by_source), "by_teacher": self._means(by_teacher)}

    def _means(self, groups: Mapping[str, list[float]]) -> dict[str, dict[str, float]]:
        return {name: self._named(*numbers) for name, numbers in groups.items()}

    def _named(self, tokens: float, *values: float) -> dict[str, float]:
        means = dict(zip(PER_TOKEN_NAMES, (each / tokens for each in values), strict=True))
        return {"labels": round(tokens), **{logged: means[name] for name, logged in self.names.items()}}


def _add(total: list[float], numbers: Sequence[float]) -> None:
    total[:] = [a + b for a, b in zip(total or [0.0] * M, numbers, strict=True)]
