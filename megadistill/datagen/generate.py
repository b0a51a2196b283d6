"""Continuations of prompts from the stream by a teacher, written as a data set to train on.

Slots are dealt out to shards in order, and shards to the jobs that share the work, so what lies in a shard does not
depend on the job that writes it. The same call, started again, keeps complete shards and resumes.
"""

import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from rich.table import Table

from megadistill.data import Mixture, TokenStream, missing_bos
from megadistill.data.prepare.encode import disk_faults
from megadistill.data.prepare.output_lock import TOKENIZER_FOLDER
from megadistill.data.prepare.shard_tasks import SHARD_PATTERN, TRAIN
from megadistill.data.shards.manifest import (
    FORMAT_VERSION,
    GeneratedRecord,
    Manifest,
    PackerRecord,
    SourceRecord,
    token_dtype,
)
from megadistill.data.shards.shard_record import remove_unlisted
from megadistill.data.shards.shard_table import ShardTable
from megadistill.data.shards.tar import SAMPLE_FORMAT
from megadistill.data.tokenizers.data_files import read_files
from megadistill.data.tokenizers.tokenizer import Tokenizer, load_tokenizer, tokenizer_record
from megadistill.datagen.generated_shards import PACKER, PACKER_VERSION, GeneratedShard, Generator
from megadistill.errors import UserError
from megadistill.models.families import load_config
from megadistill.models.fingerprint import teacher_fingerprint
from megadistill.models.sampling import Sampling
from megadistill.models.weights import check_weights
from megadistill.progress import ShowProgress
from megadistill.teacher.tokenizer_check import require_same_ids
from megadistill.units import spell

SHARD_SLOTS: Final = 1024
logger = logging.getLogger(__name__)

MARKER: Final = ".generate"
"""File in the output until the manifest is written: it tells a folder of `generate` from any other."""


@dataclass(frozen=True)
class GenerateReport:
    """Result of `generate`, over the shards of this job."""

    output: Path
    finished: bool
    """Whether the manifest is written."""
    counts: Mapping[str, int]
    """Number of sequences, shards, tokens, and so on, by the name in the table."""
    seconds: float

    def table(self) -> Table:
        """A table for a terminal."""
        state = "finished" if self.finished else "the share of one job"
        title = f"{self.output}: {state}, {spell(self.seconds)}"
        table = Table("", title=title, title_justify="left", show_header=False)
        table.add_column("", justify="right")
        for name, count in self.counts.items():
            table.add_row(name, f"{count:,}")
        return table


def generate(
    teacher: Path,
    data: Mixture,
    output: Path,
    *,
    slots: range,
    order_seed: int,
    prompt_tokens: int,
    sampling: Sampling,
    batch: int,
    device: torch.device,
    progress: ShowProgress,
    shard_slots: int = SHARD_SLOTS,
    rank: int = 0,
    world: int = 1,
) -> GenerateReport:
    """Writes `output`/tokenizer and `output`/train: a sequence for each of `slots`, for `objective: labels`.

    A prompt is the first `prompt_tokens` of a slot, and its continuation is drawn by numbers that depend on (seed,
    slot) alone. `batch` prompts are read at a time; in float32 every batch gives the same bytes, unless a draw falls
    within the rounding of a product, and in bfloat16 the same batch does. The teacher reads a prompt as one text.

    Job `rank` of `world` writes its share of the shards. Jobs need not run at the same time; when all have ended, the
    same call with a world of 1 reuses their shards and writes the manifest.

    Raises:
        UserError: an argument, the teacher or the output folder cannot be used.
        ShardFault: a prompt cannot be read.
        OperatorFault: the logits are not finite, or the disk is full.
    """
    began = time.perf_counter()
    stream = TokenStream(data, seed=order_seed, batch_slots=1, rank=0, world_size=1)
    if not (slots.step == 1 and 0 <= slots.start < slots.stop):
        raise UserError(f"slots {slots.start} to {slots.stop}: give a first slot, and a larger one to stop before")
    if batch < 1 or shard_slots < 1:
        raise UserError(f"a batch of {batch} and shards of {shard_slots} slots: give at least 1 of each")
    if not 0 <= rank < world:
        raise UserError(f"job {rank} of {world}: jobs count from 0")
    _check_teacher(teacher, data, prompt_tokens, sampling.new_tokens)
    Manifest.refuse_finished(output / TRAIN)
    _refuse_foreign(output)
    record = GeneratedRecord(
        teacher=teacher_fingerprint(teacher),
        order=stream.fingerprint,
        insert_bos=data.insert_bos,
        first_slot=slots.start,
        stop_slot=slots.stop,
        prompt_tokens=prompt_tokens,
        new_tokens=sampling.new_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=sampling.seed,
    )
    with disk_faults(output):
        output.mkdir(parents=True, exist_ok=True)
        (output / MARKER).touch()
        (output / TRAIN).mkdir(exist_ok=True)
        tokenizer = _copy_tokenizer(data, output / TOKENIZER_FOLDER, rank=rank)
        generator = Generator(output / TRAIN, teacher, stream, tokenizer, record, sampling, batch, device)
        records, reused = _generate_shards(generator, _share(slots, shard_slots, rank, world), progress)
        if world == 1:
            _finish(generator, records, data, inputs=(teacher.resolve().name, *sorted(data.sources)))
    counts = {
        "sequences": sum(record.shard.sequences for record in records if record.shard),
        "shards": sum(record.shard is not None for record in records),
        "shards reused": reused,
        "tokens written": sum(record.new_tokens for record in records),
        "continuations that ended": sum(record.ended for record in records),
        "prompts left out": sum(record.left_out for record in records),
    }
    return GenerateReport(output, finished=world == 1, counts=counts, seconds=time.perf_counter() - began)


def _share(slots: range, shard_slots: int, rank: int, world: int) -> dict[int, range]:
    """The slots of each shard of a job, by the shard's number."""
    starts = range(0, len(slots), shard_slots)
    return {number: slots[start : start + shard_slots] for number, start in enumerate(starts) if number % world == rank}


def _generate_shards(
    generator: Generator, share: dict[int, range], progress: ShowProgress
) -> tuple[list[GeneratedShard], int]:
    """The record of each shard, and how many of them were complete before."""
    existing = {number: generator.existing(number, slots) for number, slots in share.items()}
    slot_bytes = generator.record.new_tokens * np.dtype(token_dtype(generator.tokenizer.vocab_size)).itemsize
    total = sum(len(share[number]) for number, record in existing.items() if record is None) * slot_bytes
    done = tokens = 0
    progress("generate", done=done, total=total, tokens=tokens)
    records = []
    for number, record in existing.items():
        if record is None:
            record = generator.generate(number, share[number])
            done, tokens = done + len(share[number]) * slot_bytes, tokens + record.new_tokens
            progress("generate", done=done, total=total, tokens=tokens)
        records.append(record)
    return records, sum(record is not None for record in existing.values())


def _finish(generator: Generator, records: list[GeneratedShard], data: Mixture, *, inputs: tuple[str, ...]) -> None:
    """Writes the manifest, and deletes the files that only a later start would have needed."""
    prompts, folder, tokenizer = generator.record, generator.folder, generator.tokenizer
    listed = tuple(record.shard for record in records if record.shard is not None)
    if not listed:
        raise UserError(
            f"no slot from {prompts.first_slot} to {prompts.stop_slot} has a prompt of {prompts.prompt_tokens} tokens "
            "of one document: give fewer --prompt-tokens"
        )
    Manifest(
        version=FORMAT_VERSION,
        split=TRAIN,
        sequence_length=prompts.prompt_tokens + prompts.new_tokens - 1,
        dtype=token_dtype(tokenizer.vocab_size),
        vocab_size=tokenizer.vocab_size,
        largest_id=max(record.largest_id for record in records),
        sample_format=SAMPLE_FORMAT,
        tokenizer=tokenizer_record(tokenizer, f"../{TOKENIZER_FOLDER}", folder.parent / TOKENIZER_FOLDER),
        packer=PackerRecord(
            name=PACKER,
            version=PACKER_VERSION,
            bos=data.bos,
            eos=tokenizer.eos,
            sequence_bos=data.begins_with_bos,
        ),
        documents=sum(record.documents for record in records),
        tokens=sum(record.tokens for record in records),
        text_bytes=sum(record.text_bytes for record in records) or None,
        source=SourceRecord(inputs=inputs, generated=prompts),
        shards=ShardTable.of(listed),
    ).write(folder)
    remove_unlisted(folder, SHARD_PATTERN, listed)
    (folder.parent / MARKER).unlink()


def _refuse_foreign(output: Path) -> None:
    if not output.exists() or (output / MARKER).exists() or (output.is_dir() and not any(output.iterdir())):
        return
    raise UserError(f"--output {output} exists and was not begun by `generate`: give another folder")


def _check_teacher(teacher: Path, data: Mixture, prompt_tokens: int, new_tokens: int) -> None:
    """Raises UserError: the teacher cannot continue these prompts."""
    if not 1 <= prompt_tokens <= data.sequence_length:
        raise UserError(
            f"--prompt-tokens {prompt_tokens}: the sequences of the data have {data.sequence_length} tokens: give 1 to "
            f"{data.sequence_length}"
        )
    config = load_config(teacher, what=f"teacher {teacher}")
    places, needed = config.max_position_embeddings, prompt_tokens + new_tokens
    if needed > places:
        raise UserError(
            f"--prompt-tokens {prompt_tokens} and --new-tokens {new_tokens} make {needed}, but the "
            f"teacher in {teacher} reads {places}: give fewer"
        )
    require_same_ids(teacher, config, data)
    if problem := missing_bos(teacher, data, key="--insert-bos"):
        logger.warning("--data: %s", problem)
    check_weights(teacher, config)


def _copy_tokenizer(data: Mixture, folder: Path, *, rank: int) -> Tokenizer:
    """The tokenizer of the data, copied to `folder`; jobs that do so at the same time write the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in read_files(data.first).items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        temporary = path.with_name(f".{path.name}.{rank}.tmp")
        temporary.write_bytes(content)
        os.replace(temporary, path)
    return load_tokenizer(folder / data.tokenizer.file.rpartition("/")[2])
