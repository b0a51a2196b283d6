"""Inputs of a plan whose data or weights are on another machine."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from megadistill.errors import UserError
from megadistill.plan.output.plan_json import to_json
from megadistill.plan.plan_input import read_plan_input
from megadistill.plan.search import plan
from megadistill.plan.throughput import MfuAssumption
from tests.unit.plan.tiny import TINY, cluster, plan_input


def _recipe(folder: Path, **sections: Any) -> Path:
    values = {**plan_input().recipe.snapshot(), **sections}
    values["student"] = {**values["student"], "deepspeed": "cpu", **sections.get("student", {})}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def _model(folder: Path, **keys: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**TINY, **keys}))
    return folder


def test_without_data_and_weights_the_options_stand_for_them(tmp_path: Path) -> None:
    teacher = _model(tmp_path / "elsewhere", num_hidden_layers=6)
    inputs = read_plan_input(_recipe(tmp_path), sequence_length=64, teacher_config=teacher)
    assert (inputs.vocab_size, inputs.stats.sequence_length, inputs.without_data) == (250, 64, True)
    assert inputs.stats.teacher is not None
    assert inputs.stats.teacher.layers == 6


def test_what_is_missing_is_refused_with_the_option_that_helps(tmp_path: Path) -> None:
    path = _recipe(tmp_path)
    with pytest.raises(UserError, match=r"manifest\.json .*--sequence-length S"):
        read_plan_input(path)
    with pytest.raises(UserError, match=r"teacher\.path: .*--teacher-config DIR"):
        read_plan_input(path, sequence_length=64)


def test_the_data_decides_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Here:
        vocab_size, sequence_length = 200, 48

        @classmethod
        def load(cls, _: object, *, global_batch: int) -> "Here":
            return cls()

        def for_models(self, *rows: int | None) -> "Here":
            assert not rows, "no model of this recipe has a vocabulary of its own"
            return self

    monkeypatch.setattr("megadistill.plan.plan_input.Mixture", Here)
    student = {key: value for key, value in TINY.items() if key != "vocab_size"}
    path = _recipe(tmp_path, objective="labels", teacher=None, student={"config": student})
    inputs = read_plan_input(path)
    assert (inputs.vocab_size, inputs.stats.student.config.vocab_size, inputs.stats.sequence_length) == (200, 200, 48)
    assert not inputs.without_data
    with pytest.raises(UserError, match="the shards hold sequences of 48 tokens"):
        read_plan_input(path, sequence_length=64)


@pytest.mark.parametrize(
    ("sections", "options", "says"),
    [
        ({"objective": "labels", "teacher": None}, {"teacher_config": Path("x")}, "no teacher runs"),
        ({}, {"sequence_length": 0}, "at least one token"),
        ({}, {"sequence_length": 65}, "max_position_embeddings is 64, below 65"),
        ({"student": {"config": {k: v for k, v in TINY.items() if k != "vocab_size"}}}, {}, "config.vocab_size=V"),
    ],
)
def test_what_is_wrong_is_refused(sections: dict[str, Any], options: dict[str, Any], says: str, tmp_path: Path) -> None:
    teacher = _model(tmp_path / "elsewhere")
    given = {"sequence_length": 64, "teacher_config": teacher, **options}
    with pytest.raises(UserError, match=says):
        read_plan_input(_recipe(tmp_path, **sections), **given)


def test_a_run_that_begins_from_another_is_planned_without_its_steps(tmp_path: Path) -> None:
    """Read off the checkpoint's name alone, which may be elsewhere; of a run folder, by its newest."""
    options: dict[str, Any] = {"sequence_length": 64, "teacher_config": _model(tmp_path / "elsewhere")}
    steps = plan_input().recipe.train.steps

    def first_step(begin_from: Path) -> int:
        run = {**plan_input().recipe.run.model_dump(), "begin_from": str(begin_from)}
        return read_plan_input(_recipe(tmp_path, run=run), **options).stats.first_step

    assert first_step(Path("/elsewhere/run/checkpoints/step-00000003")) == 3
    (tmp_path / "a" / "checkpoints" / "step-00000002").mkdir(parents=True)
    (tmp_path / "a" / "checkpoints" / "step-00000004").mkdir()
    assert first_step(tmp_path / "a") == 4
    with pytest.raises(UserError, match=f"is at step {steps}, train.steps is {steps}"):
        first_step(Path(f"step-{steps:08d}"))


def test_entries_of_another_shape_have_a_plan_each(tmp_path: Path) -> None:
    """Without the data: lengths are those that the entries name, the others that of the option."""
    curriculum = [
        {"tokens": 3000, "weights": {"short": 1}, "micro_batch": 2, "global_batch": 8},
        {"tokens": 30_000, "weights": {"short": 1}},
        {"weights": {"long": 1}, "sequence_length": 48, "global_batch": 4},
    ]
    data = {"sources": {"short": "nowhere/a.json", "long": "nowhere/b.json"}, "curriculum": curriculum}
    train = {**plan_input().recipe.snapshot()["train"], "steps": None, "tokens": 40_000}
    train["schedule"] = {"warmup_tokens": 1000}
    path = _recipe(tmp_path, data=data, train=train)
    inputs = read_plan_input(path, sequence_length=16, teacher_config=_model(tmp_path / "teacher"))
    each = (inputs.others[0], inputs, inputs.others[1])
    entries = [one.entry for one in each if one.entry is not None]
    assert [one.stats.sequence_length for one in each] == [16, 16, 48]
    assert [entry.steps for entry in entries] == [24, 79, 35]  # of 128, 384 and 192 tokens
    assert [entry.tokens for entry in entries] == [24 * 128, 79 * 384, 35 * 192]
    made = plan(inputs, cluster(), MfuAssumption())
    known = [one.estimate for one in made.entries if one.estimate is not None]
    assert [one.sharding.tokens for one in known] == [32, 16, 48], "of a micro-batch"
    assert [one.sharding.accumulation for one in known] == [1, 6, 1]
    values = to_json(made, law=None, price=2.0)["entries"]
    assert [one["memory_bytes"] for one in values] == [one.memory for one in known]
    assert [one["tokens"] for one in values] == [entry.tokens for entry in entries]
    assert known[1].requirements.tokens == 79 * 384, "of the rest of the plan"
