"""The reference is the models' own, and whole: every key, with a meaning, and the page in docs/ as it is today."""

import pytest

from megadistill.cli.main import main
from megadistill.config import Recipe, load_recipe
from megadistill.config.keys import keys, markdown
from tests.paths import RECIPES, ROOT


def test_the_page_is_what_the_models_say() -> None:
    page = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    assert page == markdown(), "renew it: megadistill reference --markdown > docs/reference.md"


def test_every_key_has_a_meaning() -> None:
    assert not [key.name for key in keys() if not key.meaning]


def test_every_key_of_a_resolved_recipe_is_there() -> None:
    """Against what pydantic makes of a recipe, not against the walk through its models."""
    known = {key.name for key in keys()}
    sections = {key.section for key in keys()}
    snapshot = load_recipe(RECIPES / "smoke.yaml").snapshot()

    def walk(values: dict[str, object], prefix: str) -> None:
        for name, value in values.items():
            path = prefix + name
            if isinstance(value, dict) and path in sections:
                walk(value, f"{path}.")
            else:
                assert path in known, path

    walk(snapshot, "")
    assert {"data.curriculum[].weights", "loss.targets.draws", "run.folder", "objective"} <= known


def test_types_bounds_and_defaults_are_the_models() -> None:
    found = {key.name: key for key in keys()}
    assert (found["train.steps"].type, found["train.steps"].default) == ("integer, ≥ 1", "required")
    assert (found["train.optimizer.beta2"].type, found["train.optimizer.beta2"].default) == ("number, ≥ 0, < 1", "0.95")
    assert found["objective"].type == "`labels` or `distill`"
    assert (found["teacher.queue"].default, found["loss.schedule.kind"].default) == ("4", "cosine")
    assert found["checkpoint.asynchronous"].default == "true"
    assert found["distributed.vocab_group"].type == "integer or null, ≥ 1"
    assert len(found) > len(Recipe.model_fields)


def test_one_section_in_80_columns(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["reference", "train.optimizer"]) == 0
    said = capsys.readouterr().out
    assert "weight_decay" in said
    assert "max_grad_norm" not in said
    assert max(map(len, said.splitlines())) <= 80
    assert main(["reference", "lose"]) == 2
    assert "did you mean 'loss'" in capsys.readouterr().err
