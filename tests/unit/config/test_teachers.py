"""Several teachers in a recipe: who teaches a source, with which share, and what is refused in one line."""

from pathlib import Path
from typing import Any

import pytest

from megadistill.config.keys import keys
from megadistill.config.load import load_recipe
from megadistill.config.mistakes import find_mistakes
from megadistill.config.recipe import Recipe
from megadistill.errors import UserError

SOURCES = {"web": "web.json", "code": "code.json", "books": "books.json"}
DATA = {"sources": SOURCES, "curriculum": [{"weights": {"web": 3, "code": 1, "books": 1}}]}


def _values(teachers: dict[str, Any], **changes: Any) -> dict[str, Any]:
    train = {"steps": 4, "global_batch": 4, "micro_batch": 2, "optimizer": {"learning_rate": 1e-3}}
    values = {"objective": "distill", "run": {"folder": "run"}, "data": DATA, "student": {"config": {}}, "train": train}
    return {**values, "teachers": teachers, **changes}


def test_each_source_has_the_teachers_that_name_it_or_those_of_the_rest() -> None:
    teachers = {
        "coder": {"path": "c", "sources": ["code", "books"], "weight": 3.0},
        "writer": {"path": "w", "sources": ["books"]},
        "rest": {"path": "r"},
    }
    recipe = Recipe.model_validate(_values(teachers))
    assert recipe.teachers_of("web") == {"rest": 1.0}
    assert recipe.teachers_of("code") == {"coder": 1.0}
    assert recipe.teachers_of("books") == {"coder": 0.75, "writer": 0.25}
    alone = recipe.with_teacher("writer")
    assert (alone.teacher, alone.teachers) == (recipe.teachers["writer"], {})
    assert list(recipe.teacher_sections) == ["teachers.coder", "teachers.writer", "teachers.rest"]


ONE = {"a": {"path": "a"}}
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "both": (ONE, {"teacher": {"path": "b"}}, "teacher and teachers exclude each other"),
    "labels": (ONE, {"objective": "labels"}, "objective labels uses no teacher: set teachers to {}"),
    "unknown source": ({"a": {"path": "a", "sources": ["wob"]}}, {}, "teachers.a.sources has wob.*did you mean 'web'"),
    "untaught": ({"a": {"path": "a", "sources": ["web", "code"]}}, {}, "data.sources.books has no teacher"),
    "idle": ({**ONE, "b": {"path": "b", "sources": [*SOURCES]}}, {}, "teachers.a teaches no source"),
    "a name with a path": ({"../a": {"path": "a"}}, {}, "'../a' is no name"),
    "ranks": (
        {"a": {"path": "a", "placement": "disaggregated", "ranks": 1}},
        {},
        "teachers.a.placement disaggregated gives ranks",
    ),
    "saved": (
        {"a": {"path": "a", "save_targets": "t"}},
        {"loss": {"targets": {"draws": 4}}},
        "teachers.a.save_targets stores the targets of every row",
    ),
    "stored": ({"a": {"source": "stored", "targets": "t"}}, {}, "teachers.a.source stored needs loss.targets"),
    "sequence": (ONE, {"distributed": {"sequence": 2}}, "distributed.sequence is 2, but the ranks of several"),
    "unknown key": ({"a": {"path": "a", "wieght": 2.0}}, {}, "teachers.a.wieght: no such key.*weight"),
    "weight": ({"a": {"path": "a", "weight": 0.0}}, {}, "teachers.a.weight: give more than 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_mistake_is_one_line_with_its_key(name: str) -> None:
    teachers, changes, message = REFUSED[name]
    recipe, mistakes = find_mistakes(_values(teachers, **changes))
    assert recipe is None
    assert len(mistakes) == 1, mistakes
    assert "\n" not in mistakes[0].text
    with pytest.raises(ValueError, match=message):
        raise ValueError(mistakes[0].text)


BY_NAME = """
objective: distill
run: {folder: run}
data: {sources: {web: w.json, code: c.json}, curriculum: [{weights: {web: 1, code: 1}}]}
student: {config: {}}
train: {steps: 4, global_batch: 4, micro_batch: 2, optimizer: {learning_rate: 1.0e-3}}
teacher:
  coder: {path: models/coder, sources: [code]}
  general: {path: models/general}
"""


def test_a_map_of_names_under_teacher_is_teachers(tmp_path: Path) -> None:
    """In the recipe of a run alone; its mistakes have the lines of the file."""
    path = tmp_path / "recipe.yaml"
    path.write_text(BY_NAME, encoding="utf-8")
    recipe = load_recipe(path, ["teacher.coder.weight=2"])
    path.write_text(BY_NAME.replace("teacher:", "teachers:"), encoding="utf-8")
    assert recipe == load_recipe(path, ["teachers.coder.weight=2"])
    assert recipe.snapshot()["teacher"] is None
    path.write_text(BY_NAME.replace("general: {path", "general: {pth"), encoding="utf-8")
    with pytest.raises(UserError, match=r"line 9: teachers\.general\.pth: no such key"):
        load_recipe(path)
    path.write_text(BY_NAME + "  path: models/plain\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"teacher\.coder: no such key; several teachers by name are teachers"):
        load_recipe(path)


def test_a_split_without_sources_has_its_teachers_too() -> None:
    mixed = {"a": {"path": "a", "weight": 0.2}, "b": {"path": "b", "weight": 0.6}}
    recipe = Recipe.model_validate(_values(mixed, data={"manifest": "m.json"}))
    assert recipe.teachers_of("data") == pytest.approx({"a": 0.25, "b": 0.75})
    _, mistakes = find_mistakes(_values({"a": {"path": "a", "sources": ["web"]}}, data={"manifest": "m.json"}))
    assert "data.manifest has no names, remove it" in mistakes[0].text


def test_the_keys_of_a_teacher_by_name_are_in_the_table() -> None:
    names = {key.name for key in keys()}
    assert {"teachers", "teachers.NAME.path", "teachers.NAME.sources", "teachers.NAME.weight"} <= names
