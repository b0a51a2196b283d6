"""The MFU that a run measures, from its metrics to the options of a plan that the report prints."""

import html
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM
from typing_extensions import override

from megadistill.accelerators import accelerator
from megadistill.config.recipe import Recipe
from megadistill.distributed.launch import Launch
from megadistill.distributed.topology import Topology
from megadistill.models.families import load_config
from megadistill.plan.estimate import estimate
from megadistill.plan.layouts import Cluster, place
from megadistill.plan.plan_input import read_plan_input
from megadistill.plan.throughput import MfuAssumption
from megadistill.report.page import report
from megadistill.timeline.clock import HostClock
from megadistill.train import loop
from megadistill.train.setup.setup import prepare
from megadistill.train.telemetry import metrics
from tests.ranks.harness import run_ranks
from tests.ranks.train import test_loop as loops

manifest, teacher = loops.manifest, loops.teacher  # the fixtures

RANKS, ACCUMULATION = 2, 2
PEAK = 40e6
"""FLOP/s."""


class _Counter(HostClock):
    """A second from each moment to the next."""

    def __init__(self) -> None:
        self.now = 0.0

    @override
    def moment(self) -> float:
        self.now += 1
        return self.now


def _recipe(manifest: Path, folder: Path, teacher: Path) -> Recipe:
    base = loops.recipe(manifest, folder).snapshot()
    changes: dict[str, Any] = {
        "objective": "distill",
        "teacher": {"path": str(teacher)},
        "student": {**base["student"], "activation_checkpointing": "full"},
        "train": {**base["train"], "steps": 3, "micro_batch": loops.BATCH // RANKS // ACCUMULATION},
        "distributed": {**base["distributed"], "vocab_group": RANKS},
    }
    return Recipe.model_validate({**base, **changes})


def _distill(topology: Topology, manifest: str, folder: str, teacher: str) -> None:
    loop.clock_for = lambda device: _Counter()  # type: ignore[attr-defined]  # this process is the test's own
    metrics.peak_flops = lambda device, precision: PEAK
    made = _recipe(Path(manifest), Path(folder), Path(teacher))
    loop.run(prepare(made, Launch(topology.rank, RANKS, topology.local_rank, RANKS)), topology, stop_after=None)


def _forward(config: Any, sequence: int) -> tuple[int, int]:
    """FLOPs of a token in the layers with the last norm, and in the head, counted from transformers' own model."""
    model = AutoModelForCausalLM.from_config(config)
    matrices = sum(weight.numel() for weight in model.parameters())
    embeddings = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    attention = 2 * config.num_hidden_layers * sequence * config.hidden_size
    return 2 * (matrices - embeddings) + attention, 2 * config.vocab_size * config.hidden_size


def test_the_report_prints_the_quotient_and_plan_gives_the_seconds_back(
    manifest: Path, teacher: Path, tmp_path: Path
) -> None:
    """Each part of a step takes a second: a forward pass, a loss, a backward pass with the optimizer, a stage."""
    folder = tmp_path / "run"
    run_ranks(RANKS, _distill, str(manifest), str(folder), str(teacher), vocab_group=RANKS)
    made = _recipe(manifest, folder, teacher)
    page = html.unescape(report([folder], evaluations=[], output=None, now=0.0).read_text(encoding="utf-8"))
    printed = re.search(r"megadistill plan … --student-mfu (\S+) --teacher-mfu (\S+)</code>", page)
    assert printed is not None
    student_mfu, teacher_mfu = map(float, printed.groups())

    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    student_seconds, loss_seconds = 2 * ACCUMULATION, ACCUMULATION
    assert [(line["student_seconds"], line["loss_seconds"]) for line in lines] == [(student_seconds, loss_seconds)] * 3
    assert all(line["teacher_seconds"] > line["wait_seconds"] > 0 for line in lines)
    config, teacher_config = (load_config(path, what="test") for path in (loops.STUDENT, teacher))
    config.vocab_size = teacher_config.vocab_size
    length = prepare(made, Launch(0, RANKS, 0, RANKS)).data.sequence_length
    (body, head), (teacher_body, teacher_head) = _forward(config, length), _forward(teacher_config, length)
    tokens = loops.BATCH // RANKS * length
    flops = tokens * (3 * (body + head) + body + teacher_head)  # the layers once more for checkpointing
    assert student_mfu == pytest.approx(flops / (student_seconds + loss_seconds) / PEAK, rel=0.01)
    norm = 2 * teacher_config.hidden_size  # the last one is nobody's layer
    round_flops = RANKS * tokens // ACCUMULATION * (teacher_body - norm) // 2  # of the two layers, one
    assert teacher_mfu == pytest.approx(round_flops / 1.0 / PEAK, rel=0.01)

    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(made.snapshot()), encoding="utf-8")
    kind = accelerator("h100").model_copy(update={"peak_tflops": {"float32": PEAK / 1e12}})
    cluster, inputs = Cluster(1, RANKS, kind), read_plan_input(tmp_path / "recipe.yaml")
    planned = estimate(place(inputs.recipe, inputs, cluster), cluster, MfuAssumption(student_mfu, teacher_mfu))
    assert planned.times.compute == pytest.approx((student_seconds + loss_seconds) / ACCUMULATION, rel=0.01)
    assert planned.times.tick == pytest.approx(1.0, rel=0.01)
