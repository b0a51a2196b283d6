"""Plans of recipes with several teachers: each counts for the rows that it reads, and all are in memory."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from megadistill.config.load import validate_recipe
from megadistill.errors import UserError
from megadistill.plan.entries import teacher_shares
from megadistill.plan.estimate import Estimate, estimate
from megadistill.plan.layouts import layouts, place
from megadistill.plan.output.plan_json import to_json
from megadistill.plan.plan_input import PlanInput, read_plan_input
from megadistill.plan.search import plan
from megadistill.plan.throughput import MfuAssumption
from tests.unit.plan.tiny import TINY, cluster, plan_input

MIXTURE: dict[str, Any] = {
    "sources": {"web": "w.json", "code": "c.json"},
    "curriculum": [{"weights": {"web": 3, "code": 1}}],
}


@pytest.fixture
def models(tmp_path: Path) -> dict[str, str]:
    """Folders with a config alone: a teacher like the student, and a larger one of another vocabulary."""
    folders = {}
    for name, keys in {"small": {}, "large": {"num_hidden_layers": 6, "hidden_size": 64}}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({**TINY, **keys}))
        folders[name] = str(tmp_path / name)
    return folders


def _input(folder: Path, *, data: dict[str, Any] = MIXTURE, **sections: Any) -> PlanInput:
    values = {**plan_input().recipe.snapshot(), "data": data, "teacher": None, **sections}
    values["student"] |= {"deepspeed": "cpu"}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return read_plan_input(path, sequence_length=32)


def _estimate(inputs: PlanInput) -> Estimate:
    return estimate(place(inputs.recipe, inputs, cluster()), cluster(), MfuAssumption())


def test_one_teacher_by_name_is_the_plain_plan(tmp_path: Path, models: dict[str, str]) -> None:
    named = _estimate(_input(tmp_path, teachers={"one": {"path": models["large"]}}))
    plain = _estimate(_input(tmp_path, teacher={"path": models["large"]}))
    assert named.requirements.flops_per_token == plain.requirements.flops_per_token
    assert (named.memory, named.times.stages) == (plain.memory, plain.times.stages)
    assert named.times.student_forward == plain.times.student_forward
    assert named.times.vocabulary > plain.times.vocabulary, "the terms of each token are added up"


def test_specialists_cost_their_rows_and_are_all_in_memory(tmp_path: Path, models: dict[str, str]) -> None:
    teachers = {"coder": {"path": models["small"], "sources": ["code"]}, "general": {"path": models["large"]}}
    inputs = _input(tmp_path, teachers=teachers)
    both = _estimate(inputs)
    coder, general = (_estimate(_input(tmp_path, teacher={"path": models[name]})) for name in ("small", "large"))
    student, *others = both.requirements.models
    assert student.work == general.requirements.models[0].work, "a row has one teacher"
    assert [(each.role, each.share) for each in others] == [("teacher general", 0.75), ("teacher coder", 0.25)]
    alone = [each.requirements.models[1].flops for each in (general, coder)]
    assert [each.flops for each in others] == pytest.approx([0.75 * alone[0], 0.25 * alone[1]], abs=2)
    mixed = [0.75 * g + 0.25 * c for g, c in zip(general.times.stages, coder.times.stages, strict=True)]
    assert both.times.stages == pytest.approx(mixed)
    phase = both.requirements.phases["step"]
    for name, one in (("general", general), ("coder", coder)):
        lines = one.requirements.phases["step"]
        assert phase[f"teacher {name}"] == sum(size for line, size in lines.items() if line.startswith("teacher "))
    assert both.memory > max(general.memory, coder.memory)
    assert all(layout.teacher_ranks == 0 for layout in layouts(inputs, cluster()))
    made = plan(inputs, cluster(), MfuAssumption())
    values = to_json(made, law=None, price=None)
    assert [model["share_of_tokens"] for model in values["models"]] == [1.0, 0.75, 0.25]
    assert "teachers.coder.attention" in values["chosen"]


def test_a_mixture_costs_all_of_them_and_the_students_head_once_for_each(
    tmp_path: Path, models: dict[str, str]
) -> None:
    both = _estimate(_input(tmp_path, teachers={name: {"path": path} for name, path in models.items()}))
    alone = _estimate(_input(tmp_path, teacher={"path": models["large"]}))
    (student, *others), (plain, large) = both.requirements.models, alone.requirements.models
    assert student.work.head == 2 * plain.work.head
    assert student.work.body == plain.work.body
    assert others[0].work == large.work
    assert both.times.stages > alone.times.stages


def test_shares_follow_the_curriculum() -> None:
    values = plan_input().recipe.snapshot() | {"teacher": None}
    values["data"] = {**MIXTURE, "curriculum": [{"tokens": 400, "weights": {"web": 1}}, MIXTURE["curriculum"][0]]}
    values["teachers"] = {"coder": {"path": "c", "sources": ["code"]}, "a": {"path": "a"}, "b": {"path": "b"}}
    recipe = validate_recipe(values, source="test")
    assert teacher_shares(recipe, tokens=1000) == pytest.approx({"coder": 0.15, "a": 0.85, "b": 0.85})
    assert teacher_shares(recipe, tokens=300) == pytest.approx({"coder": 0.0, "a": 1.0, "b": 1.0})


def test_folders_that_are_elsewhere_are_given_by_their_keys(tmp_path: Path, models: dict[str, str]) -> None:
    teachers = {"coder": {"path": "nowhere", "sources": ["code"]}, "general": {"path": models["large"]}}
    with pytest.raises(UserError, match=r"teachers\.coder\.path.*--set teachers\.coder\.path=DIR"):
        _input(tmp_path, teachers=teachers)
    with pytest.raises(UserError, match=r"--set teachers\.coder\.path=DIR --set teachers\.general\.path=DIR"):
        read_plan_input(tmp_path / "recipe.yaml", sequence_length=32, teacher_config=tmp_path)
