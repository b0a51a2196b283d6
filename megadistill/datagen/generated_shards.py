"""Shards of prompts and the teacher's continuations of them.

A sequence is the first tokens of a slot's sequence and the teacher's continuation, up to its end-of-document id; behind
that there is padding without labels.

Legend: B sequences of a batch, P tokens of a prompt, N new tokens; a sequence has P + N.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from torch import Tensor

from megadistill.data import TokenStream
from megadistill.data.prepare.shard_tasks import SHARD_PREFIX
from megadistill.data.shards.manifest import FORMAT_VERSION, Count, GeneratedRecord, token_dtype
from megadistill.data.shards.packing import PackedSequence
from megadistill.data.shards.shard_record import ShardRecord
from megadistill.data.shards.tar import write_shard
from megadistill.data.tokenizers.tokenizer import Tokenizer
from megadistill.models.sampling import Sampling, continuations
from megadistill.models.weights import load_pretrained
from megadistill.types import IGNORED_LABEL

PACKER: Final[Literal["generated"]] = "generated"
PACKER_VERSION: Final = 1
"""Version of the format: raise it when the same prompts and draws would give other sequences."""


class GeneratedShard(ShardRecord):
    """Counts of a complete shard."""

    inputs_sha256: str
    """Digest of everything that decided the shard's content."""
    new_tokens: Count
    """Tokens that the teacher wrote."""
    ended: Count
    """Continuations with an end-of-document id."""
    left_out: Count
    """Slots whose prompt is not one stretch of text."""
    largest_id: Count
    """0 where there is no shard."""


@dataclass(frozen=True)
class Generator:
    """Generates the shards of one data set, each from its slots alone. The teacher is loaded on first use."""

    folder: Path
    teacher: Path
    stream: TokenStream
    tokenizer: Tokenizer
    record: GeneratedRecord
    sampling: Sampling
    batch: int
    """Prompts of a forward pass."""
    device: torch.device

    @cached_property
    def _model(self) -> Any:
        return load_pretrained(self.teacher, what=f"teacher {self.teacher}", device=self.device)

    def existing(self, number: int, slots: range) -> GeneratedShard | None:
        """The record of a shard that an earlier start, or another job, completed from the same inputs."""
        return GeneratedShard.load(self._path(number), inputs_sha256=self._inputs_sha256(slots))

    def generate(self, number: int, slots: range) -> GeneratedShard:
        """Writes a shard, and then its record."""
        sequences = list(self._sequences(slots))
        path = self._path(number)
        written = [sequence.tokens[: sequence.bounds[-1]] for sequence in sequences]
        record = GeneratedShard(
            inputs_sha256=self._inputs_sha256(slots),
            shard=write_shard(path, sequences, dtype=token_dtype(self.tokenizer.vocab_size)) if sequences else None,
            documents=sum(len(sequence.bounds) - 1 for sequence in sequences),
            tokens=sum(len(tokens) - 1 for tokens in written),
            text_bytes=sum(int(self.tokenizer.piece_bytes[tokens[1:]].sum()) for tokens in written),
            new_tokens=sum(len(tokens) - self.record.prompt_tokens for tokens in written),
            ended=sum(int(tokens[-1] == self.tokenizer.eos) for tokens in written),
            left_out=len(slots) - len(sequences),
            largest_id=max((int(sequence.tokens.max()) for sequence in sequences), default=0),
        )
        record.write(path)
        return record

    def _sequences(self, slots: range) -> Iterator[PackedSequence]:
        """One for each slot whose prompt is one stretch of text."""
        P = self.record.prompt_tokens
        for start in range(slots.start, slots.stop, self.batch):
            read = self.stream.batch(range(start, min(start + self.batch, slots.stop)))
            usable_B = (read.labels[:, :P] != IGNORED_LABEL).all(dim=1)
            if not usable_B.any():
                continue
            prompts_BP, starts_BP = read.tokens[usable_B, :P], read.starts[usable_B, :P]
            new_BN = continuations(
                self._model,
                prompts_BP,
                torch.stack([self.sampling.uniforms(f"generate/{slot}") for slot in read.slots[usable_B].tolist()]),
                temperature=self.sampling.temperature,
                top_p=self.sampling.top_p,
                eos=self.tokenizer.eos,
                vocab_size=min(self.tokenizer.vocab_size, self._model.config.vocab_size),
            )
            for prompt_P, starts_P, new_N in zip(prompts_BP, starts_BP, new_BN, strict=True):
                yield self._sequence(prompt_P, starts_P, new_N)

    def _sequence(self, prompt_P: Tensor, starts_P: Tensor, new_N: Tensor) -> PackedSequence:
        P, eos = len(prompt_P), self.tokenizer.eos
        begins = np.flatnonzero(starts_P.numpy()).tolist()
        if prompt_P[-1] == eos:  # the continuation is a document of its own
            begins.append(P)
        ends = (new_N == eos).nonzero()
        bounds = np.array([*begins, P + (int(ends[0]) + 1 if len(ends) else len(new_N))], dtype=np.int32)
        return PackedSequence(torch.cat([prompt_P, new_N]).to(torch.int32).numpy(), bounds)

    def _inputs_sha256(self, slots: range) -> str:
        inputs = f"{self.record.model_dump_json()} {slots.start}:{slots.stop} {PACKER_VERSION} {FORMAT_VERSION}"
        return hashlib.sha256(inputs.encode()).hexdigest()

    def _path(self, number: int) -> Path:
        return self.folder / f"{SHARD_PREFIX}{number:05d}.tar"
