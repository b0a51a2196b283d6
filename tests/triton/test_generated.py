"""The loss's compiled arithmetic on a GPU, read without one: one kernel a function, no matrix beside those it is given.

Inductor writes its Triton for an H100 and Triton compiles it to sm_90; nothing is run.
"""

import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.paths import ROOT
from tests.triton.generated import CASES

PACKAGES = ROOT / ".venv" / ".triton"
"""The folder of `make triton`: beside the environment, whose torch finds none on a CPU."""

pytestmark = [
    pytest.mark.thorough,
    pytest.mark.skipif(
        not PACKAGES.is_dir() and importlib.util.find_spec("triton") is None, reason="no Triton: `make triton` gets it"
    ),
]


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Function of `pointwise` -> its kernels."""
    folder = tmp_path_factory.mktemp("generated")
    path = os.pathsep.join([str(ROOT), str(PACKAGES), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "tests.triton.generated"],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": path,
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
            "TRITON_CACHE_DIR": str(folder / "triton"),
        },
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    kernels: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return kernels


@pytest.mark.parametrize("name", CASES)
def test_a_function_is_one_kernel(generated: dict[str, dict[str, Any]], name: str) -> None:
    """So logits are read from memory once or twice, and a chunk has few launches."""
    assert len(generated[name]["kernels"]) == 1


@pytest.mark.parametrize("name", CASES)
def test_no_matrix_is_made_beside_logits_and_gradient(generated: dict[str, dict[str, Any]], name: str) -> None:
    """A third [n, v] buffer would be a quarter of `logit_memory` more, and one more pass over it."""
    assert generated[name]["matrices"] == []


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_compiles_for_hopper(generated: dict[str, dict[str, Any]], name: str) -> None:
    (configurations,) = generated[name]["kernels"]
    assert configurations
    for each in configurations:
        assert each["target"] == ["sm_90a"]
        assert each["bytes"] > 1000
