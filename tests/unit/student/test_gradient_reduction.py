"""The error of a reduction of gradients in bfloat16 over many ranks, simulated, and where a run warns of it."""

import json
from pathlib import Path

import pytest
import torch

from megadistill.errors import UserError
from megadistill.student.deepspeed_config import (
    BFLOAT16_SHRINK,
    RANKS_OF_LOW_PRECISION,
    load_deepspeed_config,
    low_precision_reduction,
    reduction_dtype,
)
from tests.paths import DS_CONFIGS

NUMBERS = 4000
"""Elements of the simulated gradient."""


def _ring(ranks: int, *, signal: float, dtype: torch.dtype) -> tuple[float, float]:
    """Size of the reduced mean gradient, and its relative error, against the true mean of the ranks' gradients.

    As DeepSpeed and NCCL reduce: each rank divides by the number of ranks, and each hop of the ring adds one rank's
    term in float32 and passes the partial sum on in `dtype`. `signal`: a gradient's mean against its deviation.
    """
    generator = torch.Generator().manual_seed(ranks)
    mean = torch.randn(NUMBERS, generator=generator)
    partial, true = torch.zeros(NUMBERS, dtype=dtype), torch.zeros(NUMBERS, dtype=torch.float64)
    for _ in range(ranks):
        gradient = (signal * mean + torch.randn(NUMBERS, generator=generator)).bfloat16()
        true += gradient.double() / ranks
        partial = (partial.float() + (gradient.to(dtype) / ranks).float()).to(dtype)
    reduced = partial.double()
    return float(reduced @ true / (true @ true)), float((reduced - true).norm() / true.norm())


@pytest.mark.parametrize(("ranks", "shrink"), BFLOAT16_SHRINK.items())
def test_a_ring_in_bfloat16_shrinks_gradients_that_agree(ranks: int, shrink: float) -> None:
    size, _ = _ring(ranks, signal=10.0, dtype=torch.bfloat16)
    assert size == pytest.approx(shrink, abs=0.01)
    size, error = _ring(ranks, signal=10.0, dtype=torch.float32)
    assert size == pytest.approx(1.0, abs=1e-6)
    assert error < 1e-6


@pytest.mark.parametrize(("ranks", "error"), [(64, 0.009), (512, 0.022), (2048, 0.05)])
def test_in_gradients_that_are_mostly_noise_a_ring_in_bfloat16_adds_some_per_cent(ranks: int, error: float) -> None:
    size, measured = _ring(ranks, signal=0.1, dtype=torch.bfloat16)
    assert measured == pytest.approx(error, rel=0.15)
    assert size == pytest.approx(1.0, abs=0.02), "noise carries the sum over most of its rounding"


@pytest.mark.parametrize("path", sorted(DS_CONFIGS.iterdir()), ids=lambda path: path.stem)
def test_files_that_we_ship_reduce_in_float32(path: Path) -> None:
    assert low_precision_reduction(load_deepspeed_config(path), "bfloat16", 4096) is None


def test_more_than_64_ranks_that_reduce_in_16_bits_are_warned_of() -> None:
    assert low_precision_reduction({}, "bfloat16", RANKS_OF_LOW_PRECISION) is None
    warning = low_precision_reduction({}, "bfloat16", RANKS_OF_LOW_PRECISION + 1)
    assert warning is not None
    assert "gradients of 65 ranks are added up in bfloat16" in warning
    assert "0.99 over 64, 0.76 over 512, 0.27 over 1,536, 0.21 over 2,048" in warning
    assert "communication_data_type to fp32" in warning
    assert low_precision_reduction({}, "float32", 4096) is None
    assert low_precision_reduction({"communication_data_type": "bf16"}, "float32", 4096) is not None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"communication_data_type": "float32"}, "communication_data_type is 'float32': give one of fp16, bf16, fp32"),
        ({"communication_data_type": ["fp32"]}, r"communication_data_type is \['fp32'\]: give one of"),
        (
            {"zero_optimization": {"stage": 3, "zero_quantized_gradients": True}},
            "zero_quantized_gradients must be false: DeepSpeed's kernel reads gradients as float16",
        ),
    ],
)
def test_a_reduction_that_would_be_wrong_is_refused(values: dict[str, object], message: str, tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(UserError, match=message):
        load_deepspeed_config(tmp_path / "ds.json")


@pytest.mark.parametrize(
    "text",
    ['{"zero_optimization": {"stage": 3, "zero_quantized_gradients": false}}', '{"communication_data_type": null}'],
)
def test_a_file_may_name_a_key_of_the_reduction_with_its_default(text: str, tmp_path: Path) -> None:
    """Published files name such keys with their defaults."""
    (tmp_path / "ds.json").write_text(text)
    assert reduction_dtype(load_deepspeed_config(tmp_path / "ds.json"), "bfloat16") == "bfloat16"
