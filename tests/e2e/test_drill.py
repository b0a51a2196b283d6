"""The quick cases of the drill (`make drill` has them all)."""

import pytest

from tests.drill.__main__ import QUICK
from tests.drill.cases import CASES
from tests.drill.launch import left_over
from tests.drill.place import Place


@pytest.fixture(scope="module")
def drilled(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("drill")).make()


@pytest.mark.parametrize("name", QUICK)
def test_a_run_survives(drilled: Place, name: str) -> None:
    CASES[name][1](drilled)
    assert not left_over()
