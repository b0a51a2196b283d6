"""Cost of the teacher in a run: a colocated step against its parts alone, and the bubble of a pipeline that drains at
each step against one that runs ahead. Prints tables and appends every number to a CSV file.

    python -m benchmarks.teacher --help
"""

import tempfile
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from benchmarks.measure import Run, Spread, ranks, rounds
from benchmarks.report import Report, cell, parser
from megadistill.config.recipe import Recipe
from megadistill.data.shards.manifest import (
    Manifest,
    PackerRecord,
    SampleFormat,
    SourceRecord,
    TokenizerRecord,
    token_dtype,
)
from megadistill.data.shards.packing import PackedSequence
from megadistill.data.shards.shard_table import ShardTable
from megadistill.data.shards.tar import write_shard
from megadistill.distributed.launch import Launch
from megadistill.distributed.topology import Topology
from megadistill.loss import Head, distill_loss
from megadistill.models.families import load_config
from megadistill.timeline.clock import HostClock
from megadistill.timeline.recorder import Recorder
from megadistill.train.build import build, objective_of, stream_of
from megadistill.train.lookahead import StepBatches
from megadistill.train.setup.setup import Setup, prepare
from megadistill.train.step import train_step
from megadistill.train.teacher.live import ColocatedTeacher
from megadistill.types import TokenBatch

QUESTIONS = ("step", "bubble")
MEASURED = ("megadistill", "benchmarks/*.py")
SEQUENCE, VOCAB, MICRO, ACCUMULATION = 256, 4096, 2, 4
STUDENT = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4}
TEACHER = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8}

HELP = """\
questions (both, when --only does not choose):
  step     two ranks of one thread each: a whole colocated step, in turn with its parts run alone on the same cores
           (the student's layers forward and backward with the optimizer; this rank's stage on both micro-batches; the
           loss on hidden states that lie there), and of another step the time that a rank waits for other stages
  bubble   2 and 4 stages, the teacher alone: idle ticks of a stage, and the time of a step, when the
           pipeline is drained at the end of each step and when it runs ahead through all of them

a ratio is the median over rounds of this / that in the same round; a machine with fewer cores than ranks shows the
bubble in ticks alone, since an idle stage gives its core to another one"""


def write_inputs(
    folder: Path,
    *,
    sequence: int = SEQUENCE,
    vocab: int = VOCAB,
    teacher: dict[str, int] = TEACHER,
    sequences: int = 512,
) -> Path:
    """A random teacher and random sequences."""
    tokens = np.random.default_rng(0).integers(0, vocab, (sequences, sequence + 1)).astype(np.int32)
    data = folder / "data"
    data.mkdir(parents=True)
    (data / "tokenizer.model").write_bytes(b"random")
    bounds = np.array([0, sequence + 1], dtype=np.int32)
    dtype = token_dtype(vocab)
    shard = write_shard(data / "shard-00000.tar", (PackedSequence(row, bounds) for row in tokens), dtype=dtype)
    Manifest(
        version=3,
        split="train",
        sequence_length=sequence,
        dtype=dtype,
        vocab_size=vocab,
        sample_format=SampleFormat(kind="npy", tokens="tokens.npy", bounds="bounds.npy"),
        tokenizer=TokenizerRecord(kind="sentencepiece", file="tokenizer.model", sha256="0" * 64),
        packer=PackerRecord(name="chunk", version=2, bos=None, eos=2),
        documents=None,
        tokens=sequences * sequence,
        text_bytes=None,
        source=SourceRecord(inputs=("random",)),
        shards=ShardTable.of([shard]),
    ).write(data)
    disable_progress_bar()
    sizes = {"model_type": "llama", "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": vocab}
    config = load_config({**sizes, **teacher, "max_position_embeddings": sequence}, what="teacher")
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "teacher")
    (folder / "map.json").write_text(str(list(range(vocab))))
    return folder


def setup_of(topology: Topology, folder: Path) -> Setup:
    config = {"model_type": "llama", "num_attention_heads": 8, "num_key_value_heads": 4, **STUDENT}
    values: dict[str, Any] = {
        "objective": "distill",
        "run": {"folder": str(folder / "run")},
        "data": {"manifest": str(folder / "data" / "manifest.json")},
        "student": {"config": {**config, "max_position_embeddings": SEQUENCE}},
        "teacher": {"path": str(folder / "teacher"), "vocab_map": str(folder / "map.json")},
        "train": {
            "steps": 1_000_000,
            "global_batch": topology.world * MICRO * ACCUMULATION,
            "micro_batch": MICRO,
            "precision": "float32",
            "optimizer": {"learning_rate": 1e-3},
        },
    }
    launch = Launch(topology.rank, topology.world, topology.local_rank, topology.world)
    return prepare(Recipe.model_validate(values), launch)


def step_runs(topology: Topology, folder: Path) -> dict[str, Run]:
    """A whole step, and its parts, of one rank."""
    setup = setup_of(topology, folder)
    student, teacher = build(setup, topology)
    student.draw_weights(setup.recipe.run.seed)
    assert isinstance(teacher, ColocatedTeacher)
    pipeline, objective = teacher.pipeline, objective_of(setup)
    batches = StepBatches(iter(stream_of(setup, topology, start=None)), teacher, micro_batch=MICRO)
    valid = MICRO * ACCUMULATION * SEQUENCE

    def step() -> None:
        train_step(
            student,
            next(batches),
            step=1,
            learning_rate=1e-6,
            objective=objective,
            topology=topology,
        )

    def waiting() -> float:
        recorder = Recorder(HostClock())
        recorder.start()
        step()
        recorder.stop()
        stages = ("wait for packet", "wait for answer", "send answers", "flush")
        return sum(span.end - span.begin for span in recorder.recorded()[0] if span.name in stages)

    tokens = torch.randint(VOCAB, (MICRO, SEQUENCE))

    def student_alone() -> None:
        for _ in range(ACCUMULATION):
            alone: Any = student
            student.head.gradient().empty = False  # the head's gradient is not of interest
            alone.backward(student.hidden(tokens).mean())
            student.step(1e-6)

    entering = tokens if pipeline.stage.is_first else torch.randn(MICRO, SEQUENCE, TEACHER["hidden_size"])

    def stage_alone() -> None:
        for _ in range(ACCUMULATION * topology.group_size):
            pipeline.stage(entering)

    hidden = torch.randn(MICRO * SEQUENCE, STUDENT["hidden_size"], requires_grad=True)
    teacher_hidden = torch.randn(MICRO * SEQUENCE, TEACHER["hidden_size"])
    labels, weights = tokens.flatten(), torch.full((MICRO * SEQUENCE,), 1 / valid)
    head = student.head.weight().detach().clone().requires_grad_()

    def loss_alone() -> None:
        for _ in range(ACCUMULATION):
            distill_loss(
                Head(hidden, head),
                teacher.head_on(teacher_hidden),
                labels,
                token_weights=weights,
                divergence=objective.divergence(1),
                vocab=student.head.vocab,
            ).loss.backward()  # type: ignore[no-untyped-call]

    return {
        "whole step": step,
        "student": student_alone,
        "stage": stage_alone,
        "loss": loss_alone,
        "of a step, waiting for other stages": waiting,
    }


def bubble_runs(topology: Topology, folder: Path) -> dict[str, Run]:
    """Eight steps of the teacher alone, drained at each step or not."""
    setup = setup_of(topology, folder)
    _, teacher = build(setup, topology)
    assert isinstance(teacher, ColocatedTeacher)
    pipeline: Any = teacher.pipeline
    tokens = torch.randint(VOCAB, (MICRO, SEQUENCE))
    batch = TokenBatch(tokens, tokens, torch.arange(MICRO), torch.zeros(MICRO, dtype=torch.int64), tokens < 0)

    def steps(count: int) -> None:
        for _ in range(count):
            with closing(pipeline.signals(iter([batch] * (8 // count * ACCUMULATION)))) as signals:
                for _ in signals:
                    pass

    return {"drained": partial(steps, 8), "ahead": partial(steps, 1)}


def _timed(slower: Callable[[str], float], names: list[str], repeats: int) -> dict[str, list[float]]:
    for name in names:
        slower(name)
    return rounds({name: partial(slower, name) for name in names}, repeats)


def step_question(folder: Path, report: Report) -> None:
    widths = (f"{sizes['hidden_size']} x {sizes['num_hidden_layers']} layers" for sizes in (STUDENT, TEACHER))
    shape = f"student {next(widths)}, teacher {next(widths)}, V {VOCAB}"
    parts = ["student", "stage", "loss"]
    with ranks(2, step_runs, folder) as slower:
        times = _timed(slower, ["whole step", *parts, "of a step, waiting for other stages"], report.repeats)
    together = [sum(values) for values in zip(*(times[part] for part in parts), strict=True)]
    table = report.table(f"step, 2 ranks: {shape}", "", "ms a step", "to the parts together")
    for name, own in {**times, "parts together": together}.items():
        ratio = Spread.of_ratios(own, together)
        report.add("step", shape, name, Spread.of(own), ratio=ratio, to="parts together")
        table.add_row(name, f"{Spread.of(own).median * 1e3:.0f}", cell(ratio))
    report.console.print(table)


def bubble_question(folder: Path, report: Report) -> None:
    for stages in (2, 4):
        shape = f"{stages} stages, {ACCUMULATION} rounds a step"
        with ranks(stages, bubble_runs, folder) as slower:
            times = _timed(slower, ["drained", "ahead"], report.repeats)
        rounds_ = 8 * ACCUMULATION
        ticks = {"drained": 8 * (ACCUMULATION + stages - 1), "ahead": rounds_ + stages - 1}
        table = report.table(f"bubble: {shape}, 8 steps", "", "idle ticks of a stage", "ms a step", "to ahead")
        for name, own in times.items():
            ratio = Spread.of_ratios(own, times["ahead"])
            report.add("bubble", shape, name, Spread.of(own), ratio=ratio, to="ahead")
            idle = 1 - rounds_ / ticks[name]
            report.add("bubble", shape, f"{name}, idle ticks", idle, unit="share")
            table.add_row(name, f"{idle:.1%}", f"{Spread.of(own).median / 8 * 1e3:.0f}", cell(ratio))
        report.console.print(table)


def main() -> None:
    arguments = parser("teacher", __doc__, HELP, QUESTIONS).parse_args()
    report = Report(threads=1, repeats=arguments.repeats, measured=MEASURED)
    report.print_machine()
    with tempfile.TemporaryDirectory() as name:
        folder = write_inputs(Path(name))
        if "step" in arguments.only:
            step_question(folder, report)
        if "bubble" in arguments.only:
            bubble_question(folder, report)
    if not arguments.no_csv:
        report.append_to(arguments.csv)


if __name__ == "__main__":
    main()
