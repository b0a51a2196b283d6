"""A config with a number that no model has is one line, before transformers sees it; published ones pass.

A hostile number is a value in hostile_configs.yaml.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from megadistill.errors import UserError
from megadistill.models.config_bounds import refuse_extreme_numbers
from megadistill.models.families import load_config
from tests.paths import RECIPES

SMALL = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
}  # fmt: skip
HOSTILE = yaml.safe_load(Path(__file__).with_name("hostile_configs.yaml").read_text(encoding="utf-8"))
CASES = [(name, value) for name, values in HOSTILE.items() for value in values]


def test_the_small_config_is_taken() -> None:
    assert load_config(SMALL, what="student.config").hidden_size == 16


@pytest.mark.parametrize(("name", "value"), CASES)
def test_a_number_that_no_model_has_is_refused(name: str, value: Any, tmp_path: Path) -> None:
    keys = {**SMALL, name.partition(".")[0]: value}
    with pytest.raises(UserError, match=f"student.config: {name} is") as inline:
        load_config(keys, what="student.config")
    assert len(str(inline.value)) < 200
    (tmp_path / "config.json").write_text(json.dumps(keys), encoding="utf-8")
    with pytest.raises(UserError, match=f"{name} is|is not a JSON number"):
        load_config(tmp_path, what="teacher.path")


def test_thousands_of_digits_are_not_printed() -> None:
    with pytest.raises(UserError, match="hidden_size is about 1e5000;"):
        refuse_extreme_numbers({"hidden_size": 10**5000}, "student.config")


@pytest.mark.parametrize("path", sorted((RECIPES / "models").glob("*/config.json")), ids=lambda path: path.parent.name)
def test_published_configs_are_within_the_bounds(path: Path) -> None:
    refuse_extreme_numbers(json.loads(path.read_text(encoding="utf-8")), path.parent.name)
