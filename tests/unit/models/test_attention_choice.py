"""Which attention `auto` chooses, and which ones a recipe cannot have."""

from importlib.metadata import PackageNotFoundError
from typing import Any

import pytest

from megadistill.errors import UserError
from megadistill.models.attention import choice
from megadistill.models.attention.choice import choose_attention, flash_implementation, has_window
from megadistill.models.families import load_config
from tests.unit.models.cases import CASES

HERE: dict[str, Any] = {"accelerator": False, "precision": "bfloat16", "documents": False, "sequence_length": 64}
GPU = {**HERE, "accelerator": True, "triton": True, "flash": False}


def _config(case: str, **keys: Any) -> Any:
    return load_config({**CASES[case], **keys}, what=case)


@pytest.mark.parametrize(
    ("case", "facts", "value", "reason"),
    [
        ("llama", HERE, "sdpa", "causal alone, which needs no mask"),
        ("llama", {**HERE, "documents": True}, "flex", "documents: blockwise on a CPU"),
        ("mistral", HERE, "flex", "sliding windows: blockwise on a CPU"),
        ("mistral", {**HERE, "sequence_length": 6}, "sdpa", "causal alone, which needs no mask"),
        ("gemma2", HERE, "flex", "softcapped scores and sliding windows: blockwise on a CPU"),
        ("llama", GPU, "sdpa", "causal alone, which needs no mask"),
        ("llama", {**GPU, "documents": True}, "flex", "documents"),
        ("llama", {**GPU, "flash": True}, "flash", "flash-attn is installed"),
        ("llama", {**GPU, "flash": True, "precision": "float32"}, "sdpa", "causal alone, which needs no mask"),
        ("llama", {**GPU, "flash": True, "documents": True}, "flex", "documents"),
        ("gemma2", {**GPU, "flash": True}, "flash", "flash-attn is installed"),
        ("gemma2", GPU, "flex", "softcapped scores and sliding windows"),
        (
            "gemma2",
            {**GPU, "triton": False},
            "eager",
            "softcapped scores and sliding windows, by dense masks, as flex cannot run: no gcc",
        ),
        (
            "qwen3",
            {**GPU, "triton": False},
            "sdpa",
            "sliding windows, by dense masks, as flex cannot run: no gcc",
        ),
    ],
)
def test_auto(case: str, facts: dict[str, Any], value: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "missing_for_triton", lambda: "no gcc")
    chosen = choose_attention("auto", _config(case), **facts)
    assert (chosen.value, chosen.reason) == (value, reason)


def test_a_wide_head_is_not_for_flash_attn() -> None:
    assert choose_attention("auto", _config("mistral", head_dim=512), **{**GPU, "flash": True}).value == "flex"


def test_a_narrow_head_is_not_for_the_kernels_of_flex() -> None:
    """torch's refuse it when they are compiled, in the first step."""
    narrow = _config("mistral", head_dim=8)
    chosen = choose_attention("auto", narrow, **GPU)
    assert chosen.value == "sdpa"
    assert chosen.reason.endswith("flex cannot run: heads have 8 columns, and its kernels at least 16")
    with pytest.raises(UserError, match=r"a\.b is flex, and heads have 8 columns.*: set a\.b to auto"):
        choose_attention("flex", narrow, **GPU, key="a.b")
    assert choose_attention("flex", narrow, **HERE).value == "flex", "blockwise takes any"


@pytest.mark.parametrize(
    ("setting", "case", "facts", "message"),
    [
        ("sdpa", "gemma2", HERE, "student.attention is sdpa, which has no softcap"),
        ("flash", "llama", HERE, "student.attention is flash, which runs on accelerators alone, and this is a CPU"),
        ("flash", "llama", GPU, "student.attention is flash, and neither flash-attn"),
        ("flash", "llama", {**GPU, "flash": True, "precision": "float32"}, "train.precision is float32"),
        ("flex", "llama", {**GPU, "triton": False}, "student.attention is flex, which needs Triton"),
    ],
)
def test_an_attention_that_cannot_compute_the_model_is_refused(
    setting: Any, case: str, facts: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as refusal:
        choose_attention(setting, _config(case), **facts, key="student.attention")
    assert "\n" not in str(refusal.value)
    assert "student.attention to auto" in str(refusal.value)


def test_the_recipe_may_name_what_computes_the_model() -> None:
    for setting, facts in (("eager", HERE), ("flex", HERE), ("flash", {**GPU, "flash": True}), ("eager", GPU)):
        named: Any = setting
        assert choose_attention(named, _config("gemma2"), **facts) == (setting, "by the recipe")
    uncapped = _config("gemma2", attn_logit_softcapping=None, layer_types=["full_attention"] * 5)
    assert str(choose_attention("auto", uncapped, **GPU)) == "flex (gemma2, which has no sdpa)"


@pytest.mark.parametrize(
    ("installed", "name"),
    [
        ({}, None),
        ({"flash-attn": "2.6.3"}, None),
        ({"flash-attn": "2.8.3.post1"}, "flash_attention_2"),
        ({"flash-attn": "2.8.3", "flash-attn-3": "3.0.0b1"}, "flash_attention_3"),
    ],
)
def test_flash_attn_is_looked_for_by_its_distributions(
    installed: dict[str, str], name: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(distribution: str) -> str:
        if distribution not in installed:
            raise PackageNotFoundError
        return installed[distribution]

    monkeypatch.setattr(choice, "version", version)
    assert flash_implementation() == name


def test_a_window_counts_where_a_layer_has_one_that_is_shorter_than_the_sequence() -> None:
    assert has_window(_config("exaone4"), None)
    assert has_window(_config("qwen2"), 7)
    assert not has_window(_config("qwen2"), 6)
    assert not has_window(_config("qwen2", layer_types=["full_attention"] * 5), 64)
    assert not has_window(_config("llama"), 64)
