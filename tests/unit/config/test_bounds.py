"""Every number of a recipe has a lower and an upper bound; what is beyond is one line, at once.

A hostile number is a line of hostile_numbers.yaml.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import annotated_types
import pytest
import yaml
from pydantic.fields import FieldInfo

from megadistill.cli.main import run_command
from megadistill.config.bounds import MAX_STEPS
from megadistill.config.keys import keys
from megadistill.config.load import load_recipe
from megadistill.config.recipe import CurriculumEntry, Recipe, Section, sections_in
from megadistill.errors import UserError
from tests.paths import RECIPES

HOSTILE = yaml.safe_load(Path(__file__).with_name("hostile_numbers.yaml").read_text(encoding="utf-8"))


def _numbers(annotation: Any, metadata: list[Any]) -> Iterator[tuple[Any, list[Any]]]:
    """Each number type in an annotation, with the metadata that apply to it."""
    if annotation in (int, float):
        yield annotation, metadata
        return
    parts = get_args(annotation)
    if hasattr(annotation, "__metadata__"):
        inner = [each for part in annotation.__metadata__ if isinstance(part, FieldInfo) for each in part.metadata]
        yield from _numbers(parts[0], inner)
    elif get_origin(annotation) is not Literal:
        is_union = type(None) in parts
        for part in parts:
            yield from _numbers(part, metadata if is_union else [])


def _sections(section: type[Section]) -> Iterator[type[Section]]:
    yield section
    for field in section.model_fields.values():
        for inner in sections_in(field.annotation):
            yield from _sections(inner)


def _unbounded(section: type[Section]) -> list[str]:
    missing = []
    for name, field in section.model_fields.items():
        for _, metadata in _numbers(field.annotation, field.metadata):
            lower = any(isinstance(each, annotated_types.Ge | annotated_types.Gt) for each in metadata)
            upper = any(isinstance(each, annotated_types.Le | annotated_types.Lt) for each in metadata)
            if not (lower and upper):
                missing.append(f"{section.__name__}.{name}")
    return missing


def test_every_number_has_two_bounds() -> None:
    every = list(_sections(Recipe))
    assert len(every) > 10
    unbounded = [name for section in every for name in _unbounded(section)]
    assert unbounded == []


def test_a_section_without_bounds_fails_the_test_above() -> None:
    class Loose(Section):
        steps: int
        rates: list[float]

    assert _unbounded(Loose) == ["Loose.steps", "Loose.rates"]
    assert CurriculumEntry in set(_sections(Recipe))


def _number_keys() -> list[str]:
    """Keys whose value is a number."""
    return [key.name for key in keys() if key.type.startswith(("integer", "number")) and "[]" not in key.name]


@pytest.mark.parametrize("number", HOSTILE["numbers"], ids=lambda text: str(text)[:12])
def test_no_number_is_taken_unseen(number: str, tmp_path: Path) -> None:
    """Each key with each hostile number: refused, in a line that names the key and is short enough to be read."""
    (tmp_path / "x.yaml").write_text(f"extends: {RECIPES / 'smoke.yaml'}\n", encoding="utf-8")
    names = _number_keys()
    assert len(names) >= 45
    for name in names:
        with pytest.raises(UserError) as caught:
            load_recipe(tmp_path / "x.yaml", [f"{name}={number}"])
        text = str(caught.value)
        assert name.rpartition(".")[2] in text, (name, text)
        assert max(map(len, text.splitlines())) < 1000, (name, text[:200])


@pytest.mark.parametrize(("key", "number"), [tuple(each) for each in HOSTILE["keys"]])
def test_one_key_with_a_number_that_only_it_refuses(key: str, number: str) -> None:
    with pytest.raises(UserError, match=key.rpartition(".")[2]):
        load_recipe(RECIPES / "smoke.yaml", [f"{key}={number}"])


def test_a_command_refuses_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["train", str(RECIPES / "smoke.yaml"), "--set", f"train.steps={10**30}"]) == 2
    error = capsys.readouterr().err
    assert "train.steps" in error
    assert f"{MAX_STEPS:,}" in error
    assert "Traceback" not in error


def test_intervals_may_say_never() -> None:
    recipe = load_recipe(RECIPES / "smoke.yaml", [f"train.checkpoint_every={MAX_STEPS}"])
    assert recipe.checkpoint.keep_every == 10 * MAX_STEPS
