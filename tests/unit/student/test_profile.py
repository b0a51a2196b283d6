"""DeepSpeed's file: what the recipe owns, what is filled in by others, and what a run would be silently wrong under."""

import json
from pathlib import Path
from typing import Any

import pytest

from megadistill.config import TrainSection
from megadistill.errors import UserError
from megadistill.student.profile import deepspeed_config, load_deepspeed
from tests.paths import DS_CONFIGS


@pytest.mark.parametrize("name", ["zero3.json", "zero3.cpu.json"])
def test_the_deepspeed_files_that_we_ship_are_accepted(name: str) -> None:
    assert load_deepspeed(DS_CONFIGS / name)["zero_optimization"]["stage"] == 3


@pytest.mark.parametrize(
    ("key", "value", "owner"),
    [
        ("train_micro_batch_size_per_gpu", 4, "train.micro_batch"),
        ("gradient_accumulation_steps", 2, "train.global_batch"),
        ("gradient_clipping", 1.0, "train.clip"),
        ("bf16", {"enabled": True}, "train.precision"),
        ("optimizer", {"type": "AdamW"}, "train.adamw"),
    ],
)
def test_a_deepspeed_file_that_sets_what_the_recipe_owns_is_refused(
    tmp_path: Path, key: str, value: Any, owner: str
) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3}, key: value}), encoding="utf-8")
    with pytest.raises(UserError, match=f"sets {key}.*{owner}"):
        load_deepspeed(path)


def test_auto_and_broken_deepspeed_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"reduce_bucket_size": "auto"}}), encoding="utf-8")
    with pytest.raises(UserError, match=r"zero_optimization\.reduce_bucket_size"):
        load_deepspeed(path)
    path.write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="JSON"):
        load_deepspeed(path)
    with pytest.raises(UserError, match="no file"):
        load_deepspeed(tmp_path / "missing.json")


@pytest.mark.parametrize(
    ("zero", "says"),
    [
        (3, "must be an object, found 3"),
        ({"stage": 2, "memory_efficient_linear": False}, "stage must be 3, found 2"),
        ({"stage": 3}, "memory_efficient_linear must be false"),
        ({"stage": 3, "memory_efficient_linear": False, "zero_hpz_partition_size": 2}, "zero_hpz_partition_size"),
    ],
)
def test_a_run_that_would_be_silently_wrong_is_refused(zero: Any, says: str) -> None:
    train = TrainSection.model_validate(
        {"steps": 1, "global_batch": 1, "micro_batch": 1, "adamw": {"learning_rate": 1e-3}}
    )
    with pytest.raises(UserError, match=says):
        deepspeed_config({"zero_optimization": zero, "data_types": {"grad_accum_dtype": "fp32"}}, train, accumulation=1)


def test_a_mistyped_key_is_refused_with_the_nearest(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"comunication_data_type": "fp32"}), encoding="utf-8")
    with pytest.raises(UserError, match="no such key comunication_data_type; did you mean 'communication_data_type'"):
        load_deepspeed(path)
