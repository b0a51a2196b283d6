"""The list of keys is that of the models, and complete; docs/config-keys.md is up to date."""

import pytest

from megadistill.cli.main import run_command
from megadistill.config.keys import keys, markdown
from megadistill.config.load import load_recipe
from megadistill.config.recipe import Recipe
from tests.paths import RECIPES, ROOT


def test_the_page_is_up_to_date() -> None:
    page = (ROOT / "docs" / "config-keys.md").read_text(encoding="utf-8")
    assert page == markdown(), "renew it: megadistill config-keys --markdown > docs/config-keys.md"


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
    known = {key.name: key for key in keys()}
    assert (known["train.steps"].type, known["train.steps"].default) == ("integer, ≥ 1, ≤ 1e9", "null")
    assert (known["train.optimizer.beta2"].type, known["train.optimizer.beta2"].default) == ("number, ≥ 0, < 1", "0.95")
    assert known["objective"].type == "`labels` or `distill`"
    assert (known["teacher.queue"].default, known["loss.schedule.kind"].default) == ("4", "cosine")
    assert known["checkpoint.asynchronous"].default == "true"
    assert known["distributed.vocab_group"].type == "integer or null, ≥ 1, ≤ 1e6"
    assert len(known) > len(Recipe.model_fields)


def test_one_section_in_80_columns(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run_command(["config-keys", "train.optimizer"]) == 0
    out = capsys.readouterr().out
    assert "weight_decay" in out
    assert "max_grad_norm" not in out
    assert max(map(len, out.splitlines())) <= 80
    assert run_command(["config-keys", "lose"]) == 2
    assert "did you mean 'loss'" in capsys.readouterr().err
