"""Checks of any real teacher, against transformers' own results or the file itself."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import real_models
from megadistill.distributed.topology import Topology
from megadistill.errors import UserError
from megadistill.teacher.pipeline import TeacherPipeline
from megadistill.teacher.stage import TeacherStage
from megadistill.types import TokenBatch, token_digest
from tests.e2e.commands import TORCHRUN_2, in_process, settings, succeed, succeeded
from tests.ranks.harness import run_ranks

TEXT = Path(__file__).parent / "known_text.txt"
"""The beginning of the Declaration of Independence, and most of the Gettysburg Address: every language model has read
them, so a model whose weights are in their places is little surprised by them."""

SEQUENCE = 128


def require(*packages: str) -> None:
    """Skips the tests where a package is missing."""
    try:
        real_models.refuse_missing(*packages)
    except UserError as error:
        pytest.skip(str(error))


def transformers_model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def assert_tensors_of_the_file(file: Path, folder: Path, names: dict[str, str], *, norm_offset: float = 0.0) -> None:
    """Compares with the format's own reader, which does not use transformers.

    `names`: of tensors in the file -> in the folder. `norm_offset`: what the file adds to the weights of norms.
    """
    gguf = pytest.importorskip("gguf")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    with safe_open(folder / "model.safetensors", framework="pt") as stored:
        for theirs, ours in names.items():
            expected = torch.tensor(gguf.dequantize(tensors[theirs].data, tensors[theirs].tensor_type))
            assert torch.equal(stored.get_tensor(ours), expected - norm_offset * ("norm" in ours)), ours


def _batch(tokens: Tensor, rank: int) -> TokenBatch:
    starts = torch.zeros_like(tokens, dtype=torch.bool)
    slots = torch.arange(len(tokens)) + 1000 * rank
    return TokenBatch(tokens=tokens, labels=tokens, slots=slots, digests=token_digest(tokens), starts=starts)


def _logits(topology: Topology, folder: str, tokens: Tensor) -> Tensor:
    """Logits of this rank's row, by the stages of the group and the head that the loss uses."""
    stage = TeacherStage.load(
        Path(folder),
        stage=topology.group_rank,
        stages=topology.group_size,
        dtype=torch.float32,
        device=topology.device,
    )
    row = tokens[topology.rank : topology.rank + 1]
    batch = _batch(row, topology.rank)
    (signal,) = TeacherPipeline(stage, topology).signals(iter([batch]))
    return signal.hidden_for(batch)


def assert_stages_give_transformers_logits(folder: Path, model: Any, stages: int) -> None:
    """Runs `stages` ranks, each with tokens of its own."""
    ids = AutoTokenizer.from_pretrained(folder)(TEXT.read_text(encoding="utf-8")).input_ids
    tokens = torch.tensor(ids[: stages * 96]).view(stages, 96)
    hidden = torch.stack(run_ranks(stages, _logits, str(folder), tokens, deadline=300))
    with torch.no_grad():
        actual, expected = model.lm_head(hidden), model(input_ids=tokens, use_cache=False).logits
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-3)


def tokenized(folder: Path, output: Path, *options: str) -> Path:
    """The manifest of the text, tokenized with the teacher's tokenizer."""
    what = ("--tokenizer", str(folder), "--sequence-length", str(SEQUENCE), "--heldout-fraction", "0", *options)
    succeeded(in_process("tokenize", str(TEXT), *what, "--output", str(output)))
    return output / "train" / "manifest.json"


def measured(model: Path, manifest: Path, *options: str) -> dict[str, float]:
    """The last model's result of `evaluate` on the tokens of the manifest."""
    written = manifest.parent.parent / f"{model.name}.json"
    what = ("--data", str(manifest), "--batch", "4", "--json", str(written), *options)
    succeeded(in_process("evaluate", str(model), *what))
    results: list[dict[str, float]] = json.loads(written.read_text(encoding="utf-8"))
    return results[-1]


def transformers_cross_entropy(folder: Path, model: Any) -> float:
    """Nats a predicted token, of the same text in the same pieces, each framed as the tokenizer frames a text."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(TEXT.read_text(encoding="utf-8"), add_special_tokens=False).input_ids
    frame = tokenizer("", add_special_tokens=True).input_ids
    length = SEQUENCE if frame else SEQUENCE + 1
    pieces = [frame + ids[start : start + length] for start in range(0, len(ids) - SEQUENCE, SEQUENCE)]
    losses = []
    for piece in pieces:
        tokens = torch.tensor([piece])
        with torch.no_grad():
            losses.append(float(model(input_ids=tokens, labels=tokens, use_cache=False).loss))
    return float(np.mean(losses))


def assert_a_student_learns(teacher: Path, manifest: Path, place: Path, *, vocab_size: int) -> None:
    """Four steps on two ranks, then everything that is done with a student."""
    changes = settings(
        data__manifest=manifest,
        teacher__path=teacher,
        run__folder=place / "distill",
        train__steps=4,
        train__global_batch=2,
        train__schedule__warmup_steps=1,
        train__checkpoint_every=4,
    )
    succeed(*TORCHRUN_2, "train", "recipes/smollm2.yaml", *changes, timeout=300)
    lines = [json.loads(line) for line in (place / "distill" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        assert line["teacher_ce"] < 5.0 < line["student_ce"], "one has read the text before, the other has not"
    assert lines[0]["student_ce"] == pytest.approx(math.log(vocab_size), rel=0.02)
    assert lines[-1]["kl"] < lines[0]["kl"] - 0.1
    student = place / "student"
    succeeded(in_process("export", str(place / "distill"), "--output", str(student)))
    after = measured(student, manifest, "--teacher", str(teacher), "--limit", "2")
    assert after["cross_entropy"] < lines[0]["student_ce"]
    assert 0 < after["kl"] < lines[0]["kl"]
    assert transformers_model(student).config.vocab_size == vocab_size
    what = ("--data", str(manifest), "--sequences", "1", "--prompt-tokens", "16", "--new-tokens", "4")
    assert succeeded(in_process("sample", str(student), *what)).out
