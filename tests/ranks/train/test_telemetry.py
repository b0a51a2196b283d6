"""Norms, a profile and a tracker that hangs, all at once: a run of real ranks has the numbers of a run without."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from torch.utils.flop_counter import FlopCounterMode

from megadistill.config.recipe import Recipe
from megadistill.data import Manifest
from megadistill.distributed.launch import Launch
from megadistill.distributed.topology import Topology
from megadistill.models.families import build_causal_lm, load_config
from megadistill.tracking import process
from megadistill.train import loop
from megadistill.train.setup.setup import prepare
from tests.ranks.harness import run_ranks
from tests.ranks.train import test_loop as loops

manifest, teacher = loops.manifest, loops.teacher  # the fixtures

RANKS, STEPS, FIRST, LAST = 2, 4, 2, 3
TELEMETRY: dict[str, Any] = {
    "track": ["tensorboard", "wandb"],
    "profile": {"steps": [FIRST, LAST], "ranks": [1], "memory_snapshot": False},
}
FAKE = Path(__file__).parents[2] / "unit" / "tracking" / "fake_wandb.py"


def _distill(topology: Topology, manifest: str, folder: str, teacher: str, packages: str | None) -> None:
    import os
    import sys

    base = loops.recipe(Path(manifest), Path(folder)).snapshot()
    changes: dict[str, Any] = {
        "objective": "distill",
        "teacher": {"path": teacher},
        "train": {**base["train"], "steps": STEPS, "norms_every": 0 if packages is None else 2, "max_grad_norm": 1e-3},
    }
    if packages is not None:
        sys.path.insert(0, packages)
        os.environ.update(
            PYTHONPATH=os.pathsep.join([packages, *sys.path]),
            FAKE_WANDB="blocks in log",
            FAKE_FOLDER=packages,
            WANDB_API_KEY="a-key",
        )
        process.CLOSE_SECONDS = loop.CLOSE_SECONDS = 0.2  # type: ignore[attr-defined]  # this process is the test's own
        changes |= TELEMETRY
    setup = prepare(
        Recipe.model_validate({**base, **changes}), Launch(topology.rank, RANKS, topology.local_rank, RANKS)
    )
    loop.run(setup, topology, stop_after=None)


@pytest.fixture(scope="module")
def runs(manifest: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of a run without telemetry, and of one with all of it and a tracker that never answers."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "packages").mkdir()
    (folder / "packages" / "wandb.py").write_text(FAKE.read_text(encoding="utf-8"), encoding="utf-8")
    for name, packages in (("plain", None), ("watched", str(folder / "packages"))):
        run_ranks(RANKS, _distill, str(manifest), str(folder / name), str(teacher), packages)
    return folder / "plain", folder / "watched"


def test_no_number_of_the_run_moves(runs: tuple[Path, Path]) -> None:
    plain, watched = (loops._numbers(folder) for folder in runs)
    norms = [line.pop("norms", None) for line in watched]
    assert plain == watched, "to the bit"
    assert [each is not None for each in norms] == [False, True, False, True]
    assert all((folder / "DONE").exists() for folder in runs)


def test_norms_are_in_the_metrics(runs: tuple[Path, Path]) -> None:
    for line in loops._numbers(runs[1])[1::2]:
        norms = line["norms"]
        assert norms["gradient"]["total"] == pytest.approx(line["grad_norm"], rel=1e-9)
        assert norms["clipped_steps"] == 1.0
        assert norms["expected_logit"] == pytest.approx(line["log_z"] - line["student_entropy"])
        assert 0 < norms["update"]["layers.0"] < norms["weight"]["layers.0"] < norms["weight"]["total"]


def test_a_tracker_that_hangs_is_ended_with_the_run(runs: tuple[Path, Path]) -> None:
    log = (runs[1] / "log.txt").read_text(encoding="utf-8")
    assert "tracker wandb has not finished within 0.2 s and was ended" in log


def test_the_trace_has_the_runs_spans(runs: tuple[Path, Path]) -> None:
    assert sorted(path.name for path in (runs[1] / "profile").iterdir()) == [
        "rank-00001-parts.json",
        "rank-00001.json.gz",
    ]
    with gzip.open(runs[1] / "profile" / "rank-00001.json.gz", "rt", encoding="utf-8") as file:
        events = json.load(file)["traceEvents"]
    ranges = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    micros = loops.BATCH // RANKS * (LAST - FIRST + 1)
    for name in ("student forward", "loss", "student backward", "teacher stage 1"):
        assert ranges.count(name) == micros, name
    assert {name for name in ranges if name.startswith("step ")} == {f"step {n}" for n in range(FIRST, LAST + 1)}
    products = [event for event in events if event.get("name") == "aten::mm"]
    assert products
    assert all("Input Dims" in event["args"] for event in products)


def test_flops_by_part_are_those_of_torchs_counter(runs: tuple[Path, Path], manifest: Path, teacher: Path) -> None:
    """Of the students' matrix products; the head's are the loss's."""
    profiled = json.loads((runs[1] / "profile" / "rank-00001-parts.json").read_text(encoding="utf-8"))
    assert profiled["steps"] == [FIRST, LAST]
    parts = {part["part"]: part for part in profiled["parts"]}
    assert {*parts} == {"student", "loss", "teacher stage"}
    teacher_config = load_config(teacher, what="test")
    vocab, rows = teacher_config.vocab_size, loops.BATCH // RANKS * len(profiled["steps"])
    length = Manifest.load(manifest).sequence_length
    (body, head), (_, teacher_head) = (
        _counted(load_config(source, what="test"), vocab, rows, length) for source in (loops.STUDENT, teacher)
    )
    assert parts["loss"]["flops"] == pytest.approx(3 * head + teacher_head, rel=1e-6)
    assert parts["student"]["flops"] == pytest.approx(3 * body, rel=0.02), "but for norms and rotary embeddings"
    for part in parts.values():
        assert part["seconds"] > 0
        assert part["flops_per_second"] == pytest.approx(part["flops"] / part["seconds"])
        assert part["mfu"] is None, "nobody knows the peak of a CPU"


def _counted(config: Any, vocab: int, rows: int, length: int) -> tuple[int, int]:
    """FLOPs of a forward pass of transformers' model: all but the head, and the head. Attention is causal: a half."""
    import torch

    config.vocab_size = vocab
    model = build_causal_lm(config, vocab_size=vocab, dtype=torch.float32, attention="eager")
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(input_ids=torch.zeros(rows, length, dtype=torch.long), use_cache=False)
    attention = counter.get_flop_counts()["Global"][torch.ops.aten.bmm]
    head = 2 * rows * length * vocab * config.hidden_size
    return counter.get_total_flops() - head - attention // 2, head
