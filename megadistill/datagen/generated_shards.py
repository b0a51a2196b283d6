"""Room `teacher`: shards of prompts and what the teacher says after them. It knows no jobs and no student.

A unit is the first tokens of a slot's unit and what the teacher says after them, up to its end-of-document id; behind
that there is padding, which nobody learns. A shard has a record `.shard-00012.json` from when it is whole until the
data set is finished.

Legend: B sequences of a batch, P tokens of a prompt, N new tokens; a unit has P + N.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from megadistill.data import TokenStream
from megadistill.data.prepare.shard_tasks import SHARD_PREFIX
from megadistill.data.shards.manifest import FORMAT_VERSION, Count, GeneratedRecord, Shard, token_dtype
from megadistill.data.shards.packing import PackedSequence
from megadistill.data.shards.tar import write_shard
from megadistill.data.tokenizers.base import Tokenizer
from megadistill.io import atomic_write, file_sha256
from megadistill.models.sampling import continuations
from megadistill.models.weights import load_pretrained
from megadistill.rng import keyed_generator
from megadistill.types import IGNORED_LABEL

PACKER: Final[Literal["generated"]] = "generated"
PACKER_VERSION: Final = 1
"""Raise it when the same prompts and draws would give other units."""
MAX_RECORD_BYTES: Final = 1 << 16


@dataclass(frozen=True)
class Speaker:
    """The teacher, and how it is run; loaded when it is first asked."""

    folder: Path
    batch: int
    """Prompts read at a time."""
    device: torch.device
    dtype: torch.dtype | None
    """None: that of its weights."""

    @cached_property
    def model(self) -> Any:
        model = load_pretrained(self.folder, what=f"teacher {self.folder}", device=self.device)
        return model if self.dtype is None else model.to(self.dtype)


class Done(BaseModel):
    """What became of a shard's slots. Its record is written when the shard is whole."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    asked: str
    """Digest of what decided the shard."""
    shard: Shard | None
    """None: all were left out."""
    documents: Count
    tokens: Count
    """That are predicted."""
    text_bytes: Count
    """Of those tokens."""
    new_tokens: Count
    ended: Count
    left_out: Count


@dataclass(frozen=True)
class Shards:
    """The shards of one data set, each from its slots alone."""

    folder: Path
    stream: TokenStream
    speaker: Speaker
    tokenizer: Tokenizer
    record: GeneratedRecord

    def whole(self, number: int, slots: range) -> Done | None:
        """The record of a shard that an earlier start, or another job, wrote whole and from the same."""
        try:
            with open(self._record_path(number), "rb") as file:
                done = Done.model_validate_json(file.read(MAX_RECORD_BYTES))
            if done.asked != self._asked(slots):
                return None
            if done.shard is not None:
                for name, sha256 in ((done.shard.name, done.shard.sha256), (done.shard.index, done.shard.index_sha256)):
                    if file_sha256(self.folder / name) != sha256:
                        return None
        except (OSError, ValidationError):
            return None
        return done

    def write(self, number: int, slots: range) -> Done:
        """Generates a shard."""
        units = list(self._units(slots))
        path = self.folder / f"{SHARD_PREFIX}{number:05d}.tar"
        done = Done(
            asked=self._asked(slots),
            shard=write_shard(path, units, dtype=token_dtype(self.tokenizer.vocab_size)) if units else None,
            left_out=len(slots) - len(units),
            **self._counts(units),
        )
        with atomic_write(self._record_path(number)) as file:
            file.write(done.model_dump_json().encode())
        return done

    def _units(self, slots: range) -> Iterator[PackedSequence]:
        """One for each slot whose prompt is one stretch of text."""
        P = self.record.prompt_tokens
        for start in range(slots.start, slots.stop, self.speaker.batch):
            read = self.stream.batch(range(start, min(start + self.speaker.batch, slots.stop)))
            usable_B = (read.labels[:, :P] != IGNORED_LABEL).all(dim=1)
            if not usable_B.any():
                continue
            prompts_BP, starts_BP = read.tokens[usable_B, :P], read.starts[usable_B, :P]
            new_BN = self._continued(prompts_BP, read.slots[usable_B])
            for prompt_P, starts_P, new_N in zip(prompts_BP, starts_BP, new_BN, strict=True):
                yield self._unit(prompt_P, starts_P, new_N)

    def _continued(self, prompts_BP: Tensor, slots_B: Tensor) -> Tensor:
        return continuations(
            self.speaker.model,
            prompts_BP,
            torch.stack([_uniforms(slot, self.record) for slot in slots_B.tolist()]),
            temperature=self.record.temperature,
            top_p=self.record.top_p,
            eos=self.tokenizer.eos,
            vocab_size=self.tokenizer.vocab_size,
        )

    def _unit(self, prompt_P: Tensor, starts_P: Tensor, new_N: Tensor) -> PackedSequence:
        P, eos = len(prompt_P), self.tokenizer.eos
        begins = np.flatnonzero(starts_P.numpy()).tolist()
        if prompt_P[-1] == eos:  # what follows is a document of its own
            begins.append(P)
        bounds = np.array([*begins, P + _length(new_N, eos)], dtype=np.int32)
        return PackedSequence(torch.cat([prompt_P, new_N]).to(torch.int32).numpy(), bounds)

    def _counts(self, units: list[PackedSequence]) -> dict[str, int]:
        written = [unit.tokens[: unit.bounds[-1]] for unit in units]
        return {
            "documents": sum(len(unit.bounds) - 1 for unit in units),
            "tokens": sum(len(tokens) - 1 for tokens in written),
            "text_bytes": sum(int(self.tokenizer.piece_bytes[tokens[1:]].sum()) for tokens in written),
            "new_tokens": sum(len(tokens) - self.record.prompt_tokens for tokens in written),
            "ended": sum(int(tokens[-1] == self.tokenizer.eos) for tokens in written),
        }

    def _asked(self, slots: range) -> str:
        asked = f"{self.record.model_dump_json()} {slots.start}:{slots.stop} {PACKER_VERSION} {FORMAT_VERSION}"
        return hashlib.sha256(asked.encode()).hexdigest()

    def _record_path(self, number: int) -> Path:
        return self.folder / f".{SHARD_PREFIX}{number:05d}.json"


def _length(new_N: Tensor, eos: int) -> int:
    """Up to and with the first `eos`."""
    ends = (new_N == eos).nonzero()
    return int(ends[0]) + 1 if len(ends) else len(new_N)


def _uniforms(slot: int, record: GeneratedRecord) -> Tensor:
    """[N] float64 in [0, 1): by seed and slot alone."""
    return torch.from_numpy(keyed_generator(record.seed, f"generate/{slot}").random(record.new_tokens))
