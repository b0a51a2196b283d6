"""lm-evaluation-harness on an exported folder, with tasks whose questions lie beside them: nothing is fetched."""

import importlib
import importlib.metadata
import importlib.util
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megadistill.errors import UserError
from megadistill.evaluate import lm_eval
from megadistill.evaluate.lm_eval import Score, TaskScores, run_tasks
from tests.unit.evaluate.test_sample import model  # noqa: F401

installed = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="lm-evaluation-harness is not installed: pip install 'megadistill[lm-eval]'",
)

TEXTS = ["def hello(name: str) -> str:", "    return f'hello {name}'"]
CHOICES: list[dict[str, Any]] = [
    {"question": "def hello(", "choices": ["name", "é漢", "of many"], "answer": 0},
    {"question": "this is", "choices": ["\n\n", " text number"], "answer": 1},
    {"question": "return f", "choices": ["str", "'hello"], "answer": 1},
]
TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{text}"
doc_to_target: "{target}"
{rest}
metric_list:
  - metric: {metric}
    aggregation: {aggregation}
    higher_is_better: true
"""


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """The files of `own_text` and `own_choice`."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, rows in (("own_text", [{"text": text} for text in TEXTS]), ("own_choice", CHOICES)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = {"kind": "loglikelihood_rolling", "text": "", "target": "{{text}}", "rest": ""}
    choice = {"kind": "multiple_choice", "text": "{{question}}", "target": "{{answer}}"}
    for name, words in (
        ("own_text", {**text, "metric": "bits_per_byte", "aggregation": "bits_per_byte"}),
        ("own_choice", {**choice, "rest": 'doc_to_choice: "{{choices}}"', "metric": "acc", "aggregation": "mean"}),
    ):
        task = TASK.format(name=name, file=folder / f"{name}.jsonl", **words)
        (folder / f"{name}.yaml").write_text(task)
    return folder


def _nats(folder: Path, before: list[int], after: list[int]) -> float:
    """-ln p of `after`, dense and in float64."""
    causal = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        log_p = causal(torch.tensor([before + after])).logits[0, :-1].double().log_softmax(-1)
    return float(-log_p[len(before) - 1 :].gather(1, torch.tensor(after)[:, None]).sum())


def _run(folder: Path, tasks: list[str], include: Path | None) -> TaskScores:
    options = {"fewshot": None, "batch": 2, "limit": None, "device": torch.device("cpu")}
    return run_tasks(folder, tasks, include=include, **options)  # type: ignore[arg-type]


@installed
def test_the_harness_measures_what_the_model_says(
    model: Path,  # noqa: F811
    tasks: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    config = importlib.import_module("datasets").config
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
    plain = shutil.copytree(model, tmp_path / "plain")
    rules = json.loads((plain / "tokenizer.json").read_text())
    (plain / "tokenizer.json").write_text(json.dumps({**rules, "post_processor": None}))
    scored = _run(plain, ["own_text", "own_choice"], tasks)
    assert scored.harness == importlib.metadata.version("lm_eval")
    scores = {(score.task, score.metric): score for score in scored.scores}

    tokenizer = AutoTokenizer.from_pretrained(plain)
    assert tokenizer.bos_token_id is not None, "it has one, which no document begins with"
    nats = [_nats(plain, [tokenizer.eos_token_id], tokenizer(text)["input_ids"]) for text in TEXTS]
    bits = sum(nats) / math.log(2) / sum(len(text.encode()) for text in TEXTS)
    assert scores["own_text", "bits_per_byte"].value == pytest.approx(bits, rel=1e-5)

    right = 0
    for row in CHOICES:
        before = tokenizer(row["question"])["input_ids"]
        choices = row["choices"]
        assert isinstance(choices, list)
        costs = [
            _nats(model, before, tokenizer(row["question"] + choice)["input_ids"][len(before) :]) for choice in choices
        ]
        right += costs.index(min(costs)) == row["answer"]
    accuracy = scores["own_choice", "acc"]
    assert accuracy.value == pytest.approx(right / len(CHOICES))
    assert accuracy.samples == len(CHOICES)

    with pytest.raises(UserError, match="no task own_texts; did you mean 'own_text'"):
        _run(model, ["own_texts"], tasks)
    with pytest.raises(UserError, match=r"--include .*/none is no folder"):
        _run(model, ["own_text"], tmp_path / "none")


@installed
def test_a_text_is_measured_behind_one_bos(
    model: Path,  # noqa: F811
    tasks: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The harness puts BOS in front of a whole text, and its tokenizer would put a second one there."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(importlib.import_module("datasets").config, "HF_DATASETS_CACHE", tmp_path / "cache")
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    assert {row[0] for row in ids} == {tokenizer.bos_token_id}
    nats = [_nats(model, row[:1], row[1:]) for row in ids]
    bits = sum(nats) / math.log(2) / sum(len(text.encode()) for text in TEXTS)
    (score,) = [one for one in _run(model, ["own_text"], tasks).scores if one.metric == "bits_per_byte"]
    assert score.value == pytest.approx(bits, rel=1e-5)


def test_without_the_extra_it_says_how_to_get_it(
    model: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lm_eval, "HARNESS", "no_such_harness")
    with pytest.raises(UserError, match=r"pip install 'megadistill\[lm-eval\]'"):
        _run(model, ["hellaswag"], None)


def test_scores_are_those_of_the_harness() -> None:
    """Its results as version 0.4.13 gives them: counts and names beside the metrics, "N/A" for an error."""
    metrics = {
        "a": {"name": "a", "alias": "a", "sample_len": 2, "acc,none": 0.5, "acc_stderr,none": 0.25},
        "b": {"alias": "b", "exact,strict": math.inf, "exact_stderr,strict": "N/A"},
    }
    results = {"results": metrics, "n-samples": {"a": {"original": 9, "effective": 2}}, "n-shot": {"a": 5}}
    assert lm_eval._scores(results) == [
        Score("a", "acc", 0.5, 0.25, samples=2, fewshot=5),
        Score("b", "exact,strict", None, None, samples=None, fewshot=None),
    ]
