"""Precisions: the recipe's names, torch's dtypes, and the flag of the export."""

import subprocess
import sys
from typing import get_args

import pytest
import torch

from megadistill.config.recipe import TrainSection
from megadistill.precision import PRECISIONS, Precision, torch_dtype


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_precision_is_the_name_of_its_dtype(precision: Precision) -> None:
    assert str(torch_dtype(precision)) == f"torch.{precision}"
    assert torch_dtype(precision).itemsize == torch.zeros(1, dtype=torch_dtype(precision)).nbytes


def test_a_recipe_takes_every_precision() -> None:
    assert get_args(TrainSection.model_fields["precision"].annotation) == PRECISIONS


def test_a_recipe_and_the_command_line_load_without_torch() -> None:
    code = "import sys, megadistill.config, megadistill.cli.main; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
