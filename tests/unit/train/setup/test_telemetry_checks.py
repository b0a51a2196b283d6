"""What a recipe asks of trackers, norms and the profiler, and cannot have, is refused in one line."""

from pathlib import Path
from typing import Any

import pytest

from megadistill.config.load import load_recipe, validate_recipe
from megadistill.distributed.launch import Launch
from megadistill.errors import UserError
from megadistill.train.setup import telemetry_checks
from megadistill.train.setup.telemetry_checks import refuse_telemetry
from tests.paths import ROOT
from tests.unit.train.cases import recipe

TWO_RANKS = Launch(0, 2, 0, 2)


def _refused(zero: dict[str, Any] | None = None, norms_every: int = 0, **changes: Any) -> str:
    values = recipe(Path("manifest.json"), Path("run")).snapshot()
    values["train"]["norms_every"] = norms_every
    made = validate_recipe({**values, **changes}, source="recipe")
    with pytest.raises(UserError) as refused:
        refuse_telemetry(made, {"zero_optimization": zero or {}}, TWO_RANKS)
    return str(refused.value)


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = _refused(profile={"steps": [3, 4], "ranks": [0, 2]})
    assert ranks == "profile.ranks has 2, but the student has 2 ranks, numbered from 0: name some of them"
    assert "set it to false" in _refused(profile={"steps": [3, 4], "memory_snapshot": True}), "there is no accelerator"
    norms = _refused(zero={"offload_optimizer": {"device": "nvme"}}, norms_every=10)
    assert norms.startswith("train.norms_every is 10, but student.deepspeed offloads to NVMe")
    monkeypatch.setattr(telemetry_checks, "find_spec", lambda name: None)
    assert "pip install 'megadistill[mlflow]'" in _refused(track=["mlflow"])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("profile.steps=[3,2]", "give [first, last]"),
        ("profile.steps=[0,2]", "[first, last]"),
        ("profile.steps=[1,40]", "more than 20 steps"),
        ("track=[wandb,wandb]", "name each tracker once"),
        ("track=[wanb]", "did you mean 'wandb'"),
        ("report_to=wandb", "track"),
        ("train.log_params_norm=1", "train.norms_every"),
    ],
)
def test_a_recipe_is_refused(override: str, words: str) -> None:
    with pytest.raises(UserError, match=r".") as refused:
        load_recipe(ROOT / "recipes" / "smoke.yaml", [override])
    assert words in str(refused.value)


def test_what_the_pages_set_is_valid() -> None:
    overrides = ["profile.steps=[11,13]", "train.norms_every=100", "track=[tensorboard,wandb]"]
    made = load_recipe(ROOT / "recipes" / "smoke.yaml", overrides)
    assert made.profile is not None
    assert (made.profile.steps, made.profile.ranks) == ([11, 13], [0])
    assert made.track == ["tensorboard", "wandb"]
    assert load_recipe(ROOT / "recipes" / "smoke.yaml", []).track == ["tensorboard"]
