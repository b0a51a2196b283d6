"""An evaluation that ranks share: the numbers of one process, from any number of them."""

from dataclasses import asdict
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megadistill.distributed.launch import Launch
from megadistill.distributed.topology import Topology
from megadistill.evaluate.evaluate import evaluate, ranks
from megadistill.evaluate.evaluation import Evaluation
from megadistill.heldout.splits import load_splits
from megadistill.loss import Head, LossOptions, TokenTerms, VocabSlice, token_terms
from megadistill.models.families import load_config
from tests.ranks.harness import run_ranks
from tests.unit.data.splits import random_sequences, write_split
from tests.unit.loss.problems import problem

VOCAB, SEQUENCE = 120, 12


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two splits, one of whole documents; a teacher and a student."""
    folder = tmp_path_factory.mktemp("shared")
    packers: tuple[tuple[str, int, Literal["chunk", "bestfit"]], ...] = (("web", 9, "chunk"), ("code", 4, "bestfit"))
    for name, count, packer in packers:
        units = random_sequences(count, seed=count, sequence=SEQUENCE, vocab=VOCAB, full=packer == "chunk")
        write_split(folder / name, units, vocab=VOCAB, packer=packer, text_bytes=500)
    for seed, name in enumerate(("student", "teacher")):
        torch.manual_seed(seed)
        config = {
            "model_type": "llama",
            "vocab_size": VOCAB,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "max_position_embeddings": 32,
            "initializer_range": 0.3,
        }
        AutoModelForCausalLM.from_config(load_config(config, what="test")).save_pretrained(folder / name)
    return folder


def _measured(topology: Topology, folder: Path) -> tuple[list[Evaluation], int]:
    calls: list[int] = []
    results = evaluate(
        [folder / "student"],
        load_splits([str(folder / name / "manifest.json") for name in ("web", "code")]),
        teacher=folder / "teacher",
        batch=2,
        topology=topology,
        progress=lambda stage, *, done, total, tokens=None: calls.append(done),
    )
    return results, len(calls)


def _flat(value: object) -> list[float]:
    if isinstance(value, dict | list | tuple):
        return [number for one in (value.values() if isinstance(value, dict) else value) for number in _flat(one)]
    return [float(value)] if isinstance(value, int | float) else []


@pytest.mark.parametrize("world", [2, 8])
def test_any_number_of_ranks_finds_what_one_process_finds(place: Path, world: int) -> None:
    """Seven batches: with eight ranks one of them has none."""
    with ranks(Launch(rank=0, world=1, local_rank=0, local_world=1)) as alone:
        torch.set_num_threads(1)
        expected, _ = _measured(alone, place)
    numbers = [_flat(asdict(model)) for model in expected]
    assert len(numbers[1]) > 100
    by_rank = run_ranks(world, _measured, place)
    for results, _ in by_rank:
        for model, truth in zip(results, numbers, strict=True):
            np.testing.assert_allclose(_flat(asdict(model)), truth, rtol=1e-9, atol=1e-15)
    assert [count > 0 for _, count in by_rank] == [True] + [False] * (world - 1), "the first rank alone shows progress"


def _split_vocabulary(topology: Topology, counts: list[int]) -> TokenTerms:
    p, rank = problem(3, tokens=sum(counts)), topology.rank
    start, stop = (0, 7, 7, len(p.student_weight))[rank : rank + 2]
    mine = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    return token_terms(
        Head(p.student_hidden[mine], p.student_weight[start:stop]),
        p.labels[mine],
        vocab=VocabSlice.contiguous(start, stop, size=p.size, group=topology.vocab_group),
        teacher=Head(p.teacher_hidden[mine], p.teacher_weight[start:stop]),
        options=LossOptions(logit_memory=2000),
    )


def test_a_vocabulary_over_ranks_says_the_same_of_each_token() -> None:
    """Uneven numbers of tokens, and a rank without rows."""
    counts = [9, 0, 20]
    p = problem(3, tokens=sum(counts))
    whole = token_terms(
        p.student,
        p.labels,
        vocab=VocabSlice.contiguous(0, len(p.student_weight), size=p.size),
        teacher=p.teacher,
    )
    parts = run_ranks(3, _split_vocabulary, counts)
    for name in ("cross_entropy", "entropy", "confidence", "correct"):
        together = torch.cat([getattr(part, name) for part in parts])
        torch.testing.assert_close(together, getattr(whole, name), rtol=1e-12, atol=1e-12)
    for name, truth in vars(whole.teacher).items():
        together = torch.cat([getattr(part.teacher, name) for part in parts])
        torch.testing.assert_close(together, truth, rtol=1e-12, atol=1e-12)
