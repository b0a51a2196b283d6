"""DeepSpeed's file: what the recipe owns, what is filled in by others, and what a run would be silently wrong under."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from megadistill.config.load import dotted
from megadistill.config.recipe import TrainSection
from megadistill.errors import UserError
from megadistill.student.deepspeed_config import (
    active_deepspeed_config,
    build_engine_config,
    deepspeed_path,
    load_deepspeed_config,
    with_layer_prefetch,
)
from tests.paths import DS_CONFIGS, ROOT


def _train(**sizes: int) -> TrainSection:
    values = {"steps": 1, "global_batch": 1, "micro_batch": 1, "optimizer": {"learning_rate": 1e-3}, **sizes}
    return TrainSection.model_validate(values)


SHIPPED = sorted(path.name for path in DS_CONFIGS.iterdir())


def test_small_parameters_travel_with_their_layer_unless_they_would_be_rounded_or_copied_one_by_one() -> None:
    thresholds = {
        name: load_deepspeed_config(DS_CONFIGS / name)["zero_optimization"]["stage3_param_persistence_threshold"]
        for name in SHIPPED
    }
    assert {name for name, threshold in thresholds.items() if threshold > 0} == {"zero3-offload.json", "zeropp.json"}


def test_these_files_are_shipped() -> None:
    assert SHIPPED == ["cpu.json", "hpz.json", "zero3-offload.json", "zero3.json", "zeropp.json"]


@pytest.mark.parametrize("name", SHIPPED)
def test_a_deepspeed_file_that_we_ship_is_accepted_and_explained_key_by_key(name: str) -> None:
    values = load_deepspeed_config(DS_CONFIGS / name)
    build_engine_config(values, _train(global_batch=8), accumulation=1, ranks=8)
    page = (ROOT / "docs" / "deepspeed.md").read_text(encoding="utf-8")
    unexplained = [key for key in dotted(values) if f"`{key.rpartition('.')[2]}`" not in page]
    assert not unexplained
    assert f"`{name}`" in page


@pytest.mark.parametrize("name", SHIPPED)
def test_a_bare_name_is_a_file_that_we_ship_wherever_one_is(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = deepspeed_path(name.removesuffix(".json"), on_gpus=False)
    assert path.read_bytes() == (DS_CONFIGS / name).read_bytes()


def test_without_a_name_the_device_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for on_gpus, name in ((False, "cpu"), (True, "zero3")):
        assert deepspeed_path(None, on_gpus=on_gpus) == deepspeed_path(name, on_gpus=not on_gpus)
        monkeypatch.setattr(torch.accelerator, "is_available", lambda on_gpus=on_gpus: on_gpus)
        settings, disabled = active_deepspeed_config(None)
        assert (settings, disabled) == (load_deepspeed_config(DS_CONFIGS / f"{name}.json"), ())


def test_a_path_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that is called as a file that we ship: a folder `zero3` or a file `zero3` changes nothing."""
    monkeypatch.chdir(tmp_path)
    for name in ("zero3.json", "./zero3", "mine/zero3.json"):
        assert deepspeed_path(name, on_gpus=True) == Path(name)
    (tmp_path / "zero3").write_text("{")
    assert deepspeed_path("zero3", on_gpus=True).is_relative_to(tmp_path) is False


def test_an_unknown_name_is_refused_with_the_nearest_and_the_list() -> None:
    with pytest.raises(UserError, match=r"'zero-3'.*did you mean 'zero3'.*cpu, hpz, zero3, zero3-offload, zeropp"):
        deepspeed_path("zero-3", on_gpus=True)


def test_a_missing_path_of_a_file_that_we_ship_is_refused_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"hpz\.json does not exist: student\.deepspeed=hpz is the file that comes"):
        load_deepspeed_config(tmp_path / "ds_configs" / "hpz.json")


@pytest.mark.parametrize(
    ("key", "value", "owner"),
    [
        ("train_micro_batch_size_per_gpu", 4, "train.micro_batch"),
        ("gradient_accumulation_steps", 2, "train.global_batch"),
        ("gradient_clipping", 1.0, "train.max_grad_norm"),
        ("bf16", {"enabled": True}, "train.precision"),
        ("optimizer", {"type": "AdamW"}, "train.optimizer"),
    ],
)
def test_a_deepspeed_file_that_sets_what_the_recipe_owns_is_refused(
    tmp_path: Path, key: str, value: Any, owner: str
) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3}, key: value}), encoding="utf-8")
    with pytest.raises(UserError, match=f"sets {key}.*{owner}"):
        load_deepspeed_config(path)


def test_auto_and_broken_deepspeed_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"reduce_bucket_size": "auto"}}), encoding="utf-8")
    with pytest.raises(UserError, match=r"zero_optimization\.reduce_bucket_size"):
        load_deepspeed_config(path)
    path.write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="JSON"):
        load_deepspeed_config(path)
    with pytest.raises(UserError, match="does not exist"):
        load_deepspeed_config(tmp_path / "missing.json")


@pytest.mark.parametrize(
    ("zero", "size"),
    [
        ({}, 300_000),
        ({"stage3_param_persistence_threshold": 0}, 300_010),
        ({"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 7}, 7),
    ],
)
def test_the_largest_layer_is_prefetched_unless_the_file_has_a_size(zero: dict[str, int], size: int) -> None:
    made = with_layer_prefetch({"zero_optimization": zero}, [[200_000, 10], [150_000, 10, 150_000]])
    assert made["zero_optimization"]["stage3_prefetch_bucket_size"] == size
    assert all(
        "stage3_prefetch_bucket_size" not in load_deepspeed_config(DS_CONFIGS / name)["zero_optimization"]
        for name in SHIPPED
    )


def test_the_names_that_deepspeed_also_takes_are_those_of_its_documentation(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    short = {"stage": 3, "prefetch_bucket_size": 7, "param_persistence_threshold": 0, "max_live_parameters": 10**9}
    path.write_text(json.dumps({"zero_optimization": short}), encoding="utf-8")
    zero = load_deepspeed_config(path)["zero_optimization"]
    assert with_layer_prefetch({"zero_optimization": zero}, [[300_000, 10]])["zero_optimization"] == {
        "stage": 3,
        "stage3_prefetch_bucket_size": 7,
        "stage3_param_persistence_threshold": 0,
        "stage3_max_live_parameters": 10**9,
    }
    assert DeepSpeedZeroConfig(**zero) == DeepSpeedZeroConfig(**short)


@pytest.mark.parametrize(
    ("zero", "says"),
    [
        (3, "must be an object, found 3"),
        ({"stage": 2, "memory_efficient_linear": False}, "stage must be 3, found 2"),
        ({"stage": 3}, "memory_efficient_linear must be false"),
        (
            {"stage": 3, "memory_efficient_linear": False, "zero_hpz_partition_size": 4},
            "zero_hpz_partition_size is 4, which does not divide the 6 ranks that share the student.* 1, 2, 3, 6",
        ),
    ],
)
def test_a_run_that_would_be_silently_wrong_is_refused(zero: Any, says: str) -> None:
    train = _train(global_batch=24, micro_batch=2)
    with pytest.raises(UserError, match=says):
        build_engine_config(
            {"zero_optimization": zero, "data_types": {"grad_accum_dtype": "fp32"}}, train, accumulation=2, ranks=6
        )


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"comunication_data_type": "fp32"}, "no such key comunication_data_type; did you mean 'communication_data_ty"),
        ({"zero_optimization": {"stage3_prefetch_size": 1}}, "zero_optimization has no key stage3_prefetch_size; did"),
        (
            {"zero_optimization": {"offload_optimizer": {"devize": "cpu"}}},
            "zero_optimization.offload_optimizer has no key devize; did you mean 'device'",
        ),
        ({"zero_optimization": {"offload_optimizer": {"device": "disk"}}}, "offload_optimizer.device: .* found 'disk'"),
        ({"zero_optimization": {"reduce_bucket_size": -1}}, r"zero_optimization\.reduce_bucket_size: .* found -1"),
        ({"zero_optimization": {"cpu_offload": True}}, "DeepSpeed removed cpu_offload: use offload_optimizer"),
        (
            {"zero_optimization": {"mics_shard_size": 8}},
            "mics_shard_size: DeepSpeed removed MiCS; zero_hpz_partition_si",
        ),
        ({"zero_optimization": {"zenflow": {}}}, "ZenFlow replaces train.optimizer"),
        ({"zero_optimization": {"leaf_module": {}}}, "leaf_module: each decoder layer is a leaf: remove it"),
        ({"zero_optimization": {"stage3_module_granularity_threshold": 1}}, "each decoder layer is a leaf: remove it"),
        ({"zero_optimization": {"module_granularity_threshold": 1}}, "each decoder layer is a leaf: remove it"),
        (
            {"zero_optimization": {"max_live_parameters": 1, "stage3_max_live_parameters": 2}},
            "max_live_parameters and stage3_max_live_parameters, which are one: remove one",
        ),
        ({"elasticity": {"enabled": True}}, "elasticity: DeepSpeed removed it"),
        ({"curriculum_learning": {}}, "data.curriculum changes the mixture"),
    ],
)
def test_a_key_that_is_mistyped_or_gone_is_refused_with_the_way_out(
    tmp_path: Path, values: dict[str, Any], says: str
) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(UserError, match=says) as caught:
        load_deepspeed_config(path)
    assert "\n" not in str(caught.value)
