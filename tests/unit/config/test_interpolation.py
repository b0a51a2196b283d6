"""References of a recipe are measured before they are expanded."""

import tracemalloc
from pathlib import Path

import pytest
import yaml

from megadistill.config.interpolation import refuse_expansion
from megadistill.config.load import load_recipe
from megadistill.errors import UserError

BOMBS: dict[str, str] = yaml.safe_load(Path(__file__).with_name("interpolation_bombs.yaml").read_text())


@pytest.mark.parametrize("text", BOMBS.values(), ids=BOMBS)
def test_a_short_recipe_that_expands_to_gigabytes_is_refused_in_little_memory(text: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=r"reference|recurs|Recurs") as caught:
            load_recipe(path)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()
    assert len(str(caught.value)) < 500


def test_a_bomb_of_set_options_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("run: {a: xxxxxxxxxxxxxxxx}\n")
    steps = [f"run.a{n + 1}={('${run.a%s}' % (n or '')) * 4}" for n in range(14)]
    with pytest.raises(UserError, match=r"--set run\.a.*: its references .* expand to more than 1,048,576"):
        load_recipe(path, steps)


def test_references_that_people_write_are_no_bomb() -> None:
    values = {
        "run": {"seed": 1, "folder": "runs/${.seed}-${data.steps[0]}-${..data.steps[1]}"},
        "data": {"steps": [1, 2]},
    }
    refuse_expansion({**values, "copy": "${data}", "circle": "${circle}"}, "recipe.yaml")
