"""Room `teacher`: continuations of prompts from the stream, written as a data set to train on. It knows no student.

Slots are dealt out to shards in order, and shards to the jobs that share the work, so what lies in a shard does not
depend on who writes it. The same call, started again, keeps what is whole and goes on.
"""

import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from rich.table import Table

from megadistill.data import Mixture, TokenStream
from megadistill.data.prepare.encode import disk_faults
from megadistill.data.prepare.output_lock import TOKENIZER_FOLDER
from megadistill.data.prepare.shard_tasks import SHARD_PREFIX, TRAIN
from megadistill.data.shards.manifest import (
    FORMAT_VERSION,
    GeneratedRecord,
    Manifest,
    PackerRecord,
    SourceRecord,
    refuse_finished,
    token_dtype,
)
from megadistill.data.shards.tar import SAMPLE_FORMAT
from megadistill.data.tokenizers.base import Tokenizer, load_tokenizer, tokenizer_record
from megadistill.datagen.generated_shards import PACKER, PACKER_VERSION, Done, Shards, Speaker
from megadistill.errors import UserError
from megadistill.models.families import load_config
from megadistill.models.fingerprint import teacher_fingerprint
from megadistill.models.hf_export import TOKENIZER_FILES
from megadistill.models.sampling import require_drawable
from megadistill.models.weights import check_weights
from megadistill.progress import ShowProgress
from megadistill.teacher.tokenizer_check import require_same_ids

SHARD_SLOTS: Final = 1024
MAX_TOKENIZER_BYTES: Final = 256 << 20
BEGUN: Final = ".generate"
"""Lies in the output from the first moment until the manifest is written: what is there is no other command's."""


@dataclass(frozen=True)
class Sampling:
    """How continuations are drawn. At `temperature` 0 each is the most likely one, token by token.

    Raises:
        UserError: a number out of its range.
    """

    prompt_tokens: int
    new_tokens: int
    """At most."""
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 1

    def __post_init__(self) -> None:
        require_drawable(
            self.temperature, self.top_p, {"--prompt-tokens": self.prompt_tokens, "--new-tokens": self.new_tokens}
        )


@dataclass(frozen=True)
class GenerateReport:
    """What `generate` came to, over the shards of this job."""

    output: Path
    units: int
    shards: int
    finished: bool
    """The manifest is written."""
    new_tokens: int
    """That the teacher wrote."""
    ended: int
    """Continuations that came to their end."""
    left_out: int
    """Slots whose prompt is not one stretch of text: padding, or documents that were packed side by side."""
    kept: int
    """Shards that were there before."""
    seconds: float

    def table(self) -> Table:
        """For a person."""
        state = "finished" if self.finished else "the share of one job"
        shown = Table(
            title=f"{self.output}: {state}, {self.seconds:.0f} s",
            caption=f"{self.kept:,} shards were kept from an earlier start" if self.kept else None,
            title_justify="left",
            caption_justify="left",
            show_header=False,
        )
        shown.add_column("")
        shown.add_column("", justify="right")
        for heading, number in (
            ("sequences", self.units),
            ("shards", self.shards),
            ("tokens written", self.new_tokens),
            ("came to their end", self.ended),
            ("prompts left out", self.left_out),
        ):
            shown.add_row(heading, f"{number:,}")
        return shown


def generate(
    teacher: Path,
    data: Mixture,
    output: Path,
    *,
    slots: range,
    order_seed: int,
    sampling: Sampling,
    batch: int,
    device: torch.device,
    progress: ShowProgress,
    dtype: torch.dtype | None = None,
    shard_slots: int = SHARD_SLOTS,
    rank: int = 0,
    world: int = 1,
) -> GenerateReport:
    """Writes `output`/tokenizer and `output`/train: one unit for each of `slots`, which `objective: labels` trains on.

    What follows a prompt is drawn by numbers that depend on (seed, slot) alone. `batch` prompts are read at a time; in
    float32 any number gives the same bytes, unless a draw falls within the rounding of a product, and in bfloat16 the
    same number does. `dtype` is the teacher's; by default that of its weights. The teacher reads a prompt as one text.

    Job `rank` of `world` writes its share of the shards. Jobs need not run at the same time; when all have ended, the
    same call with a world of 1 finds their shards whole, and writes the manifest.

    Raises:
        UserError: an argument, the teacher or the output folder does not do; one line.
        ShardFault: a prompt cannot be read. OperatorFault: the logits are not finite, or the disk is full.
    """
    began = time.perf_counter()
    stream = TokenStream(data, seed=order_seed, batch_slots=1, rank=0, world_size=1)
    _check(teacher, data, sampling, slots=slots, batch=batch, shard_slots=shard_slots, rank=rank, world=world)
    refuse_finished(output / TRAIN)
    _refuse_foreign(output)
    record = GeneratedRecord(
        teacher=teacher_fingerprint(teacher),
        order=stream.fingerprint,
        first_slot=slots.start,
        stop_slot=slots.stop,
        prompt_tokens=sampling.prompt_tokens,
        new_tokens=sampling.new_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=sampling.seed,
    )
    with disk_faults(output):
        output.mkdir(parents=True, exist_ok=True)
        (output / BEGUN).touch()
        (output / TRAIN).mkdir(exist_ok=True)
        tokenizer = _kept_tokenizer(data, output / TOKENIZER_FOLDER, rank=rank)
        speaker = Speaker(teacher, batch=batch, device=device, dtype=dtype)
        shards = Shards(output / TRAIN, stream, speaker, tokenizer, record)
        done, kept = _written(shards, _share(slots, shard_slots, rank, world), progress)
        if world == 1:
            _finish(shards, done, data, inputs=(teacher.resolve().name, *sorted(data.sources)))
    return GenerateReport(
        output=output,
        units=sum(one.shard.sequences for one in done if one.shard),
        shards=sum(one.shard is not None for one in done),
        finished=world == 1,
        new_tokens=sum(one.new_tokens for one in done),
        ended=sum(one.ended for one in done),
        left_out=sum(one.left_out for one in done),
        kept=kept,
        seconds=time.perf_counter() - began,
    )


def _share(slots: range, shard_slots: int, rank: int, world: int) -> dict[int, range]:
    """The slots of each shard of a job, by the shard's number."""
    starts = range(0, len(slots), shard_slots)
    return {number: slots[start : start + shard_slots] for number, start in enumerate(starts) if number % world == rank}


def _written(shards: Shards, share: dict[int, range], progress: ShowProgress) -> tuple[list[Done], int]:
    """What became of each shard, and how many of them were whole before."""
    found = {number: shards.whole(number, slots) for number, slots in share.items()}
    kept = sum(done is not None for done in found.values())
    slot_bytes = shards.record.new_tokens * np.dtype(token_dtype(shards.tokenizer.vocab_size)).itemsize
    total = sum(len(share[number]) for number, done in found.items() if done is None) * slot_bytes
    written = tokens = 0
    progress("generate", done=written, total=total, tokens=tokens)
    finished = []
    for number, done in found.items():
        if done is None:
            done = shards.write(number, share[number])
            written, tokens = written + len(share[number]) * slot_bytes, tokens + done.new_tokens
            progress("generate", done=written, total=total, tokens=tokens)
        finished.append(done)
    return finished, kept


def _finish(shards: Shards, done: list[Done], data: Mixture, *, inputs: tuple[str, ...]) -> None:
    """Writes the manifest, and deletes what only a later start would have needed."""
    record, folder, tokenizer = shards.record, shards.folder, shards.tokenizer
    listed = tuple(one.shard for one in done if one.shard is not None)
    if not listed:
        raise UserError(
            f"no slot from {record.first_slot} to {record.stop_slot} has a prompt of {record.prompt_tokens} tokens "
            "of one document: give fewer --prompt-tokens"
        )
    Manifest(
        version=FORMAT_VERSION,
        split=TRAIN,
        sequence_length=record.prompt_tokens + record.new_tokens - 1,
        dtype=token_dtype(data.vocab_size),
        vocab_size=data.vocab_size,
        sample_format=SAMPLE_FORMAT,
        tokenizer=tokenizer_record(tokenizer, f"../{TOKENIZER_FOLDER}"),
        packer=PackerRecord(name=PACKER, version=PACKER_VERSION, bos=tokenizer.bos, eos=tokenizer.eos),
        documents=sum(one.documents for one in done),
        tokens=sum(one.tokens for one in done),
        text_bytes=sum(one.text_bytes for one in done) or None,
        source=SourceRecord(inputs=inputs, generated=record),
        shards=listed,
    ).write(folder)
    names = {name for shard in listed for name in (shard.name, shard.index)}
    for path in [*folder.glob(f"{SHARD_PREFIX}*.tar*"), *folder.glob(f".{SHARD_PREFIX}*")]:
        if path.name not in names:
            path.unlink()
    (folder.parent / BEGUN).unlink()


def _refuse_foreign(output: Path) -> None:
    if not output.exists() or (output / BEGUN).exists() or (output.is_dir() and not any(output.iterdir())):
        return
    raise UserError(f"--output {output} exists, and nothing says that generate began it: give another folder")


def _check(
    teacher: Path,
    data: Mixture,
    sampling: Sampling,
    *,
    slots: range,
    batch: int,
    shard_slots: int,
    rank: int,
    world: int,
) -> None:
    if not (slots.step == 1 and 0 <= slots.start < slots.stop):
        raise UserError(
            f"slots {slots.start} to {slots.stop} are no prompts: give a first slot, and one behind the last"
        )
    if batch < 1 or shard_slots < 1:
        raise UserError(f"a batch of {batch} and shards of {shard_slots} slots: give at least 1 of each")
    if not 0 <= rank < world:
        raise UserError(f"job {rank} of {world}: jobs count from 0")
    if sampling.prompt_tokens > data.sequence_length:
        raise UserError(
            f"--prompt-tokens {sampling.prompt_tokens}: the sequences of the data have {data.sequence_length} tokens: "
            "give at most as many"
        )
    config = load_config(teacher, what=f"teacher {teacher}")
    places, needed = config.max_position_embeddings, sampling.prompt_tokens + sampling.new_tokens
    if needed > places:
        raise UserError(
            f"--prompt-tokens {sampling.prompt_tokens} and --new-tokens {sampling.new_tokens} make {needed}, but the "
            f"teacher in {teacher} reads {places}: give fewer"
        )
    require_same_ids(teacher, config, data)
    check_weights(teacher, config)


def _kept_tokenizer(data: Mixture, folder: Path, *, rank: int) -> Tokenizer:
    """The tokenizer of the data, copied to `folder`; jobs that do so at the same time write the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        with suppress(FileNotFoundError):
            temporary = folder / f".{name}.{rank}.tmp"
            temporary.write_bytes(data.tokenizer_file(name, max_bytes=MAX_TOKENIZER_BYTES))
            os.replace(temporary, folder / name)
    return load_tokenizer(folder / data.tokenizer.file.rpartition("/")[2])
